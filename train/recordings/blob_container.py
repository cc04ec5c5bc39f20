"""A container of Azure Blob, asked again while network or server fail; what it refuses is a Fault, in our words.

Credentials come from the environment alone, and azure is imported only when a container is opened. No error of its SDK is
repeated whole: it may hold an address with its signature.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from blob_url import BlobUrl
from faults import AGAIN, Fault

if TYPE_CHECKING:
    from azure.core.exceptions import AzureError
    from azure.storage.blob import ContainerClient

PIECE = 4 << 20  # bytes of one request: what a kill costs at most, for each blob under way
PAUSES = (1, 2, 4, 8, 16)  # seconds before each new try
PASSING = (None, 408, 429, 500, 502, 503, 504)  # of HTTP; None where there was no answer
LASTING = re.compile(
    r"Name or service not known|Name does not resolve|CERTIFICATE_VERIFY_FAILED"
)  # not worth a new try
RECORDING = re.compile(r"metadata\.yaml|.*\.(bag|db3|mcap)[^/]*", re.DOTALL)  # as osmo-workflow.yaml downloads
CONNECTION_STRING, KEY, SAS = "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN"
CREDENTIALS = f"{CONNECTION_STRING}, {KEY} or {SAS}, or log in with `az login`"
T = TypeVar("T")


class Unfinished(Fault):
    """Nothing to mend: the same command goes on."""

    code = AGAIN


class Blob(NamedTuple):
    """A recording's file, or one of them."""

    name: str
    path: str  # the name below the prefix
    size: int  # bytes
    etag: str


