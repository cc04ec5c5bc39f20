"""Messages as time series: the numbers of a signal by joint name, index or dotted path, on one clock per topic."""

from __future__ import annotations

import dataclasses
import struct
from array import array
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from config import Signal
from faults import Fault
from recordings.bags import Bag, Message, read_messages

MAX_SKEW_NS = 1_000_000_000  # a header stamp this far from its receive stamp is on another clock
GREATEST = float(np.finfo(np.float32).max)
LAYOUTS = 16  # of a topic to learn
STAMP, STAMP_END = struct.Struct("<iI"), 12  # a header's, behind 4 bytes of CDR or ROS 1's sequence number
JOINT_STATE, TRAJECTORY = "sensor_msgs/msg/JointState", "trajectory_msgs/msg/JointTrajectory"
NAMES = {JOINT_STATE: "name", TRAJECTORY: "joint_names"}
USUAL_FIELD = {JOINT_STATE: "position", TRAJECTORY: "points.0.positions"}
IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")


class Series(NamedTuple):
    """One topic of one bag over time."""

    stamps: np.ndarray  # (M,) int64, ns, never decreasing
    clock: str  # "header", or "receive (why not header)"
    values: dict[Signal, np.ndarray]  # (M, K) float64 each; empty for a camera
    names: dict[Signal, tuple[str, ...]]  # of the K numbers
    skipped: int  # messages of other joints


def read_series(bag: Bag, signals: Collection[Signal], cameras: Collection[str]) -> dict[str, Series]:
    """The wanted topics of a bag in one pass: numbers of the signals, stamps of the cameras.

    Memory grows with the joint messages, not with the pictures. Raises Fault with everything wrong with the bag.
    """
    by_topic: dict[str, list[Signal]] = {topic: [] for topic in cameras}
    for signal in signals:
        by_topic.setdefault(signal.topic, []).append(signal)
    topics = {name: _Topic(name in cameras, wanted) for name, wanted in by_topic.items()}
    faults: list[str] = []
    try:
        for message in read_messages(bag, by_topic):
            topic = topics[message.topic]
            try:
                topic.add(message)
            except Fault as fault:  # the first of a topic is enough
                topic.faults += fault.at(message.place).args
    except Fault as fault:
        faults += fault.args
    faults += [fault for topic in topics.values() for fault in topic.faults or topic.only_other_joints()]
    if faults:
        raise Fault(*faults)
    series = {name: topic.series() for name, topic in topics.items()}
    for name, one in series.items():
        if np.any(np.diff(one.stamps) < 0):
            at = int(np.argmax(np.diff(one.stamps) < 0)) + 1
            faults.append(f"{bag.name}: {name}: stamps decrease at message {at}; its files overlap or are out of order")
        for signal, rows in one.values.items():
            bad = ~(np.abs(rows) <= GREATEST)
            if bad.any():
                row, column = np.argwhere(bad)[0]
                faults.append(
                    f"{bag.name}: {name}: {one.names[signal][column]} is {rows[row, column]} at "
                    f"t+{(one.stamps[row] - one.stamps[0]) / 1e9:.3f} s ({bad.any(1).sum()} such messages); expected finite "
                    "float32 numbers; cut the recording or leave this joint out"
                )
    if faults:
        raise Fault(*faults)
    return series


def choose_clock(receive: np.ndarray, header: np.ndarray) -> tuple[np.ndarray, str]:
    """Header stamps if all of them can be trusted, else receive stamps, and why."""
    if not header.all():
        missing = f"{(header == 0).sum()} header stamps are zero, first at message {int(np.argmax(header == 0))}"
        return receive, f"receive ({missing if header.any() else 'no header stamps'})"
    if np.any(np.diff(header) < 0):
        return receive, f"receive (header stamps decrease at message {int(np.argmax(np.diff(header) < 0)) + 1})"
    skew = np.abs(header - receive)
    if skew.max() >= MAX_SKEW_NS:
        return receive, f"receive (header stamps are off by up to {skew.max() / 1e9:.2f} s, at message {skew.argmax()})"
    return header, "header"


