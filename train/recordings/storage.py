"""A storage file, read once from front to back and checked on the way: MCAP, SQLite of rosbag2, ROS 1 bag.

Every record is read, whether or not its topic is wanted; no index is needed to find a message. Sizes, checksums, counts,
message indexes and repeated definitions are compared with what was read. Messages come in file order, in which they were
recorded: sorted by stamp, a clock that was set back would mix two moments.

https://mcap.dev/spec    https://wiki.ros.org/Bags/Format/2.0    https://github.com/ros2/rosbag2
"""

from __future__ import annotations

import bz2
import io
import sqlite3
import struct
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

import lz4.frame

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Stamped = tuple[int, int, bytes]  # connection, receive stamp in ns, message
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
UNPACKERS: dict[str, Callable[[], Any]] = {
    "bz2": bz2.BZ2Decompressor,
    "lz4": lz4.frame.LZ4FrameDecompressor,
    "zstd": zstd.ZstdDecompressor,
}
LARGEST = 2**28  # bytes of an unpacked chunk or message: a small file must not fill the memory
NO_SUM = "none"
SUMS = {"bz2": "bz2's CRCs", "lz4": "LZ4's checksums", "zstd": "zstd's checksum"}


class Unreadable(Exception):
    """Why a file cannot be read, and how to fix it; without a fix the file is damaged."""


class Connection(NamedTuple):
    """A topic of a file with the type of its messages."""

    id: int
    topic: str
    msgtype: str
    serialization: str  # cdr, ros1; or what nobody here reads, such as protobuf
    encoding: str  # of the definition: ros2msg, ros2idl, omgidl, ros1msg; or empty
    definition: str


class Storage:
    """An open storage file. `connections`, `counts` and `sums` are complete when all messages have been read."""

    MAGIC: bytes

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.end = file, file.seek(0, 2)
        self.connections: dict[int, Connection] = {}
        self.counts: Counter[int] = Counter()  # messages by connection
        self.sums: Counter[str] = Counter()  # the checksums in the file, in words
        self.definitions: dict[str, Any] = {}  # as first defined
        self.start_ns = -1  # the first message's stamp

    def messages(self, topics: Collection[str] | None = None) -> Iterator[tuple[Connection, int, bytes]]:
        """The messages of some topics (None: all) and their receive stamps in ns. Raises Unreadable."""
        self.file.seek(0)
        if (found := self.file.read(len(self.MAGIC))) != self.MAGIC:
            raise _damage(0, f"found {found!r}, expected {self.MAGIC!r}")
        wanted: dict[int, Connection | None] = {}
        for messages in self._messages():
            for number, stamp, raw in messages:
                if number not in wanted:
                    is_wanted = topics is None or self.connections[number].topic in topics
                    wanted[number] = self.connections[number] if is_wanted else None
                if connection := wanted[number]:
                    yield connection, stamp, raw

    def _messages(self) -> Iterator[list[Stamped]]:
        """The messages in file order: those of a chunk, or one."""
        raise NotImplementedError

    def _message(self, connection: int, stamp: int, raw: bytes, at: int) -> Stamped:
        if connection not in self.connections:
            raise _damage(at, f"a message of channel {connection}, which is not defined before it")
        self.counts[connection] += 1
        if self.start_ns < 0:
            self.start_ns = stamp
        return connection, stamp, raw

    def _define(self, name: str, definition: Any, at: int) -> None:
        if self.definitions.setdefault(name, definition) != definition:
            raise _damage(at, f"{name} is defined twice, differently")

    def _indexed(self, chunk: list[Stamped], index: list[tuple[int, int]], at: int) -> list[Stamped]:
        """A chunk that agrees with its (connection, stamp) index."""
        if sorted(index) != sorted(message[:2] for message in chunk):
            raise _damage(at, f"a chunk of {len(chunk)} messages before it, {len(index)} in its index, or other stamps")
        return chunk


def open_storage(file: BinaryIO, suffix: str) -> Storage:
    """The storage in an open file of a suffix: .mcap, .bag, else SQLite."""
    return {".mcap": Mcap, ".bag": Ros1}.get(suffix, Sqlite)(file)


def _damage(at: int, what: str) -> Unreadable:
    return Unreadable(f"damaged at byte {at}: {what}")


