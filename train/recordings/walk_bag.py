"""A ROS bag, record by record, held against itself. https://wiki.ros.org/Bags/Format/2.0

Its chunks are followed by indexes of their messages; at its end stand the connections once more, and how many messages of each
every chunk has.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from recordings.chunks import Damage, Entry, sum_of, unpack

MAGIC = b"#ROSBAG V2.0\n"
MESSAGE, BAG_HEADER, INDEX, CHUNK, CHUNK_INFO, CONNECTION = range(2, 8)


class Record(NamedTuple):
    """A record, its header taken apart."""

    at: int  # byte of the file, or of the chunk
    kind: int
    fields: dict[str, bytes]
    body: bytes


class Chunk(NamedTuple):
    """A chunk, unpacked."""

    at: int  # byte of the file
    messages: list[Entry]
    records: set[int]  # where one begins

    @property
    def span(self) -> tuple[int, int]:
        """First and last time, ns."""
        times = [entry.time for entry in self.messages]
        return (min(times), max(times)) if times else (0, 0)


def walk_bag(file: Path, sums: Counter[str]) -> None:
    """Raises Damage at the first contradiction; what checksums there are is counted in `sums`."""
    with file.open("rb") as content:
        if content.read(len(MAGIC)) != MAGIC:
            raise Damage(0, "it does not begin as a ROS bag of version 2.0 does")
        end = content.seek(0, 2)
        content.seek(len(MAGIC))
        definitions: dict[int, bytes] = {}  # by connection
        told: dict[int, tuple[Counter[int], tuple[int, int]]] = {}  # of each chunk: messages by connection, span
        chunk: Chunk | None = None
        indexed: list[Entry] = []
        header = (0, 0, 0)
        index_at, connections, infos, last = 0, 0, 0, 0
        for record in _records(content, len(MAGIC), end):
            at, kind = record.at, record.kind
            if (last == 0) != (kind == BAG_HEADER) or (index_at and kind in (CHUNK, INDEX)):
                raise Damage(at, f"a record of type {kind}, out of its place")
            if chunk and kind != INDEX:
                _agree(chunk, indexed)
                chunk, indexed = None, []
            last = kind
            if kind == BAG_HEADER:
                header = _number(record, "index_pos", 8), _number(record, "conn_count"), _number(record, "chunk_count")
            elif kind == CHUNK:
                packing = record.fields.get("compression", b"").decode("latin-1")
                raw = bytes(unpack(packing, record.body, _number(record, "size"), at))
                sums[sum_of(packing, record.body)] += 1
                chunk = _chunk(raw, at, definitions)
                told[at] = Counter(entry.channel for entry in chunk.messages), chunk.span
            elif kind == INDEX and chunk:
                indexed += _index(record)
            elif kind == CONNECTION:
                index_at, connections = index_at or at, connections + 1
                _define(record, at, definitions)
            elif kind == CHUNK_INFO:
                index_at, infos = index_at or at, infos + 1
                _hold_against(record, told)
            else:
                raise Damage(at, f"a record of type {kind}, out of its place")
        if chunk:
            raise Damage(end, "its index is missing")
        for what, says, found in zip(
            ("index is at byte", "connections are", "chunks are"),
            header,
            (index_at or end, connections, infos),
            strict=True,
        ):
            if says != found:
                raise Damage(len(MAGIC), f"by its header its {what} {says}, by its records {found}")
        if infos != len(told):
            raise Damage(index_at, f"its index has {infos} chunks, of which {len(told)} are there")


def _records(content: BinaryIO, at: int, end: int) -> Iterator[Record]:
    """The records up to a byte."""
    while at < end:
        begin, parts = at, []
        for _ in range(2):  # header and body, each with its length
            (length,) = struct.unpack("<I", content.read(4)) if at + 4 <= end else (end,)
            if at + 4 + length > end:
                raise Damage(begin, f"a record with a part of {length} bytes, where {max(0, end - at - 4)} are left")
            parts.append(content.read(length))
            at += 4 + length
        yield _record(begin, parts[0], parts[1], begin)


def _record(at: int, header: bytes, body: bytes, damage_at: int) -> Record:
    fields = _fields(header, damage_at)
    kind = fields.get("op", b"")
    if len(kind) != 1:
        raise Damage(damage_at, "a record that does not say of which type it is")
    return Record(at, kind[0], fields, body)


def _fields(header: bytes, at: int) -> dict[str, bytes]:
    """name=value, each with its length."""
    fields, offset = {}, 0
    while offset < len(header):
        (length,) = struct.unpack_from("<I", header, offset) if offset + 4 <= len(header) else (len(header),)
        name, equals, value = header[offset + 4 : offset + 4 + length].partition(b"=")
        offset += 4 + length
        if not equals or offset > len(header):
            raise Damage(at, f"a header of {len(header)} bytes that is not made of fields")
        fields[name.decode("latin-1")] = value
    return fields


def _number(record: Record, name: str, size: int = 4) -> int:
    value = record.fields.get(name, b"")
    if len(value) != size:
        raise Damage(record.at, f"a record of type {record.kind} with {len(value)} bytes of {name}, expected {size}")
    return int.from_bytes(value, "little")


def _time(record: Record, name: str) -> int:
    """In ns."""
    packed = _number(record, name, 8)
    return (packed & 0xFFFFFFFF) * 10**9 + (packed >> 32)


def _chunk(raw: bytes, at: int, definitions: dict[int, bytes]) -> Chunk:
    """A chunk that stands at a byte of the file."""
    messages, starts, offset = [], set(), 0
    while offset < len(raw):
        begin, parts = offset, []
        for _ in range(2):
            (length,) = struct.unpack_from("<I", raw, offset) if offset + 4 <= len(raw) else (len(raw),)
            if offset + 4 + length > len(raw):
                raise Damage(at, f"a record at byte {begin} of the {len(raw)} of a chunk, longer than what is left")
            parts.append(raw[offset + 4 : offset + 4 + length])
            offset += 4 + length
        starts.add(begin)
        record = _record(at, parts[0], parts[1], at)
        if record.kind == CONNECTION:
            _define(record, at, definitions)
        elif record.kind == MESSAGE and _number(record, "conn") in definitions:
            messages.append(Entry(_number(record, "conn"), _time(record, "time"), begin))
        else:
            raise Damage(at, f"a record of type {record.kind} within a chunk, or a message of an unknown connection")
    return Chunk(at, messages, starts)


def _define(record: Record, at: int, definitions: dict[int, bytes]) -> None:
    """A connection: whenever it stands there again it is the same."""
    number, fields = _number(record, "conn"), _fields(record.body, at)
    definition = repr((record.fields.get("topic"), sorted(fields.items()))).encode()
    if definitions.setdefault(number, definition) != definition:
        raise Damage(at, f"connection {number} is defined in two ways")


def _index(record: Record) -> list[Entry]:
    connection, count = _number(record, "conn"), _number(record, "count")
    if count * 12 != len(record.body):
        raise Damage(record.at, f"an index of {len(record.body)} bytes that says {count} entries of 12 bytes")
    entries = struct.iter_unpack("<III", record.body)
    return [Entry(connection, seconds * 10**9 + nanoseconds, offset) for seconds, nanoseconds, offset in entries]


def _agree(chunk: Chunk, indexed: list[Entry]) -> None:
    """Hold a chunk against its indexes; they may point at a connection in front of the message."""
    odd = Counter(entry[:2] for entry in indexed)
    odd.subtract(entry[:2] for entry in chunk.messages)
    if any(odd.values()) or not chunk.records.issuperset(entry.offset for entry in indexed):
        raise Damage(
            chunk.at,
            f"a chunk of {len(chunk.messages)} messages, {len(indexed)} in its indexes, which are not the same",
        )


def _hold_against(record: Record, found: dict[int, tuple[Counter[int], tuple[int, int]]]) -> None:
    """Hold what the index says of a chunk against the chunk."""
    at, count = _number(record, "chunk_pos", 8), _number(record, "count")
    counts = dict(struct.iter_unpack("<II", record.body)) if len(record.body) == 8 * count else None
    span = _time(record, "start_time"), _time(record, "end_time")
    if at not in found or counts != found[at][0] or (counts and span != found[at][1]):
        raise Damage(record.at, f"what the index says of a chunk at byte {at} that is not there, or not as it says")
