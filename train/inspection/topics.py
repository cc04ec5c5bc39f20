"""What one topic of a bag carries: counts, rate, gaps, stamps, joints and pictures, measured message by message.

Nothing grows with the messages but their stamps; a picture is decoded only where it is looked at.
"""

from __future__ import annotations

import dataclasses
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
from rosbags.interfaces import Connection

from faults import Fault
from recordings.bags import full_name, plain
from recordings.images import CHANNELS, DEPTH, is_cut, no_picture, resize, to_rgb
from recordings.signals import IMAGES, JOINT_STATE, choose_clock

STAMP_END = 12  # of a message that begins with a header: 4 bytes of CDR's or ROS 1's own, then the stamp
GAP_PERIODS = 2.5  # a gap worth showing
LOOKED_AT = 20  # compressed pictures of a camera, spread evenly, besides those of far fewer bytes than usual
BLACK = 10  # mean brightness out of 255
SHOWN_HEIGHT = 240  # pixels, at most, of the pictures that are kept
BLOCK = 4096  # messages of joints that are looked at together
SECOND = 10**9


class Spread(NamedTuple):
    """How some differences of time are spread."""

    median: float  # ms, with its sign
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
    """The pictures of a topic."""

    kinds: dict[str, int]  # "640x480 rgb8" or "640x480 jpeg": how many
    frozen: tuple[int, ...]  # numbers of the messages whose picture is, byte for byte, the one before
    looked_at: int  # decoded, to see whether they are black; none of these three where pictures are not wanted
    black: int  # of those
    shown: tuple[Picture, ...]  # the first, the middle and the last


class Topic(NamedTuple):
    """A topic of a bag."""

    name: str
    types: tuple[str, ...]
    read: int  # messages
    stored: int  # as the storage counts them
    declared: int | None  # as metadata.yaml does, where there is one
    stamps: np.ndarray  # (read,) int64 ns, of the clock
    clock: str  # "header", or "receive (why not header)"
    not_understood: str | None  # why its messages cannot be decoded: only counts, stamps and sizes are known then
    first_s: float | None  # since the bag's first message
    last_s: float | None
    rate_hz: float | None  # median
    slowest_second_hz: float | None  # messages in the emptiest second; none where it lasts less than two
    largest_gap: Gap | None
    gaps: tuple[Gap, ...]  # all longer than GAP_PERIODS usual ones
    header_minus_receive_ms: Spread | None
    in_order: bool | None  # whether header stamps never fall
    joints: tuple[Joint, ...]
    pictures: Pictures | None


class Measure:
    """The measuring of one topic while its messages go by.

    `pictures` decodes some of them; a topic that is `wanted` as a camera has its first one decoded in any case.
    """

    def __init__(self, name: str, declared: int | None, pictures: bool, wanted: bool) -> None:
        self.name = name
        self.declared = declared
        self.stored = 0
        self.types: set[str] = set()
        self.not_understood: str | None = None
        self.receive = array("q")
        self.header = array("q")
        self.joints = _Joints()
        self.pictures = _Pictures(pictures, wanted)

    def add(self, connection: Connection, receive_ns: int, raw: bytes, decode: Decode | None, place: str) -> None:
        """A message. Raises Fault where it should be decoded and does not; it is counted all the same."""
        msgtype = full_name(connection.msgtype)
        self.receive.append(receive_ns)
        self.header.append(0)
        raw = plain(raw, place)
        try:
            stamp = self.header[-1] = decode.stamp(raw, place) if decode else 0
        except Fault as fault:
            if msgtype == JOINT_STATE or msgtype in IMAGES:
                raise
            stamp, self.not_understood = 0, str(fault)  # another release's, perhaps: nobody may have asked for it
        if msgtype == JOINT_STATE and decode:
            self.joints.add(decode(raw, place), stamp or receive_ns)
        elif msgtype in IMAGES and decode:
            total = self.declared or self.stored
            self.pictures.add(raw, decode, place, len(self.receive) - 1, total, receive_ns)

    def topic(self, start_ns: int) -> Topic:
        """What was measured; seconds count from start_ns."""
        receive, header = np.array(self.receive, np.int64), np.array(self.header, np.int64)
        stamps, clock = choose_clock(receive, header) if len(receive) else (receive, "receive (no message)")
        gaps = np.diff(stamps)
        usual = float(np.median(gaps)) if len(gaps) else 0.0

        def gap(i: int) -> Gap:
            return Gap((int(stamps[i]) - start_ns) / SECOND, float(gaps[i]) / SECOND)

        shown = np.flatnonzero(gaps > GAP_PERIODS * usual) if usual else ()
        stamped = header[header != 0]
        return Topic(
            self.name,
            tuple(sorted(self.types)),
            len(receive),
            self.stored,
            self.declared,
            stamps,
            clock,
            self.not_understood,
            (int(stamps[0]) - start_ns) / SECOND if len(stamps) else None,
            (int(stamps[-1]) - start_ns) / SECOND if len(stamps) else None,
            SECOND / usual if usual else None,
            _slowest_second(stamps),
            gap(int(gaps.argmax())) if len(gaps) else None,
            tuple(gap(int(i)) for i in shown),
            Spread.of(header[header != 0] - receive[header != 0]) if len(stamped) else None,
            bool(np.all(np.diff(stamped) >= 0)) if len(stamped) else None,
            self.joints.found(start_ns),
            self.pictures.found(start_ns) if self.pictures.kinds else None,
        )