def _unpack(packing: str, packed: bytes, size: int, at: int) -> bytes:
    """The content of a chunk."""
    if packing not in ("", "none", *UNPACKERS):
        raise Unreadable(f"chunks compressed by {packing!r}", "compress it with zstd or lz4 (`mcap compress`)")
    if size > LARGEST:
        what = f"a chunk at byte {at} has {size} bytes, unpacked; expected at most {LARGEST}"
        raise Unreadable(what, "record it with smaller chunks, or remove it")
    try:
        raw = unpacked(packing, packed, size) if packing in UNPACKERS else packed
    except Exception as error:  # each library has its own
        raise _damage(at, f"cannot decompress a chunk ({' '.join(str(error).split())[:80]})") from None
    if len(raw) != size:
        raise _damage(at, f"a chunk of {len(raw)} bytes, declared {size}")
    return raw


def unpacked(packing: str, packed: bytes, most: int) -> bytes:
    """What is in compressed frames, one after the other; stops after more than `most` bytes. Raises the library's errors."""
    parts: list[bytes] = []
    left = most + 1
    while packed and left > 0:
        unpacker = UNPACKERS[packing]()
        parts.append(unpacker.decompress(packed, max_length=left))
        left -= len(parts[-1])
        if not unpacker.eof and left > 0:
            raise EOFError("it ends too early")
        packed = unpacker.unused_data or b""
    return b"".join(parts)


def _sum_of(packing: str, packed: bytes) -> str:
    """The checksum in a compressed frame, by the flags in its descriptor."""
    flags = {"bz2": 1, "lz4": 0b10100, "zstd": 0b100}.get(packing, 0)
    return SUMS[packing] if packing == "bz2" or (len(packed) > 4 and packed[4] & flags) else NO_SUM


def _numbers(form: str, body: bytes, at: int, offset: int = 0) -> tuple[Any, ...]:
    if len(body) < offset + struct.calcsize(form):
        raise _damage(at, f"a truncated record of {len(body)} bytes")
    return struct.unpack_from(form, body, offset)


