"""Rosbags as messages: find recordings in a folder, read topics, decode messages. Every fault is named.

storage.py reads and checks the files; the rosbags library knows the message types.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import yaml
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore

from faults import Fault, NoRoom
from recordings.storage import LARGEST, ZSTD_MAGIC, Connection, Storage, Unreadable, open_storage, unpacked, zstd

YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast
STORAGES = (".mcap", ".db3", ".bag")
COPYING = (".part", ".tmp", ".partial", ".filepart", ".crdownload")  # as those who copy name what is not whole
LONGEST_DEFINITION = 200_000  # characters; the longest of ROS itself has 4,000
MOST_PACKED = 200  # times that a recording may be compressed
PACKED = (".zstd", ".zst")  # as rosbag2 and as zstd name them
REMEDIES = {".mcap": "`mcap recover`", ".db3": "`sqlite3 FILE .recover`", ".bag": "`rosbag reindex`"}
# these types are the same in every release: another definition of them is a damaged one
FIXED_TYPES = {
    *(f"sensor_msgs/msg/{name}" for name in ("JointState", "Image", "CompressedImage")),
    *(f"trajectory_msgs/msg/{name}" for name in ("JointTrajectory", "JointTrajectoryPoint")),
    *("std_msgs/msg/Header", "builtin_interfaces/msg/Time", "builtin_interfaces/msg/Duration"),
}


class Bag(NamedTuple):
    """One recording: its name below bag_dir, its storage files in order, and what its metadata.yaml declares."""

    name: str
    files: tuple[Path, ...]
    declared: dict[str, int]  # topic: messages; empty without a metadata.yaml


class Message(NamedTuple):
    """One message, not decoded."""

    bag: str
    topic: str
    number: int  # within its topic
    msgtype: str
    receive_ns: int
    seconds: float  # since the bag's first message
    raw: bytes
    decode: Callable[[bytes], Any]

    @property
    def place(self) -> str:
        """Bag, topic, number and time, for error messages."""
        return f"{self.bag}: {self.topic}: message {self.number} at t+{self.seconds:.3f} s"

    def content(self) -> Any:
        """The decoded message. Raises Fault, without its place."""
        try:
            return self.decode(self.raw)
        except Exception as error:  # rosbags raises many kinds for damaged bytes
            raise Fault(
                f"does not decode as {self.msgtype} ({_brief(error)}); the file is damaged: copy it again"
            ) from None


def find_bags(folder: Path) -> tuple[list[Bag], list[str]]:
    """All recordings below a folder (or the one at a path), sorted by name, and the faults of broken ones.

    A folder with a metadata.yaml is one recording of one or many files; without it each storage file is a recording.
    """
    if not folder.exists():
        raise Fault(
            f"data.bag_dir: {folder} does not exist; set it to the folder of your recordings, or try `make -C train demo`"
        )
    paths = [folder] if folder.is_file() else _files(folder)
    described = set() if folder.is_file() else {path.parent for path in paths if path.name == "metadata.yaml"}
    root = folder.parent if folder.is_file() or folder in described else folder
    bags: list[Bag] = []
    faults: list[str] = []
    for path in paths:
        try:
            if path.suffix == ".active" and path.stem.endswith(STORAGES):
                raise Fault(f"{path}: its recorder did not finish it; `rosbag reindex` it and remove the .active")
            if path.suffix in COPYING and _storage_suffix(path.with_suffix("")) in STORAGES:
                raise Fault(f"{path}: is still being copied; wait until it is whole, or remove it")
            if path.name == "metadata.yaml" and path.parent in described:
                bags.append(_described_bag(path, str(path.parent.relative_to(root))))
            elif _storage_suffix(path) in STORAGES and path.parent not in described:
                if path.exists() and not path.is_file():
                    raise Fault(f"{path}: is a pipe or a device; expected a file; remove it")
                if path.suffix in PACKED and path.with_suffix("").exists() and folder != path:
                    raise Fault(f"{path}: a compressed copy of {path.stem}; remove one of them")
                bags.append(Bag(str(path.relative_to(root)), (path,), {}))
        except Fault as fault:
            faults += fault.args
    if not bags and not faults:
        raise Fault(f"data.bag_dir: {folder} has no recordings; expected files ending in {', '.join(STORAGES)}")
    return sorted(bags), faults


def _files(folder: Path) -> list[Path]:
    """All files below a folder, each once; links are followed, hidden files are not."""
    paths: dict[str, Path] = {}  # by the real path
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        links_last = sorted((Path(parent, name) for name in (*folders, *files)), key=Path.is_symlink)
        shown = [path for path in links_last if not path.name.startswith(".")]
        real_parent, subfolders = os.path.realpath(parent), set(folders)
        folders[:] = [path.name for path in shown if path.name in subfolders and real_parent not in seen]
        seen.add(real_parent)
        for path in shown:
            if path.name not in subfolders:
                paths.setdefault(os.path.realpath(path), path)
    return sorted(paths.values())


def _storage_suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in PACKED else path.suffix


def _described_bag(metadata: Path, name: str) -> Bag:
    """The recording that a metadata.yaml describes."""
    advice = "`ros2 bag reindex` the folder, or remove metadata.yaml to read each file as a recording"
    try:
        info = yaml.load(metadata.read_text(), YAML)["rosbag2_bagfile_information"]
        listed = [metadata.parent / Path(file).name for file in info["relative_file_paths"]]
        packed = [
            [Path(f"{file}{suffix}") for suffix in ("", *PACKED) if Path(f"{file}{suffix}").exists()] for file in listed
        ]
        files = tuple((names or [file])[0] for names, file in zip(packed, listed, strict=True))
        topics = info["topics_with_message_count"]
        declared = {topic["topic_metadata"]["name"]: topic["message_count"] for topic in topics}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise Fault(f"{metadata}: cannot read ({_brief(error)}); {advice}") from None
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise Fault(f"{metadata}: missing file: {', '.join(missing) or 'all'}; copy the whole recording, or {advice}")
    siblings = [path for path in _files(metadata.parent) if path.parent == metadata.parent and path not in files]
    if unlisted := [path.name for path in siblings if _storage_suffix(path) in STORAGES]:
        raise Fault(f"{metadata}: does not list {', '.join(unlisted)}; move the file away, or {advice}")
    return Bag(name, files, declared)


def read_messages(bag: Bag, topics: Collection[str]) -> Iterator[Message]:
    """The messages of some topics of a bag, in file order; every file is read to its end and checked.

    Raises Fault if a file is damaged, a topic is missing, empty or of two types, or metadata.yaml declares another count.
    """
    read: Counter[str] = Counter()
    types: dict[str, set[str]] = {}
    start_ns: float | None = None
    for file in bag.files:
        decoders: dict[int, tuple[str, Callable[[bytes], Any]]] = {}
        with opened(file) as storage:
            for connection, receive_ns, raw in storage.messages(topics):
                start_ns = storage.start_ns if start_ns is None else start_ns
                topic = connection.topic
                if connection.id not in decoders:
                    decoders[connection.id] = full_name(connection.msgtype), decoder(file, connection)
                msgtype, decode = decoders[connection.id]
                yield Message(
                    bag.name, topic, read[topic], msgtype, receive_ns, (receive_ns - start_ns) / 1e9, raw, decode
                )
                read[topic] += 1
            for connection in storage.connections.values():
                types.setdefault(connection.topic, set()).add(full_name(connection.msgtype))
    faults = []
    for topic in topics:
        if topic not in types:
            known = ", ".join(f"{name} ({'/'.join(sorted(kinds))})" for name, kinds in sorted(types.items())) or "none"
            faults.append(f"{bag.name}: {topic}: no such topic; topics in the bag: {known}")
        elif len(types[topic]) > 1:
            faults.append(f"{bag.name}: {topic}: two types, {' and '.join(sorted(types[topic]))}; expected one")
        elif fault := miscounted(bag, topic, read[topic]):
            faults.append(fault)
        elif not read[topic]:
            faults.append(f"{bag.name}: {topic}: has no messages; re-record or remove it")
    if faults:
        raise Fault(*faults)


def miscounted(bag: Bag, topic: str, read: int) -> str:
    """The fault of a topic whose number of messages differs from metadata.yaml; empty if it does not."""
    if not bag.declared or read == bag.declared.get(topic, 0):
        return ""
    return (
        f"{bag.name}: {topic}: {read} messages read, metadata.yaml declares {bag.declared.get(topic, 0)}; copy the "
        "recording again, or `ros2 bag reindex` its folder"
    )


@contextmanager
def opened(file: Path) -> Iterator[Storage]:
    """An open storage file, decompressed if it ends in one of PACKED. Raises Fault, also for what its messages() raises."""
    wal = file.with_name(file.name + "-wal")
    if wal.exists() and wal.stat().st_size:
        merge = f"sqlite3 {file.name} 'pragma wal_checkpoint(truncate)'"
        raise Fault(f"{wal}: has messages that are not in {file.name}; merge them: `{merge}`")
    with ExitStack() as stack:
        try:
            content: BinaryIO = stack.enter_context(file.open("rb"))
            before = file.stat()
            if not before.st_size:
                raise Fault(f"{file}: is empty (0 bytes); copy it again or remove it")
            if file.suffix in PACKED:
                content = _decompressed(file, content, stack)
        except OSError as error:
            raise Fault(f"{file}: cannot read ({error.strerror}); copy it again or remove it") from None
        try:
            yield open_storage(content, _storage_suffix(file))
            _check_unchanged(file, before)
        except Unreadable as error:
            _check_unchanged(file, before)
            what, *fix = error.args
            repair = f"copy it again, try {REMEDIES.get(_storage_suffix(file), 'its recorder')}, or remove it"
            raise Fault(f"{file}: {what}; {fix[0] if fix else repair}") from None


def _check_unchanged(file: Path, before: os.stat_result) -> None:
    """Raises Fault if a file is not as it was."""
    after = file.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise Fault(f"{file}: changed while it was read; is it still being copied or recorded? Run it again later")


def _decompressed(file: Path, content: BinaryIO, stack: ExitStack) -> BinaryIO:
    """The content of a compressed file, in the temporary folder until the stack is closed."""
    folder = tempfile.gettempdir()
    try:
        plain: Any = stack.enter_context(tempfile.NamedTemporaryFile(prefix="rosbag-"))  # noqa: SIM115
        most = max(LARGEST, MOST_PACKED * file.stat().st_size)
        with zstd.open(content, "rb") as stream:
            while part := stream.read(1 << 20):
                plain.write(part)
                if plain.tell() > most:
                    raise Fault(f"{file}: unpacks to more than {most / 1e6:.0f} MB; expected a recording; remove it")
        plain.flush()
    except (zstd.ZstdError, EOFError) as error:
        raise Fault(f"{file}: cannot decompress ({_brief(error)}); it is truncated: copy it again") from None
    except OSError as error:
        raise NoRoom(
            f"{file}: cannot decompress to {folder} ({error.strerror}); free some space, or set TMPDIR"
        ) from None
    return plain


def decoder(file: Path, connection: Connection) -> Callable[[bytes], Any]:
    """A function from a raw message of a connection to its content. Raises Fault if its type is unknown.

    The definition in the bag counts; without one, and for FIXED_TYPES, that of ROS 2 Humble or ROS 1 Noetic.
    """
    name, place = full_name(connection.msgtype), f"{file}: {connection.topic}"
    if connection.serialization not in ("cdr", "ros1", ""):
        raise Fault(
            f"{place}: messages are {connection.serialization}, not ROS; expected cdr or ros1; record them by ros2 bag, or "
            "remove the topic from the configuration"
        )
    ros1 = connection.serialization == "ros1"
    store = get_typestore(Stores.ROS1_NOETIC if ros1 else Stores.ROS2_HUMBLE)
    if name not in FIXED_TYPES:
        try:
            if connection.encoding not in ("ros2msg", "ros2idl", "omgidl", "ros1msg"):
                raise ValueError("the bag has no definition of it")
            is_idl = connection.encoding.endswith("idl")
            if len(text := connection.definition) > LONGEST_DEFINITION:
                raise ValueError(f"its definition has {len(text)} characters, expected at most {LONGEST_DEFINITION}")
            types = get_types_from_idl(text) if is_idl else get_types_from_msg(text, name)
            for key in types.keys() & store.fielddefs.keys() - FIXED_TYPES:  # types grow from release to release
                del store.fielddefs[key], store.types[key]
            store.register({key: value for key, value in types.items() if key not in store.fielddefs})
        except Exception as error:
            if name not in store.fielddefs:
                advice = "record it with its definition, or remove the topic from the configuration"
                raise Fault(f"{place}: unknown type {name} ({_brief(error)}); {advice}") from None
    deserialize = store.deserialize_ros1 if ros1 else store.deserialize_cdr
    return lambda raw: deserialize(plain(raw), name)


def plain(raw: bytes) -> bytes:
    """A message as it was sent: compression mode MESSAGE compresses each alone. Raises Fault."""
    if raw[:4] != ZSTD_MAGIC:  # no CDR or ROS 1 message that is read here begins so
        return raw
    try:
        message = unpacked("zstd", raw, LARGEST)
    except (zstd.ZstdError, EOFError) as error:
        raise Fault(f"cannot decompress ({_brief(error)}); the file is damaged: copy it again") from None
    if len(message) > LARGEST:
        raise Fault(f"unpacks to more than {LARGEST} bytes; expected a message; remove the recording")
    return message


def _brief(error: Exception) -> str:
    """A library's error on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"


def full_name(msgtype: str) -> str:
    """`sensor_msgs/Image`, as ROS 1 and recorders of 2019 write it, is `sensor_msgs/msg/Image`."""
    return msgtype if msgtype.count("/") != 1 else msgtype.replace("/", "/msg/")
