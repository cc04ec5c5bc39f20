"""Bags, signals and pictures: every storage gives the same numbers, every fault one clear message."""

import contextlib
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from rosbags import rosbag2
from rosbags.typesys import Stores, get_typestore
from writing import (
    CAMERA,
    COMMAND,
    JOINTS,
    KINDS,
    MS,
    START,
    STATE,
    Timed,
    episode,
    image,
    joint_state,
    jpeg,
    make,
    picture,
    write,
)

from config import Part, Signal
from faults import Fault
from recordings import images
from recordings.bags import Bag, find_bags, read_messages
from recordings.signals import read_series
from recordings.storage import LARGEST, zstd

SHARED = Path(__file__).parents[3] / "shared/bags"
JOINT_SIGNAL = Signal(STATE, JOINTS)


def only(path: Path) -> Bag:
    (bag,), faults = find_bags(path)
    assert not faults
    return bag


@pytest.mark.parametrize("kind", KINDS)
def test_every_storage_gives_the_same_numbers(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "bag", episode(ros1=kind.startswith("ros1")), kind)
    velocity, command = Signal(STATE, ("c",), field="velocity"), Signal(COMMAND, ("b",))
    series = read_series(only(path), [JOINT_SIGNAL, velocity, command], [CAMERA])
    expected = np.sin(np.arange(101)[:, None] / 50 + np.arange(3))
    joints = series[JOINT_SIGNAL]
    assert np.array_equal(joints.rows, expected), "by name, in whatever order the message has"
    assert np.array_equal(series[velocity].rows, expected[:, 2:] * 2)
    assert np.array_equal(joints.stamps, START + np.arange(101) * 10 * MS) and joints.clock == "header"
    assert len(series[CAMERA].stamps) == 31 and len(series[command].stamps) == 51
    assert joints.names == JOINTS


def test_a_split_recording_and_bare_files(tmp_path: Path) -> None:
    messages = episode(2.0)
    half = len(messages) // 2
    parts = [write(tmp_path / f"part{i}", some) for i, some in enumerate((messages[:half], messages[half:]))]
    whole = tmp_path / "whole"
    whole.mkdir()
    for i, part in enumerate(parts):
        shutil.copy(next(part.glob("*.mcap")), whole / f"whole_{i}.mcap")
    assert [bag.name for bag in find_bags(whole)[0]] == ["whole_0.mcap", "whole_1.mcap"], (
        "without metadata.yaml each is a recording"
    )
    counts = {topic: sum(message[0] == topic for message in messages) for topic in (STATE, COMMAND, CAMERA)}
    topics = "".join(
        f"  - topic_metadata: {{name: {topic}, type: x, serialization_format: cdr}}\n    message_count: {count}\n"
        for topic, count in counts.items()
    )
    (whole / "metadata.yaml").write_text(
        "rosbag2_bagfile_information:\n  relative_file_paths: [whole_0.mcap, whole_1.mcap]\n"
        f"  topics_with_message_count:\n{topics}".replace("\n  - ", "\n    - ").replace(
            "\n    message", "\n      message"
        )
    )
    series = read_series(only(whole), [JOINT_SIGNAL], [])
    assert np.array_equal(series[JOINT_SIGNAL].stamps, START + np.arange(201) * 10 * MS)


@pytest.mark.skipif(not SHARED.exists(), reason="the recordings of others are not here")
@pytest.mark.parametrize(
    ("path", "topics", "count"),
    [
        ("ros2-rosbag2/mcap/talker", ["/topic", "/rosout"], 20),
        ("ros2-rosbag2/sqlite3/talker", ["/topic", "/rosout"], 20),
        ("ros2-rosbag2/mcap/convert_a", ["a_empty", "b_basictypes"], 150),
        ("ros2-rosbag2/mcap/convert_b", ["a_empty", "c_strings"], 75),
        ("ros2-rosbag2/sqlite3/wbag", list(map(str.__mul__, "ABCDEFGH", [3] * 8)), 6074),
        ("cruise-automation-rosbagjs/example-lz4.bag", ["/turtle1/pose"], 1344),
    ],
)
def test_topics_that_other_readers_silently_drop(path: str, topics: list[str], count: int) -> None:
    assert sum(1 for _ in read_messages(only(SHARED / path), topics)) == count


