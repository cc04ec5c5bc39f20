"""What one topic of a bag contains: counts, rate, gaps, stamps, joints and pictures, measured message by message.

Pictures are decoded only where they are looked at, and three of them are kept.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import struct
from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from faults import Fault
from recordings.bags import Message, plain
from recordings.images import CHANNELS, is_depth, is_truncated, no_picture, resize, to_rgb
from recordings.plausibility import period_ns
from recordings.signals import IMAGES, JOINT_STATE, choose_clock, header_stamp
from recordings.video import Video, codec, rgb

STAMP_END = 12  # of a message with a header: 4 bytes of CDR or ROS 1, then the stamp
GAP_PERIODS = 2.5  # a longer pause is a gap
LOOKED_AT = 20  # compressed pictures of a camera to decode, spread evenly, besides those of far fewer bytes than usual
BLACK = 10  # mean brightness of 255
SHOWN_HEIGHT = 240  # pixels, at most, of the kept pictures
SECOND = 10**9


class Spread(NamedTuple):
    """The distribution of time differences, in ms."""

    median: float  # signed
    percentile_95: float  # of the magnitudes
    greatest: float  # of the magnitudes

    @staticmethod
    def of(nanoseconds: np.ndarray) -> Spread:
        size = np.abs(nanoseconds) / 1e6
        return Spread(float(np.median(nanoseconds)) / 1e6, float(np.percentile(size, 95)), float(size.max()))


class Gap(NamedTuple):
    """A time without messages; at_s is since the bag's first message."""

    at_s: float
    seconds: float


class Joint(NamedTuple):
    """A joint's position over a bag, in the recording's units; `fastest` is per second, between two messages."""

    name: str
    least: float
    greatest: float
    fastest: float
    fastest_at_s: float
    not_finite: int  # messages


class Picture(NamedTuple):
    """A camera's picture (H, W, 3) uint8 RGB, at most SHOWN_HEIGHT high."""

    at_s: float
    pixels: np.ndarray


