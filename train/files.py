"""Files that survive a kill: written under a temporary name, on the disk before they are renamed; one owner per folder."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, fsync it and rename it; its folder is created. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    fsync(temporary)
    temporary.rename(path)
    fsync(path.parent)


def write_json(path: Path, content: Any, indent: int = 2) -> None:
    """Write a tree as JSON, as write_whole does."""
    write_whole(path, json.dumps(content, indent=indent) + "\n")


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk: a rename must not outlive its content in a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is created, alone among processes; wait for another owner. A dead owner's lock is free."""
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: waiting for another process that uses it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
