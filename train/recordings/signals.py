"""Messages as time series: the numbers of each signal by joint name, index or dotted path, each on one clock.

A JointTrajectory with the usual field is what its controller commands over time: its points, interpolated.
"""

from __future__ import annotations

import dataclasses
import struct
from array import array
from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from config import Signal
from faults import Fault
from recordings.bags import Bag, Message, read_messages
from recordings.video import PACKET, VIDEO, Video, codec

MAX_SKEW_NS = 1_000_000_000  # a header stamp this far from its receive stamp is on another clock
GREATEST = float(np.finfo(np.float32).max)
LAYOUTS = 16  # of a signal to learn
STAMP, STAMP_END = struct.Struct("<iI"), 12  # a header's, behind 4 bytes of CDR or ROS 1's sequence number
JOINT_STATE, TRAJECTORY = "sensor_msgs/msg/JointState", "trajectory_msgs/msg/JointTrajectory"
NAMES = {JOINT_STATE: "name", TRAJECTORY: "joint_names"}
USUAL_FIELD = {JOINT_STATE: "position", TRAJECTORY: "points.0.positions"}
IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage", VIDEO, PACKET)
Source = Signal | str  # a signal, or the topic of a camera


class Plans(NamedTuple):
    """The points of trajectories: message i has those from first[i] to first[i + 1]."""

    first: np.ndarray  # (M + 1,)
    after_ns: np.ndarray  # (P,) int64, since the trajectory's start
    points: np.ndarray  # (P, K)


class Series(NamedTuple):
    """One signal or camera of one bag over time."""

    topic: str
    stamps: np.ndarray  # (M,) int64, ns, never decreasing
    clock: str  # "header", or "receive (why not header)"
    rows: np.ndarray  # (M, K) float64; of a trajectory its first point; K is 0 for a camera
    names: tuple[str, ...]  # of the K numbers
    skipped: int  # messages of its topic that no signal takes
    plans: Plans | None = None
    numbers: np.ndarray = np.zeros(0, np.int64)  # (M,) of a camera's messages in the topic; empty for a signal

    def at(self, ticks: np.ndarray, messages: np.ndarray) -> np.ndarray:
        """The numbers (N, K) at ticks (N,) int64 ns by the messages (N,) that are in force then."""
        if not self.plans:
            return self.rows[messages]
        first, after_ns, points = self.plans
        rows = np.empty((len(ticks), points.shape[1]))
        for message in np.unique(messages):
            its_ticks, its_points = messages == message, slice(first[message], first[message + 1])
            since = ticks[its_ticks] - self.stamps[message]
            rows[its_ticks] = np.stack(
                [np.interp(since, after_ns[its_points], p) for p in points[its_points].T], axis=1
            )
        return rows


def read_series(bag: Bag, signals: Collection[Signal], cameras: Collection[str]) -> dict[Source, Series]:
    """The wanted signals and cameras of a bag in one pass. Publishers of different joints may share a topic.

    Memory grows with the joint messages, not with the pictures. Raises Fault with everything wrong with the bag.
    """
    readers = [_Reader(camera, None) for camera in cameras] + [_Reader(signal.topic, signal) for signal in signals]
    by_topic: dict[str, list[_Reader]] = {}
    for reader in readers:
        by_topic.setdefault(reader.topic, []).append(reader)
    faults: list[str] = []
    skipped: Counter[str] = Counter()
    try:
        for message in read_messages(bag, by_topic):
            is_taken = False
            for reader in by_topic[message.topic]:
                try:
                    is_taken |= reader.add(message)
                except Fault as fault:  # the first of a signal is enough
                    reader.faults += fault.at(message.place).args
            skipped[message.topic] += not is_taken
    except Fault as fault:
        faults += fault.args
    faults += [fault for reader in readers for fault in reader.faults or reader.only_other_joints()]
    if faults:
        raise Fault(*dict.fromkeys(faults))
    series: dict[Source, Series] = {}
    for reader in readers:
        try:
            series[reader.signal or reader.topic] = reader.series(skipped[reader.topic])
        except Fault as fault:
            faults += fault.at(f"{bag.name}: {reader.topic}").args
    if faults:
        raise Fault(*dict.fromkeys(faults))
    return series