class Pictures(NamedTuple):
    """The pictures of a topic; those from looked_at on are empty where they are not wanted."""

    kinds: dict[str, int]  # "640x480 rgb8" or "640x480 jpeg": count
    frozen: tuple[int, ...]  # numbers of the messages whose picture equals the one before, byte for byte
    looked_at: int  # decoded, to find black ones
    black: int
    unusable: str  # why its first picture cannot be trained on; empty if it can
    shown: tuple[Picture, ...]  # the first, one near the middle, the last


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
    publishers: tuple[tuple[str, ...], ...]  # the different joints that its messages name, a tuple each
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
        self.pictures = _Pictures(pictures, is_camera, declared)
        self.stamps, self.clock = np.zeros(0, np.int64), "receive (no messages)"

    def add(self, message: Message) -> None:
        """Count a message and measure it. Raises Fault if a message of joints or pictures does not decode."""
        self.receive.append(message.receive_ns)
        self.header.append(0)
        if self.not_understood:
            return
        raw = plain(message.raw)
        if message.msgtype != JOINT_STATE and message.msgtype not in IMAGES:
            try:
                self.header[-1] = self._header_stamp(message, raw)
            except Fault as fault:
                self.not_understood = str(fault)  # perhaps another release's; nobody may need it
            return
        content = message.content()
        self.header[-1] = header_stamp(content)
        if message.msgtype in IMAGES:
            self.pictures.add(content, raw, message)
            return
        names = tuple(content.name) or ("",) * len(content.position)
        if "" in names or len(set(names)) < len(names):
            unclear = {name for name in names if not name or names.count(name) > 1}
            names = tuple(f"position[{i}]" if name in unclear else name for i, name in enumerate(names))
        if len(names) == len(content.position):  # not so in a command of velocities
            rows, stamps = self.joints.setdefault(names, (array("d"), array("q")))
            rows.frombytes(content.position.astype(np.float64).tobytes())
            stamps.append(self.header[-1] or message.receive_ns)

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
        seconds, nanoseconds = struct.unpack_from(form, raw, 4) if form and len(raw) >= STAMP_END else (0, 0)
        return int(seconds * SECOND + nanoseconds)

    def check(self) -> None:
        """Choose the clock, and decode the last picture. Raises Fault with what is wrong."""
        faults: list[str] = []
        receive, header = np.array(self.receive, np.int64), np.array(self.header, np.int64)
        try:
            if len(receive):
                self.stamps, self.clock = choose_clock(receive, header)
        except Fault as fault:
            faults = [*fault.args]
            self.stamps, self.clock = receive, "receive (no clock can be trusted)"
        try:
            self.pictures.finish()
        except Fault as fault:
            faults += fault.at("last message").args
        if faults:
            raise Fault(*faults)

    def topic(self, start_ns: int) -> Topic:
        """The measured topic, after check(); seconds count from start_ns."""
        stamps, receive, header = self.stamps, np.array(self.receive, np.int64), np.array(self.header, np.int64)
        pauses, stamped = np.diff(stamps), (header != 0) & (receive != 0)
        headers = header[header != 0]
        usual = period_ns(stamps)
        gaps = [
            Gap((int(at) - start_ns) / SECOND, float(pause) / SECOND) for at, pause in zip(stamps, pauses, strict=False)
        ]
        return Topic(
            self.name,
            tuple(sorted(self.types)),
            len(receive),
            self.declared,
            stamps,
            self.clock,
            self.not_understood,
            rate_hz=SECOND / usual if usual else None,
            slowest_second_hz=_slowest_second(stamps),
            largest_gap=max(gaps, key=lambda gap: gap.seconds, default=None),
            gaps=tuple(gap for gap in gaps if usual and gap.seconds * SECOND > GAP_PERIODS * usual),
            header_minus_receive_ms=Spread.of(header[stamped] - receive[stamped]) if stamped.any() else None,
            in_order=bool(np.all(np.diff(headers) >= 0)) if len(headers) else None,
            joints=tuple(self._joints(start_ns)),
            publishers=tuple({frozenset(names): names for names in reversed(self.joints) if names}.values())[::-1],
            pictures=self.pictures.measured(start_ns) if self.pictures.kinds or self.pictures.unusable else None,
        )

    def _joints(self, start_ns: int) -> list[Joint]:
        """Range and fastest step of each joint, in whatever order its messages name it."""
        joints = []
        tables = [
            (names, np.array(r).reshape(-1, len(names)), np.array(s)) for names, (r, s) in self.joints.items() if names
        ]
        for joint in dict.fromkeys(name for names, _, _ in tables for name in names):
            columns = [(rows[:, names.index(joint)], stamps) for names, rows, stamps in tables if joint in names]
            position, at = (np.concatenate(parts) for parts in zip(*columns, strict=True))
            order = np.argsort(at, kind="stable")
            finite = np.isfinite(position[order])
            position, at = position[order][finite], at[order][finite]
            if not len(position):
                joints.append(Joint(joint, math.nan, math.nan, math.nan, math.nan, len(finite)))
                continue
            elapsed = np.diff(at)
            with np.errstate(over="ignore"):  # damaged numbers
                # a busy machine delivers in bursts what was measured a period apart
                period = np.maximum(elapsed, max(1.0, period_ns(at)))
                speed = np.append(0.0, np.abs(np.diff(position)) / period * SECOND)
            most, seconds = int(speed.argmax()), (at - start_ns) / SECOND
            span = float(position.min()), float(position.max())
            unknown = int(np.count_nonzero(~finite))
            joints.append(Joint(joint, *span, float(speed[most]), float(seconds[most]), unknown))
        return joints


