"""Recordings in Azure Blob, mirrored below data.cache_dir, then read as any folder of recordings.

Beside a file NAME, .NAME.etag holds the ETag of its blob; an incomplete file is .NAME.part. A killed mirror resumes where
it stopped, complete files are not downloaded again, and a replaced blob is. Credentials come from the environment only.
No error of the SDK is printed as it is: it may contain a signature.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from blob_url import BlobUrl
from faults import AGAIN, Fault
from files import locked, write_whole

PIECE = 4 << 20  # bytes of one request
RETRIES: dict[str, float] = {"retry_total": 5, "initial_backoff": 1, "increment_base": 2}  # pauses of 2, 3, 5, 9, 17 s
WORKERS = 8  # blobs downloaded at once
REPLACED = 5  # times that a blob may be replaced during its download
PASSING = (None, 408, 429, 500, 502, 503, 504)  # HTTP status of errors that pass; None: no answer
UNRESOLVED = re.compile(r"Name or service not known|Name does not resolve|CERTIFICATE_VERIFY_FAILED")
RECORDING = re.compile(r"metadata\.yaml|.*\.(bag|db3|mcap)[^/]*", re.DOTALL)  # as osmo-workflow.yaml downloads
CONNECTION_STRING, KEY, SAS = "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN"
CREDENTIALS = f"set {CONNECTION_STRING}, {KEY} or {SAS}, or log in with `az login`"


class Unfinished(Fault):
    """Nothing to fix: run the same command again to resume."""

    code = AGAIN


class Blob(NamedTuple):
    """One file of a recording."""

    name: str
    path: str  # the name below the prefix
    size: int  # bytes
    etag: str


def local_folder(place: Path | BlobUrl, cache_dir: Path) -> Path:
    """The folder of recordings at a place: itself, or its updated mirror. Raises Fault; Unfinished if the network failed."""
    if isinstance(place, Path):
        return place
    host = place.endpoint.partition("://")[2]
    root, gone = (cache_dir / "blob" / middle / host / place.container for middle in ("", ".gone"))
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = root.with_name(f".{root.name}.lock")
        with _client(place) as (client, secret), _faults(place, secret), locked(lock):
            return _mirror(place, client, root, gone)
    except OSError as error:
        raise Fault(
            f"{error.filename or root}: cannot write the mirror of {place} ({error.strerror}); free some space or set "
            "data.cache_dir, and run the same command to resume"
        ) from None


def _mirror(url: BlobUrl, client: Any, root: Path, gone: Path) -> Path:
    """Update the folder of the URL's prefix below root."""
    blobs = list(_list(client, f"{url.prefix}/" if url.prefix else ""))
    if not blobs:  # the prefix may be a recording itself, perhaps with a write-ahead log
        blobs = [blob for blob in _list(client, url.prefix) if blob.name in (url.prefix, f"{url.prefix}-wal")]
    shown = [blob for blob in blobs if not re.search(r"(^|/)\.[^./]|(^|/)$", blob.path)]
    wanted = [blob for blob in shown if RECORDING.fullmatch(blob.path.rpartition("/")[2])]
    others = [blob.path for blob in shown if blob not in wanted]
    if not wanted:
        found = f"other blobs: {_first(others)}" if others else "no blobs at all"
        raise Fault(f"{url}: no recordings (.mcap, .db3, .bag), {found}; check the prefix")
    if faults := wrong_names([blob.path for blob in wanted]):
        raise Fault(*faults).at(url)
    files = {root / blob.name: blob for blob in wanted}
    folder = root / url.prefix
    moved = _set_aside(folder, files, gone / url.prefix) if folder not in files else []
    fetched = _download_all(client, {file: blob for file, blob in files.items() if not _is_complete(file, blob)})
    if os.environ.get("LOCAL_RANK", "0") == "0":  # else each process of this machine prints it
        size = sum(blob.size for blob in wanted) / 1e6
        print(
            f"mirror: {len(wanted)} blobs, {size:.1f} MB, downloaded {fetched / 1e6:.1f} MB, in {folder}",
            file=sys.stderr,
        )
        if others:
            print(f"mirror: skipped, not recordings: {_first(others)}", file=sys.stderr)
        if moved:
            print(f"mirror: no longer in the container, moved to {gone / url.prefix}: {_first(moved)}", file=sys.stderr)
    return folder


