"""Storage files: the same messages as rosbags, and hundreds of damaged files without a traceback or a silently lost message."""

import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from rosbags import rosbag1, rosbag2
from writing import (
    CAMERA,
    COMMAND,
    KINDS,
    MS,
    STATE,
    STORES,
    Timed,
    episode,
    image,
    joint_state,
    jpeg,
    make,
    picture,
    write,
)

from config import load
from dataset.cache import load_dataset
from faults import Fault
from inspection.verdict import inspect
from recordings.bags import find_bags, opened, plain, read_messages

JOINT_STATE, JPEG = "sensor_msgs/msg/JointState", "sensor_msgs/msg/CompressedImage"
STORAGES = (*KINDS, "mcap-crc")
SUMMED = ("mcap-crc", "ros1-bz2")  # every message lies under a checksum
SECONDS = 0.5
FLIPPED = 24  # damaged files of each storage


def record(folder: Path, kind: str, messages: list[Timed] | None = None) -> Path:
    """A recording in a folder; its storage file."""
    path = write(folder / "bag", messages or episode(SECONDS, ros1=is_ros1(kind)), kind.removesuffix("-crc"))
    file = path if path.is_file() else next(file for file in path.iterdir() if file.name != "metadata.yaml")
    if kind == "mcap-crc":
        file.write_bytes(with_sums(file.read_bytes()))
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_messages_as_rosbags(tmp_path: Path, kind: str) -> None:
    file = record(tmp_path, kind)
    if kind == "sqlite-zstd-file":
        (bag,), _ = find_bags(tmp_path)
        assert [m.receive_ns for m in read_messages(bag, [STATE])] == [m[2] for m in episode(SECONDS) if m[0] == STATE]
        return
    reader: Any = rosbag1.Reader(file) if is_ros1(kind) else rosbag2.Reader(file)
    with reader, opened(file) as storage:
        theirs = [(connection.topic, receive, bytes(raw)) for connection, receive, raw in reader.messages()]
        assert [(connection.topic, receive, raw) for connection, receive, raw in storage.messages()] == theirs


@pytest.mark.parametrize("kind", ["mcap", "sqlite", "ros1"])
def test_messages_come_in_file_order_and_need_no_index(tmp_path: Path, kind: str) -> None:
    """A clock that was set back leaves its trace in the file order alone."""
    messages = [
        (STATE, JOINT_STATE, 10**9 + (i * 7919 % 400) * MS, joint_state(10**9 + i * MS, [i, 0, 0], ros1=is_ros1(kind)))
        for i in range(400)
    ]
    file = record(tmp_path, kind, messages)
    if kind == "mcap":
        file.write_bytes(without_indexes(file.read_bytes()))
    with opened(file) as storage:
        assert [receive for _, receive, _ in storage.messages()] == [stamp for _, _, stamp, _ in messages]


def without_indexes(content: bytes) -> bytes:
    """An MCAP file of the records up to the end of the data, without message indexes."""
    out, at = bytearray(content[:8]), 8
    while at < len(content) - 8:
        kind, length = struct.unpack_from("<BQ", content, at)
        if kind not in (0x07, 0x0F) and kind != 0x02:
            out += content[at : at + 9 + length]
        at += 9 + length
        if kind == 0x0F:
            break
    out += struct.pack("<BQI", 0x0F, 4, 0) + struct.pack("<BQQQI", 0x02, 20, 0, 0, 0)
    return bytes(out + content[-8:])


def is_ros1(kind: str) -> bool:
    return kind.startswith("ros1")


def with_sums(content: bytes) -> bytes:
    """An MCAP file with the checksums that the library does not write."""
    out, at, summary = bytearray(content[:8]), 8, 0
    while at < len(content) - 8:
        kind, length = struct.unpack_from("<BQ", content, at)
        body = bytearray(content[at + 9 : at + 9 + length])
        if kind == 0x06:  # a chunk, not packed
            body[24:28] = struct.pack("<I", crc32(body[40:]))
        if kind == 0x0F:  # the end of the data
            body, summary = bytearray(struct.pack("<I", crc32(out))), at + 9 + length
        if kind == 0x02:  # the footer
            body[16:] = struct.pack("<I", crc32(out[summary:] + content[at : at + 9] + body[:16]))
        out += content[at : at + 9] + body
        at += 9 + length
    return bytes(out + content[-8:])


def reported(folder: Path) -> tuple[list[str], list[str]]:
    """Faults and warnings of an inspection of a folder. A training finds the same faults, or it would read the recordings."""
    config = load(
        None,
        [
            f"data.bag_dir={folder}",
            f"data.cache_dir={folder}/.cache",
            f"data.cameras={{color: {CAMERA}}}",
            f"data.state=[{{topic: {STATE}, joints: [a, b, c]}}]",
            "data.image_size=[48, 64]",
            "model.chunk_size=10",
            "model.n_action_steps=10",
        ],
    )
    bags, faults = find_bags(folder)
    found = [inspect(bag, config, pictures=True) for bag in bags]
    faults += [f"{one.name}: {fault}" for one in found for fault in one.faults]
    try:
        load_dataset(config)
    except Fault as fault:
        assert faults, f"training refuses what inspection accepts: {fault}"
    else:
        unused = all("do not decode as a picture" in fault for fault in faults)  # by any tick
        assert unused, f"training reads what inspection refuses: {faults}"
    return faults, [warning for one in found for warning in one.warnings]