class _Pictures:
    """Sizes, frozen and black pictures of one topic."""

    def __init__(self, decoded: bool, is_camera: bool, declared: int | None) -> None:
        self.decoded, self.is_camera, self.declared = decoded, is_camera, declared
        self.kinds: Counter[str] = Counter()
        self.frozen = array("q")
        self.last = b""
        self.unusable = ""
        self.bytes = self.looked_at = self.black = 0
        self.kept: list[Picture] = []  # the first, and at least one near the middle; at_s in ns
        self.end: tuple[int, Callable[[], np.ndarray]] | None = None  # the last picture, not decoded
        self.video: Video | None = None

    def add(self, content: Any, raw: bytes, message: Message) -> None:
        number = message.number
        self.bytes += len(raw)
        if name := codec(content):
            self._add_video(name, content.data.tobytes(), message)
            return
        kind, is_color = _kind(content)
        self.kinds[kind] += 1
        end = max(STAMP_END, len(raw) - 4096)  # compared first: most likely to differ
        if len(raw) == len(self.last) and raw[end:] == self.last[end:] and raw[STAMP_END:] == self.last[STAMP_END:]:
            self.frozen.append(number)
        self.last = raw
        if number == 0:
            try:
                to_rgb(content)
            except Fault as fault:  # of what no camera sends
                self.unusable = str(fault)
                if self.is_camera:
                    raise
        if not is_color or not self.decoded:
            return
        is_small = len(raw) < 0.4 * self.bytes / (number + 1)  # as a black picture is, compressed
        look, keep = self._samples(number)
        if look or is_small or hasattr(content, "encoding"):
            self.looked_at += 1
            self.black += bool(_brightness(content) < BLACK)
        if keep:
            self.kept.append(Picture(message.receive_ns, _small(to_rgb(content))))
        self.end = message.receive_ns, lambda: to_rgb(content)

    def _samples(self, number: int) -> tuple[bool, bool]:
        """Whether to look at a picture by its number, and whether to keep it."""
        doubling = 1 << max(0, number.bit_length() - 5)  # without a metadata.yaml the total is unknown
        if not self.declared:
            return number % doubling == 0, number % (4 * doubling) == 0
        return number % max(1, self.declared // LOOKED_AT) == 0, number in (0, self.declared // 2)

    def _add_video(self, name: str, data: bytes, message: Message) -> None:
        """Decode a message of video, as all that follow need it."""
        if self.video is None:
            self.video = Video(name)
            self.unusable = f"{self.video.name} video without a key frame"
        try:
            if self.kinds and not self.decoded:
                self.kinds[next(iter(self.kinds))] += self.video.holds_picture(data)
                return
            for _, frame in self.video.decode(message.number, data):
                look, keep = self._samples(self.kinds.total())
                self.kinds[f"{frame.width}x{frame.height} {self.video.name}"] += 1
                self.unusable, pixels = "", rgb(frame) if look or keep else None
                if look and pixels is not None:
                    self.looked_at += 1
                    self.black += bool(pixels.mean() < BLACK)
                if keep and pixels is not None:
                    self.kept.append(Picture(message.receive_ns, _small(pixels)))
                self.end = message.receive_ns, functools.partial(rgb, frame)
        except Fault as fault:
            self.unusable = str(fault)
            raise

    def finish(self) -> None:
        """Keep the last picture. Raises Fault if it does not decode."""
        if self.end and self.end[0] > (self.kept[-1].at_s if self.kept else -1):
            self.kept.append(Picture(self.end[0], _small(self.end[1]())))

    def measured(self, start_ns: int) -> Pictures:
        pictures = [*self.kept]
        if len(pictures) > 2:
            middle = (pictures[0].at_s + pictures[-1].at_s) / 2
            pictures[1:-1] = [min(pictures[1:-1], key=lambda picture: abs(picture.at_s - middle))]
        shown = tuple(Picture((picture.at_s - start_ns) / SECOND, picture.pixels) for picture in pictures)
        return Pictures(dict(self.kinds), tuple(self.frozen), self.looked_at, self.black, self.unusable, shown)


def _kind(content: Any) -> tuple[str, bool]:
    """(size and encoding of a picture, whether it is color or grey), without decoding it. Raises Fault."""
    if hasattr(content, "encoding"):
        return f"{content.width}x{content.height} {content.encoding}", content.encoding in CHANNELS
    if is_depth(content):
        return f"{content.format} of more than 8 bits", False
    try:
        with Image.open(io.BytesIO(content.data)) as picture:
            kind = f"{picture.width}x{picture.height} {(picture.format or '').lower()}"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise no_picture(content.data, content.format) from None
    if is_truncated(content.data):
        raise no_picture(content.data, content.format)
    return kind, True


def _brightness(content: Any) -> float:
    """The mean of a picture, 0 to 255; a compressed one is decoded at an eighth of its size, which is faster."""
    grey = None
    if not hasattr(content, "encoding") and len(content.data):
        grey = cv2.imdecode(np.asarray(content.data), cv2.IMREAD_REDUCED_GRAYSCALE_8)
    return float((to_rgb(content) if grey is None else grey).mean())  # to_rgb raises the fault


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