class Decode:
    """The messages of one connection, decoded; a header's stamp without decoding."""

    def __init__(self, decode: Callable[[Connection, bytes, str], Any], connection: Connection) -> None:
        self._decode, self._connection = decode, connection
        self._packed: str | None = None  # how the header's stamp is; empty where there is no header

    def __call__(self, raw: bytes, place: str) -> Any:
        return self._decode(self._connection, raw, place)

    def stamp(self, raw: bytes, place: str) -> int:
        """The header's stamp in ns, or 0."""
        if self._packed is None:
            content = self(raw, place)
            fields = dataclasses.fields(content)
            self._packed = ""
            if fields and fields[0].name == "header" and hasattr(content.header, "stamp"):
                stamp = content.header.stamp.sec, content.header.stamp.nanosec
                self._packed = "<iI" if struct.unpack_from("<iI", raw, 4) == stamp else ">iI"
        if not self._packed or len(raw) < STAMP_END:
            return 0
        seconds, nanoseconds = struct.unpack_from(self._packed, raw, 4)
        return int(seconds * SECOND + nanoseconds)


class _Joints:
    """Ranges and fastest steps of joints by name, whatever their order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.places: dict[tuple[str, ...], np.ndarray] = {}
        self.rows, self.stamps = array("d"), array("q")  # not yet looked at
        self.seen: dict[str, tuple[int, float]] = {}  # the last stamp and position of each
        self.joints: dict[str, Joint] = {}  # with the stamp itself, in ns, for fastest_at_s

    def add(self, content: Any, stamp: int) -> None:
        named = tuple(content.name) or tuple(f"position[{i}]" for i in range(len(content.position)))
        if len(named) != len(content.position):  # a command of velocities, say; read_series tells who wants positions
            return
        places = self.places.get(named)
        if places is None:
            self.look()
            self.names += [name for name in dict.fromkeys(named) if name not in self.names]
            places = self.places[named] = np.array([self.names.index(name) for name in named], int)
        row = np.full(len(self.names), np.nan)
        row[places] = content.position
        self.rows.frombytes(row.tobytes())
        self.stamps.append(stamp)
        if len(self.stamps) == BLOCK:
            self.look()

    def look(self) -> None:
        """Look at the rows that have gathered, and let them go."""
        rows, stamps = np.array(self.rows).reshape(-1, max(1, len(self.names))), np.array(self.stamps, np.int64)
        self.rows, self.stamps = array("d"), array("q")
        for name, column in zip(self.names, rows.T, strict=True) if len(rows) else ():
            there = np.isfinite(column)
            if not there.any():
                continue
            position, at = column[there], stamps[there]
            if name in self.seen:
                at, position = np.append(self.seen[name][0], at), np.append(self.seen[name][1], position)
            self.seen[name] = int(at[-1]), float(position[-1])
            one = self.joints.get(name, Joint(name, math.inf, -math.inf, 0.0, float(at[0])))
            elapsed = np.diff(at)
            if len(elapsed):
                # a busy machine delivers in bunches what was measured a period apart
                with np.errstate(over="ignore"):  # of damaged numbers
                    speed = (
                        np.abs(np.diff(position)) / np.maximum(elapsed, max(1.0, float(np.median(elapsed)))) * SECOND
                    )
                most = int(speed.argmax())
                if speed[most] > one.fastest:
                    one = one._replace(fastest=float(speed[most]), fastest_at_s=float(at[most + 1]))
            self.joints[name] = one._replace(
                least=min(one.least, float(position.min())), greatest=max(one.greatest, float(position.max()))
            )

    def found(self, start_ns: int) -> tuple[Joint, ...]:
        self.look()
        return tuple(one._replace(fastest_at_s=(one.fastest_at_s - start_ns) / SECOND) for one in self.joints.values())


class _Pictures:
    """Sizes, frozen and black pictures of one topic."""

    def __init__(self, decoded: bool, wanted: bool) -> None:
        self.decoded, self.wanted = decoded, wanted
        self.kinds: Counter[str] = Counter()
        self.frozen = array("q")
        self.last = b""
        self.bytes = 0
        self.looked_at = self.black = 0
        self.shown: list[tuple[int, np.ndarray]] = []
        self.end: tuple[int, Any, str] | None = None  # the last picture, not decoded

    def add(self, raw: bytes, decode: Decode, place: str, number: int, total: int, stamp: int) -> None:
        """A picture; total is how many there will be."""
        content = decode(raw, place)
        self.bytes += len(raw)
        kind, colour = _kind(content, place)
        self.kinds[kind] += 1
        end = max(STAMP_END, len(raw) - 4096)  # looked at first: it is most likely to differ
        if len(raw) == len(self.last) and raw[end:] == self.last[end:] and raw[STAMP_END:] == self.last[STAMP_END:]:
            self.frozen.append(number)
        self.last = raw
        if self.wanted and number == 0:
            to_rgb(content, place)  # raises the Fault of what no camera gives
        if not colour or not self.decoded:
            return
        small = len(raw) < 0.4 * self.bytes / (number + 1)  # as a black picture is, once compressed
        if number % max(1, total // LOOKED_AT) == 0 or small or hasattr(content, "encoding"):
            self.looked_at += 1
            self.black += bool(_brightness(content, place) < BLACK)
        if number in (0, total // 2):
            self.shown.append((stamp, _small(to_rgb(content, place))))
        self.end = stamp, content, place

    def found(self, start_ns: int) -> Pictures:
        shown = self.shown
        if self.end and self.end[0] > (shown[-1][0] if shown else -1):
            shown = [*shown, (self.end[0], _small(to_rgb(*self.end[1:])))]
        pictures = tuple(Picture((stamp - start_ns) / SECOND, pixels) for stamp, pixels in shown)
        return Pictures(dict(self.kinds), tuple(self.frozen), self.looked_at, self.black, pictures)


def _kind(content: Any, place: str) -> tuple[str, bool]:
    """(size and encoding of a picture, whether it is one in colour or grey), without decoding it."""
    if hasattr(content, "encoding"):
        return f"{content.width}x{content.height} {content.encoding}", content.encoding in CHANNELS
    if any(depth in content.format for depth in DEPTH):
        return content.format, False
    try:
        if is_cut(content.data):
            raise OSError("its end is missing")
        with Image.open(io.BytesIO(content.data)) as picture:
            return f"{picture.width}x{picture.height} {(picture.format or '').lower()}", True
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise no_picture(content.data, content.format, place) from None


def _brightness(content: Any, place: str) -> float:
    """The mean of a picture, 0 to 255; of a compressed one at an eighth of its size, which is quicker."""
    if not hasattr(content, "encoding"):
        try:
            grey = cv2.imdecode(np.asarray(content.data), cv2.IMREAD_REDUCED_GRAYSCALE_8)
        except cv2.error:
            grey = None
        if grey is not None:
            return float(grey.mean())
    return float(to_rgb(content, place).mean())  # raises the Fault of what does not decode


def _small(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    scale = min(1.0, SHOWN_HEIGHT / height)
    return resize(pixels, (round(height * scale), max(1, round(width * scale))))


def _slowest_second(stamps: np.ndarray) -> float | None:
    """Messages in the emptiest second between the first and the last."""
    if len(stamps) < 2 or stamps[-1] - stamps[0] < 2 * SECOND:
        return None
    ordered = np.sort(stamps)
    after = ordered[ordered <= ordered[-1] - SECOND]  # the emptiest begins right behind a message
    return float((np.searchsorted(ordered, after + SECOND, side="right") - np.arange(1, len(after) + 1)).min())
