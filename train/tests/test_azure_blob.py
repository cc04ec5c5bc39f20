"""Recordings in Azure Blob, on Azure's emulator: mirrored, killed, replaced, disconnected, refused; no secret is printed."""

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import azurite
import numpy as np
import pytest
from azurite import ACCOUNT, Azurite
from test_train import run, tiny
from writing import episode, write

from blob_url import BlobUrl
from config import load
from dataset.cache import load_dataset
from faults import AGAIN, Fault
from recordings import azure_blob
from recordings.azure_blob import Blob, Unfinished, local_folder, wrong_names
from training.run import Run

sdk = pytest.importorskip("azure.storage.blob", reason="the extra `azure` is not installed")
TRAIN = Path(azure_blob.__file__).parents[1]
SECRET = "c2VjcmV0" * 8  # a key that is none


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    if reason := azurite.why_not():
        pytest.skip(reason)
    emulator = Azurite(tmp_path_factory.mktemp("azurite"))
    yield emulator
    emulator.stop()


@pytest.fixture
def blobs(
    started: Azurite, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> Iterator["Blobs"]:
    """A container for each test, with its key in the environment; no secret is printed."""
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AZURE_STORAGE_KEY", started.key + "\n")  # as a file ends
    monkeypatch.setattr(azure_blob, "RETRIES", {"retry_total": 3, "initial_backoff": 0.05, "increment_base": 0.1})
    monkeypatch.setattr(azure_blob, "PIECE", 1 << 16)
    started.reset()
    with Blobs(started, f"c{abs(hash(request.node.name))}"[:20]) as blobs:
        yield blobs
    captured = capfd.readouterr()
    assert started.key not in captured.out + captured.err and "sig=" not in captured.out + captured.err


class Blobs:
    """A container of the emulator."""

    def __init__(self, emulator: Azurite, container: str) -> None:
        self.emulator, self.name = emulator, container
        self.client = sdk.ContainerClient(emulator.endpoint, container, credential=emulator.key)
        self.client.create_container()
        self.url = BlobUrl(f"{emulator.endpoint}/{container}/day 1")

    def __enter__(self) -> "Blobs":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def put(self, name: str, content: bytes) -> bytes:
        self.client.upload_blob(f"day 1/{name}", content, overwrite=True)
        return content

    def served(self) -> dict[str, int]:
        """Bytes that were served of each blob; what a killed test has under way still counts as its own."""
        begin = f"{self.name}/day 1/"
        return {name.removeprefix(begin): n for name, n in self.emulator.served.items() if name.startswith(begin)}


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def there(folder: Path) -> dict[str, bytes]:
    """The files that a reader of recordings would see."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def fault(url: str, cache: Path) -> Fault:
    with pytest.raises(Fault) as caught:
        local_folder(BlobUrl(url), cache)
    return caught.value


def script(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    before = f"import sys; sys.path.insert(0, {str(TRAIN)!r}); from recordings import azure_blob; azure_blob.PIECE = 1 << 16\n"
    command = [sys.executable, "-c", before + code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def test_training_from_blob_is_as_from_the_folder(tmp_path: Path, blobs: Blobs) -> None:
    write(tmp_path / "bags/one", episode(seed=0))
    write(tmp_path / "bags/two", episode(seed=1), "sqlite-zstd-file")
    write(tmp_path / "bags/deep/three", episode(seed=2, ros1=True), "ros1")
    (tmp_path / "bags/notes.txt").write_text("not a recording")
    for file in (path for path in (tmp_path / "bags").rglob("*") if path.is_file()):
        blobs.put(file.relative_to(tmp_path / "bags").as_posix(), file.read_bytes())
    path = tiny(tmp_path)
    url = f"data.bag_dir={blobs.url.replace('day 1', 'day%201')}/"
    one, remote = load_dataset(load(path)), run("--config", path, "--dry-run", url)
    assert (
        remote.stdout == Run(load(path), one).report() + "\n"
        and "mirror: skipped, not recordings: notes.txt" in remote.stderr
    )

    before, lists = dict(blobs.emulator.served), blobs.emulator.lists
    other = load_dataset(load(path, [url]))
    assert blobs.emulator.served == before and blobs.emulator.lists > lists, "the second run lists, and moves nothing"
    assert np.array_equal(one.train.state, other.train.state) and one.recordings == other.recordings
    ticks = np.arange(8)
    pictures = [dataset.train.gather(ticks).images for dataset in (one, other)]
    assert pictures[0] is not None and pictures[1] is not None and (pictures[0] == pictures[1]).all()
    assert (
        not list((tmp_path / "cache").rglob(".building*")) and len(list((tmp_path / "cache").glob("reader-*/*-*"))) == 6
    )


KILLED = """
import contextlib, json, os, random, signal, time
from pathlib import Path
import azure.identity, azure.storage.blob
from blob_url import BlobUrl
from recordings import azure_blob
url, cache = BlobUrl(sys.argv[1]), Path(sys.argv[2])
def held():
    total = 0
    for path in cache.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            total += path.stat().st_size if path.suffix in (".part", ".mcap") else 0
    return total
for kill in range(20):
    goal = held() + (int(sys.argv[3]) - held()) * random.Random(kill).uniform(0, 0.15)
    if not (child := os.fork()):
        azure_blob.local_folder(url, cache)
        os._exit(0)
    while held() < goal and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)  # fails if it has ended
    os.waitpid(child, 0)
    whole = [path.name for path in cache.rglob("*.mcap")]
    print(json.dumps(whole), flush=True)
    input()