def choose_clock(receive: np.ndarray, header: np.ndarray) -> tuple[np.ndarray, str]:
    """Header stamps (M,) if all of them can be trusted, else receive stamps, and why. Raises Fault if neither can be.

    Stamps are in file order, so that a clock that was set back shows.
    """
    skew = np.abs(header - receive)
    if not header.all():
        missing = f"{(header == 0).sum()} header stamps are zero, first at message {int(np.argmax(header == 0))}"
        wrong = missing if header.any() else "no header stamps"
    elif fall := _fall(header):
        wrong = f"header stamps decrease {fall}"
    elif skew.max() >= MAX_SKEW_NS:
        wrong = f"header stamps are off by up to {skew.max() / 1e9:.2f} s, at message {skew.argmax()}"
    else:
        return header, "header"
    if fall := _fall(receive):
        worse = f"receive stamps decrease {fall}"
    elif not receive.any() or (len(receive) > 2 and receive[0] == receive[-1]):
        worse = f"all receive stamps are {receive[0]}"
    else:
        return receive, f"receive ({wrong})"
    if header.all() and not _fall(header):
        return header, f"header ({worse})"
    cause = ": the recorder's clock was set back, or messages are out of order" if fall else ""
    raise Fault(f"{worse}, and {wrong}{cause}; cut the recording there, or record it again")


def _fall(stamps: np.ndarray) -> str:
    """Where stamps (M,) first decrease, and by how much against the usual pause, in words; empty if they never do."""
    steps = np.diff(stamps)
    at = int(np.argmax(steps < 0)) if len(steps) else 0
    is_fall = len(steps) and steps[at] < 0
    return f"at message {at + 1} by a step of {(np.median(steps) - steps[at]) / 1e9:.3f} s" if is_fall else ""


def header_stamp(content: Any) -> int:
    """The stamp of a message's header in ns, or foxglove's own; 0 if it has none."""
    stamp: Any = getattr(getattr(content, "header", content), "stamp", getattr(content, "timestamp", None))
    return int(stamp.sec * 10**9 + stamp.nanosec) if hasattr(stamp, "nanosec") else 0