def _list(client: Any, begin: str) -> Iterator[Blob]:
    """All blobs whose names begin so, without the folders that a Data Lake account lists."""
    for blob in client.list_blobs(name_starts_with=begin, include=["metadata"]):
        if (blob.metadata or {}).get("hdi_isfolder") != "true":
            yield Blob(blob.name, blob.name[begin.rfind("/") + 1 :], blob.size, blob.etag.strip('"'))


def wrong_names(names: list[str]) -> list[str]:
    """The faults of blob names, below the prefix, that cannot be the paths of files."""
    faults = []
    folders = {name[: match.start()] for name in names for match in re.finditer("/", name)}
    for name in names:
        parts = name.split("/")
        if any(part in ("", ".", "..") or re.search(r"[\\\0-\x1f]", part) for part in parts):
            faults.append(f"the blob name {name!r} is not the path of a file; rename it")
        elif any(len(part.encode()) > 240 for part in parts):
            faults.append(f"the blob name {name[:80]!r}... is too long for a file; rename it")
        elif name in folders:
            faults.append(f"the blob {name!r} would be a file and a folder: others begin with {name}/; rename it")
    return faults


def _set_aside(folder: Path, files: dict[Path, Blob], gone: Path) -> list[str]:
    """Move files that are no longer in the container out of the mirror, and remove incomplete ones."""
    known = {path for file in files for path in (file, *_beside(file))}
    moved = []
    for path in sorted(folder.rglob("*"), reverse=True):  # the content of a folder before the folder
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in known and path.name.startswith("."):
            path.unlink()
        elif path not in known:
            target = gone / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
            moved.append(str(path.relative_to(folder)))
    return moved[::-1]


def _download_all(client: Any, missing: dict[Path, Blob]) -> int:
    """Download blobs into files, several at once; the bytes that came."""
    stop = threading.Event()
    have = sum(_size(_beside(file)[0]) for file, blob in missing.items() if _etag(file) == blob.etag)
    options: dict[str, Any] = {"desc": "mirroring", "unit": "B", "unit_scale": True, "disable": not missing}
    total = sum(blob.size for blob in missing.values())
    with tqdm(total=total, initial=have, **options) as bar, ThreadPoolExecutor(WORKERS) as pool:
        try:
            for done in [pool.submit(_download, client, file, blob, bar, stop) for file, blob in missing.items()]:
                done.result()
        finally:  # after a fault or a stop, the others end after their piece
            stop.set()
            pool.shutdown(cancel_futures=True)
        return int(bar.n) - have


def _download(client: Any, file: Path, blob: Blob, bar: tqdm[Any], stop: threading.Event) -> None:
    """Download a blob into a file, from where it stopped."""
    from azure.core import MatchConditions, exceptions

    part, record = _beside(file)
    for _ in range(REPLACED):
        if _etag(file) != blob.etag or _size(part) > blob.size:  # the file is of another blob, or of a replaced one
            file.unlink(missing_ok=True)
            part.unlink(missing_ok=True)
            write_whole(record, blob.etag)
        same: dict[str, Any] = {"etag": f'"{blob.etag}"', "match_condition": MatchConditions.IfNotModified}
        try:
            with part.open("ab") as out:
                while out.tell() < blob.size and not stop.is_set():
                    length = min(PIECE, blob.size - out.tell())
                    out.write(client.download_blob(blob.name, out.tell(), length, decompress=False, **same).readall())
                    out.flush()
                    with bar.get_lock():
                        bar.update(length)
                os.fsync(out.fileno())
        except exceptions.ResourceModifiedError:
            now = client.get_blob_client(blob.name).get_blob_properties()
            blob = blob._replace(size=now.size, etag=now.etag.strip('"'))
            continue
        if _size(part) == blob.size:
            part.rename(file)
        return
    raise Unfinished(f"{blob.name}: replaced again and again during its download; run the same command to resume")


def _beside(file: Path) -> tuple[Path, Path]:
    """The incomplete file, and the file of its ETag."""
    return file.with_name(f".{file.name}.part"), file.with_name(f".{file.name}.etag")


