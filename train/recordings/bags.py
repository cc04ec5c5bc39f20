"""Rosbags as messages: recordings found in a folder, topics read whole, every fault named.

The storage files themselves are opened with the low-level readers of the rosbags library, one by one: its reader of
folders drops a topic without a word where metadata.yaml and storage differ in QoS, and its AnyReader refuses a bag for
one bad definition of a topic nobody asked for. What is read is counted against what was declared.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import yaml
from rosbags import rosbag1, rosbag2
from rosbags.interfaces import Connection, MessageDefinitionFormat
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore

from faults import Fault, NoRoom
from recordings.chunks import ZSTD_MAGIC, zstd

STORAGES = (".mcap", ".db3", ".bag")
UNREADABLE = {
    ".active": "the recorder did not finish it; `rosbag reindex` it and drop the .active",
    ".zst": "unpack it first: `zstd -d`",
}
# alike in every release, and with fields that are named here: another definition of them is a damaged one
SETTLED = {
    *(f"sensor_msgs/msg/{name}" for name in ("JointState", "Image", "CompressedImage")),
    *(f"trajectory_msgs/msg/{name}" for name in ("JointTrajectory", "JointTrajectoryPoint")),
    *("std_msgs/msg/Header", "builtin_interfaces/msg/Time", "builtin_interfaces/msg/Duration"),
}
REMEDIES = {".mcap": "`mcap recover`", ".db3": "`sqlite3 ... .recover`", ".bag": "`rosbag reindex`"}


def _hide_undefined(database: apsw.Connection) -> None:
    """rosbags fails on the encoding, "unknown" or none, by which recorders say that they found no definition of a type."""
    known = "SELECT * FROM main.message_definitions WHERE encoding IN ('ros2msg', 'ros2idl')"
    database.execute(f"CREATE TEMP VIEW message_definitions AS {known}")


apsw.connection_hooks.append(_hide_undefined)


class Bag(NamedTuple):
    """One recording: its name below bag_dir, its storage files in order, and what its metadata.yaml declares."""

    name: str
    files: tuple[Path, ...]
    declared: dict[str, int]  # topic: messages; empty without a metadata.yaml


class Storage(NamedTuple):
    """One storage file, open."""

    connections: list[Connection]  # topics, their types and how many messages are stored
    raw: Iterator[tuple[Connection, int, bytes]]  # every message with its receive stamp in ns, not decoded
    decoder: Callable[
        [Connection], Callable[[Connection, bytes, str], Any]
    ]  # of a topic; a Fault where its type is unknown


class Message(NamedTuple):
    """One message, as it is stored."""

    bag: str
    topic: str
    number: int  # within its topic
    msgtype: str
    receive_ns: int
    seconds: float  # since the bag's begin
    raw: bytes
    decode: Callable[[bytes], Any]

    @property
    def place(self) -> str:
        """Bag, topic, number and time, for error messages."""
        return f"{self.bag}: {self.topic}: message {self.number} at t+{self.seconds:.3f} s"

    def content(self) -> Any:
        """The message, decoded by the definition in the bag or by the standard one; Fault where it does not decode."""
        return _decoded(self.decode, self.raw, self.place, self.msgtype)


def find_bags(folder: Path) -> tuple[list[Bag], list[str]]:
    """All recordings below a folder (or the one at a path), sorted by name, and the faults of those that cannot be told.

    A folder with a metadata.yaml is one recording, of one or many files; without one each storage file is a recording.
    """
    if not folder.exists():
        raise Fault(
            f"data.bag_dir: {folder} does not exist; set it to the folder of your recordings, "
            "or try `make -C train demo`, which records some by itself"
        )
    paths = [folder] if folder.is_file() else _files(folder)
    described = set() if folder.is_file() else {path.parent for path in paths if path.name == "metadata.yaml"}
    root = folder.parent if folder.is_file() or folder in described else folder
    bags: list[Bag] = []
    faults: list[str] = []
    for path in paths:
        try:
            if path.suffix in UNREADABLE and path.with_suffix("").suffix in STORAGES:
                raise Fault(f"{path}: cannot be read as it is: {UNREADABLE[path.suffix]}")
            if path.name == "metadata.yaml" and path.parent in described:
                bags.append(_described_bag(path, str(path.parent.relative_to(root))))
            elif _is_storage(path) and path.parent not in described:
                bags.append(Bag(str(path.relative_to(root)), (path,), {}))
        except Fault as fault:
            faults += fault.args
    if not bags and not faults:
        raise Fault(f"data.bag_dir: {folder} holds no recording; expected files ending in {', '.join(STORAGES)}")
    return sorted(bags), faults


def _files(folder: Path) -> list[Path]:
    """All files below a folder, through links, without what is hidden; each once, though `latest` may lead to it, too."""
    found: dict[str, Path] = {}
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        links_last = sorted((Path(parent, name) for name in (*folders, *files)), key=Path.is_symlink)
        shown = [path for path in links_last if not path.name.startswith(".")]
        here, below = os.path.realpath(parent), set(folders)
        folders[:] = [path.name for path in shown if path.name in below and here not in seen]
        seen.add(here)
        for path in shown:
            if path.name not in below:
                found.setdefault(os.path.realpath(path), path)
    return sorted(found.values())


def _is_storage(path: Path) -> bool:
    return Path(path.name.removesuffix(".zstd")).suffix in STORAGES


def _described_bag(metadata: Path, name: str) -> Bag:
    """The recording that a metadata.yaml describes."""
    advice = "`ros2 bag reindex` the folder, or remove the file and each storage file counts as a recording"
    try:
        info = yaml.safe_load(metadata.read_text())["rosbag2_bagfile_information"]
        files = tuple(metadata.parent / Path(file).name for file in info["relative_file_paths"])
        declared = {
            topic["topic_metadata"]["name"]: topic["message_count"] for topic in info["topics_with_message_count"]
        }
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise Fault(f"{metadata}: is broken ({_brief(error)}); {advice}") from None
    missing = [file.name for file in files if not file.exists()]
    if missing or not files:
        raise Fault(
            f"{metadata}: names {', '.join(missing) or 'no file'}, which is not there; copy the whole recording, or {advice}"
        )
    beside = [path for path in _files(metadata.parent) if path.parent == metadata.parent and _is_storage(path)]
    if unlisted := [path.name for path in beside if path not in files]:
        raise Fault(f"{metadata}: does not name {', '.join(unlisted)}, which lies beside it; move it away, or {advice}")
    return Bag(name, files, declared)


def read_messages(bag: Bag, topics: Collection[str]) -> Iterator[Message]:
    """The messages of some topics of a bag in the order they were received.

    Raises Fault where a topic is missing or empty, a file cannot be read, or fewer messages come than were declared.
    """
    read: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    seen: dict[str, set[str]] = {}
    start_ns = 0
    for file in bag.files:
        with _opened(file) as reader:
            connections = [c for c in reader.connections if c.topic in topics]
            decoders = _decoders(file, connections, ros1=file.suffix == ".bag")
            for connection in reader.connections:
                stored[connection.topic] += connection.msgcount
                seen.setdefault(connection.topic, set()).add(full_name(connection.msgtype))
            start_ns = start_ns or reader.start_time
            # an empty filter would read the whole bag
            for connection, receive_ns, raw in _guarded(reader.messages(connections) if connections else (), file):
                topic, seconds = connection.topic, (receive_ns - start_ns) / 1e9
                msgtype, decode = decoders[connection.id]
                yield Message(bag.name, topic, read[topic], msgtype, receive_ns, seconds, raw, decode)
                read[topic] += 1
    faults = []
    for topic in topics:
        if topic not in seen:
            there = ", ".join(f"{name} ({'/'.join(sorted(kinds))})" for name, kinds in sorted(seen.items())) or "none"
            faults.append(f"{bag.name}: {topic}: no such topic; topics that are there: {there}")
        elif len(seen[topic]) > 1:
            faults.append(f"{bag.name}: {topic}: carries two types, {' and '.join(sorted(seen[topic]))}; expected one")
        elif wrong := miscounted(bag, topic, read[topic], stored[topic]):
            faults.append(wrong)
        elif not read[topic]:
            faults.append(f"{bag.name}: {topic}: holds no message; record it again or leave the recording out")
    if faults:
        raise Fault(*faults)


def miscounted(bag: Bag, topic: str, read: int, stored: int) -> str:
    """In words, that another number of messages came than the storage counts, or metadata.yaml declares; else nothing."""
    if read != stored:
        return f"{bag.name}: {topic}: {read} messages read, {stored} stored; the file is damaged: copy it again"
    if bag.declared and read != bag.declared.get(topic, 0):
        return (
            f"{bag.name}: {topic}: {read} messages read, metadata.yaml declares {bag.declared.get(topic, 0)}; if the "
            "storage is right, `ros2 bag reindex` the folder"
        )
    return ""


@contextmanager
def open_storage(file: Path) -> Iterator[Storage]:
    """A storage file with the messages of all its topics, those of unknown types too. Raises Fault, as reading does.

    A message may still be packed, see `plain`.
    """

    def decoder(connection: Connection) -> Callable[[Connection, bytes, str], Any]:
        msgtype, decode = _decoders(file, [connection], ros1=file.suffix == ".bag")[connection.id]
        return lambda _, raw, place: _decoded(decode, raw, place, msgtype)

    with _opened(file) as reader:
        yield Storage(list(reader.connections), _guarded(reader.messages(), file), decoder)


@contextmanager
def _opened(file: Path) -> Iterator[rosbag1.Reader | rosbag2.Reader]:
    """A storage file, opened."""
    wal = file.with_name(file.name + "-wal")
    if wal.exists() and wal.stat().st_size:
        raise Fault(
            f"{wal}: the recorder left messages here that no reader would see; merge them first: "
            f"`sqlite3 {file.name} 'pragma wal_checkpoint(truncate)'`"
        )
    try:
        if not file.stat().st_size:
            raise Fault(f"{file}: is empty (0 bytes); copy it again or remove it")
    except OSError as error:
        raise Fault(f"{file}: cannot be read ({error.strerror}); copy it again or remove it") from None
    with unpacked(file) as plain:
        try:
            reader = rosbag1.Reader(plain) if plain.suffix == ".bag" else rosbag2.Reader(plain)
            reader.open()
        except Exception as error:  # the library raises whatever a damaged file provokes
            raise Fault(
                f"{file}: cannot be opened ({_brief(error)}); copy it again, try {_remedy(file)}, or remove it"
            ) from None
        try:
            if odd := [c for c in reader.connections if not (isinstance(c.topic, str) and isinstance(c.msgtype, str))]:
                raise Fault(
                    f"{file}: has a topic named {odd[0].topic!r} of type {odd[0].msgtype!r}; expected two names: the file is "
                    "damaged: copy it again, or leave it out"
                )
            yield reader
        finally:
            reader.close()


@contextmanager
def unpacked(file: Path) -> Iterator[Path]:
    """The file itself, or what is in a .zstd file, in the temporary folder for as long as it is read. Raises Fault."""
    if file.suffix != ".zstd":
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="rosbag-") as folder:
        plain = Path(folder, file.stem)
        try:
            with zstd.open(file, "rb") as packed, plain.open("wb") as content:
                shutil.copyfileobj(packed, content, 1 << 20)
        except (zstd.ZstdError, EOFError) as error:
            raise Fault(f"{file}: cannot be unpacked ({_brief(error)}); it is cut short: copy it again") from None
        except OSError as error:
            raise NoRoom(
                f"{file}: cannot be unpacked to {folder} ({error.strerror}); free some, or set TMPDIR"
            ) from None
        yield plain


def _guarded(messages: Any, file: Path) -> Iterator[tuple[Connection, int, bytes]]:
    """The reader's messages, with its errors turned into faults."""
    try:
        for connection, receive_ns, raw in messages:
            if not isinstance(receive_ns, int) or not isinstance(raw, bytes):
                raise ValueError(f"a message of {connection.topic} that is a {type(raw).__name__} at {receive_ns!r}")
            yield connection, receive_ns, raw
    except Exception as error:
        raise Fault(
            f"{file}: cannot be read to its end ({_brief(error)}); copy it again, try {_remedy(file)}, or remove it"
        ) from None