class Mcap(Storage):
    """MCAP, with or without chunks, indexes and summary."""

    MAGIC = b"\x89MCAP0\r\n"
    HEAD = struct.Struct("<BQ")  # type and length of a record
    MESSAGE_HEAD = struct.Struct("<HIQQ")  # channel, number, receive and publish stamp
    HEADER, FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK, MESSAGE_INDEX, CHUNK_INDEX = range(1, 9)
    ATTACHMENT, ATTACHMENT_INDEX, STATISTICS, METADATA, METADATA_INDEX, SUMMARY_OFFSET, DATA_END = range(9, 16)
    IN_DATA = (HEADER, ATTACHMENT, METADATA)  # not needed to read messages
    IN_SUMMARY = (CHUNK_INDEX, ATTACHMENT_INDEX, METADATA_INDEX, SUMMARY_OFFSET)
    PRIVATE = 0x80  # and above: other programs' records

    def _messages(self) -> Iterator[list[Stamped]]:
        has_data_crc = self._has_data_crc()
        self.file.seek(len(self.MAGIC))
        data_crc, summary_crc, in_summary, last, chunks = crc32(self.MAGIC), 0, False, 0, 0
        chunk: list[Stamped] | None = None  # the last one, until its indexes have been read
        index: list[tuple[int, int]] = []
        for at, kind, body in self._records():
            if chunk is not None and kind != self.MESSAGE_INDEX:
                yield self._indexed(chunk, index, at) if index else chunk
                chunk, index = None, []
            head = self.HEAD.pack(kind, len(body))
            if last == self.FOOTER or (last == 0) != (kind == self.HEADER):
                raise _damage(at, f"a record of type {kind} in the wrong place")
            if kind == self.DATA_END and not in_summary:
                if has_data_crc:
                    self._check_crc("CRC of the data", _numbers("<I", body, at)[0], data_crc, at)
            elif kind == self.FOOTER:
                _, _, written = _numbers("<QQI", body, at)
                self._check_crc("CRC of the summary", written, crc32(head + body[:16], summary_crc), at)
            elif kind in (self.SCHEMA, self.CHANNEL):
                self._add_definition(kind, body, at)
            elif kind == self.STATISTICS and in_summary:
                self._compare_statistics(body, chunks, at)
            elif kind == self.MESSAGE and not in_summary:
                channel, _, stamp, _ = _numbers("<HIQQ", body, at)
                yield [self._message(channel, stamp, body[22:], at)]
            elif kind == self.CHUNK and not in_summary:
                chunks, chunk = chunks + 1, self._chunk(body, at)
            elif kind == self.MESSAGE_INDEX and chunk is not None:
                channel, size = _numbers("<HI", body, at)
                if size != len(body) - 6 or size % 16:
                    raise _damage(at, f"a message index of {len(body) - 6} bytes, declared {size}")
                index += [(channel, stamp) for stamp, _ in struct.iter_unpack("<QQ", body[6:])]
            elif kind < self.PRIVATE and kind not in (self.IN_SUMMARY if in_summary else self.IN_DATA):
                raise _damage(at, f"a record of type {kind} in the wrong place")
            if in_summary:
                summary_crc = crc32(body, crc32(head, summary_crc))
            elif has_data_crc:
                data_crc = crc32(body, crc32(head, data_crc))
            in_summary, last = in_summary or kind == self.DATA_END, kind
        if last != self.FOOTER or self.file.read() != self.MAGIC:
            raise _damage(self.end, "no footer at the end")
        if self.sums["CRC of the data"]:
            del self.sums[NO_SUM]
        elif self.counts and not chunks:
            self.sums[NO_SUM] += 1

    def _has_data_crc(self) -> bool:
        """Whether DATA_END, before the summary or the footer, has a checksum; computing it takes time."""
        footer = self.end - len(self.MAGIC) - self.HEAD.size - 20
        self.file.seek(max(0, footer))
        summary = int.from_bytes(self.file.read(self.HEAD.size + 8)[self.HEAD.size :], "little")
        self.file.seek(max(0, min(summary or footer, self.end) - 4))
        return self.file.read(4) != bytes(4)

    def _records(self) -> Iterator[tuple[int, int, bytes]]:
        """(byte, type, body) of each record of the file."""
        at, end = len(self.MAGIC), self.end - len(self.MAGIC)
        while at < end:
            head = self.file.read(self.HEAD.size)
            kind, length = self.HEAD.unpack(head) if len(head) == self.HEAD.size else (0, 0)
            if kind == 0 or at + self.HEAD.size + length > end:
                raise _damage(at, f"a record of type {kind} and {length} bytes; {end - at - self.HEAD.size} are left")
            yield at, kind, self.file.read(length)
            at += self.HEAD.size + length

    def _check_crc(self, name: str, written: int, computed: int, at: int) -> None:
        if written and written != computed:
            raise _damage(at, f"the {name} is {computed:08x}, written {written:08x}")
        self.sums[name] += written != 0

    def _chunk(self, body: bytes, at: int) -> list[Stamped]:
        first, last, size, crc, length = _numbers("<QQQII", body, at)
        (packed_size,) = _numbers("<Q", body, at, 32 + length)
        packing, packed = body[32 : 32 + length].decode("latin-1"), body[40 + length :]
        if len(packed) != packed_size:
            raise _damage(at, f"a chunk of {len(packed)} compressed bytes, declared {packed_size}")
        raw = _unpack(packing, packed, size, at)
        if not crc:
            self.sums[_sum_of(packing, packed)] += 1
        self._check_crc("CRC of each chunk", crc, crc32(raw) if crc else 0, at)
        messages, offset = [], 0
        while offset < size:
            begin = offset + self.HEAD.size
            kind, length = self.HEAD.unpack_from(raw, offset) if begin <= size else (0, 0)
            end = begin + length
            if kind == 0 or end > size or (kind == self.MESSAGE and length < self.MESSAGE_HEAD.size):
                raise _damage(at, f"a chunk with a record of type {kind} and {length} bytes; {size - begin} are left")
            if kind == self.MESSAGE:
                channel, _, stamp, _ = self.MESSAGE_HEAD.unpack_from(raw, begin)
                messages.append(self._message(channel, stamp, raw[begin + 22 : end], at))
            elif kind in (self.SCHEMA, self.CHANNEL):
                self._add_definition(kind, raw[begin:end], at)
            elif kind < self.PRIVATE:
                raise _damage(at, f"a chunk with a record of type {kind}")
            offset = end
        stamps = [message[1] for message in messages]
        if stamps and (min(stamps), max(stamps)) != (first, last):
            raise _damage(at, f"a chunk with stamps {min(stamps)} to {max(stamps)} ns, declared {first} to {last}")
        return messages

    def _add_definition(self, kind: int, body: bytes, at: int) -> None:
        (number,) = _numbers("<H", body, at)
        self._define(f"{'channel' if kind == self.CHANNEL else 'schema'} {number}", body, at)
        if kind == self.CHANNEL and number not in self.connections:
            schema, (topic, serialization) = _numbers("<H", body, at, 2)[0], _texts(body, 4, 2, at)
            if schema and f"schema {schema}" not in self.definitions:
                raise _damage(at, f"channel {number} names schema {schema}, which is not defined before it")
            typed = _texts(self.definitions[f"schema {schema}"], 2, 3, at) if schema else ["", "", ""]
            self.connections[number] = Connection(number, topic, typed[0], serialization, typed[1], typed[2])

    def _compare_statistics(self, body: bytes, chunks: int, at: int) -> None:
        total, _, _, _, _, declared_chunks, _, _, size = _numbers("<QHIIIIQQI", body, at)
        by_channel = {number: n for number, n in struct.iter_unpack("<HQ", body[46 : 46 + size - size % 10]) if n}
        declared = total, declared_chunks, by_channel  # not its stamps: recorders of 2022 ignored a stamp of 0
        read = self.counts.total(), chunks, dict(self.counts) if size else {}
        if declared != read:
            raise _damage(at, f"messages, chunks, messages by channel are {read}, declared {declared}")