def test_other_messages_as_state(tmp_path: Path) -> None:
    trajectory_point = make(
        "trajectory_msgs/msg/JointTrajectoryPoint",
        positions=np.array([1.0, 2.0, 3.0]),
        velocities=np.zeros(0),
        accelerations=np.zeros(0),
        effort=np.zeros(0),
        time_from_start=make("builtin_interfaces/msg/Duration", sec=0, nanosec=0),
    )
    trajectory = make(
        "trajectory_msgs/msg/JointTrajectory", stamp=START, joint_names=["b", "a", "c"], points=[trajectory_point]
    )
    layout = make("std_msgs/msg/MultiArrayLayout", dim=[], data_offset=0)
    pose = make(
        "geometry_msgs/msg/PoseStamped",
        stamp=START,
        pose=make(
            "geometry_msgs/msg/Pose",
            position=make("geometry_msgs/msg/Point", x=1.0, y=2.0, z=3.0),
            orientation=make("geometry_msgs/msg/Quaternion", x=0.0, y=0.0, z=0.0, w=1.0),
        ),
    )
    path = write(
        tmp_path / "bag",
        [
            ("/t", "trajectory_msgs/msg/JointTrajectory", START, trajectory),
            (
                "/array",
                "std_msgs/msg/Float64MultiArray",
                START,
                make("std_msgs/msg/Float64MultiArray", layout=layout, data=np.array([5.0, 6.0, 7.0])),
            ),
            ("/grip", "std_msgs/msg/Bool", START, make("std_msgs/msg/Bool", data=True)),
            ("/pose", "geometry_msgs/msg/PoseStamped", START, pose),
        ],
    )
    signals = [
        Signal("/t", ("a", "b")),
        Signal("/array", index=(2, 0)),
        Signal("/grip"),
        Signal("/pose", field="pose.position"),
    ]
    series = read_series(only(path), signals, [])
    assert [series[s].rows[0].tolist() for s in signals] == [[2.0, 1.0], [7.0, 5.0], [1.0], [1.0, 2.0, 3.0]]
    assert series[signals[3]].names[0] == "/pose.pose.position.x"


def broken(change: str, folder: Path) -> Path:
    """A recording with one fault outside its messages; test_storage.py has those inside."""
    kind = {"wal": "sqlite", "unindexed": "ros1", "old types": "sqlite"}.get(change, "mcap")
    path = write(folder / "bag", episode(0.3, ros1=kind == "ros1"), kind)
    file = path if path.is_file() else next(file for file in path.iterdir() if file.name != "metadata.yaml")
    if change == "wal":
        file.with_name(file.name + "-wal").write_bytes(b"x")
    if change == "unindexed":  # as a killed recorder leaves it
        content, field = file.read_bytes(), b"index_pos="
        at = content.index(field) + len(field)
        file.write_bytes(content[:at] + bytes(8) + content[at + 8 :])
    if change == "missing file":
        file.rename(folder / "elsewhere")
    if change == "half metadata":
        (path / "metadata.yaml").write_text((path / "metadata.yaml").read_text()[:120])
    if change == "lying metadata":
        text = (path / "metadata.yaml").read_text()
        (path / "metadata.yaml").write_text(text.replace("message_count: 31", "message_count: 5"))
    if change == "unlisted":
        shutil.copy(file, path / "bag_1.mcap")
    if change == "packed":
        shutil.copy(file, folder / "bag.mcap")
        (folder / "bag.mcap.zst").write_bytes(zstd.compress(file.read_bytes()))
        shutil.rmtree(path)
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("wal", ["bag.db3-wal", "wal_checkpoint"]),
        ("unindexed", ["bag.bag", "unfinished", "rosbag reindex"]),
        ("missing file", ["metadata.yaml", "missing file: bag.mcap"]),
        ("half metadata", ["metadata.yaml", "cannot read", "reindex"]),
        ("lying metadata", [STATE, "31 messages read", "declares 5"]),
        ("unlisted", ["metadata.yaml", "does not list bag_1.mcap"]),
        ("packed", ["bag.mcap.zst", "a compressed copy of bag.mcap; remove one"]),
    ],
)
def test_a_broken_recording_gets_one_clear_message(tmp_path: Path, change: str, words: list[str]) -> None:
    found, faults = find_bags(broken(change, tmp_path))
    for bag in found if change != "packed" else ():
        with pytest.raises(Fault) as caught:
            read_series(bag, [JOINT_SIGNAL], [CAMERA])
        faults += caught.value.args
    assert len(faults) == 1
    assert all(word in faults[0] for word in words), faults[0]