class _Layout(NamedTuple):
    """Where the numbers of a parsed message are: one that differs only in stamp and arrays needs no parsing."""

    fixed: list[tuple[int, int, bytes]]  # from, to, content
    numbers: struct.Struct | None  # of the signal; None in a message of other joints
    offset: int
    order: list[int]  # where the signal's numbers are in the array

    @staticmethod
    def of(raw: bytes, content: Any, picked: Any, order: list[int]) -> _Layout | None:
        """The layout of a message with a header and the array `picked`; None if that is not as it is in its bytes."""
        stamp = getattr(getattr(content, "header", None), "stamp", None)
        spans: dict[int, tuple[int, int]] = {}  # array: from, to
        for value in (getattr(content, f.name) for f in dataclasses.fields(content)):
            if isinstance(value, np.ndarray) and isinstance(value.base, bytes):
                body = np.frombuffer(value.base, np.uint8)  # the message behind its first bytes
                offset = len(raw) - len(body) + value.ctypes.data - body.ctypes.data
                if raw[offset : offset + value.nbytes] == value.tobytes():
                    spans[id(value)] = offset, offset + value.nbytes
        is_stamped = stamp and STAMP.unpack_from(raw, 4) == (stamp.sec, stamp.nanosec)
        if not is_stamped or (picked is not None and (id(picked) not in spans or picked.dtype != "<f8")):
            return None
        edges = [STAMP_END, *(edge for span in sorted(spans.values()) for edge in span), len(raw)]
        fixed = [(a, b, raw[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        if picked is None:
            return _Layout(fixed, None, 0, order)
        return _Layout(fixed, struct.Struct(f"<{picked.size}d"), spans[id(picked)][0], order)

    def fits(self, raw: bytes) -> bool:
        return len(raw) == self.fixed[-1][1] and [raw[a:b] for a, b, _ in self.fixed] == [
            part for _, _, part in self.fixed
        ]


class _Reader:
    """Reads one signal, or a camera's stamps, message after message."""

    def __init__(self, topic: str, signal: Signal | None) -> None:
        self.topic, self.signal = topic, signal
        self.layouts: list[_Layout] = []
        self.parsed = 0
        self.receive, self.header = array("q"), array("q")
        self.names: tuple[str, ...] = ()
        self.order: list[int] = []  # where the signal's numbers are in the message
        self.rows = array("d")  # flat: a list of arrays needs six times the memory
        self.first, self.after_ns = array("q", [0]), array("q")  # of trajectories
        self.numbers = array("q")
        self.video: Video | None = None
        self.faults: list[str] = []
        self.first_skipped = ""

    def add(self, message: Message) -> bool:
        """Append a message; False for one of other joints. Raises Fault."""
        if self.faults:
            return False
        raw = message.raw
        for layout in self.layouts:
            if layout.fits(raw):
                if layout.numbers is None:
                    return False
                values = layout.numbers.unpack_from(raw, layout.offset)
                self.rows.extend([values[i] for i in layout.order])
                seconds, nanoseconds = STAMP.unpack_from(raw, 4)
                self.receive.append(message.receive_ns)
                self.header.append(seconds * 10**9 + nanoseconds)
                return True
        content, picked = message.content(), None
        if self.signal:
            joints = list(getattr(content, NAMES[message.msgtype])) if message.msgtype in NAMES else []
            if joints and self.signal.joints and set(self.signal.joints).isdisjoint(joints):
                missing = _no_joint(self.signal.joints, joints)  # an arm and its gripper may publish on one topic
                self.first_skipped = self.first_skipped or f"{message.place}: {missing}"
                self._learn(raw, content, None)
                return False
            picked = self._add_numbers(self.signal, message.msgtype, content, joints)
        elif message.msgtype not in IMAGES:
            raise Fault(f"is a {message.msgtype}; a camera needs {', '.join(IMAGES)}; give another topic")
        elif (video := self._video(content)) and not video.holds_picture(content.data.tobytes()):
            early = f"{message.place}: {video.name} video without a key frame; record it with some"
            self.first_skipped = self.first_skipped or early
            return False
        else:
            self.numbers.append(message.number)
        self.receive.append(message.receive_ns)
        self.header.append(header_stamp(content))
        if picked is not None:
            self._learn(raw, content, picked)
        return True

    def _video(self, content: Any) -> Video | None:
        """The stream of a camera that sends video. Raises Fault."""
        if self.video is None and (name := codec(content)):
            self.video = Video(name)
        return self.video

    def _learn(self, raw: bytes, content: Any, picked: Any) -> None:
        self.parsed += 1
        layout = (
            _Layout.of(raw, content, picked, self.order) if self.parsed <= LAYOUTS else None
        )  # else all messages differ
        self.layouts += [layout] if layout else []

    def only_other_joints(self) -> list[str]:
        """The fault of a signal whose messages all are of other joints, or of video that never begins."""
        return [self.first_skipped] if self.first_skipped and not self.receive else []

    def series(self, skipped: int) -> Series:
        """What was read. Raises Fault if no clock can be trusted, or a number is not finite."""
        stamps, clock = choose_clock(np.array(self.receive, np.int64), np.array(self.header, np.int64))
        points, plans = np.array(self.rows).reshape(len(self.after_ns) or len(stamps), -1), None
        rows, of_row = points, np.arange(len(stamps))
        if self.after_ns:
            plans = Plans(np.array(self.first, np.int64), np.array(self.after_ns, np.int64), points)
            rows, of_row = points[plans.first[:-1]], np.repeat(of_row, np.diff(plans.first))
        bad = ~(np.abs(points) <= GREATEST)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise Fault(
                f"{self.names[column]} is {points[row, column]} at t+{(stamps[of_row[row]] - stamps[0]) / 1e9:.3f} s "
                f"({bad.any(1).sum()} such messages); expected finite float32 numbers; cut the recording or leave this "
                "joint out"
            )
        return Series(self.topic, stamps, clock, rows, self.names, skipped, plans, np.array(self.numbers, np.int64))

    def _add_numbers(self, signal: Signal, msgtype: str, content: Any, joints: list[str]) -> Any:
        """Append the numbers of a message, whose joints have these names; the array they are in. Raises Fault."""
        field = signal.field or USUAL_FIELD.get(msgtype) or ("data" if msgtype.startswith("std_msgs/") else "")
        if not field:
            raise Fault(f"a {msgtype} needs `field`; its fields: {', '.join(_fields(content))}")
        if msgtype == TRAJECTORY and not signal.field:
            return self._add_points(signal, content, joints)
        value = _follow(content, field)
        numbers, paths = _numbers(value, field)
        if msgtype not in NAMES and signal.joints:
            raise Fault(f"`joints` needs a {JOINT_STATE} or {TRAJECTORY}, found a {msgtype}; use `index`")
        self._choose(signal, joints, field, paths, msgtype in NAMES)
        self.rows.frombytes(numbers[self.order].tobytes())
        return value

    def _add_points(self, signal: Signal, content: Any, joints: list[str]) -> None:
        """Append all points of a trajectory."""
        after = [p.time_from_start.sec * 10**9 + p.time_from_start.nanosec for p in content.points]
        if not after or sorted(after) != after:
            found = "decreasing time_from_start" if after else "no points"
            raise Fault(f"a trajectory with {found}; cut the recording, or take another topic")
        for i, point in enumerate(content.points):
            numbers, paths = _numbers(point.positions, f"points.{i}.positions")
            self._choose(signal, joints, USUAL_FIELD[TRAJECTORY], paths, True)
            self.rows.frombytes(numbers[self.order].tobytes())
        self.after_ns.extend(after)
        self.first.append(len(self.after_ns))

    def _choose(self, signal: Signal, joints: list[str], field: str, paths: list[str], is_named: bool) -> None:
        """Set `order` and `names` for a message whose numbers have these paths, and joints these names. Raises Fault."""
        count = len(self.names)
        unclear = [i for i, joint in enumerate(joints) if not joint or joints.count(joint) > 1]
        if signal.joints:
            self._find_joints(signal.joints, joints, len(paths), field)
        elif joints and not set(signal.index) & set(unclear):
            raise Fault(f"list the joints to take by `joints`, in order; joints in the message: {', '.join(joints)}")
        elif signal.index:
            if max(signal.index) >= len(paths):
                raise Fault(f"index {max(signal.index)} is beyond the {len(paths)} numbers of {field}")
            self.order = list(signal.index)
        elif is_named:
            raise Fault(f"name[] is empty; if you know the joints' order, set index: {list(range(len(paths)))}")
        else:
            self.order = list(range(len(paths)))
        if not signal.joints:
            self.names = tuple(f"{signal.topic}.{paths[i]}" for i in self.order)
        if count and count != len(self.order):
            raise Fault(f"{field} has {len(self.order)} numbers, {count} before; expected the same; set `index`")

    def _find_joints(self, wanted: tuple[str, ...], joints: list[str], count: int, field: str) -> None:
        if not joints:
            raise Fault(f"name[] is empty: cannot find {', '.join(wanted)}; if you know their order, use `index`")
        if missing := [joint for joint in wanted if joint not in joints]:
            raise Fault(f"{_no_joint(missing, joints)}; joints of another publisher need an entry of their own")
        if count != len(joints):
            raise Fault(f"{field} has {count} values for {len(joints)} joint names; expected one each; set `field`")
        if double := [joint for joint in wanted if joints.count(joint) > 1]:
            raise Fault(f"two joints are named {double[0]}; take them by `index`: {', '.join(joints)}")
        kind = field.split(".")[-1]
        suffix = "" if kind in ("position", "positions") else f".{kind}"
        self.order = [joints.index(joint) for joint in wanted]
        self.names = tuple(f"{joint}{suffix}" for joint in wanted)


def _no_joint(missing: Collection[str], joints: list[str]) -> str:
    return f"no joint {', '.join(missing)}; joints in the message: {', '.join(joints)}"


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
