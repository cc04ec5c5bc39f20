"""What one topic of a bag contains: counts, rate, gaps, stamps, joints and pictures, measured message by message.

Pictures are decoded only where they are looked at, and three of them are kept.
"""

from __future__ import annotations

import dataclasses
import io
import struct
from array import array
from collections import Counter
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from faults import Fault
from recordings.bags import Message, plain
from recordings.images import CHANNELS, DEPTH, is_truncated, no_picture, resize, to_rgb
from recordings.signals import IMAGES, JOINT_STATE, choose_clock

STAMP_END = 12  # of a message with a header: 4 bytes of CDR or ROS 1, then the stamp
GAP_PERIODS = 2.5  # a longer pause is a gap
LOOKED_AT = 20  # compressed pictures of a camera to decode, spread evenly, besides those of far fewer bytes than usual
BLACK = 10  # mean brightness of 255
SHOWN_HEIGHT = 240  # pixels, at most, of the kept pictures
SECOND = 10**9


class Spread(NamedTuple):
    """The distribution of time differences."""

    median: float  # ms, signed
    percentile_95: float  # ms, of the magnitudes
    greatest: float  # ms, of the magnitudes

    @staticmethod
    def of(nanoseconds: np.ndarray) -> Spread:
        size = np.abs(nanoseconds) / 1e6
        return Spread(float(np.median(nanoseconds)) / 1e6, float(np.percentile(size, 95)), float(size.max()))


class Gap(NamedTuple):
    """A time without messages."""

    at_s: float  # since the bag's first message
    seconds: float


class Joint(NamedTuple):
    """A joint's position over a bag, in the recording's units."""

    name: str
    least: float
    greatest: float
    fastest: float  # units per second between two messages
    fastest_at_s: float


class Picture(NamedTuple):
    """A camera's picture."""

    at_s: float
    pixels: np.ndarray  # (H, W, 3) uint8 RGB, at most SHOWN_HEIGHT high


class Pictures(NamedTuple):
    """The pictures of a topic; the last three fields are empty where pictures are not wanted."""

    kinds: dict[str, int]  # "640x480 rgb8" or "640x480 jpeg": count
    frozen: tuple[int, ...]  # numbers of the messages whose picture equals the one before, byte for byte
    looked_at: int  # decoded, to find black ones
    black: int  # of those
    shown: tuple[Picture, ...]  # the first, the middle and the last


class Topic(NamedTuple):
    """A topic of a bag."""

    name: str
    types: tuple[str, ...]
    read: int  # messages
    declared: int | None  # messages by metadata.yaml, if there is one
    stamps: np.ndarray  # (read,) int64 ns, on the clock
    clock: str  # "header", or "receive (why not header)"
    not_understood: str | None  # why its messages cannot be decoded; then only counts and receive stamps are known
    rate_hz: float | None  # median
    slowest_second_hz: float | None  # messages in the emptiest second; None if it lasts less than two
    largest_gap: Gap | None
    gaps: tuple[Gap, ...]  # all longer than GAP_PERIODS periods
    header_minus_receive_ms: Spread | None
    in_order: bool | None  # whether header stamps never decrease
    joints: tuple[Joint, ...]
    pictures: Pictures | None


