"""Real recordings for the tests, written by the rosbags library's own writers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rosbags import rosbag1, rosbag2
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin
from rosbags.typesys import Stores, get_typestore

STORES = {False: get_typestore(Stores.ROS2_HUMBLE), True: get_typestore(Stores.ROS1_NOETIC)}
START = 1_700_000_000_000_000_000
MS = 1_000_000
JOINTS = ("a", "b", "c")
STATE, COMMAND, CAMERA = "/joint_states", "/command", "/camera"
KINDS = ("mcap", "mcap-zstd", "sqlite", "sqlite-zstd-message", "sqlite-zstd-file", "ros1", "ros1-lz4", "ros1-bz2")

Timed = tuple[str, str, int, Any]  # topic, type, receive stamp in ns, content


def make(msgtype: str, ros1: bool = False, **fields: Any) -> Any:
    """A message; `stamp` is the header's, in ns."""
    types = STORES[ros1].types
    if "stamp" in fields:
        seconds, nanoseconds = divmod(fields.pop("stamp"), 10**9)
        sequence = {"seq": 0} if ros1 else {}
        stamp = types["builtin_interfaces/msg/Time"](sec=seconds, nanosec=nanoseconds)
        fields["header"] = types["std_msgs/msg/Header"](stamp=stamp, frame_id="", **sequence)
    return types[msgtype](**fields)


def joint_state(stamp: int, position: Iterable[float], names: Iterable[str] = JOINTS, ros1: bool = False) -> Any:
    position = np.array(list(position), np.float64)
    return make(
        "sensor_msgs/msg/JointState",
        ros1,
        stamp=stamp,
        name=list(names),
        position=position,
        velocity=position * 2,
        effort=np.zeros(0),
    )


def picture(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth picture (H, W, 3) uint8 RGB that tells its seed."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 3 % 256, y * 4 % 256, np.full_like(x, seed * 7 % 256)], axis=2).astype(np.uint8)


def jpeg(stamp: int, pixels: np.ndarray, ros1: bool = False) -> Any:
    data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].ravel()
    return make("sensor_msgs/msg/CompressedImage", ros1, stamp=stamp, format="rgb8; jpeg compressed bgr8", data=data)


def image(
    stamp: int, pixels: np.ndarray, encoding: str = "rgb8", pad: int = 0, ros1: bool = False, **wrong: Any
) -> Any:
    """An Image of (H, W, K) uint8 with `pad` bytes behind each row."""
    height, width = pixels.shape[:2]
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (0, pad)), constant_values=255)
    fields = {
        "height": height,
        "width": width,
        "encoding": encoding,
        "is_bigendian": 0,
        "step": rows.shape[1],
        "data": rows.ravel(),
    }
    return make("sensor_msgs/msg/Image", ros1, stamp=stamp, **(fields | wrong))


def episode(
    seconds: float = 1.0, seed: int = 0, start: int = START, camera: bool = True, ros1: bool = False
) -> list[Timed]:
    """Joints at 100 Hz on sines, scrambled from message to message; a JPEG camera at 30 Hz; a command at 50 Hz."""
    messages: list[Timed] = []
    for i in range(int(seconds * 100) + 1):
        t = start + i * 10 * MS
        values = np.sin(i / 50 + np.arange(3) + 0.777 * seed)
        order = np.roll(np.arange(3), i % 3)
        names = [JOINTS[j] for j in order]
        messages.append((STATE, "sensor_msgs/msg/JointState", t + MS, joint_state(t, values[order], names, ros1)))
        if i % 2 == 0:
            messages.append((COMMAND, "sensor_msgs/msg/JointState", t + MS, joint_state(t, values + 0.1, JOINTS, ros1)))
    for i in range(int(seconds * 30) + 1 if camera else 0):
        t = start + i * 33 * MS + 5 * MS
        messages.append((CAMERA, "sensor_msgs/msg/CompressedImage", t + 4 * MS, jpeg(t, picture(i + seed), ros1)))
    return sorted(messages, key=lambda message: message[2])


def write(path: Path, messages: list[Timed], kind: str = "mcap") -> Path:
    """A recording of one of KINDS; path/ for ROS 2, path.bag for ROS 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ros1 = kind.startswith("ros1")
    store = STORES[ros1]
    writer: Any
    if ros1:
        path = path.with_suffix(".bag")
        writer = rosbag1.Writer(path)
        if kind != "ros1":
            writer.set_compression(rosbag1.Writer.CompressionFormat[kind.split("-")[1].upper()])
    else:
        writer = rosbag2.Writer(
            path, version=9, storage_plugin=StoragePlugin.MCAP if "mcap" in kind else StoragePlugin.SQLITE3
        )
        if "zstd" in kind:
            mode = {
                "mcap-zstd": CompressionMode.STORAGE,
                "sqlite-zstd-message": CompressionMode.MESSAGE,
                "sqlite-zstd-file": CompressionMode.FILE,
            }[kind]
            writer.set_compression(mode, CompressionFormat.ZSTD)
    with writer:
        kinds = {topic: msgtype for topic, msgtype, _, _ in messages}
        connections = {
            topic: writer.add_connection(topic, msgtype, typestore=store) for topic, msgtype in kinds.items()
        }
        for topic, msgtype, receive, content in messages:
            raw = (store.serialize_ros1 if ros1 else store.serialize_cdr)(content, msgtype)
            writer.write(connections[topic], receive, raw)
    return path