@pytest.mark.parametrize("kind", ["mcap", "sqlite", "ros1"])
@pytest.mark.parametrize("suffix", [".zst", ".zstd"])
def test_files_that_were_compressed_afterwards(tmp_path: Path, kind: str, suffix: str) -> None:
    """With and without a metadata.yaml, which names the file as it was."""
    path = write(tmp_path / "bag", episode(0.3, ros1=kind == "ros1"), kind)
    file = path if path.is_file() else next(file for file in path.iterdir() if file.name != "metadata.yaml")
    expected = read_series(only(path), [JOINT_SIGNAL], [CAMERA])[JOINT_SIGNAL].rows
    packed = file.with_name(file.name + suffix)
    packed.write_bytes(zstd.compress(file.read_bytes()))
    file.unlink()
    for place in {packed, packed.parent}:
        assert np.array_equal(read_series(only(place), [JOINT_SIGNAL], [CAMERA])[JOINT_SIGNAL].rows, expected)


def in_sqlite(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(statement)
        database.commit()


def test_old_type_names_unknown_types_and_two_types_of_one_topic(tmp_path: Path) -> None:
    file = write(tmp_path / "old", episode(0.3), "sqlite") / "old.db3"
    in_sqlite(file, "UPDATE topics SET type = replace(type, '/msg/', '/')")
    series = read_series(only(file), [JOINT_SIGNAL], [CAMERA])
    assert len(series[JOINT_SIGNAL].stamps) == 31 and len(series[CAMERA].stamps) == 10, "the names of recorders of 2019"

    file = write(tmp_path / "unknown", episode(0.3), "sqlite") / "unknown.db3"
    in_sqlite(file, f"UPDATE topics SET type = 'my_msgs/msg/Arm' WHERE name = '{COMMAND}'")
    assert len(read_series(only(file), [JOINT_SIGNAL], [CAMERA])[JOINT_SIGNAL].stamps) == 31, "an unwanted topic"
    with pytest.raises(Fault) as caught:
        read_series(only(file), [Signal(COMMAND, JOINTS)], [])
    assert all(word in str(caught.value) for word in (COMMAND, "my_msgs/msg/Arm", "no definition"))

    longer = "encoded_message_definition = encoded_message_definition || printf('%300000s', '')"
    in_sqlite(
        file, f"UPDATE message_definitions SET topic_type = 'my_msgs/msg/Arm', {longer} WHERE topic_type LIKE '%State'"
    )
    with pytest.raises(Fault, match=r"its definition has 30\d{4} characters, expected at most 200000"):
        read_series(only(file), [Signal(COMMAND, JOINTS)], [])

    messages = episode(0.3, camera=False)
    trigger = make("std_msgs/msg/Bool", data=True)
    messages += [(f"{STATE}2", "std_msgs/msg/Bool", messages[-1][2] + MS, trigger)]
    file = write(tmp_path / "two", messages, "sqlite") / "two.db3"
    in_sqlite(file, f"UPDATE topics SET name = '{STATE}' WHERE name = '{STATE}2'")
    with pytest.raises(Fault) as caught:
        read_series(only(file), [JOINT_SIGNAL], [])
    assert any("two types, sensor_msgs/msg/JointState and std_msgs/msg/Bool" in fault for fault in caught.value.args)


def test_definitions_come_from_the_bag(tmp_path: Path) -> None:
    """Standard types grow from release to release; a recorder may find no definition of a type."""
    jazzy = get_typestore(Stores.ROS2_JAZZY)
    header = jazzy.types["std_msgs/msg/Header"](jazzy.types["builtin_interfaces/msg/Time"](1, 0), "")
    with rosbag2.Writer(tmp_path / "range", version=9, storage_plugin=rosbag2.StoragePlugin.MCAP) as writer:
        connection = writer.add_connection("/range", "sensor_msgs/msg/Range", typestore=jazzy)
        content = jazzy.types["sensor_msgs/msg/Range"](header, 0, 0.5, 0.125, 4.0, 2.5, 0.25)
        writer.write(connection, START, jazzy.serialize_cdr(content, "sensor_msgs/msg/Range"))
    fields = Signal("/range", field="range"), Signal("/range", field="variance")
    series = read_series(only(tmp_path / "range"), fields, [])
    assert [series[field].rows.item() for field in fields] == [2.5, 0.25], "Humble has no variance"

    file = write(tmp_path / "undefined", episode(0.3), "sqlite") / "undefined.db3"
    in_sqlite(file, "UPDATE message_definitions SET encoding = 'unknown' WHERE topic_type LIKE '%Image'")
    in_sqlite(file, "UPDATE message_definitions SET encoding = '' WHERE topic_type LIKE '%JointState'")
    assert len(read_series(only(file), [JOINT_SIGNAL], [CAMERA])[JOINT_SIGNAL].stamps) == 31


def test_links_copies_and_recordings_within_recordings(tmp_path: Path) -> None:
    one = write(tmp_path / "bags/one", episode(0.3))
    (tmp_path / "bags/latest").symlink_to(one)
    (tmp_path / "bags/self").symlink_to(tmp_path / "bags")
    (tmp_path / "bags/of another disk").symlink_to(write(tmp_path / "disk/two", episode(0.3, seed=1)))
    write(one / "old/three", episode(0.3, seed=2))
    (one / "._one.mcap").write_bytes(b"what macOS leaves beside a file")
    bags, faults = find_bags(tmp_path / "bags")
    assert [bag.name for bag in bags] == ["of another disk", "one", "one/old/three"] and not faults


@pytest.mark.parametrize("gripper", ["finger", "fingers on the right"])
def test_an_arm_and_its_gripper_on_one_topic(tmp_path: Path, gripper: str) -> None:
    """Messages of other joints are skipped and counted, also if they are as long as the arm's."""
    messages, others = [], ["x", "y", "z"] if gripper == "finger" else [gripper]
    for i in range(3000):
        t = START + i * 10 * MS
        messages.append((STATE, "sensor_msgs/msg/JointState", t, joint_state(t, [i, i + 1, i + 2])))
        messages.append((STATE, "sensor_msgs/msg/JointState", t + MS, joint_state(t + MS, [0.5] * len(others), others)))
    bag = only(write(tmp_path / "bag", messages))
    series = read_series(bag, [JOINT_SIGNAL], [])[JOINT_SIGNAL]
    assert np.array_equal(series.rows, np.arange(3000)[:, None] + np.arange(3))
    assert np.array_equal(series.stamps, START + np.arange(3000) * 10 * MS) and series.skipped == 3000
    with pytest.raises(Fault, match="no joint finger_1; joints in the message: a, b, c"):
        read_series(bag, [Signal(STATE, ("finger_1",))], [])


def test_header_stamps_that_cannot_be_trusted(tmp_path: Path) -> None:
    def clock(name: str, stamps: list[int]) -> str:
        messages: list[Timed] = [
            (STATE, "sensor_msgs/msg/JointState", START + i * MS, joint_state(s, [1, 2, 3]))
            for i, s in enumerate(stamps)
        ]
        return read_series(only(write(tmp_path / name, messages)), [JOINT_SIGNAL], [])[JOINT_SIGNAL].clock

    assert clock("good", [START - MS, START]) == "header"
    assert clock("zero", [0, 0]) == "receive (no header stamps)"
    assert "decrease" in clock("unsorted", [START, START - MS])
    assert "off by up to 1.20 s, at message 0" in clock("late", [START - 1200 * MS, START])
    assert "off by up to 3600.00 s" in clock("future", [START, START + 3_600_000 * MS])
    assert "off by up to" in clock("another epoch", [10**9, 10**9 + MS]), "seconds since the robot was switched on"


PIXELS = picture(3)
GREY = PIXELS[..., :1]
UYVY = np.stack([np.full((48, 64), 128), np.arange(64)[None].repeat(48, 0)], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    ("encoding", "data", "expected"),
    [
        ("rgb8", PIXELS, PIXELS),
        ("bgr8", PIXELS[..., ::-1], PIXELS),
        ("mono8", GREY, GREY.repeat(3, 2)),
        ("rgba8", np.dstack([PIXELS, GREY]), PIXELS),
        ("bgra8", np.dstack([PIXELS[..., ::-1], GREY]), PIXELS),
    ],
)
@pytest.mark.parametrize("pad", [0, 5])
def test_every_encoding_gives_the_same_picture(encoding: str, data: np.ndarray, expected: np.ndarray, pad: int) -> None:
    assert np.array_equal(images.to_rgb(image(START, data, encoding, pad)), expected)


def test_bayer_yuv_and_jpeg_keep_their_colors() -> None:
    red = np.zeros((48, 64, 1), np.uint8)
    red[::2, ::2] = 200  # an RGGB mosaic of a red scene
    rgb = images.to_rgb(image(START, red, "bayer_rggb8"))[10:-10, 10:-10]
    assert rgb[..., 0].min() > 150 > 50 > rgb[..., 1:].max()
    grey = images.to_rgb(image(START, UYVY, "yuv422"))
    assert np.ptp(grey, axis=2).max() == 0 and np.all(np.diff(grey[0, 16:, 0].astype(int)) >= 0)
    assert np.abs(images.to_rgb(jpeg(START, PIXELS)).astype(int) - PIXELS).mean() < 8


@pytest.mark.parametrize(("size", "off"), [((240, 320), 1.0), ((120, 160), 1.0), ((224, 224), 0.0), ((480, 640), 0.0)])
def test_a_jpeg_decoded_at_a_fraction_of_its_size_is_the_same_picture(size: tuple[int, int], off: float) -> None:
    noise = np.random.default_rng(0).normal(0, 6, (480, 640, 3))
    message = jpeg(START, (cv2.resize(picture(3), (640, 480)) + noise).clip(0, 255).astype(np.uint8))
    pixels, native = images.at_size(message, size)
    whole = images.resize(images.to_rgb(message), size)
    assert pixels.shape == (*size, 3) and native == (480, 640)
    assert np.abs(pixels.astype(int) - whole).mean() <= off


@pytest.mark.parametrize(
    ("part", "size", "off"),
    [
        ((0.25, 0.25, 0.5, 0.5), (120, 160), 1.0),  # a JPEG is decoded at half of its size
        ((0.1, 0.3, 0.31, 0.33), (60, 80), 0.0),
        ((0.99, 0.0, 0.001, 1.0), (32, 32), 0.0),  # at least a row
    ],
)
def test_a_part_of_a_picture_is_the_same_by_any_way(part: Part, size: tuple[int, int], off: float) -> None:
    message = jpeg(START, cv2.resize(picture(3), (640, 480)))
    whole = images.to_rgb(message)
    (top, bottom), (left, right) = images.edges((480, 640), part)
    expected = images.resize(whole[top:bottom, left:right], size).astype(int)
    assert (top, left) == (round(part[0] * 480), round(part[1] * 640)) and bottom > top
    for given in (message, image(START, whole)):
        pixels, native = images.at_size(given, size, part)
        assert native == (480, 640) and np.abs(pixels - expected).mean() <= off
    kept, _ = images.jpeg_at_size(message, size, part)
    assert np.abs(images.decode(kept).astype(int) - expected).mean() < 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (image(START, PIXELS, step=100), ["step 100", "at least 192"]),
        (image(START, PIXELS, "rgb16"), ["'rgb16'", "bgr8"]),
        (image(START, PIXELS[..., :2], "16UC1"), ["16UC1", "color camera"]),
        (image(START, PIXELS, height=50), ["64x50"]),
        (
            make(
                "sensor_msgs/msg/CompressedImage",
                stamp=START,
                format="32FC1; compressedDepth",
                data=np.ones(9, np.uint8),
            ),
            ["depth"],
        ),
        (
            make("sensor_msgs/msg/CompressedImage", stamp=START, format="jpeg", data=jpeg(START, PIXELS).data[:-40]),
            ["bytes of format", "do not decode"],
        ),
        (make("sensor_msgs/msg/CompressedImage", stamp=START, format="jpeg", data=np.zeros(0, np.uint8)), ["0 bytes"]),
    ],
)
def test_a_broken_picture_gets_one_clear_message(message: object, words: list[str]) -> None:
    with pytest.raises(Fault) as caught:
        images.at_size(message, (24, 32))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("cut", [0, 1000])
