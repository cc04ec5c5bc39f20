"""The address of recordings in Azure Blob, taken apart and checked: https://ACCOUNT.blob.core.windows.net/CONTAINER/PREFIX.

A secret does not belong in it, nor in any configuration; one that is there is refused, and not repeated.
"""

from __future__ import annotations

import re
from urllib.parse import SplitResult, unquote, urlsplit

from faults import Fault

EXPECTED = "expected https://ACCOUNT.blob.core.windows.net/CONTAINER/PREFIX"
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # an emulator, which has the account's name in the path


def is_url(text: str) -> bool:
    """Whether a text is meant as an address, not as a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


class BlobUrl(str):
    """A checked address. Raises Fault with all that is wrong with it."""

    account: str
    endpoint: str  # scheme, host and port, with the account if it stands in the path
    container: str
    prefix: str  # a folder of blobs, or one blob; "" for the whole container

    def __new__(cls, text: str) -> BlobUrl:
        try:
            parts = urlsplit(text.strip())
            host, port = parts.hostname or "", parts.port
        except ValueError:  # a port that is no number, half an IPv6 address
            raise Fault(f"cannot be taken apart as a URL; {EXPECTED}") from None
        segments = [unquote(segment) for segment in parts.path.strip("/").split("/")]
        local = host in LOOPBACK
        container = segments[local] if len(segments) > local else ""
        if faults := [*_secrets(parts), *_wrong_place(parts.scheme, host, container, segments[local + 1 :])]:
            raise Fault(*faults)
        self = super().__new__(cls, text.strip())
        self.account = segments[0] if local else host.partition(".")[0]
        netloc = f"[{host}]" if ":" in host else host
        self.endpoint = f"{parts.scheme}://{netloc}{f':{port}' if port else ''}{f'/{segments[0]}' if local else ''}"
        self.container, self.prefix = container, "/".join(segments[local + 1 :])
        return self


def _secrets(parts: SplitResult) -> list[str]:
    """What may be a secret: refused, and never repeated."""
    faults = []
    if parts.query:
        faults.append(
            "has a query behind the ?, perhaps a SAS token, which does not belong in a configuration; "
            "take it away, and put it into the environment as AZURE_STORAGE_SAS_TOKEN"
        )
    if "@" in parts.netloc:
        faults.append(
            "has a name or password before the @, which does not belong in a configuration; "
            "take it away, and put the account's key into the environment as AZURE_STORAGE_KEY"
        )
    if parts.fragment:
        faults.append("has a # and something behind it; in the name of a blob it is written %23")
    return faults


def _wrong_place(scheme: str, host: str, container: str, prefix: list[str]) -> list[str]:
    if scheme not in ("https", "http") or not host:
        return [f"is at {scheme}://{host}, which is not Azure Blob; {EXPECTED}"]
    faults = []
    if scheme == "http" and host not in LOOPBACK:
        faults.append(f"http://{host} would send recordings and credentials in the clear; {EXPECTED}")
    if ".dfs." in host:
        faults.append(
            f"{host} is the account's Data Lake address; give the same with {host.replace('.dfs.', '.blob.')}"
        )
    if not re.fullmatch(r"\$?[a-z0-9][a-z0-9-]{2,62}", container):
        found = f"{container!r} is not the name of a container" if container else "names no container"
        faults.append(f"{found}; {EXPECTED}")
    if any(segment in ("", ".", "..") or re.search(r"[/\\\0]", segment) for segment in prefix):
        faults.append(f"the prefix {'/'.join(prefix)!r} is not the name of a folder; {EXPECTED}")
    return faults
