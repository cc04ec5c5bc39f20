"""What MCAP files and ROS bags share: chunks of messages, packed or not, with the checksums that their packing brings along."""

from __future__ import annotations

import bz2
import sys
from collections.abc import Callable
from typing import NamedTuple

import lz4.frame

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
NO_SUM = "none"
LZ4_SUMS, ZSTD_SUM = (
    0b10100,
    0b100,
)  # bits of the frames' descriptors: LZ4's block and content checksums, zstd's checksum
Packed = bytes | memoryview
UNPACK: dict[str, Callable[[Packed], Packed]] = {
    "": lambda packed: packed,
    "none": lambda packed: packed,
    "lz4": lz4.frame.decompress,
    "zstd": zstd.decompress,
    "bz2": bz2.decompress,
}


class Damage(Exception):
    """A contradiction, and at which byte of the file it stands, where that is known."""

    def __init__(self, at: int | None, what: str) -> None:
        super().__init__(f": {what}" if at is None else f" at byte {at}: {what}")


class Entry(NamedTuple):
    """A message, as its chunk has it or as an index says."""

    channel: int  # or connection
    time: int  # ns
    offset: int  # within its chunk, unpacked


def unpack(packing: str, packed: Packed, size: int, at: int) -> Packed:
    """The content of a chunk that stands at a byte of its file and should be of some size. Raises Damage."""
    if packing not in UNPACK:
        raise Damage(at, f"a chunk packed by {packing!r}")
    try:
        raw = UNPACK[packing](packed)
    except Exception as error:  # each library has its own
        raise Damage(at, f"a chunk that does not unpack ({' '.join(str(error).split())[:80]})") from None
    if len(raw) != size:
        raise Damage(at, f"a chunk that unpacks to {len(raw)} bytes and says {size}")
    return raw


def sum_of(packing: str, packed: Packed) -> str:
    """The checksum that a packing brings along, in words."""
    if packing == "bz2":
        return "bz2's CRCs"
    if packing == "lz4":
        return "LZ4's checksums" if len(packed) > 4 and packed[4] & LZ4_SUMS else NO_SUM
    return zstd_sum(packed) if packing == "zstd" else NO_SUM


def zstd_sum(frame: Packed) -> str:
    """The checksum of a zstd frame, in words."""
    return "zstd's checksum" if len(frame) > 4 and frame[4] & ZSTD_SUM else NO_SUM