def _remedy(file: Path) -> str:
    """A tool that mends such a file."""
    suffix = Path(file.name.removesuffix(".zstd")).suffix
    return REMEDIES.get(suffix, f"one of {', '.join(STORAGES)}")


def _decoders(file: Path, connections: list[Connection], ros1: bool) -> dict[int, tuple[str, Callable[[bytes], Any]]]:
    """By connection, its type and a function from a raw message to its content.

    Types come from the bag's definitions; standard ones that it does not define, and SETTLED, from ROS 2 Humble or ROS 1 Noetic.
    """
    store = get_typestore(Stores.ROS1_NOETIC if ros1 else Stores.ROS2_HUMBLE)
    for connection in connections:
        name, definition = full_name(connection.msgtype), connection.msgdef
        if name in SETTLED:
            continue
        try:
            if definition.format == MessageDefinitionFormat.NONE:
                raise ValueError("the bag holds no definition of it")
            idl = definition.format == MessageDefinitionFormat.IDL
            found = get_types_from_idl(definition.data) if idl else get_types_from_msg(definition.data, name)
            standard = found.keys() & store.fielddefs.keys()
            for key in standard - SETTLED:  # they grow from release to release
                del store.fielddefs[key], store.types[key]
            store.register({key: value for key, value in found.items() if key not in store.fielddefs})
        except Exception as error:
            if name in store.fielddefs:
                continue
            raise Fault(
                f"{file}: {connection.topic}: its type {name} cannot be understood ({_brief(error)}); "
                "record it with its definition, or leave the topic out"
            ) from None

    def decode(msgtype: str, raw: bytes) -> Any:
        return (store.deserialize_ros1 if ros1 else store.deserialize_cdr)(_plain(raw), msgtype)

    types = {connection.id: full_name(connection.msgtype) for connection in connections}
    return {number: (msgtype, functools.partial(decode, msgtype)) for number, msgtype in types.items()}


def plain(raw: bytes, place: str) -> bytes:
    """A message as it was sent. Raises Fault where it was packed alone (compression mode MESSAGE), and does not unpack."""
    try:
        return _plain(raw)
    except zstd.ZstdError as error:
        raise Fault(f"{place}: does not unpack ({_brief(error)}); the file is damaged: copy it again") from None


def _plain(raw: bytes) -> bytes:
    return zstd.decompress(raw) if raw[:4] == ZSTD_MAGIC else raw  # no CDR or ROS 1 message of ours begins so


def _decoded(decode: Callable[[bytes], Any], raw: bytes, place: str, msgtype: str) -> Any:
    """The content of a message. Raises Fault where it does not decode."""
    try:
        return decode(raw)
    except Exception as error:
        raise Fault(f"{place}: does not decode as {msgtype} ({_brief(error)}); the file is damaged") from None


def _brief(error: Exception) -> str:
    """A library's error on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"


def full_name(msgtype: str) -> str:
    """`sensor_msgs/Image`, as recorders of 2019 wrote it, is `sensor_msgs/msg/Image`."""
    return msgtype if msgtype.count("/") != 1 else msgtype.replace("/", "/msg/")