def test_a_recording_that_is_still_being_copied(tmp_path: Path, cut: int) -> None:
    write(tmp_path / "one", episode(1.0))
    file = next((tmp_path / "one").glob("*.mcap"))
    os.truncate(file, file.stat().st_size - cut)
    ((bag,), _) = find_bags(tmp_path)
    messages = read_messages(bag, [CAMERA])
    next(messages)
    with file.open("ab") as copied:
        copied.write(bytes(9))
    with pytest.raises(Fault, match=r"one.mcap: changed while it was read; is it still being copied"):
        list(messages)
    file.rename(file.with_name("one.mcap.part"))
    (tmp_path / "two.bag.zst.tmp").touch()
    assert sum("is still being copied; wait" in fault for fault in find_bags(tmp_path)[1]) == 2


def bomb(declared: int) -> bytes:
    """A small MCAP with one chunk that unpacks to LARGEST bytes more than allowed, or than declared."""

    def record(kind: int, body: bytes) -> bytes:
        return struct.pack("<BQ", kind, len(body)) + body

    packed = zstd.compress(bytes(LARGEST + 2))
    chunk = struct.pack("<QQQII4sQ", 0, 1, declared, 0, 4, b"zstd", len(packed)) + packed
    magic = b"\x89MCAP0\r\n"
    return magic + record(1, bytes(8)) + record(6, chunk) + record(2, bytes(20)) + magic


