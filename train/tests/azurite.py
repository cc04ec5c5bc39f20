"""Azure's storage emulator on loopback, behind a proxy that counts what it serves and can slow or cut it."""

from __future__ import annotations

import base64
import os
import secrets
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

PROGRAM = Path(__file__).parents[1] / ".azurite/node_modules/.bin/azurite-blob"
LOG = Path(__file__).parents[1] / ".azurite/npm.log"
ACCOUNT = "robots"


def why_not() -> str:
    """Why the emulator cannot be started, if so."""
    if PROGRAM.exists():
        return ""
    errors = [line for line in LOG.read_text().splitlines() if "error" in line] if LOG.exists() else []
    return f"Azurite is not installed: {' '.join(errors[:2]) or '`make test` installs it where npm is'}"


class Proxy(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no error here."""


class Azurite:
    """The emulator, with an account and a key of its own, and the proxy before it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = folder, base64.b64encode(secrets.token_bytes(64)).decode()
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = int(found.getsockname()[1])
        self.served: Counter[str] = Counter()  # bytes of each blob, by container/name
        self.lists = 0
        self.before: Callable[[str], object] = lambda name: None  # called with each blob that is asked for
        self.cut: Callable[[str], bool] = lambda name: False  # whether to end in the middle of an answer
        self.proxy = Proxy(("127.0.0.1", 0), self.handler())
        Thread(target=self.proxy.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.proxy.server_port}/{ACCOUNT}"
        self.start()

    def start(self) -> None:
        where = ("--location", self.folder, "--blobHost", "127.0.0.1", "--blobPort", str(self.port))
        quiet = ("--silent", "--disableTelemetry", "--skipApiVersionCheck")
        environment = os.environ | {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{self.key}"}
        self.process = subprocess.Popen([PROGRAM, *where, *quiet], env=environment, stdout=subprocess.DEVNULL)
        for _ in range(300):
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise TimeoutError("Azurite did not start within 30 s")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    def reset(self) -> None:
        self.served.clear()
        self.lists = 0
        self.before, self.cut = lambda name: None, lambda name: False

    def handler(self) -> type[BaseHTTPRequestHandler]:
        emulator = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

            def do_GET(self) -> None:
                path = urlsplit(self.path)
                name = unquote(path.path).partition(f"/{ACCOUNT}/")[2]
                blob = self.command == "GET" and "comp=" not in path.query and "/" in name
                emulator.lists += "comp=list" in path.query
                try:
                    if blob:
                        emulator.before(name)
                    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                    server = HTTPConnection("127.0.0.1", emulator.port)
                    server.request(self.command, self.path, body, dict(self.headers))
                    answer = server.getresponse()
                    content = answer.read()
                    self.send_response_only(answer.status, answer.reason)
                    for key, value in answer.getheaders():
                        if key.lower() not in ("transfer-encoding", "connection", "content-length"):
                            self.send_header(key, value)
                    length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
                    self.send_header("Content-Length", str(length or 0))
                    self.end_headers()
                    if blob and emulator.cut(name):
                        content, self.close_connection = content[: len(content) // 2], True
                    self.wfile.write(content)
                    if blob and answer.status in (200, 206):
                        emulator.served[name] += len(content)
                except OSError:  # one of the two sides is gone
                    self.close_connection = True

            do_HEAD = do_PUT = do_DELETE = do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        return Handler
