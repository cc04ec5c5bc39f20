"""An MCAP file, record by record, held against itself. https://mcap.dev/spec

Its summary repeats what its data says: definitions, where each chunk stands, how many messages each channel has. Behind each
chunk stand indexes of its messages. What is not there is no contradiction: a recorder may leave out any of these.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zlib import crc32

from recordings.chunks import NO_SUM, Damage, Entry, sum_of, unpack

MAGIC = b"\x89MCAP0\r\n"
HEADER, FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK, MESSAGE_INDEX, CHUNK_INDEX = range(1, 9)
ATTACHMENT, ATTACHMENT_INDEX, STATISTICS, METADATA, METADATA_INDEX, SUMMARY_OFFSET, DATA_END = range(9, 16)
PRIVATE = 0x80  # from here on record types of other programs
HEAD = struct.Struct("<BQ")  # of a record: its type and the length of what follows


class ChunkIndex(NamedTuple):
    """What the summary says of a chunk, in its order."""

    first: int  # ns
    last: int
    at: int  # byte of the file
    length: int  # with its head
    indexes: dict[int, int]  # channel: byte of the file
    indexes_length: int
    packing: str
    packed_size: int
    size: int


def walk_mcap(file: Path, sums: Counter[str]) -> None:
    """Raises Damage at the first contradiction; what checksums there are is counted in `sums`."""
    with file.open("rb") as content:
        end = content.seek(0, 2) - len(MAGIC)
        content.seek(0)
        if content.read(len(MAGIC)) != MAGIC:
            raise Damage(0, "it does not begin as an MCAP file does")
        data, summary = _Data(sums), _Summary()
        summed = _has_data_crc(content, end)
        data_crc, summary_crc, summary_at, last = crc32(MAGIC), 0, 0, 0
        content.seek(len(MAGIC))
        for at, kind, body in _records(content, len(MAGIC), end):
            if last == FOOTER or (last == 0) != (kind == HEADER) or (kind == DATA_END and summary_at):
                raise Damage(at, f"a record of type {kind}, out of its place")
            last, head = kind, HEAD.pack(kind, len(body))
            if kind == DATA_END:
                data.close_chunk(at)
                (written,) = _read("<I", body, at)
                if summed and _checked("data", written, data_crc, at):
                    sums["CRC of the data"] += 1
                summary_at = at + HEAD.size + len(body)
            elif kind == FOOTER:
                data.close_chunk(at)
                start, _, written = _read("<QQI", body, at)
                if start not in (0, summary_at or at):
                    raise Damage(at, f"the summary is at byte {summary_at}, the footer says {start}")
                if _checked("summary", written, crc32(head + body[:16], summary_crc), at):
                    sums["CRC of the summary"] += 1
            elif summary_at:
                summary_crc = crc32(body, crc32(head, summary_crc))
                summary.add(at, kind, body, data)
            else:
                if summed:
                    data_crc = crc32(body, crc32(head, data_crc))
                data.add(at, kind, body)
        if last != FOOTER:
            raise Damage(end, "the footer is missing")
        summary.lacks_nothing(summary_at, data)
        if sums["CRC of the data"]:
            del sums[NO_SUM]
        elif data.counts and not data.chunks:
            sums[NO_SUM] += 1


def _has_data_crc(content: BinaryIO, end: int) -> bool:
    """Whether there may be a checksum over all the data, which takes as long as reading it: by the record before the summary."""
    length = HEAD.size + 20
    content.seek(max(0, end - length))
    footer = content.read(length)
    start = _read("<Q", footer, end, HEAD.size)[0] or end - length
    content.seek(max(0, min(start, end) - 4))
    return content.read(4) != bytes(4)


def _records(content: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    """(byte, type, body) of each record up to the closing magic."""
    at = start
    while at < end:
        head = content.read(HEAD.size)
        kind, length = HEAD.unpack(head) if len(head) == HEAD.size else (0, 0)
        if kind == 0 or at + HEAD.size + length > end:
            raise Damage(
                at, f"a record of type {kind} and {length} bytes, where {max(0, end - at - HEAD.size)} are left"
            )
        yield at, kind, content.read(length)
        at += HEAD.size + length
    if content.read() != MAGIC:
        raise Damage(end, "it does not end as an MCAP file does")


def _read(form: str, body: bytes, at: int, offset: int = 0) -> tuple[int, ...]:
    """Numbers of a record that stands at a byte of the file."""
    if len(body) < offset + struct.calcsize(form):
        raise Damage(at, f"a record of {len(body)} bytes, cut short")
    return struct.unpack_from(form, body, offset)


def _checked(what: str, written: int, found: int, at: int) -> bool:
    """Whether a checksum was written; it is then the right one."""
    if written and written != found:
        raise Damage(at, f"the CRC of the {what} is {found:08x}, its recorder wrote {written:08x}")
    return written != 0


class _Data:
    """The records before the summary."""

    def __init__(self, sums: Counter[str]) -> None:
        self.sums = sums
        self.definitions: dict[tuple[int, int], bytes] = {}  # (SCHEMA or CHANNEL, number): the record
        self.counts: Counter[int] = Counter()  # messages by channel
        self.chunks: dict[int, ChunkIndex] = {}  # by byte of the file
        # of the last chunk, as long as its indexes go by
        self.open: ChunkIndex | None = None
        self.messages: list[Entry] = []
        self.indexed: list[Entry] = []

    def add(self, at: int, kind: int, body: bytes) -> None:
        if kind != MESSAGE_INDEX:
            self.close_chunk(at)
        if kind in (SCHEMA, CHANNEL):
            self.define(at, kind, body)
        elif kind == MESSAGE:
            self._count(at, _read("<HIQQ", body, at)[0])
        elif kind == CHUNK:
            self._open_chunk(at, body)
        elif kind == MESSAGE_INDEX:
            self._add_index(at, body)
        elif kind not in (HEADER, ATTACHMENT, METADATA) and kind < PRIVATE:
            raise Damage(at, f"a record of type {kind} in the data")

    def define(self, at: int, kind: int, body: bytes) -> None:
        """A schema or a channel: whenever it stands there again it is the same."""
        (number,) = _read("<H", body, at)
        if self.definitions.setdefault((kind, number), body) != body:
            raise Damage(at, f"{'channel' if kind == CHANNEL else 'schema'} {number} is defined in two ways")

    def _count(self, at: int, channel: int) -> None:
        if (CHANNEL, channel) not in self.definitions:
            raise Damage(at, f"a message of channel {channel}, which is not defined before it")
        self.counts[channel] += 1

    def _open_chunk(self, at: int, body: bytes) -> None:
        first, last, size, crc, length = _read("<QQQII", body, at)
        (packed_size,) = _read("<Q", body, at, 32 + length)
        packing, packed = body[32 : 32 + length].decode("latin-1"), memoryview(body)[40 + length :]
        if len(packed) != packed_size:
            raise Damage(at, f"a chunk of {len(packed)} packed bytes that says {packed_size}")
        raw = unpack(packing, packed, size, at)
        self.sums["CRC of each chunk" if crc else sum_of(packing, packed)] += 1
        if crc:
            _checked("chunk", crc, crc32(raw), at)
        self.messages = list(self._messages(raw, at))
        times = [entry.time for entry in self.messages]
        if times and (min(times), max(times)) != (first, last):
            raise Damage(at, f"a chunk of messages from {min(times)} to {max(times)} ns that says {first} to {last}")
        self.open = ChunkIndex(first, last, at, HEAD.size + len(body), {}, 0, packing, packed_size, size)

    def _messages(self, raw: bytes | memoryview, at: int) -> Iterator[Entry]:
        """Of a chunk that stands at a byte of the file."""
        offset, size = 0, len(raw)
        while offset < size:
            begin = offset + HEAD.size
            kind, length = HEAD.unpack_from(raw, offset) if begin <= size else (0, 0)
            if kind == 0 or begin + length > size:
                raise Damage(
                    at, f"a record of type {kind} and {length} bytes at byte {offset} of the {size} of a chunk"
                )
            if kind == MESSAGE and length >= 22:
                channel, _, time = struct.unpack_from("<HIQ", raw, begin)
                self._count(at, channel)
                yield Entry(channel, time, offset)
            elif kind in (SCHEMA, CHANNEL):
                self.define(at, kind, bytes(raw[begin : begin + length]))
            elif kind < PRIVATE:
                raise Damage(at, f"a record of type {kind} and {length} bytes within a chunk")
            offset = begin + length

    def _add_index(self, at: int, body: bytes) -> None:
        channel, size = _read("<HI", body, at)
        if self.open is None or size != len(body) - 6 or size % 16 or channel in self.open.indexes:
            raise Damage(
                at, f"an index of channel {channel}, out of its place or of {len(body) - 6} bytes and not {size}"
            )
        self.open.indexes[channel] = at
        self.indexed += [Entry(channel, *entry) for entry in struct.iter_unpack("<QQ", body[6:])]

    def close_chunk(self, at: int) -> None:
        """Hold the chunk before a byte against the indexes that followed it, if there are any."""
        if self.open is None:
            return
        if self.open.indexes and (odd := set(self.indexed) ^ set(self.messages)):
            raise Damage(
                self.open.at,
                f"a chunk of {len(self.messages)} messages, {len(self.indexed)} in its indexes, {len(odd)} not in both",
            )
        self.chunks[self.open.at] = self.open._replace(indexes_length=at - self.open.at - self.open.length)
        self.open, self.messages, self.indexed = None, [], []


class _Summary:
    """The records behind the data, held against it."""

    def __init__(self) -> None:
        self.channels: set[int] = set()
        self.chunks: set[int] = set()

    def add(self, at: int, kind: int, body: bytes, data: _Data) -> None:
        if kind in (SCHEMA, CHANNEL):
            data.define(at, kind, body)
            if kind == CHANNEL:
                self.channels.update(_read("<H", body, at))
        elif kind == CHUNK_INDEX:
            told = _chunk_index(at, body)
            if data.chunks.get(told.at) != told:
                raise Damage(at, f"the index of a chunk at byte {told.at} that is not there, or not as it says")
            self.chunks.add(told.at)
        elif kind == STATISTICS:
            _hold_against(at, body, data)
        elif kind not in (ATTACHMENT_INDEX, METADATA_INDEX, SUMMARY_OFFSET) and kind < PRIVATE:
            raise Damage(at, f"a record of type {kind} in the summary")

    def lacks_nothing(self, at: int, data: _Data) -> None:
        """If there are some channels or chunks in the summary, then all."""
        if self.channels and (lost := data.counts.keys() - self.channels):
            raise Damage(
                at, f"the summary does not have channel {min(lost)} with its {data.counts[min(lost)]} messages"
            )
        if self.chunks and (lost := data.chunks.keys() - self.chunks):
            raise Damage(at, f"the summary does not have the chunk at byte {min(lost)}")


def _chunk_index(at: int, body: bytes) -> ChunkIndex:
    first, last, begin, length, size = _read("<QQQQI", body, at)
    indexes = dict(struct.iter_unpack("<HQ", body[36 : 36 + size - size % 10]))
    indexes_length, named = _read("<QI", body, at, 36 + size)
    packed_size, unpacked_size = _read("<QQ", body, at, 48 + size + named)
    packing = body[48 + size : 48 + size + named].decode("latin-1")
    return ChunkIndex(first, last, begin, length, indexes, indexes_length, packing, packed_size, unpacked_size)


def _hold_against(at: int, body: bytes, data: _Data) -> None:
    """Hold the statistics against the data."""
    total, _, _, _, _, chunks, _, _, size = _read("<QHIIIIQQI", body, at)
    counts = {channel: n for channel, n in struct.iter_unpack("<HQ", body[46 : 46 + size - size % 10]) if n}
    told: dict[str, object] = {"messages": total, "chunks": chunks}
    found: dict[str, object] = {"messages": data.counts.total(), "chunks": len(data.chunks)}
    if size:  # its times are not looked at: recorders of 2022 took a message at 0 for none
        told |= {"messages by channel": counts}
        found |= {"messages by channel": dict(data.counts)}
    for what in told:
        if told[what] != found[what]:
            raise Damage(at, f"{what}: {told[what]} by the statistics, {found[what]} in the data")
