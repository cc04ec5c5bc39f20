"""Messages as time series: the numbers of a signal by joint name, place or dotted path, under one clock for each topic."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from config import Signal
from faults import Fault
from recordings.bags import Bag, Message, read_messages
from recordings.layout import Layout, Numbers, layout_of, numbers_of, stamps_ns
from recordings.plausibility import TWO_TURNS

MAX_SKEW_NS = 1_000_000_000  # a header stamp this far from its receive stamp is of another clock
BLOCK = 1024  # messages of one length that are looked at together
GREATEST = float(np.finfo(np.float32).max)
LAYOUTS = 16  # of a topic to learn: one whose messages all differ, as by a changing order of joints, has none
JOINT_STATE, TRAJECTORY = "sensor_msgs/msg/JointState", "trajectory_msgs/msg/JointTrajectory"
NAMES = {JOINT_STATE: "name", TRAJECTORY: "joint_names"}
IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
MAX_JOINT_SPEED = 30.0  # rad/s: the fastest axes of industrial robots turn at 20
SPIKE = 3  # messages, at most
OF_A_TURN = 0.1  # rad: how far two messages at a jump of 2 pi may be from it
SWITCH = 16  # a joint of at most so many positions is one, such as a gripper that is open or closed


class Series(NamedTuple):
    """One topic of one bag over time."""

    stamps: np.ndarray  # (M,) int64, ns, never falling
    clock: str  # "header", or "receive (why not header)"
    values: dict[Signal, np.ndarray]  # (M, K) float64 each; none for a camera
    names: dict[Signal, tuple[str, ...]]  # of the K numbers
    others: int  # messages that were left out: they were of other joints alone


def read_series(bag: Bag, signals: Collection[Signal], cameras: Collection[str]) -> dict[str, Series]:
    """The wanted topics of a bag in one pass: numbers of the signals, stamps alone of the cameras.

    Memory grows with the joint messages, not with the pictures. Raises Fault with all that is wrong with the bag.
    """
    by_topic: dict[str, list[Signal]] = {topic: [] for topic in cameras}
    for signal in signals:
        by_topic.setdefault(signal.topic, []).append(signal)
    topics = {topic: _Topic(topic in cameras, picks) for topic, picks in by_topic.items()}
    faults: list[str] = []
    try:
        for message in read_messages(bag, by_topic):
            topics[message.topic].add(message)
    except Fault as fault:
        faults += fault.args
    for one in topics.values():
        one.settle()
        faults += one.faults
        if one.others and not one.receive and not one.faults:
            faults.append(one.of_others)
    if faults:
        raise Fault(*faults)
    series = {}
    for topic, one in topics.items():
        stamps, clock = choose_clock(np.array(one.receive, np.int64), np.array(one.header, np.int64))
        if np.any(np.diff(stamps) < 0):
            at = int(np.argmax(np.diff(stamps) < 0)) + 1
            faults.append(
                f"{bag.name}: {topic}: time runs backwards at message {at}; its files overlap in time or are out of order"
            )
        picked = {pick.signal: pick for pick in one.picked}
        values = {signal: pick.values() for signal, pick in picked.items()}
        for signal, rows in values.items():
            bad = ~(np.abs(rows) <= GREATEST)
            if bad.any():
                row, column = np.argwhere(bad)[0]
                faults.append(
                    f"{bag.name}: {topic}: {picked[signal].names[column]} is {rows[row, column]} at "
                    f"t+{(stamps[row] - stamps[0]) / 1e9:.3f} s ({bad.any(1).sum()} messages have such a value); "
                    "expected finite numbers, as a float32 holds them; cut the recording or leave this joint out"
                )
        names = {signal: picked[signal].names for signal in values}
        series[topic] = Series(stamps, clock, values, names, one.others)
    if faults:
        raise Fault(*faults)
    return series


def choose_clock(receive: np.ndarray, header: np.ndarray) -> tuple[np.ndarray, str]:
    """Header stamps where all of them can be trusted, else receive stamps and why."""
    if not header.all():
        some = f"{(header == 0).sum()} header stamps are zero, the first at message {int(np.argmax(header == 0))}"
        return receive, f"receive ({some if header.any() else 'no header stamp'})"
    if np.any(np.diff(header) < 0):
        return receive, f"receive (header stamps run backwards at message {int(np.argmax(np.diff(header) < 0)) + 1})"
    skew = np.abs(header - receive)
    if skew.max() >= MAX_SKEW_NS:
        return (
            receive,
            f"receive (header stamps are up to {skew.max() / 1e9:.2f} s off, at message {int(skew.argmax())})",
        )
    return header, "header"


def jumps(series: Series, signal: Signal) -> tuple[list[str], list[str]]:
    """Where joints of a signal go faster than any arm can, in words: those that come back at once, and those that do not.

    What comes back was never there: a flipped bit, a driver's slip. What stays may be an arm that was reset; a turn of 2 pi may come back.
    Positions in rad alone are looked at: other numbers may jump, and where a joint is usually beyond two turns they are degrees.
    """
    rows, names = series.values[signal], series.names[signal]
    spikes: list[str] = []
    steps: list[str] = []
    if signal.field not in ("", "position") or len(rows) < 3 or np.median(np.abs(rows), axis=0).max() > TWO_TURNS:
        return spikes, steps
    elapsed = np.diff(series.stamps)
    # a busy machine delivers in bunches what was measured a period apart
    seconds = np.maximum(elapsed, max(1.0, float(np.median(elapsed)))) / 1e9
    for column, name in zip(rows.T, names, strict=True):
        of_a_joint = bool(signal.joints) or name.startswith(f"{signal.topic}.position[")
        if not of_a_joint or len(np.unique(column)) <= SWITCH:
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # of damaged numbers
            size = np.abs(np.diff(column))
            at = np.flatnonzero(size > MAX_JOINT_SPEED * seconds)
            after = [column[np.minimum(at + ahead, len(column) - 1)] for ahead in range(2, 2 + SPIKE)]
            back = np.any([np.abs(later - column[at]) < size[at] / 2 for later in after], axis=0)
            back &= np.abs(size[at] - 2 * np.pi) > OF_A_TURN  # a joint that hovers at +-pi
        for which, found in ((at[back], spikes), (at[~back & ~np.isin(at - 1, at[back])], steps)):
            if len(which):
                i = int(which[0])
                found.append(
                    f"{signal.topic}: {name} goes from {column[i]:.4g} to {column[i + 1]:.4g} within {seconds[i] * 1e3:.1f} ms, at "
                    f"message {i + 1}, t+{(series.stamps[i + 1] - series.stamps[0]) / 1e9:.3f} s (one of {len(which)} such jumps)"
                )
    return spikes, steps


class _Topic:
    """The stamps and numbers of one topic, message after message."""

    def __init__(self, camera: bool, signals: list[Signal]) -> None:
        self.camera = camera
        self.picked = [_Picked(signal) for signal in signals]
        self.receive, self.header = array("q"), array("q")
        self.faults: list[str] = []  # one for each signal is enough
        self.layout: Layout | None = None
        self.alike: list[Message] = []  # put by, fewer than BLOCK
        self.parsed = 0
        self.others, self.of_others = 0, ""  # messages of other joints alone, and the first of them in words

    def add(self, message: Message) -> None:
        self.receive.append(message.receive_ns)
        self._add(message)

    def _add(self, message: Message) -> None:
        """Put a message by if it has the length of the layout that is known, else parse it."""
        if self.layout and len(message.raw) == self.layout.length:
            self.alike.append(message)
            if len(self.alike) == BLOCK:
                self.settle()
        else:
            self.settle()
            self._parse(message)

    def settle(self) -> None:
        """Take the numbers of the messages that were put by, as far as they are of the layout; parse the others."""
        while self.alike and (layout := self.layout):
            block, self.alike = self.alike, []
            rows = np.frombuffer(b"".join(message.raw for message in block), np.uint8).reshape(len(block), -1)
            fits, at = layout.fits(rows), 0
            while at < len(block) and self.layout is layout:
                count = len(block) - at if fits[at:].all() else int(fits[at:].argmin())
                self.header.frombytes(stamps_ns(rows[at : at + count]).tobytes())
                for picked in self.picked:
                    picked.add_alike(rows[at : at + count])
                at += count
                if at < len(block):
                    self._parse(block[at])
                    at += 1
            for message in block[at:]:
                self._add(message)

    def _parse(self, message: Message) -> None:
        if self.faults:
            return
        try:
            content = message.content()
            if self._of_others(message, content):
                return
            stamp = getattr(getattr(content, "header", None), "stamp", None)
            self.header.append(stamp.sec * 10**9 + stamp.nanosec if stamp else 0)
            if self.camera and message.msgtype not in IMAGES:
                raise Fault(f"{message.place}: is a {message.msgtype}; a camera's topic carries {' or '.join(IMAGES)}")
        except Fault as fault:
            self.faults += fault.args
            return
        for picked in self.picked:
            try:
                picked.add(message, content)
            except Fault as fault:
                self.faults += fault.args
        self.parsed += 1
        learn = bool(self.picked) and not self.faults and self.parsed <= LAYOUTS
        known = learn and all(picked.find_again(message.raw) for picked in self.picked)
        self.layout = layout_of(message.raw, content) if known else None

    def _of_others(self, message: Message, content: Any) -> bool:
        """Whether a message is of other joints alone, as where an arm and its gripper publish on one topic: left out, and counted."""
        named = _joint_names(message, content)
        wanted = [picked.signal.joints for picked in self.picked]
        if not named or not wanted or not all(joints and set(joints).isdisjoint(named) for joints in wanted):
            return False
        del self.receive[len(self.header)]
        self.others += 1
        self.of_others = (
            self.of_others
            or f"{message.place}: no joint {', '.join(wanted[0])}; joints that are there: {', '.join(named)}"
        )
        return True


class _Picked:
    """The numbers of one signal, message after message, with their names and where they stand in a message."""

    def __init__(self, signal: Signal) -> None:
        self.signal = signal
        self.array: Any = None  # of the last message, as it was parsed
        self.place: Numbers | None = None  # of that array, in messages of the same layout
        self.names: tuple[str, ...] = ()
        self.order: np.ndarray | None = None
        self.order_of: list[str] | None = None
        self.rows = array("d")  # flat: a list of arrays would take six times the memory

    def find_again(self, raw: bytes) -> bool:
        """Whether the numbers of the message that was added last stand in it as they are."""
        self.place = numbers_of(raw, self.array)
        return self.place is not None

    def add_alike(self, rows: np.ndarray) -> None:
        """Messages of the layout of the last one that was parsed, (M, length) uint8."""
        assert self.place and self.order is not None
        self.rows.frombytes(self.place.of(rows)[:, self.order].astype(np.float64).tobytes())

    def add(self, message: Message, content: Any) -> None:
        before, row = self.names, self._pick(message, content)
        if before and len(before) != len(row):
            raise Fault(
                f"{message.place}: {self.signal.field or 'the array'} has {len(row)} numbers, {len(before)} before; "
                "expected the same in every message; pick some by `index`"
            )
        self.rows.frombytes(row.tobytes())

    def values(self) -> np.ndarray:
        """(M, K) float64."""
        return np.array(self.rows).reshape(-1, len(self.names))

    def _pick(self, message: Message, content: Any) -> np.ndarray:
        """(K,) float64 of one message."""
        signal = self.signal
        field = signal.field or self._usual_field(message, content)
        self.array = _follow(content, field, message)
        numbers, leaves = _numbers(self.array, field, message)
        named = _joint_names(message, content)
        of_joints = message.msgtype in NAMES
        if of_joints:
            leaves = named or leaves
        elif signal.joints:
            raise Fault(
                f"{message.place}: `joints` needs a {JOINT_STATE} or {TRAJECTORY}, this is a {message.msgtype}; use `index`"
            )
        if signal.joints:
            if self.order is None or named != self.order_of:  # any message may bring another order
                self._find_joints(named, message)
            if len(numbers) != len(named):
                raise Fault(
                    f"{message.place}: {field} has {len(numbers)} values for {len(named)} joint names; "
                    "expected one each; choose another `field`"
                )
            self.names = tuple(
                signal.joints
                if field in ("position", "points.0.positions")
                else (f"{joint}.{field.split('.')[-1]}" for joint in signal.joints)
            )
            return numbers[self.order]
        if named and of_joints:
            raise Fault(
                f"{message.place}: say which joints to take, and in which order, by `joints`; there are: {', '.join(named)}"
            )
        if signal.index:
            if max(signal.index) >= len(numbers):
                raise Fault(
                    f"{message.place}: index {max(signal.index)} is beyond the {len(numbers)} numbers of {field}"
                )
            self.order = np.array(signal.index)
        elif of_joints:
            raise Fault(
                f"{message.place}: name[] is empty; if the order of the {len(numbers)} joints is known, "
                f"take them by place: index: {list(range(len(numbers)))}"
            )
        else:
            self.order = np.arange(len(numbers))
        self.names = tuple(f"{signal.topic}.{leaves[i]}" for i in self.order)
        return numbers[self.order]

    def _usual_field(self, message: Message, content: Any) -> str:
        if message.msgtype.startswith("std_msgs/"):
            return "data"
        usual = {JOINT_STATE: "position", TRAJECTORY: "points.0.positions"}.get(message.msgtype)
        if usual is None:
            there = ", ".join(f.name for f in dataclasses.fields(content) if f.name not in ("header", "__msgtype__"))
            raise Fault(
                f"{message.place}: say which numbers of a {message.msgtype} to take by `field`; there are: {there}"
            )
        return usual

    def _find_joints(self, named: list[str], message: Message) -> None:
        missing = [joint for joint in self.signal.joints if joint not in named]
        if not named:
            raise Fault(
                f"{message.place}: name[] is empty, so the joints {', '.join(self.signal.joints)} cannot be found; "
                "if their order is known, take them by place with `index` in place of `joints`"
            )
        if missing:
            raise Fault(f"{message.place}: no joint {', '.join(missing)}; joints that are there: {', '.join(named)}")
        self.order = np.array([named.index(joint) for joint in self.signal.joints])
        self.order_of = named


def _joint_names(message: Message, content: Any) -> list[str]:
    return list(getattr(content, NAMES[message.msgtype])) if message.msgtype in NAMES else []


def _follow(content: Any, field: str, message: Message) -> Any:
    """What stands at a dotted path such as pose.position or points.0.positions."""
    for step in field.split("."):
        try:
            content = content[int(step)] if step.isdigit() else getattr(content, step)
        except (AttributeError, IndexError, TypeError):
            there = [f.name for f in dataclasses.fields(content)] if dataclasses.is_dataclass(content) else []
            there = [name for name in there if name != "__msgtype__"]
            raise Fault(
                f"{message.place}: field {field}: there is no {step}; there are: {', '.join(there) or f'{np.size(content)} elements'}"
            ) from None
    return content


def _numbers(content: Any, path: str, message: Message) -> tuple[np.ndarray, list[str]]:
    """All numbers below a field, in the order of the definition, and their dotted names."""
    if isinstance(content, (bool, int, float, np.number, np.bool_)):
        return np.array([content], np.float64), [path]
    if isinstance(content, np.ndarray) and content.dtype.kind in "iufb":
        return content.astype(np.float64), [f"{path}[{i}]" for i in range(len(content))]
    if dataclasses.is_dataclass(content):
        parts = [
            _numbers(getattr(content, f.name), f"{path}.{f.name}", message)
            for f in dataclasses.fields(content)
            if f.name != "__msgtype__"
        ]
        return np.concatenate([numbers for numbers, _ in parts]), [name for _, names in parts for name in names]
    raise Fault(f"{message.place}: field {path} is a {type(content).__name__}; expected numbers")