def changed(topic: str, change: Callable[[int, Any, int, bool], tuple[str, Any]]) -> Callable[..., list[Timed]]:
    """A change of each message of a topic, by its number, content, stamp and whether it is of ROS 1: to a type and a content."""

    def apply(messages: list[Timed], ros1: bool) -> list[Timed]:
        out, number = [], 0
        for name, kind, receive, content in messages:
            if name == topic:
                kind, content = change(number, content, receive - MS, ros1)
                number += 1
            out.append((name, kind, receive, content))
        return out

    return apply


def joints(change: Callable[[int, list[float]], list[float]], names: Callable[[int], str] = lambda _: "abc") -> Any:
    def one(number: int, _: Any, stamp: int, ros1: bool) -> tuple[str, Any]:
        values = change(number, [number / 100, number / 50, 1.0])
        return JOINT_STATE, joint_state(stamp, values, names(number), ros1)

    return changed(STATE, one)


def at_20(value: float) -> Callable[[int, list[float]], list[float]]:
    return lambda number, values: [values[0], value if number == 20 else values[1], values[2]]


def cut_picture(number: int, content: Any, stamp: int, ros1: bool) -> tuple[str, Any]:
    if number == 7:
        content.data = content.data[:-60]
    return JPEG, content


def short(number: int, _: Any, stamp: int, ros1: bool) -> tuple[str, Any]:
    empty = np.zeros(0)
    fields = {"name": list("abc"), "position": np.zeros(2), "velocity": empty, "effort": empty}
    return JOINT_STATE, make(JOINT_STATE, ros1, stamp=stamp, **fields)