def _etag(file: Path) -> str:
    record = _beside(file)[1]
    return record.read_text() if record.exists() else ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_complete(file: Path, blob: Blob) -> bool:
    return file.exists() and _size(file) == blob.size and _etag(file) == blob.etag


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def _client(url: BlobUrl) -> Iterator[tuple[Any, str]]:
    """A ContainerClient with the environment's credential, and the name of the variable that holds it, if any."""
    try:
        from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
        from azure.core.exceptions import ClientAuthenticationError
        from azure.identity import DefaultAzureCredential
        from azure.storage.blob import ContainerClient, ExponentialRetry
    except ImportError:
        raise Fault(f"{url}: needs two more packages: pip install azure-storage-blob azure-identity") from None
    logging.getLogger("azure").setLevel(logging.CRITICAL)  # it would log what becomes a fault
    values = {name: value for name in (CONNECTION_STRING, KEY, SAS) if (value := os.environ.get(name, "").strip())}
    secret, value = next(iter(values.items()), ("", ""))

    class Retry(ExponentialRetry):
        def increment(self, settings: Any, request: Any, response: Any = None, error: Any = None) -> bool:
            """Whether to try again: not without a credential, or with a wrong account name."""
            lasting = isinstance(error, ClientAuthenticationError) or UNRESOLVED.search(str(error))
            return not lasting and super().increment(settings, request, response, error)

    retry: Any = Retry(random_jitter_range=0, **RETRIES)  # type: ignore[arg-type]
    options: dict[str, Any] = {"retry_policy": retry, "read_timeout": 30, "max_single_get_size": PIECE}
    credential: Any = None
    if secret == CONNECTION_STRING:
        try:
            client = ContainerClient.from_connection_string(value, url.container, **options)
        except ValueError:
            raise Fault(f"{secret}: not a connection string; copy all of it, as Azure shows it") from None
        address = client.url.partition("?")[0].rpartition("/")[0]  # a SAS would follow
        if address != url.endpoint:
            raise Fault(f"{secret}: is for {address}, but data.bag_dir is at {url.endpoint}")
    else:
        if secret == KEY:
            credential = AzureNamedKeyCredential(url.account, value)
        elif secret == SAS:
            credential = AzureSasCredential(value.removeprefix("?"))
        elif url.endpoint.startswith("https:"):
            credential = DefaultAzureCredential()
        else:
            raise Fault(f"{url}: no credential; {CREDENTIALS} (only for https)")
        client = ContainerClient(url.endpoint, url.container, credential=credential, **options)
    with client:
        yield client, secret


@contextmanager
def _faults(url: BlobUrl, secret: str) -> Iterator[None]:
    """Turns the SDK's errors into faults."""
    from azure.core.exceptions import AzureError, ClientAuthenticationError

    unusable = Fault(f"{url}: cannot use {secret or 'the credential'}; copy all of it, as Azure shows it")
    try:
        yield
    except ValueError:  # a key that is not base64
        raise unusable from None
    except AzureError as error:
        status, code, text = getattr(error, "status_code", None), getattr(error, "error_code", None), str(error)
        answer = f"{status} {getattr(code, 'value', None) or code or ''}".strip()
        reason = answer if status else " ".join(re.sub(r"<[^>]*>:?|\w+\(host=.*?\):", "", text).split())[:160]
        fault = Fault(f"{url}: refused ({answer}); see Azure's list of Blob Storage error codes")
        if isinstance(error, ClientAuthenticationError) and status is None:
            why = re.search(r"AADSTS\d+[^\n]{0,160}", text)
            fault = unusable if secret else Fault(f"{url}: no credential{f' ({why[0]})' if why else ''}; {CREDENTIALS}")
        elif status in (401, 403):
            need = f"the key of {url.account}, a valid SAS token to read and list, or the role Storage Blob Data Reader"
            fault = Fault(
                f"{url}: refused ({answer}) with {secret or 'your login'}; expected {need}; check the firewall"
            )
        elif UNRESOLVED.search(text):
            fault = Fault(f"{url}: cannot connect ({reason}); check the account's name")
        elif "ContainerNotFound" in answer:
            fault = Fault(f"{url}: account {url.account} has no container {url.container}; check its name")
        elif status in PASSING or "BlobNotFound" in answer:
            fault = Unfinished(f"{url}: network or server failed ({reason}); run the same command to resume")
        raise fault from None