def test_a_small_file_fills_neither_memory_nor_time(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mcap")
    (tmp_path / "device.db3").symlink_to("/dev/zero")
    for name, declared in {"honest": LARGEST + 2, "lying": 1000}.items():
        (tmp_path / f"{name}.mcap").write_bytes(bomb(declared))
    (tmp_path / "whole.mcap.zstd").write_bytes(zstd.compress(bytes(LARGEST + 2)))
    bags, faults = find_bags(tmp_path)
    assert [fault.split(": ")[1] for fault in faults] == ["is a pipe or a device; expected a file; remove it"] * 2
    tracemalloc.start()
    for bag, words in zip(
        bags, ("expected at most", "a chunk of 1001 bytes, declared 1000", "unpacks to more"), strict=True
    ):
        with pytest.raises(Fault, match=words):
            list(read_messages(bag, ["/camera"]))
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


def test_memory_does_not_grow_with_recordings(tmp_path: Path) -> None:
    """Two recordings of 200 MB of raw pictures each are cached in far less memory, the second in no more than the first."""
    for name in "pq":
        stamps = [START + i * 33 * MS for i in range(220)]
        write(
            tmp_path / "bags" / name,
            [
                message
                for i, t in enumerate(stamps)
                for message in (
                    (STATE, "sensor_msgs/msg/JointState", t, joint_state(t, [1, 2, i])),
                    (CAMERA, "sensor_msgs/msg/Image", t, image(t, picture(i, 480, 640))),
                )
            ],
        )
    code = f"""
import re
from pathlib import Path
from dataset import build
from config import load
from recordings.bags import find_bags
peaks = []
def peak():
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
data = load(None, ["data.bag_dir={tmp_path}/bags", "data.cache_dir={tmp_path}/cache", "data.cameras={{color: {CAMERA}}}",
                   "data.image_size=[48, 64]", "data.state=[{{topic: {STATE}, joints: [a, b, c]}}]"]).data
peak()
for bag in find_bags(data.bag_dir)[0]:
    assert build.build(bag, data, build.cache_folder(bag, data), 2, lambda _: None) == ()
    peak()
print(*peaks)
"""
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(images.__file__).parents[1], capture_output=True, text=True, check=True
    )
    before, first, second = map(int, output.stdout.split())
    assert first - before < 150 and second - first < 30, f"{output.stdout} MB"
