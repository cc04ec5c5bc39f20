"""The URL of recordings in Azure Blob: https://ACCOUNT.blob.core.windows.net/CONTAINER/PREFIX. A secret in it is refused."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

URL_FORM = "expected https://ACCOUNT.blob.core.windows.net/CONTAINER/PREFIX"
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # an emulator; its path begins with the account's name


def is_url(text: str) -> bool:
    """Whether a text is a URL, not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


class BlobUrl(str):
    """A checked URL. Raises ValueError with everything wrong with it, one argument each, without a secret."""

    account: str
    endpoint: str  # scheme, host and port; for an emulator also the account
    container: str
    prefix: str  # a folder of blobs, or one blob; "" for the whole container

    def __new__(cls, text: str) -> BlobUrl:
        try:
            parts = urlsplit(text.strip())
            host, port = parts.hostname or "", parts.port
        except ValueError:  # a port that is no number, half an IPv6 address
            raise ValueError(f"is not a valid URL; {URL_FORM}") from None
        segments = [unquote(segment) for segment in parts.path.strip("/").split("/")]
        account = segments.pop(0) if host in LOOPBACK else host.partition(".")[0]
        container, *prefix = segments or [""]
        faults = []
        if parts.query:
            faults.append("has a query, perhaps a SAS token; remove it and set AZURE_STORAGE_SAS_TOKEN instead")
        if "@" in parts.netloc:
            faults.append("has a name or password before the @; remove it and set AZURE_STORAGE_KEY instead")
        if parts.fragment:
            faults.append("has a #; in the name of a blob write %23")
        if parts.scheme not in ("https", "http") or not host:
            faults.append(f"{parts.scheme}://{host} is not Azure Blob; {URL_FORM}")
        else:
            if parts.scheme == "http" and host not in LOOPBACK:
                faults.append(f"http://{host} would send recordings and credentials unencrypted; {URL_FORM}")
            if ".dfs." in host:
                faults.append(f"{host} is the account's Data Lake address; use {host.replace('.dfs.', '.blob.')}")
            if not re.fullmatch(r"\$?[a-z0-9][a-z0-9-]{2,62}", container):
                found = f"{container!r} is not a container's name" if container else "names no container"
                faults.append(f"{found}; {URL_FORM}")
            if any(segment in ("", ".", "..") or re.search(r"[/\\\0]", segment) for segment in prefix):
                faults.append(f"the prefix {'/'.join(prefix)!r} is not a folder's name; {URL_FORM}")
        if faults:
            raise ValueError(*faults)
        self = super().__new__(cls, text.strip())
        netloc = (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
        self.endpoint = f"{parts.scheme}://{netloc}" + (f"/{account}" if host in LOOPBACK else "")
        self.account, self.container, self.prefix = account, container, "/".join(prefix)
        return self