def _texts(body: bytes, offset: int, count: int, at: int) -> list[str]:
    """Strings, each after its length."""
    texts = []
    for _ in range(count):
        (length,) = _numbers("<I", body, at, offset)
        (text,) = _numbers(f"{length}s", body, at, offset + 4)
        texts.append(text.decode("utf-8", "replace"))
        offset += 4 + length
    return texts


Ros1Record = tuple[int, int, dict[str, bytes], bytes]  # byte, type, header, body


class Ros1(Storage):
    """A ROS 1 bag of version 2.0."""

    MAGIC = b"#ROSBAG V2.0\n"
    MESSAGE, BAG_HEADER, INDEX, CHUNK, CHUNK_INFO, CONNECTION = range(2, 8)

    def _messages(self) -> Iterator[list[Stamped]]:
        declared, chunks, connections, index_at, last = (0, 0, 0), 0, 0, 0, 0
        chunk: list[Stamped] | None = None  # the last one, until its indexes have been read
        index: list[tuple[int, int]] = []
        for at, kind, fields, body in self._records(self.file, len(self.MAGIC), self.end):
            if chunk is not None and kind != self.INDEX:
                yield self._indexed(chunk, index, at)
                chunk, index = None, []
            if (last == 0) != (kind == self.BAG_HEADER) or (index_at and kind in (self.CHUNK, self.INDEX)):
                raise _damage(at, f"a record of type {kind} in the wrong place")
            if kind == self.BAG_HEADER:
                counts = _field(fields, "conn_count", 4, at), _field(fields, "chunk_count", 4, at)
                declared = (_field(fields, "index_pos", 8, at), *counts)
                if not declared[0]:
                    raise Unreadable("unfinished: its recorder wrote no index", "`rosbag reindex` it")
            elif kind == self.CHUNK:
                packing = fields.get("compression", b"").decode("latin-1")
                raw = _unpack(packing, body, _field(fields, "size", 4, at), at)
                self.sums[_sum_of(packing, body)] += 1
                chunks, chunk = chunks + 1, self._chunk(raw, at)
            elif kind == self.INDEX and chunk is not None:
                number, count = _field(fields, "conn", 4, at), _field(fields, "count", 4, at)
                if count * 12 != len(body):
                    raise _damage(at, f"an index of {len(body)} bytes, declared {count} entries of 12 bytes")
                index += [(number, s * 10**9 + ns) for s, ns, _ in struct.iter_unpack("<III", body)]
            elif kind == self.CONNECTION:
                index_at, connections = index_at or at, connections + 1
                self._add_connection(fields, body, at)
            elif kind != self.CHUNK_INFO or not index_at:
                raise _damage(at, f"a record of type {kind} in the wrong place")
            last = kind
        if chunk is not None:
            yield self._indexed(chunk, index, self.end)
        if declared != (found := (index_at or self.end, connections, chunks)):
            words = "index at byte {}, {} connections, {} chunks"
            raise _damage(self.end, f"{words.format(*found)}; declared {words.format(*declared)}")

    def _records(self, file: BinaryIO, at: int, end: int) -> Iterator[Ros1Record]:
        """The records of the file, or of an unpacked chunk."""
        file.seek(at)
        while at < end:
            begin, parts = at, [b"", b""]
            for i in (0, 1):
                (length,) = struct.unpack("<I", file.read(4)) if at + 4 <= end else (end,)
                at += 4 + length
                if at > end:
                    raise _damage(begin, f"a record with {length} bytes; {max(0, end - at + length)} are left")
                parts[i] = file.read(length)
            fields = _fields(parts[0], begin)
            yield begin, _field(fields, "op", 1, begin), fields, parts[1]

    def _chunk(self, raw: bytes, at: int) -> list[Stamped]:
        messages = []
        for _, kind, fields, body in self._records(io.BytesIO(raw), 0, len(raw)):
            if kind == self.CONNECTION:
                self._add_connection(fields, body, at)
            elif kind == self.MESSAGE:
                number, packed = _field(fields, "conn", 4, at), _field(fields, "time", 8, at)
                stamp = (packed & 0xFFFFFFFF) * 10**9 + (packed >> 32)
                messages.append(self._message(number, stamp, body, at))
            else:
                raise _damage(at, f"a chunk with a record of type {kind}")
        return messages

    def _add_connection(self, fields: dict[str, bytes], body: bytes, at: int) -> None:
        number, about = _field(fields, "conn", 4, at), _fields(body, at)
        self._define(f"connection {number}", (fields.get("topic"), sorted(about.items())), at)
        values = fields.get("topic", b""), about.get("type", b""), about.get("message_definition", b"")
        topic, msgtype, definition = (value.decode("utf-8", "replace") for value in values)
        self.connections[number] = Connection(number, topic, msgtype, "ros1", "ros1msg", definition)


