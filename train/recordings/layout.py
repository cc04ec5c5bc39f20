"""Messages that differ from one another in their numbers alone: where these stand is found once, not in each of them.

A driver's JointState is the same from message to message but for its stamp and its arrays; parsing each anew would take
longer than decoding the pictures beside them. Every byte that is not a number must be that of the message that was parsed.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Any, NamedTuple

import numpy as np

STAMP = struct.Struct("<iI")  # of the header, a message's first field, in CDR and in ROS 1 behind four bytes
STAMP_AT = 4


class Layout(NamedTuple):
    """The bytes that all messages of a layout share."""

    length: int
    fixed: tuple[tuple[int, int, bytes], ...]  # from, to, what stands there

    def fits(self, rows: np.ndarray) -> np.ndarray:
        """Which of some messages of this length, (M, length) uint8, are of this layout: they then parse as the first did."""
        fits = np.ones(len(rows), bool)
        for start, stop, content in self.fixed:
            fits &= (rows[:, start:stop] == np.frombuffer(content, np.uint8)).all(axis=1)
        return fits


class Numbers(NamedTuple):
    """An array within the messages of a layout."""

    offset: int
    size: int
    dtype: np.dtype[Any]

    def of(self, rows: np.ndarray) -> np.ndarray:
        """(M, K) of M messages, (M, length) uint8."""
        stop = self.offset + self.size * self.dtype.itemsize
        return np.ascontiguousarray(rows[:, self.offset : stop]).view(self.dtype)


def layout_of(raw: bytes, content: Any) -> Layout | None:
    """The layout of a message that was parsed to `content`; none where it has no header or no array that lies in it as it is."""
    stamp = getattr(getattr(content, "header", None), "stamp", None)
    spans = [(one.offset, one.offset + one.size * one.dtype.itemsize) for one in _arrays(raw, content)]
    if not stamp or not spans or STAMP.unpack_from(raw, STAMP_AT) != (stamp.sec, stamp.nanosec):
        return None
    edges = [0, *(edge for span in sorted([(STAMP_AT, STAMP_AT + STAMP.size), *spans]) for edge in span), len(raw)]
    return Layout(len(raw), tuple((a, b, raw[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)))


def stamps_ns(rows: np.ndarray) -> np.ndarray:
    """The headers' stamps (M,) int64 of messages that fit a layout, (M, length) uint8."""
    seconds = np.ascontiguousarray(rows[:, STAMP_AT : STAMP_AT + 4]).view("<i4")[:, 0].astype(np.int64)
    return seconds * 10**9 + np.ascontiguousarray(rows[:, STAMP_AT + 4 : STAMP_AT + STAMP.size]).view("<u4")[:, 0]


def numbers_of(raw: bytes, array: Any) -> Numbers | None:
    """Where an array of a parsed message lies in it; none where parsing had to change it."""
    if (
        not isinstance(array, np.ndarray)
        or array.dtype.kind not in "iuf"
        or not isinstance(array.base, (bytes, memoryview))
    ):
        return None
    parsed = np.frombuffer(array.base, np.uint8)  # the message, or what of it comes behind its first bytes
    before = len(raw) - len(parsed)
    if before < 0 or raw[before:] != parsed.tobytes():
        return None
    return Numbers(before + array.ctypes.data - parsed.ctypes.data, array.size, array.dtype)


def _arrays(raw: bytes, content: Any) -> list[Numbers]:
    """All arrays of a message that lie in it."""
    if dataclasses.is_dataclass(content):
        return [one for f in dataclasses.fields(content) for one in _arrays(raw, getattr(content, f.name))]
    found = numbers_of(raw, content)
    return [found] if found else []
