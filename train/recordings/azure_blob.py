"""Recordings in Azure Blob, mirrored to a folder below data.cache_dir, which is then read as any folder of recordings.

Beside a file NAME lies .NAME.etag, the ETag of the blob that it is, written before the first byte; until the file is whole
it is .NAME.part. So a kill at any moment loses at most the piece under way: what is whole is not fetched again, and a
blob that was replaced is fetched anew.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blob_url import BlobUrl
from faults import Fault
from files import locked, write_whole
from recordings.blob_container import Blob, Container, Unfinished

WORKERS = 8  # blobs that are fetched at once
REPLACED = 5  # times that a blob may be replaced while it is fetched


def local_folder(place: Path | BlobUrl, cache_dir: Path) -> Path:
    """The folder of recordings at a place: itself, or its mirror below cache_dir, brought up to date.

    Raises Fault, and Unfinished where the network failed.
    """
    if isinstance(place, Path):
        return place
    host = place.endpoint.partition("://")[2]
    root = cache_dir / "blob" / host / place.container
    try:
        with Container(place) as container, locked(root):
            return _mirror(container, root, cache_dir / "blob/.gone" / host / place.container)
    except OSError as error:
        raise Fault(
            f"{error.filename or root}: cannot hold the mirror of {place} ({error.strerror}); free some, or set "
            "data.cache_dir; what is there stays, and the same command goes on"
        ) from None


def _mirror(container: Container, root: Path, gone: Path) -> Path:
    """Make the folder of the URL's prefix below root as the container has it."""
    url = container.url
    blobs, others = container.recordings()
    if not blobs:
        there = f"other blobs are there: {_some(others)}" if others else "nothing is there"
        raise Fault(f"{url}: holds no recording (.mcap, .db3, .bag), {there}; is the prefix spelt right?")
    if faults := wrong_names([blob.path for blob in blobs]):
        raise Fault(*(f"{url}: {fault}" for fault in faults))
    files = {root / blob.name: blob for blob in blobs}
    folder = root / url.prefix
    moved = _set_aside(folder, files.keys(), gone / url.prefix) if folder not in files else []
    missing = {file: blob for file, blob in files.items() if not _is_whole(file, blob)}
    fetched = _fetch(container, missing)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # else each process of this machine would say it
        size = sum(blob.size for blob in blobs)
        print(
            f"mirror: {len(blobs)} blobs, {size / 1e6:.1f} MB, {fetched / 1e6:.1f} MB fetched, in {folder}",
            file=sys.stderr,
        )
        if others:
            print(f"mirror: left out, no recordings: {_some(others)}", file=sys.stderr)
        if moved:
            print(f"mirror: no longer in the container, moved to {gone / url.prefix}: {_some(moved)}", file=sys.stderr)
    return folder


def wrong_names(names: list[str]) -> list[str]:
    """What is wrong with the names of blobs, below the prefix, as the paths of files."""
    faults = []
    folders = {name[: match.start()] for name in names for match in re.finditer("/", name)}
    for name in names:
        parts = name.split("/")
        if any(part in ("", ".", "..") or re.search(r"[\\\0-\x1f]", part) for part in parts):
            faults.append(f"the blob {name!r} has a name that is not the path of a file below the prefix; rename it")
        elif any(len(part.encode()) > 240 for part in parts):
            faults.append(f"the blob {name[:80]!r}... has a name too long for a file; rename it")
        elif name in folders:
            faults.append(f"the blob {name!r} would be a file and a folder, since others begin with {name}/; rename it")
    return faults


def _set_aside(folder: Path, wanted: Collection[Path], gone: Path) -> list[str]:
    """Take what is no longer in the container out of the mirror: files that were whole are moved, the rest removed."""
    known = {path for file in wanted for path in (file, *_beside(file))}
    moved = []
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in known:
            if path.name.startswith("."):
                path.unlink()
            else:
                name = path.relative_to(folder)
                (gone / name).parent.mkdir(parents=True, exist_ok=True)
                path.rename(gone / name)
                moved.append(str(name))
    return moved[::-1]


def _fetch(container: Container, missing: dict[Path, Blob]) -> int:
    """Fetch blobs into files, many at once; the bytes that came."""
    there = {file: _size(_beside(file)[0]) if _etag(file) == blob.etag else 0 for file, blob in missing.items()}
    size = sum(blob.size for blob in missing.values())
    with (
        tqdm(
            total=size, initial=sum(there.values()), desc="mirroring", unit="B", unit_scale=True, disable=not missing
        ) as bar,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        try:
            for future in as_completed([pool.submit(_fetch_one, container, *one, bar) for one in missing.items()]):
                future.result()
        finally:  # a fault in one of them, or a stop: the others end after the piece they are at
            container.stop.set()
            pool.shutdown(cancel_futures=True)
        return int(bar.n) - sum(there.values())


def _fetch_one(container: Container, file: Path, blob: Blob, bar: tqdm[Any]) -> None:
    """Fetch a blob into a file, from where it was left. Raises Unfinished, Fault, OSError."""
    part, record = _beside(file)
    for _ in range(REPLACED):
        if _etag(file) != blob.etag or _size(part) > blob.size:  # another blob, or one that was replaced
            file.unlink(missing_ok=True)
            part.unlink(missing_ok=True)
            write_whole(record, blob.etag)
        with part.open("ab") as out:
            while out.tell() < blob.size and (content := container.piece(blob, out.tell())):
                out.write(content)
                out.flush()
                with bar.get_lock():
                    bar.update(len(content))
                if container.stop.is_set():
                    return
            os.fsync(out.fileno())
        if _size(part) == blob.size:
            part.rename(file)
            return
        blob = container.now(blob)
    raise Unfinished(f"{blob.name}: is replaced again and again while it is fetched; the same command goes on")


def _beside(file: Path) -> tuple[Path, Path]:
    """Where a file grows, and where the ETag stands of the blob that it is."""
    return file.with_name(f".{file.name}.part"), file.with_name(f".{file.name}.etag")


def _etag(file: Path) -> str:
    record = _beside(file)[1]
    return record.read_text() if record.exists() else ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_whole(file: Path, blob: Blob) -> bool:
    return file.exists() and _size(file) == blob.size and _etag(file) == blob.etag


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