class _Layout(NamedTuple):
    """Where the numbers of a parsed message are: one that differs only in stamp and arrays needs no parsing."""

    fixed: list[tuple[int, int, bytes]]  # from, to, content
    arrays: list[tuple[struct.Struct, int]]  # of each signal, and its offset

    @staticmethod
    def of(raw: bytes, content: Any, picked: list[Any]) -> _Layout | None:
        """The layout of a message with a header and `picked` arrays; None if these are not as they are in its bytes."""
        stamp = getattr(getattr(content, "header", None), "stamp", None)
        spans: dict[int, tuple[int, int]] = {}  # array: from, to
        for value in (getattr(content, f.name) for f in dataclasses.fields(content)):
            if isinstance(value, np.ndarray) and isinstance(value.base, bytes):
                body = np.frombuffer(value.base, np.uint8)  # the message behind its first bytes
                offset = len(raw) - len(body) + value.ctypes.data - body.ctypes.data
                if raw[offset : offset + value.nbytes] == value.tobytes():
                    spans[id(value)] = offset, offset + value.nbytes
        is_stamped = stamp and STAMP.unpack_from(raw, 4) == (stamp.sec, stamp.nanosec)
        if not is_stamped or not picked or not all(id(value) in spans and value.dtype == "<f8" for value in picked):
            return None
        edges = [STAMP_END, *(edge for span in sorted(spans.values()) for edge in span), len(raw)]
        fixed = [(a, b, raw[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        return _Layout(fixed, [(struct.Struct(f"<{value.size}d"), spans[id(value)][0]) for value in picked])

    def fits(self, raw: bytes) -> bool:
        return len(raw) == self.fixed[-1][1] and [raw[a:b] for a, b, _ in self.fixed] == [
            part for _, _, part in self.fixed
        ]


class _Topic:
    """The stamps and numbers of one topic, message after message."""

    def __init__(self, is_camera: bool, signals: list[Signal]) -> None:
        self.is_camera, self.columns = is_camera, [_Columns(signal) for signal in signals]
        self.layout: _Layout | None = None
        self.parsed = 0
        self.receive, self.header = array("q"), array("q")
        self.faults: list[str] = []
        self.skipped, self.first_skipped = 0, ""

    def add(self, message: Message) -> None:
        if self.faults:
            return
        raw = message.raw
        if self.layout and self.layout.fits(raw):
            for columns, (numbers, offset) in zip(self.columns, self.layout.arrays, strict=True):
                values = numbers.unpack_from(raw, offset)
                columns.rows.extend([values[i] for i in columns.order])
            seconds, nanoseconds = STAMP.unpack_from(raw, 4)
            self.receive.append(message.receive_ns)
            self.header.append(seconds * 10**9 + nanoseconds)
            return
        content = message.content()
        if self.is_camera and message.msgtype not in IMAGES:
            raise Fault(f"is a {message.msgtype}; a camera needs {' or '.join(IMAGES)}; give another topic")
        joints = list(getattr(content, NAMES[message.msgtype])) if message.msgtype in NAMES else []
        wanted = [columns.signal.joints for columns in self.columns]
        if joints and wanted and all(names and set(names).isdisjoint(joints) for names in wanted):
            self.skipped += 1  # an arm and its gripper may publish on one topic
            self.first_skipped = self.first_skipped or f"{message.place}: {_no_joint(wanted[0], joints)}"
            return
        for columns in self.columns:
            columns.add(message.msgtype, content, joints)
        self.parsed += 1
        picked = [columns.value for columns in self.columns]
        self.layout = _Layout.of(raw, content, picked) if self.parsed <= LAYOUTS else None  # else all messages differ
        stamp = getattr(getattr(content, "header", None), "stamp", None)
        self.receive.append(message.receive_ns)
        self.header.append(stamp.sec * 10**9 + stamp.nanosec if stamp else 0)

    def only_other_joints(self) -> list[str]:
        """The fault of a topic whose messages all are of other joints."""
        return [self.first_skipped] if self.skipped and not self.receive else []

    def series(self) -> Series:
        stamps, clock = choose_clock(np.array(self.receive, np.int64), np.array(self.header, np.int64))
        values = {c.signal: np.array(c.rows).reshape(-1, len(c.names)) for c in self.columns}
        return Series(stamps, clock, values, {c.signal: c.names for c in self.columns}, self.skipped)


def _no_joint(missing: Collection[str], joints: list[str]) -> str:
    return f"no joint {', '.join(missing)}; joints in the message: {', '.join(joints)}"


class _Columns:
    """The numbers of one signal, message after message, and their names."""

    def __init__(self, signal: Signal) -> None:
        self.signal = signal
        self.names: tuple[str, ...] = ()
        self.order: list[int] = []  # where the signal's numbers are in the message
        self.value: Any = None  # of the last parsed message
        self.rows = array("d")  # flat: a list of arrays needs six times the memory

    def add(self, msgtype: str, content: Any, joints: list[str]) -> None:
        """Append the numbers of a message, whose joints have these names. Raises Fault."""
        signal, count = self.signal, len(self.names)
        field = signal.field or USUAL_FIELD.get(msgtype) or ("data" if msgtype.startswith("std_msgs/") else "")
        if not field:
            raise Fault(f"a {msgtype} needs `field`; its fields: {', '.join(_fields(content))}")
        self.value = _follow(content, field)
        numbers, paths = _numbers(self.value, field)
        if msgtype not in NAMES and signal.joints:
            raise Fault(f"`joints` needs a {JOINT_STATE} or {TRAJECTORY}, found a {msgtype}; use `index`")
        if signal.joints:
            self._find_joints(joints, len(numbers), field)
        elif joints:
            raise Fault(f"list the joints to take by `joints`, in order; joints in the message: {', '.join(joints)}")
        elif signal.index:
            if max(signal.index) >= len(numbers):
                raise Fault(f"index {max(signal.index)} is beyond the {len(numbers)} numbers of {field}")
            self.order = list(signal.index)
        elif msgtype in NAMES:
            advice = f"if you know the joints' order, set index: {list(range(len(numbers)))}"
            raise Fault(f"name[] is empty; {advice}")
        else:
            self.order = list(range(len(numbers)))
        if not signal.joints:
            self.names = tuple(f"{signal.topic}.{paths[i]}" for i in self.order)
        if count and count != len(self.order):
            raise Fault(f"{field} has {len(self.order)} numbers, {count} before; expected the same; set `index`")
        self.rows.frombytes(numbers[self.order].tobytes())

    def _find_joints(self, joints: list[str], count: int, field: str) -> None:
        wanted = self.signal.joints
        if not joints:
            raise Fault(f"name[] is empty: cannot find {', '.join(wanted)}; if you know their order, use `index`")
        if missing := [joint for joint in wanted if joint not in joints]:
            raise Fault(_no_joint(missing, joints))
        if count != len(joints):
            raise Fault(f"{field} has {count} values for {len(joints)} joint names; expected one each; set `field`")
        suffix = "" if field in USUAL_FIELD.values() else f".{field.split('.')[-1]}"
        self.order = [joints.index(joint) for joint in wanted]
        self.names = tuple(f"{joint}{suffix}" for joint in wanted)


def _fields(content: Any) -> list[str]:
    names = [f.name for f in dataclasses.fields(content)] if dataclasses.is_dataclass(content) else []
    return [name for name in names if name not in ("header", "__msgtype__")]


def _follow(content: Any, field: str) -> Any:
    """The value at a dotted path such as pose.position or points.0.positions."""
    for step in field.split("."):
        try:
            content = content[int(step)] if step.isdigit() else getattr(content, step)
        except (AttributeError, IndexError, TypeError):
            known = ", ".join(_fields(content)) or f"{np.size(content)} elements"
            raise Fault(f"field {field}: no {step}; known: {known}") from None
    return content


def _numbers(content: Any, path: str) -> tuple[np.ndarray, list[str]]:
    """All numbers below a field, in the order of the definition, and their dotted paths."""
    if isinstance(content, (bool, int, float, np.number, np.bool_)):
        return np.array([content], np.float64), [path]
    if isinstance(content, np.ndarray) and content.dtype.kind in "iufb":
        return content.astype(np.float64), [f"{path}[{i}]" for i in range(len(content))]
    if dataclasses.is_dataclass(content):
        names = [f.name for f in dataclasses.fields(content) if f.name != "__msgtype__"]
        parts = [_numbers(getattr(content, name), f"{path}.{name}") for name in names]
        return np.concatenate([numbers for numbers, _ in parts]), [name for _, paths in parts for name in paths]
    raise Fault(f"field {path} is a {type(content).__name__}; expected numbers")
