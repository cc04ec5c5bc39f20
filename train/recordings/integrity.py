"""Whether a storage file contradicts itself: its checksums, where its recorder wrote some, and all that stands in it twice.

A reader that goes by an index loses, without a word, the messages that a flipped bit took out of it; one that goes by a length
reads what was never recorded. So every record is walked, whether or not anyone asked for its topic, and an index is held
against its messages, a count against what is counted, a copy against its original: MCAP by walk_mcap.py, ROS bags by
walk_bag.py, SQLite by its own check, https://sqlite.org/pragma.html#pragma_integrity_check.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from faults import Fault, NoRoom
from recordings.bags import REMEDIES, unpacked
from recordings.chunks import NO_SUM, ZSTD_MAGIC, Damage, zstd_sum
from recordings.walk_bag import walk_bag
from recordings.walk_mcap import walk_mcap


class Checked(NamedTuple):
    """What a storage file says of itself."""

    carries: str  # its checksums, in words
    faults: list[str]


def check(file: Path) -> Checked:
    """A storage file, walked from end to end: its checksums, and its first contradiction."""
    sums: Counter[str] = Counter()
    faults: list[str] = []
    try:
        with unpacked(file) as plain:
            if plain != file:
                with file.open("rb") as packed:
                    sums[zstd_sum(packed.read(8))] += 1
            {".mcap": walk_mcap, ".bag": walk_bag}.get(plain.suffix, _check_sqlite)(plain, sums)
    except NoRoom:
        raise
    except Fault as fault:
        faults = [str(line) for line in fault.args]
    except Damage as damage:
        remedy = REMEDIES[Path(file.name.removesuffix(".zstd")).suffix]
        faults = [f"{file}: is damaged{damage}; copy it again, try {remedy}, or leave it out"]
    return Checked(_in_words(sums), faults)


def _in_words(sums: Counter[str]) -> str:
    kinds = [kind for kind in sums if kind != NO_SUM]
    if kinds and sums[NO_SUM]:
        of_the_whole = all(kind.startswith("CRC of the ") for kind in kinds)  # of its summary, that is
        kinds.append(f"{NO_SUM} of {'the messages' if of_the_whole else f'{sums[NO_SUM]} chunks'}")
    return ", ".join(kinds) or NO_SUM


def _check_sqlite(file: Path, sums: Counter[str]) -> None:
    """Raises Damage."""
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?immutable=1", uri=True)) as database:
            found = " ".join("; ".join(row[0] for row in database.execute("PRAGMA integrity_check(3)")).split())
            strays = (
                "topic_id NOT IN (SELECT id FROM topics) OR typeof(data) != 'blob' OR typeof(timestamp) != 'integer'"
            )
            (lost,) = database.execute(f"SELECT count(*) FROM messages WHERE {strays}").fetchone()
            first = database.execute("SELECT data FROM messages LIMIT 1").fetchone()
            (pages,), (size,) = (database.execute(f"PRAGMA page_{what}").fetchone() for what in ("count", "size"))
    except sqlite3.Error as error:
        raise Damage(None, str(error)) from None
    if found != "ok":
        raise Damage(None, f"SQLite's integrity check says {found[:200]}")
    if (
        file.stat().st_size < pages * size or file.stat().st_size % size
    ):  # what is missing of the last page reads as zeroes
        raise Damage(None, f"{file.stat().st_size} bytes, expected {pages} pages of {size}")
    if lost:
        raise Damage(None, f"{lost} messages are of a topic that its table does not have, or are none")
    packed = first is not None and bytes(first[0][:4]) == ZSTD_MAGIC
    sums[zstd_sum(first[0]) if packed else NO_SUM] += 1
