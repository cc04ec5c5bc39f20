"""Files that survive a kill: written under a temporary name, on the disk before they are renamed; one owner per folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from faults import Fault

LOCK, BUILDING = ".lock", ".building-"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, fsync it and rename it; its folder is created. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync(temporary)
        temporary.rename(path)
        fsync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write does not name its file
        raise


def write_json(path: Path, content: Any, indent: int = 2) -> None:
    """Write a tree as JSON, as write_whole does."""
    write_whole(path, json.dumps(content, indent=indent) + "\n")


def read_json(path: Path) -> Any:
    """A tree of JSON. Raises OSError, or ValueError for what is none."""
    try:
        return json.loads(path.read_text())
    except RecursionError:
        raise ValueError("nested too deep") from None


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk: a rename must not outlive its content in a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def digest(tree: dict[str, Any]) -> str:
    """The SHA-256 of a tree of JSON."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


@contextmanager
def locked(lock: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock file, its folder made, alone among processes. A dead owner's is free. Waits for a living one, or raises Fault."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            if not wait:
                raise Fault(f"{lock.parent}: in use by {owner}; wait for it, stop it, or set another folder") from None
            print(f"{lock.parent}: waiting for {owner}, which uses it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            print(f"note: {lock.parent}: no locks on this filesystem; use it by one run at a time", file=sys.stderr)
        if not os.fstat(file.fileno()).st_nlink:
            raise Fault(f"{lock.parent}: another process has just left it; run the same command again")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M}\n")
        file.flush()
        yield


@contextmanager
def building(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, removed at the end unless it was renamed. Until then this process holds its lock."""
    with ExitStack() as stack:
        with locked(parent / LOCK):  # remove_abandoned must not see the folder without its lock
            folder = Path(tempfile.mkdtemp(prefix=BUILDING, dir=parent))
            lock = folder.with_name(folder.name + LOCK)
            stack.enter_context(locked(lock))
            stack.callback(lock.unlink, missing_ok=True)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def remove_abandoned(parent: Path) -> None:
    """Remove the folders in `parent` that killed processes were building. Without any, `parent` may be read-only."""
    names = {path.name.removesuffix(LOCK) for path in parent.glob(f"{BUILDING}*")}
    with locked(parent / LOCK) if names else nullcontext():
        for folder in (parent / name for name in names):
            lock = folder.with_name(folder.name + LOCK)
            try:
                with locked(lock, wait=False):
                    shutil.rmtree(folder, ignore_errors=True)
                    lock.unlink()
            except Fault:  # its owner lives
                continue