class Container:
    """The container of a URL. Raises Fault; Unfinished where the same command goes on."""

    def __init__(self, url: BlobUrl) -> None:
        self.url, self.stop = url, threading.Event()
        try:
            from azure.core import MatchConditions, exceptions

            self.client, self.secret = _client(url)
        except ImportError:
            raise Fault(f"{url}: takes two packages more: pip install azure-storage-blob azure-identity") from None
        self.errors, self.if_same = exceptions, MatchConditions.IfNotModified
        logging.getLogger("azure").setLevel(logging.CRITICAL)  # what it would log is told as a fault

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def recordings(self) -> tuple[list[Blob], list[str]]:
        """The files of recordings at the URL, and the names of what else is there, below the prefix."""
        prefix = self.url.prefix
        found = self._ask(lambda: self._listed(f"{prefix}/" if prefix else ""))
        if not found:  # a recording itself, perhaps with a write-ahead log
            found = [one for one in self._ask(lambda: self._listed(prefix)) if one.name in (prefix, f"{prefix}-wal")]
        wanted, others = [], []
        for blob in found:
            *folders, name = blob.path.split("/")
            hidden = any(part.startswith(".") and part not in (".", "..") for part in (*folders, name))
            if RECORDING.fullmatch(name) and not hidden:
                wanted.append(blob)
            elif name:  # else a folder's placeholder
                others.append(blob.path)
        return wanted, others

    def _listed(self, begin: str) -> list[Blob]:
        """All blobs that begin so, without the placeholders of folders that a Data Lake account lists."""
        return [
            Blob(one.name, one.name[begin.rfind("/") + 1 :], one.size, one.etag.strip('"'))
            for one in self.client.list_blobs(name_starts_with=begin, include=["metadata"])
            if (one.metadata or {}).get("hdi_isfolder") != "true"
        ]

    def piece(self, blob: Blob, start: int) -> bytes | None:
        """The next bytes of a blob from start on; None if it is no longer the blob that was listed."""

        def get() -> bytes | None:
            length = min(PIECE, blob.size - start)
            same: dict[str, Any] = {"etag": f'"{blob.etag}"', "match_condition": self.if_same}
            try:
                return self.client.download_blob(blob.name, start, length, decompress=False, **same).readall()
            except self.errors.ResourceModifiedError:
                return None

        return self._ask(get)

    def now(self, blob: Blob) -> Blob:
        """The blob of the same name that is there now."""
        found = self._ask(self.client.get_blob_client(blob.name).get_blob_properties)
        return blob._replace(size=found.size, etag=found.etag.strip('"'))

    def _ask(self, question: Callable[[], T]) -> T:
        """The answer, asked for again after growing pauses while network or server fail."""
        for pause in (*PAUSES, None):
            try:
                return question()
            except self.errors.AzureError as error:
                if pause is None or not self._is_passing(error) or self.stop.wait(pause):
                    raise self._fault(error) from None
            except ValueError:  # of what cannot be made a request
                raise self._unusable() from None
        raise AssertionError("the last pause is None")

    def _is_passing(self, error: AzureError) -> bool:
        refused = isinstance(error, self.errors.ClientAuthenticationError)
        return not refused and getattr(error, "status_code", None) in PASSING and not LASTING.search(str(error))

    def _fault(self, error: AzureError) -> Fault:
        url, status, code = self.url, getattr(error, "status_code", None), getattr(error, "error_code", None)
        answer = f"{status} {getattr(code, 'value', None) or code or ''}".strip()
        reason = answer if status else " ".join(re.sub(r"<[^>]*>:?|\w+\(host=.*?\):", "", str(error)).split())[:160]
        if self._is_passing(error):
            return Unfinished(f"{url}: network or server failed ({reason}); the same command goes on from here")
        if isinstance(error, self.errors.ClientAuthenticationError) and status is None:
            if self.secret:
                return self._unusable()
            why = re.search(r"AADSTS\d+[^\n]{0,160}", str(error))
            return Fault(f"{url}: no credential{f' ({why[0]})' if why else ''}; set {CREDENTIALS}")
        if status in (401, 403):
            by = self.secret or "what DefaultAzureCredential found"
            return Fault(
                f"{url}: refused with {answer}, by {by}; expected the key of the account {url.account}, a SAS token that "
                "may read and list and has not ended, or the role Storage Blob Data Reader; and the account's firewall "
                "must let this machine in"
            )
        if "ContainerNotFound" in answer:
            return Fault(f"{url}: the account {url.account} has no container {url.container}; is it spelt right?")
        if "BlobNotFound" in answer:
            return Unfinished(f"{url}: a blob was removed while it was fetched; run the same command again")
        if status is None:
            return Fault(f"{url}: cannot be reached ({reason}); is the account's name spelt right?")
        return Fault(f"{url}: refused with {answer}; Azure's list of Blob Storage error codes says why")

    def _unusable(self) -> Fault:
        return Fault(f"{self.url}: {self.secret or 'the credential'} cannot be used; copy it whole, as Azure shows it")


def _client(url: BlobUrl) -> tuple[ContainerClient, str]:
    """A client with the credential that the environment gives, and the name of the variable that it stands in, if any."""
    from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
    from azure.identity import DefaultAzureCredential
    from azure.storage.blob import ContainerClient

    given = {name: value for name in (CONNECTION_STRING, KEY, SAS) if (value := os.environ.get(name, "").strip())}
    secret, value = next(iter(given.items()), ("", ""))
    options: dict[str, Any] = {"retry_total": 0, "read_timeout": 30, "max_single_get_size": PIECE}
    if secret == CONNECTION_STRING:
        try:
            client = ContainerClient.from_connection_string(value, url.container, **options)
        except ValueError:
            raise Fault(f"{secret}: is not a connection string; copy it whole, as Azure shows it") from None
        there = client.url.partition("?")[0]  # behind which a SAS would stand
        if there != f"{url.endpoint}/{url.container}":
            raise Fault(f"{secret}: is for {there.rpartition('/')[0]}, but data.bag_dir is at {url.endpoint}")
        return client, secret
    credential: Any
    if secret == KEY:
        credential = AzureNamedKeyCredential(url.account, value)
    elif secret == SAS:
        credential = AzureSasCredential(value.removeprefix("?"))
    elif url.endpoint.startswith("https:"):
        credential = DefaultAzureCredential()
    else:
        raise Fault(f"{url}: no credential; set {CREDENTIALS} (for https alone)")
    return ContainerClient(url.endpoint, url.container, credential=credential, **options), secret