class Measure:
    """Measures one topic, message by message; `pictures` decodes some, `is_camera` at least the first."""

    def __init__(self, name: str, declared: int | None, pictures: bool, is_camera: bool) -> None:
        self.name, self.declared = name, declared
        self.types: set[str] = set()
        self.not_understood: str | None = None
        self.receive, self.header = array("q"), array("q")
        self.stamp_form: dict[str, str] = {}  # type: how its header's stamp is packed; "" without a header
        self.joints: dict[tuple[str, ...], tuple[array[float], array[int]]] = {}  # names: positions, stamps
        self.pictures = _Pictures(pictures, is_camera)

    def add(self, message: Message) -> None:
        """Count a message and measure it. Raises Fault if a message of joints or pictures does not decode."""
        self.receive.append(message.receive_ns)
        self.header.append(0)
        if self.not_understood:
            return
        raw = plain(message.raw)
        is_joints = message.msgtype == JOINT_STATE
        if is_joints or message.msgtype in IMAGES:
            content = message.content()
            self.header[-1] = stamp = content.header.stamp.sec * SECOND + content.header.stamp.nanosec
            if is_joints:
                self._add_joints(content, stamp or message.receive_ns)
            else:
                self.pictures.add(content, raw, message, self.declared)
            return
        try:
            self.header[-1] = self._header_stamp(message, raw)
        except Fault as fault:
            self.not_understood = str(fault)  # perhaps another release's; nobody may need it

    def _header_stamp(self, message: Message, raw: bytes) -> int:
        """The header's stamp in ns, or 0; only the first message of a type is decoded."""
        if message.msgtype not in self.stamp_form:
            content, form = message.content(), ""
            fields = dataclasses.fields(content)
            if fields and fields[0].name == "header" and hasattr(content.header, "stamp"):
                stamp = content.header.stamp.sec, content.header.stamp.nanosec
                form = "<iI" if struct.unpack_from("<iI", raw, 4) == stamp else ">iI"
            self.stamp_form[message.msgtype] = form
        form = self.stamp_form[message.msgtype]
        if not form or len(raw) < STAMP_END:
            return 0
        seconds, nanoseconds = struct.unpack_from(form, raw, 4)
        return int(seconds * SECOND + nanoseconds)

    def _add_joints(self, content: Any, stamp: int) -> None:
        names = tuple(content.name) or tuple(f"position[{i}]" for i in range(len(content.position)))
        if len(names) == len(content.position):  # not so in a command of velocities
            rows, stamps = self.joints.setdefault(names, (array("d"), array("q")))
            rows.frombytes(content.position.astype(np.float64).tobytes())
            stamps.append(stamp)

    def topic(self, start_ns: int) -> Topic:
        """The measured topic; seconds count from start_ns."""
        receive, header = np.array(self.receive, np.int64), np.array(self.header, np.int64)
        stamps, clock = choose_clock(receive, header) if len(receive) else (receive, "receive (no messages)")
        pauses = np.diff(stamps)
        usual = float(np.median(pauses)) if len(pauses) else 0.0

        def gap(i: int) -> Gap:
            return Gap((int(stamps[i]) - start_ns) / SECOND, float(pauses[i]) / SECOND)

        long = np.flatnonzero(pauses > GAP_PERIODS * usual) if usual else ()
        stamped = header != 0
        return Topic(
            name=self.name,
            types=tuple(sorted(self.types)),
            read=len(receive),
            declared=self.declared,
            stamps=stamps,
            clock=clock,
            not_understood=self.not_understood,
            rate_hz=SECOND / usual if usual else None,
            slowest_second_hz=_slowest_second(stamps),
            largest_gap=gap(int(pauses.argmax())) if len(pauses) else None,
            gaps=tuple(gap(int(i)) for i in long),
            header_minus_receive_ms=Spread.of(header[stamped] - receive[stamped]) if stamped.any() else None,
            in_order=bool(np.all(np.diff(header[stamped]) >= 0)) if stamped.any() else None,
            joints=tuple(self._joints(start_ns)),
            pictures=self.pictures.measured(start_ns) if self.pictures.kinds else None,
        )

    def _joints(self, start_ns: int) -> list[Joint]:
        """Range and fastest step of each joint, in whatever order its messages name it."""
        joints = []
        tables = [
            (names, np.array(r).reshape(-1, len(names)), np.array(s)) for names, (r, s) in self.joints.items() if names
        ]
        for joint in dict.fromkeys(name for names, _, _ in tables for name in names):
            found = [(rows[:, names.index(joint)], stamps) for names, rows, stamps in tables if joint in names]
            position, at = np.concatenate([p for p, _ in found]), np.concatenate([s for _, s in found])
            position, at = position[np.isfinite(position)], at[np.isfinite(position)]
            if not len(position):
                continue
            order = np.argsort(at, kind="stable")
            position, at, elapsed = position[order], at[order], np.diff(at[order])
            with np.errstate(over="ignore"):  # damaged numbers
                # a busy machine delivers in bursts what was measured a period apart
                period = np.maximum(elapsed, max(1.0, float(np.median(elapsed)))) if len(elapsed) else elapsed
                speed = np.append(0.0, np.abs(np.diff(position)) / period * SECOND)
            most = int(speed.argmax())
            seconds = (int(at[most]) - start_ns) / SECOND
            joints.append(Joint(joint, float(position.min()), float(position.max()), float(speed[most]), seconds))
        return joints