# what is recorded wrong, and the expected words
WRONG: dict[str, tuple[Callable[[list[Timed], bool], list[Timed]], list[str]]] = {
    "no topic": (lambda m, _: [one for one in m if one[0] != STATE], [STATE, "no such topic", f"{CAMERA} ({JPEG})"]),
    "no joint": (
        joints(lambda _, v: v[:2], lambda _: "ab"),
        [STATE, "message 0", "no joint c", "joints in the message: a, b"],
    ),
    "a joint that appears halfway": (
        joints(lambda n, v: v[: 2 + (n > 25)], lambda n: "abc" if n > 25 else "ab"),
        [STATE, "message 0", "no joint c"],
    ),
    "a joint that is gone halfway": (
        joints(lambda n, v: v[: 2 + (n < 25)], lambda n: "abc" if n < 25 else "ab"),
        [STATE, "message 25 at t+0.25", "no joint c"],
    ),
    "no names": (joints(lambda _, v: v, lambda _: ""), [STATE, "name[] is empty", "index"]),
    "nan": (joints(at_20(np.nan)), [STATE, "b is nan", "t+0.200 s", "1 such messages"]),
    "beyond 32 bits": (joints(at_20(1e300)), [STATE, "b is 1e+300", "float32 numbers"]),
    "infinite": (joints(at_20(-np.inf)), [STATE, "b is -inf", "t+0.200 s"]),
    "a jump": (joints(at_20(2.0)), [STATE, "b jumps from 0.38 to 2 in 10.0 ms", "message 20, t+0.200 s", "and back"]),
    "fewer positions than names": (changed(STATE, short), [STATE, "2 values for 3 joint names"]),
    "another type": (
        changed(CAMERA, lambda *_: ("std_msgs/msg/Bool", make("std_msgs/msg/Bool", data=True))),
        [CAMERA, "std_msgs/msg/Bool", "CompressedImage"],
    ),
    "half a JPEG": (changed(CAMERA, cut_picture), [CAMERA, "message 7", "do not decode as a picture"]),
    "another size": (
        changed(CAMERA, lambda n, c, t, ros1: (JPEG, jpeg(t, picture(n, 48 + 16 * (n > 7)), ros1))),
        [CAMERA, "64x48 and 64x64"],
    ),
    "depth": (
        changed(
            CAMERA, lambda n, c, t, ros1: ("sensor_msgs/msg/Image", image(t, picture(n)[..., :2], "16UC1", ros1=ros1))
        ),
        [CAMERA, "depth or 16-bit", "color camera"],
    ),
    "rows that do not fit": (
        changed(CAMERA, lambda n, c, t, ros1: ("sensor_msgs/msg/Image", image(t, picture(n), step=100, ros1=ros1))),
        [CAMERA, "step 100", "at least 192"],
    ),
    "no time in common": (
        lambda m, _: [(t, k, r + 10**10 * (t == CAMERA), c) for t, k, r, c in m],
        ["share no time", STATE, CAMERA],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_recording_is_named(tmp_path: Path, kind: str) -> None:
    for wrong, (change, words) in WRONG.items():
        folder = tmp_path / wrong
        record(folder, kind, change(episode(SECONDS, ros1=is_ros1(kind)), is_ros1(kind)))
        faults, _ = reported(folder)
        assert any(all(word in fault for word in ["bag", *words]) for fault in faults), f"{wrong}: {faults}"
        assert len(faults) <= 2, f"{wrong}: one fault expected: {faults}"


def zeroed(start: int, stop: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:start] + bytes(min(stop, len(content)) - start) + content[stop:]


# what happens to a file, and the expected message; the second is that of files compressed as a whole
BROKEN: dict[str, tuple[Callable[[bytes], bytes], str, str]] = {
    "empty": (lambda c: b"", "is empty (0 bytes)", "is empty (0 bytes)"),
    "cut to a half": (lambda c: c[: len(c) // 2], "damaged", "cannot decompress"),
    "cut by a byte": (lambda c: c[:-1], "damaged", "cannot decompress"),
    "without its beginning": (zeroed(0, 64), "damaged", "cannot decompress"),
    "another file": (lambda c: random.Random(0).randbytes(len(c)), "damaged", "cannot decompress"),
}


@pytest.mark.parametrize("kind", STORAGES)
def test_a_broken_file_is_named(tmp_path: Path, kind: str) -> None:
    for broken, (change, words, packed_words) in BROKEN.items():
        file = record(tmp_path / broken, kind)
        file.write_bytes(change(file.read_bytes()))
        faults, _ = reported(tmp_path / broken)
        said = packed_words if kind == "sqlite-zstd-file" else words
        assert any(file.name in fault and said in fault for fault in faults), f"{broken}: {faults}"


def flip(content: bytes, around: list[int], seed: int) -> tuple[bytes, int]:
    """A file with some flipped bits, or a run of zeroes, and how many bits of it are another; half of them around the messages."""
    rng, out = random.Random(seed), bytearray(content)
    places = around if seed % 2 else range(len(out))
    if seed % 8 == 0:
        start = rng.choice(places)
        out[start : start + 64] = bytes(len(out[start : start + 64]))
    else:
        for _ in range(rng.choice((1, 1, 2, 4))):
            out[rng.choice(places)] ^= 1 << rng.randrange(8)
    return bytes(out), different(content, bytes(out))


def around(content: bytes, messages: list[bytes]) -> list[int]:
    """The bytes of a file that are not of a message, where they stand in it as they are."""
    outside = np.ones(len(content), bool)
    for message in messages:
        at = content.find(message)
        outside[at : at + len(message)] &= at < 0
    return list(np.flatnonzero(outside))


def different(a: bytes, b: bytes) -> int:
    """How many bits of two texts of one length differ."""
    return (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).bit_count()


@pytest.mark.parametrize("kind", STORAGES)
def test_flipped_bits_lose_no_message_silently(tmp_path: Path, kind: str) -> None:
    """A file without a reported fault has every message with its stamp; and its content, if the file has checksums."""
    file = record(tmp_path / "whole", kind)
    store = STORES[is_ros1(kind)]
    serialize = store.serialize_ros1 if is_ros1(kind) else store.serialize_cdr
    recorded: dict[str, list[tuple[int, bytes]]] = {topic: [] for topic in (STATE, COMMAND, CAMERA)}
    for topic, msgtype, receive, content in episode(SECONDS, ros1=is_ros1(kind)):
        recorded[topic].append((receive, bytes(serialize(content, msgtype))))
    places = around(file.read_bytes(), [raw for each in recorded.values() for _, raw in each])
    said = 0
    for seed in range(FLIPPED):
        folder = tmp_path / str(seed)
        shutil.copytree(tmp_path / "whole", folder)
        damaged = folder / file.relative_to(tmp_path / "whole")
        content, bits = flip(file.read_bytes(), places, seed)
        damaged.write_bytes(content)
        if any(reported(folder)):
            said += 1
            continue
        read: dict[str, list[tuple[int, bytes]]] = {topic: [] for topic in recorded}
        with opened(damaged) as storage:
            for connection, receive, raw in storage.messages():
                read[connection.topic].append((receive, plain(raw)))
        others = 0
        for topic, expected in recorded.items():
            assert [one[0] for one in read[topic]] == [one[0] for one in expected], f"seed {seed}: {topic}"
            for (_, ours), (_, theirs) in zip(read[topic], expected, strict=True):
                assert len(ours) == len(theirs), f"seed {seed}: {topic}"
                others += different(ours, theirs)
        assert others <= (0 if kind in SUMMED else bits if kind in ("mcap", "sqlite", "ros1") else 2**30), (
            f"seed {seed}"
        )
    if kind in SUMMED:
        assert said > FLIPPED / 2, "the others hit unused bytes"
