"""What one topic of a bag carries: counts, rate, gaps, stamps, joints and pictures, measured message by message.

Nothing grows with the messages but their stamps; a picture is decoded only where it is looked at.
"""

from __future__ import annotations

import dataclasses
import io
import struct
from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image
from rosbags.interfaces import Connection

from bags import full_name
from faults import Fault
from images import DEPTH, JPEG_BEGIN, JPEG_END, resize, to_rgb
from signals import IMAGES, JOINT_STATE, choose_clock

STAMP_END = 12  # of a message that begins with a header: 4 bytes of CDR's or ROS 1's own, then the stamp
GAP_PERIODS = 2.5  # a gap worth showing
LOOKED_AT = 20  # pictures of a camera, spread evenly, besides those of far fewer bytes than usual
BLACK = 10  # mean brightness out of 255
SHOWN_HEIGHT = 240  # pixels, at most, of the pictures that are kept
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
    """The measuring of one topic while its messages go by."""

    def __init__(self, name: str, declared: int | None, pictures: bool) -> None:
        self.name = name
        self.declared = declared
        self.stored = 0
        self.types: set[str] = set()
        self.not_understood: str | None = None
        self.receive = array("q")
        self.header = array("q")
        self.joints = _Joints()
        self.pictures = _Pictures(pictures)

    def add(self, connection: Connection, receive_ns: int, raw: bytes, decode: Decode | None, place: str) -> None:
        """A message. Raises Fault where it should be decoded and does not; it is counted all the same."""
        msgtype = full_name(connection.msgtype)
        self.receive.append(receive_ns)
        self.header.append(0)
        stamp = self.header[-1] = decode.stamp(raw, place) if decode else 0
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
        self.table = np.zeros((6, 0))  # least, greatest, last position, last time, fastest, its time
        self.first_ns = 0
        self.count = 0

    def add(self, content: Any, stamp: int) -> None:
        named = tuple(content.name) or tuple(f"position[{i}]" for i in range(len(content.position)))
        if len(named) != len(content.position):
            return
        places = self.places.get(named)
        if places is None:
            self.names += [name for name in dict.fromkeys(named) if name not in self.names]
            new = np.tile(np.array([[np.inf], [-np.inf], [np.nan], [np.nan], [0], [0]]), len(self.names))
            new[:, : self.table.shape[1]] = self.table
            self.table = new
            places = self.places[named] = np.array([self.names.index(name) for name in named], int)
        self.first_ns = self.first_ns or stamp
        self.count += 1
        seconds = (stamp - self.first_ns) / SECOND
        now = np.asarray(content.position)
        least, greatest, last, at, fastest, fastest_at = self.table[:, places]
        elapsed = seconds - at
        # messages that a busy machine delivered in a bunch are taken as one step
        apart = (elapsed > 0.5 * seconds / self.count) | np.isnan(at)
        speed = np.where(apart, np.abs(now - last) / np.where(elapsed > 0, elapsed, np.nan), 0.0)
        faster = speed > fastest
        self.table[:, places] = (
            np.fmin(least, now),
            np.fmax(greatest, now),
            np.where(apart, now, last),
            np.where(apart, seconds, at),
            np.where(faster, speed, fastest),
            np.where(faster, seconds, fastest_at),
        )

    def found(self, start_ns: int) -> tuple[Joint, ...]:
        offset = (self.first_ns - start_ns) / SECOND
        return tuple(
            Joint(name, *map(float, (least, greatest, fastest, at + offset)))
            for name, least, greatest, fastest, at in zip(self.names, *self.table[[0, 1, 4, 5]], strict=True)
        )


class _Pictures:
    """Sizes, frozen and black pictures of one topic."""

    def __init__(self, decoded: bool) -> None:
        self.decoded = decoded
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
        kind, depth = _kind(content, raw, place)
        self.kinds[kind] += 1
        end = max(STAMP_END, len(raw) - 4096)  # looked at first: it is most likely to differ
        if len(raw) == len(self.last) and raw[end:] == self.last[end:] and raw[STAMP_END:] == self.last[STAMP_END:]:
            self.frozen.append(number)
        self.last = raw
        if depth or not self.decoded:
            return
        small = len(raw) < 0.4 * self.bytes / (number + 1)  # as a black picture is, once compressed
        if number % max(1, total // LOOKED_AT) == 0 or small:
            self.looked_at += 1
            self.black += bool(_brightness(content, raw, place) < BLACK)
        if number in (0, total // 2):
            self.shown.append((stamp, _small(to_rgb(content, place))))
        self.end = stamp, content, place

    def found(self, start_ns: int) -> Pictures:
        shown = self.shown
        if self.end and self.end[0] > (shown[-1][0] if shown else -1):
            shown = [*shown, (self.end[0], _small(to_rgb(*self.end[1:])))]
        pictures = tuple(Picture((stamp - start_ns) / SECOND, pixels) for stamp, pixels in shown)
        return Pictures(dict(self.kinds), tuple(self.frozen), self.looked_at, self.black, pictures)


def _kind(content: Any, raw: bytes, place: str) -> tuple[str, bool]:
    """(size and encoding of a picture, whether it holds depth), without decoding it."""
    if hasattr(content, "encoding"):
        return f"{content.width}x{content.height} {content.encoding}", content.encoding in DEPTH
    if any(depth in content.format for depth in DEPTH):
        return content.format, True
    try:
        if content.data[:2].tobytes() == JPEG_BEGIN and raw.rfind(JPEG_END) < 0:
            raise OSError("its end is missing")
        with Image.open(io.BytesIO(content.data)) as picture:
            return f"{picture.width}x{picture.height} {(picture.format or '').lower()}", False
    except (OSError, SyntaxError, ValueError) as error:
        raise Fault(
            f"{place}: {len(content.data)} bytes of format {content.format!r} do not decode as a picture "
            f"({' '.join(str(error).split())[:80]}); the file is damaged or the recorder cut it short: leave the recording out"
        ) from None


def _brightness(content: Any, raw: bytes, place: str) -> float:
    """The mean of a picture, 0 to 255."""
    if not hasattr(content, "encoding"):
        grey = cv2.imdecode(np.asarray(content.data), cv2.IMREAD_REDUCED_GRAYSCALE_8)
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
    begin = np.arange(ordered[0], ordered[-1] - SECOND, SECOND // 10)
    return float((np.searchsorted(ordered, begin + SECOND) - np.searchsorted(ordered, begin)).min())