class _Pictures:
    """Sizes, frozen and black pictures of one topic."""

    def __init__(self, decoded: bool, is_camera: bool) -> None:
        self.decoded, self.is_camera = decoded, is_camera
        self.kinds: Counter[str] = Counter()
        self.frozen = array("q")
        self.last = b""
        self.bytes = self.looked_at = self.black = 0
        self.spaced: list[Picture] = []  # the first, and some of which one is near the middle
        self.end: tuple[int, Any] | None = None  # the last picture, not decoded

    def add(self, content: Any, raw: bytes, message: Message, declared: int | None) -> None:
        number = message.number
        self.bytes += len(raw)
        kind, is_color = _kind(content)
        self.kinds[kind] += 1
        end = max(STAMP_END, len(raw) - 4096)  # compared first: most likely to differ
        if len(raw) == len(self.last) and raw[end:] == self.last[end:] and raw[STAMP_END:] == self.last[STAMP_END:]:
            self.frozen.append(number)
        self.last = raw
        if self.is_camera and number == 0:
            to_rgb(content)  # raises the fault of what no camera sends
        if not is_color or not self.decoded:
            return
        doubling = 1 << max(0, number.bit_length() - 5)  # without a metadata.yaml the total is unknown
        every = max(1, declared // LOOKED_AT) if declared else doubling
        is_small = len(raw) < 0.4 * self.bytes / (number + 1)  # as a black picture is, compressed
        if number % every == 0 or is_small or hasattr(content, "encoding"):
            self.looked_at += 1
            self.black += bool(_brightness(content) < BLACK)
        if number in (0, declared // 2) if declared else number % (4 * doubling) == 0:
            self.spaced.append(Picture(message.receive_ns, _small(to_rgb(content))))
        self.end = message.receive_ns, content

    def measured(self, start_ns: int) -> Pictures:
        pictures = [*self.spaced]
        if self.end and self.end[0] > (pictures[-1].at_s if pictures else -1):
            pictures.append(Picture(self.end[0], _small(to_rgb(self.end[1]))))
        if len(pictures) > 2:
            middle = (pictures[0].at_s + pictures[-1].at_s) / 2
            nearest = min(pictures[1:-1], key=lambda picture: abs(picture.at_s - middle))
            pictures = [pictures[0], nearest, pictures[-1]]
        shown = tuple(Picture((picture.at_s - start_ns) / SECOND, picture.pixels) for picture in pictures)
        return Pictures(dict(self.kinds), tuple(self.frozen), self.looked_at, self.black, shown)


def _kind(content: Any) -> tuple[str, bool]:
    """(size and encoding of a picture, whether it is color or grey), without decoding it. Raises Fault."""
    if hasattr(content, "encoding"):
        return f"{content.width}x{content.height} {content.encoding}", content.encoding in CHANNELS
    if any(depth in content.format for depth in DEPTH):
        return content.format, False
    try:
        if is_truncated(content.data):
            raise OSError("truncated")
        with Image.open(io.BytesIO(content.data)) as picture:
            return f"{picture.width}x{picture.height} {(picture.format or '').lower()}", True
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise no_picture(content.data, content.format) from None


def _brightness(content: Any) -> float:
    """The mean of a picture, 0 to 255; a compressed one is decoded at an eighth of its size, which is faster."""
    if not hasattr(content, "encoding"):
        try:
            grey = cv2.imdecode(np.asarray(content.data), cv2.IMREAD_REDUCED_GRAYSCALE_8)
        except cv2.error:
            grey = None
        if grey is not None:
            return float(grey.mean())
    return float(to_rgb(content).mean())  # raises the fault of what does not decode


def _small(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    scale = min(1.0, SHOWN_HEIGHT / height)
    return resize(pixels, (round(height * scale), max(1, round(width * scale))))


def _slowest_second(stamps: np.ndarray) -> float | None:
    """Messages in the emptiest second between the first and the last."""
    if len(stamps) < 2 or stamps[-1] - stamps[0] < 2 * SECOND:
        return None
    ordered = np.sort(stamps)
    after = ordered[ordered <= ordered[-1] - SECOND]  # the emptiest second starts right after a message
    return float((np.searchsorted(ordered, after + SECOND, side="right") - np.arange(1, len(after) + 1)).min())