def _fields(header: bytes, at: int) -> dict[str, bytes]:
    """name=value, each after its length."""
    fields, offset = {}, 0
    while offset < len(header):
        (length,) = _numbers("<I", header, at, offset)
        name, equals, value = _numbers(f"{length}s", header, at, offset + 4)[0].partition(b"=")
        if not equals:
            raise _damage(at, f"a header field without =: {name[:40]!r}")
        fields[name.decode("latin-1")] = value
        offset += 4 + length
    return fields


def _field(fields: dict[str, bytes], name: str, size: int, at: int) -> int:
    if len(fields.get(name, b"")) != size:
        raise _damage(at, f"a record whose {name} is {fields.get(name)!r}, expected {size} bytes")
    return int.from_bytes(fields[name], "little")


class Sqlite(Storage):
    """A rosbag2 SQLite database, checked by SQLite itself, https://sqlite.org/pragma.html#pragma_integrity_check."""

    MAGIC = b"SQLite format 3\0"
    STRAYS = """SELECT (SELECT count(*) FROM topics WHERE typeof(name) || typeof(type) != 'texttext') + count(*) FROM messages
        WHERE topic_id NOT IN (SELECT id FROM topics) OR typeof(data) || typeof(timestamp) || typeof(id) != 'blobintegerinteger'"""

    def _messages(self) -> Iterator[list[Stamped]]:
        definitions: dict[str, tuple[str, str]] = {}
        for _ in self._rows("SELECT 1 FROM sqlite_master WHERE name = 'message_definitions'"):
            rows = self._rows("SELECT topic_type, encoding, encoded_message_definition FROM message_definitions")
            definitions = {msgtype: (encoding or "", text or "") for msgtype, encoding, text in rows}
        for row in self._rows("SELECT id, name, type, serialization_format FROM topics"):
            self.connections[row[0]] = Connection._make((*row, *definitions.get(row[2], ("", ""))))
        report = " ".join("; ".join(row[0] for row in self._rows("PRAGMA integrity_check(3)")).split())
        if report != "ok":
            raise Unreadable(f"damaged: SQLite's integrity check reports {report[:200]}")
        ((pages, size),) = self._rows("SELECT page_count, page_size FROM pragma_page_count, pragma_page_size")
        if self.end < pages * size or self.end % size:  # SQLite reads the missing part of a page as zeros
            raise Unreadable(f"damaged: {self.end} bytes, expected {pages} pages of {size}")
        ((strays,),) = self._rows(self.STRAYS)
        if strays:
            raise Unreadable(f"damaged: {strays} messages without topic, stamp or data, or topics without name or type")
        for topic, stamp, raw in self._rows("SELECT topic_id, timestamp, data FROM messages NOT INDEXED ORDER BY id"):
            if not self.counts:
                self.sums[_sum_of("zstd", raw) if raw[:4] == ZSTD_MAGIC else NO_SUM] += 1
            yield [self._message(topic, stamp, raw, 0)]

    def _rows(self, query: str) -> Iterator[Any]:
        try:
            uri = f"{Path(self.file.name).absolute().as_uri()}?immutable=1"
            with closing(sqlite3.connect(uri, uri=True)) as database:
                yield from database.execute(query)
        except sqlite3.Error as error:
            raise Unreadable(f"damaged: {error}") from None