print(azure_blob.local_folder(url, cache))
"""


def test_killed_twenty_times_in_the_middle(tmp_path: Path, blobs: Blobs) -> None:
    sizes = [0, 1, 1 << 16, 3 << 16, *random.Random(0).sample(range(200_000, 2_500_000), 20)]
    content = {f"{i}.mcap": blobs.put(f"{i}.mcap", noise(size, i)) for i, size in enumerate(sizes)}
    blobs.emulator.before = lambda name: time.sleep(0.01)
    process = script(KILLED, blobs.url, tmp_path, str(sum(sizes)))
    assert process.stdout and process.stdin
    fetched: dict[str, int] = {}  # bytes served of a blob until it was whole
    for kill in range(20):
        line = process.stdout.readline()
        assert line, f"kill {kill}: {process.communicate()[1]}"
        for name in json.loads(line):
            fetched.setdefault(name, blobs.served().get(name, 0))
        process.stdin.write("\n")
        process.stdin.flush()
    assert 6 < len(fetched) < len(sizes), f"{len(fetched)} whole: the kills were in the middle"
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert there(Path(out.strip())) == content
    served = blobs.served()
    assert all(served.get(name, 0) == count for name, count in fetched.items()), (
        "nothing that was whole is fetched again"
    )
    assert all(served.get(name, 0) <= len(data) + 20 * (1 << 16) for name, data in content.items())
    assert sum(served.values()) > sum(sizes), "some pieces were lost, or it was never killed under way"


TWO = """
import os
from pathlib import Path
import azure.identity, azure.storage.blob
from blob_url import BlobUrl
from recordings import azure_blob
children = []
for _ in range(2):
    if not (child := os.fork()):
        azure_blob.local_folder(BlobUrl(sys.argv[1]), Path(sys.argv[2]))
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitpid(child, 0)[1] for child in children))
"""


def test_two_processes_mirror_to_one_folder(tmp_path: Path, blobs: Blobs) -> None:
    content = {f"{i}.mcap": blobs.put(f"{i}.mcap", noise(400_000, i)) for i in range(6)}
    _, err = (process := script(TWO, blobs.url, tmp_path)).communicate(timeout=60)
    assert process.returncode == 0 and "waiting for process" in err, err
    assert there(local_folder(blobs.url, tmp_path)) == content
    assert blobs.served() == {name: len(data) for name, data in content.items()}, "each byte once"


def test_what_was_replaced_or_removed(tmp_path: Path, blobs: Blobs, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("a.mcap", "b/b.mcap", "c.mcap"):
        blobs.put(name, noise(200_000))
    folder = local_folder(blobs.url, tmp_path)
    stamp = (folder / "c.mcap").stat().st_mtime_ns
    blobs.emulator.reset()
    new = blobs.put("a.mcap", noise(200_000, 1))
    blobs.client.delete_blob("day 1/b/b.mcap")
    assert local_folder(blobs.url, tmp_path) == folder
    assert there(folder) == {"a.mcap": new, "c.mcap": noise(200_000)} and blobs.served() == {"a.mcap": 200_000}
    assert (folder / "c.mcap").stat().st_mtime_ns == stamp, "of which the cache's key is made"
    said = capfd.readouterr().err
    assert "no longer in the container, moved to" in said and "b/b.mcap" in said
    assert [path.read_bytes() for path in (tmp_path / "blob/.gone").rglob("*.mcap")] == [noise(200_000)]

    def replace(name: str) -> None:
        if blobs.emulator.served[name] > 300_000:
            blobs.emulator.before = lambda name: None
            blobs.put("a.mcap", noise(600_000, 3))

    blobs.put("a.mcap", noise(600_000, 2))
    blobs.emulator.reset()
    blobs.emulator.before = replace
    assert there(local_folder(blobs.url, tmp_path))["a.mcap"] == noise(600_000, 3), "replaced while it was fetched"


def test_one_recording_and_the_whole_container(tmp_path: Path, blobs: Blobs) -> None:
    one = blobs.put("one.db3", noise(100))
    blobs.put("one.db3-wal", noise(10))
    blobs.put("one.db3.txt", b"")
    blobs.put("two.mcap", noise(100, 1))
    blobs.client.upload_blob("day 10/three.mcap", b"3")
    blobs.client.upload_blob("day 1/placeholder.mcap", b"", metadata={"hdi_isfolder": "true"})
    blobs.put(".cache/four.mcap", b"4")
    file = local_folder(BlobUrl(f"{blobs.url}/one.db3"), tmp_path)
    assert file.read_bytes() == one and sorted(there(file.parent)) == ["one.db3", "one.db3-wal"]
    assert sorted(there(local_folder(blobs.url, tmp_path))) == ["one.db3", "one.db3-wal", "one.db3.txt", "two.mcap"]
    whole = local_folder(BlobUrl(blobs.url.removesuffix("/day 1")), tmp_path)
    assert "day 10/three.mcap" in there(whole) and len(there(whole)) == 5
    assert max(blobs.emulator.served.values()) == 100, "one mirror for all prefixes of a container"


def test_a_server_that_goes_and_comes_back(
    tmp_path: Path, blobs: Blobs, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    content = {f"{i}.mcap": blobs.put(f"{i}.mcap", noise(400_000, i)) for i in range(4)}
    done = threading.Event()

    def restart(name: str) -> None:
        if sum(blobs.emulator.served.values()) > 500_000 and not done.is_set():
            done.set()
            blobs.emulator.stop()
            threading.Timer(0.5, blobs.emulator.start).start()

    blobs.emulator.before = restart
    monkeypatch.setattr(azure_blob, "RETRIES", {"retry_total": 6, "initial_backoff": 0.2, "increment_base": 2})
    assert there(local_folder(blobs.url, tmp_path)) == content and done.is_set()
    assert blobs.served() == {name: len(data) for name, data in content.items()}, "it resumes where it stopped"

    for name in content:
        content[name] = blobs.put(name, noise(300_000, 9))
    blobs.emulator.reset()
    blobs.emulator.cut = lambda name: sum(blobs.emulator.served.values()) > 500_000
    monkeypatch.setattr(azure_blob, "RETRIES", {"retry_total": 1, "initial_backoff": 0.01, "increment_base": 0.01})
    unfinished = fault(blobs.url, tmp_path)
    assert isinstance(unfinished, Unfinished) and unfinished.code == AGAIN and len(unfinished.args) == 1
    assert "network or server failed" in str(unfinished) and "run the same command to resume" in str(unfinished)
    blobs.emulator.cut = lambda name: False
    assert there(local_folder(blobs.url, tmp_path)) == content


FULL = """
import resource
from pathlib import Path
import faults
from blob_url import BlobUrl
from recordings import azure_blob
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
with faults.exit_with_message():
    azure_blob.local_folder(BlobUrl(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_full_disk(tmp_path: Path, blobs: Blobs) -> None:
    small = blobs.put("small.mcap", noise(1000))
    local_folder(blobs.url, tmp_path)
    large = blobs.put("large.mcap", noise(800_000))
    _, err = (process := script(FULL, blobs.url, tmp_path)).communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err, err
    assert "cannot write the mirror" in err and "File too large" in err and "data.cache_dir" in err
    folder = local_folder(blobs.url, tmp_path)
    assert there(folder) == {"small.mcap": small, "large.mcap": large}
    assert blobs.served()["small.mcap"] == 1000 and blobs.served()["large.mcap"] <= 800_000 + (2 << 16)


def connection(endpoint: str, key: str) -> str:
    return f"AccountName={ACCOUNT};AccountKey={key};BlobEndpoint={endpoint}"


def test_the_other_credentials(tmp_path: Path, blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    content = blobs.put("a.mcap", noise(1000))
    monkeypatch.delenv("AZURE_STORAGE_KEY")
    end = datetime.now(UTC) + timedelta(hours=1)
    token = sdk.generate_container_sas(ACCOUNT, blobs.name, blobs.emulator.key, permission="rl", expiry=end)
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "?" + token)
    assert there(local_folder(blobs.url, tmp_path / "1")) == {"a.mcap": content}
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", token.replace("sp=rl", "sp=rwdl"))
    refused = str(fault(blobs.url, tmp_path))
    assert "refused (403" in refused and "AZURE_STORAGE_SAS_TOKEN" in refused and "sig" not in refused
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection(blobs.emulator.endpoint, blobs.emulator.key))
    assert there(local_folder(blobs.url, tmp_path / "2")) == {"a.mcap": content}


@pytest.mark.parametrize(
    ("environment", "place", "words"),
    [
        ({"AZURE_STORAGE_KEY": SECRET}, "", ["refused (403", "with AZURE_STORAGE_KEY", f"the key of {ACCOUNT}"]),
        ({"AZURE_STORAGE_KEY": "abc"}, "", ["cannot use AZURE_STORAGE_KEY", "copy all of it"]),
        ({"AZURE_STORAGE_KEY": ""}, "", ["no credential", "AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN", "az login"]),
        ({}, "/../nosuch/day", ["has no container nosuch", "check its name"]),
        ({}, "/empty", ["no recordings", "no blobs at all"]),
        ({}, "/other", ["no recordings", "other blobs: a.txt"]),
        ({"AZURE_STORAGE_CONNECTION_STRING": "secret"}, "", ["CONNECTION_STRING: not a connection string"]),
        (
            {"AZURE_STORAGE_CONNECTION_STRING": connection("https://else.example/x", SECRET)},
            "",
            ["is for https://else.example/x, but data.bag_dir is at http://127.0.0.1"],
        ),
    ],
)
def test_what_azure_refuses(
    tmp_path: Path,
    blobs: Blobs,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    place: str,
    words: list[str],
) -> None:
    blobs.put("a.mcap", b"a")
    blobs.put("other/a.txt", b"a")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = fault(
        blobs.url.replace(f"/{blobs.name}/day 1", place[3:]) if place[:3] == "/.." else blobs.url + place, tmp_path
    )
    said = str(found)
    assert all(word in said for word in words) and found.code == 1, said
    assert SECRET not in said and "secret" not in said.replace("secret ", "") and len(found.args) == 1
    assert not there(tmp_path)


def test_without_a_credential_or_without_the_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "EnvironmentCredential")  # it would look elsewhere for long
    found = fault("https://a.blob.core.windows.net/bags", tmp_path)
    assert "no credential; set AZURE_STORAGE_CONNECTION_STRING" in str(found) and found.code == 1

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sp=rl&sig=secret")
    found = fault("https://nobody.blob.core.windows.net/bags", tmp_path)
    assert "Failed to resolve" in str(found) and "check the account's name" in str(found), found
    assert found.code == 1 and "sig" not in str(found)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "azure.storage.blob", None)
    assert "pip install azure-storage-blob azure-identity" in str(
        fault("https://a.blob.core.windows.net/bags", tmp_path)
    )


def test_names_that_are_no_paths_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "/etc/a.mcap",
        "../a.mcap",
        "b/../../c.mcap",
        "d//e.mcap",
        "f\\g.mcap",
        "h.mcap",
        "h.mcap/i.mcap",
        "./j.bag",
    ]
    names += ["k\n.mcap", "l" * 250 + ".mcap", "fine/m.mcap", "fine/n..mcap"]
    assert len(wrong_names(names)) == 9 and not wrong_names(names[-2:] + ["h.mcap", "hh/h.mcap"])
    monkeypatch.setattr(azure_blob, "_list", lambda client, begin: [Blob(begin + name, name, 1, "1") for name in names])
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sig=secret")
    found = fault("https://a.blob.core.windows.net/bags/day", tmp_path)
    assert len(found.args) == 9 and not there(tmp_path), found
    assert "'../a.mcap'" in str(found) and "a file and a folder" in str(found)
