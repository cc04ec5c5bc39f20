"""Recordings to their folders in the cache, on all cores. No torch here.

python -m dataset.build: what a core runs. A job is a line of JSON on standard input; answers are lines of JSON on standard
output. Without its parent a process ends.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from config import Data, load, to_dict
from cores import usable_cores
from faults import Fault, NoRoom, end
from files import BUILDING, building, digest, remove_abandoned, sha256
from recordings.bags import Bag
from recordings.episodes import Recording, read_frames, read_recording

FORMAT = 3  # of a cached recording
READER = "reader-"  # and a version: the cache of that version
NOT_IN_THE_KEY = ("bag_dir", "cache_dir", "validation_fraction", "on_bad_bag")  # settings that change no sample
WORTH_PROCESSES = 50_000_000  # bytes of recordings; a process takes 0.6 s to start
FIRST_PASS = 0.2  # share of the time to read a recording in which its joints are read
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
Report = Callable[[int], Any]  # of bytes that are done


def build_all(bags: list[Bag], folders: dict[str, Path], data: Data, report: Report) -> Iterator[tuple[str, ...]]:
    """Build the folder of each recording; its faults, in the order of the recordings. Raises NoRoom if a disk is full."""
    if len(bags) < 2 or sum(map(size, bags)) < WORTH_PROCESSES:
        for bag in bags:
            yield build(bag, data, folders[bag.name], usable_cores(), report)
        return
    count = min(cores := usable_cores(), len(bags))
    idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()

    def work(bag: Bag) -> tuple[str, ...]:
        process = idle.get()
        try:
            return _ask(process, bag, folders[bag.name], report)
        finally:
            idle.put(process)

    settings = f"data={json.dumps(to_dict(data))}"
    with ExitStack() as stack:
        for _ in range(count):
            idle.put(stack.enter_context(_process(settings, cores // count)))
        pool = ThreadPoolExecutor(count, "build")
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        yield from pool.map(work, bags)


@contextmanager
def _process(settings: str, decoders: int) -> Iterator[subprocess.Popen[str]]:
    """A process that builds one recording after the other; at the end of the block it is stopped and has tidied up."""
    command = [sys.executable, "-m", "dataset.build", str(decoders), settings]
    room = Path(__file__).parents[1]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=room) as process:
        try:
            yield process
        finally:
            process.terminate()
            with suppress(BrokenPipeError):  # of what it did not read
                process.stdin.close()  # type: ignore[union-attr]  # it is a pipe


def _ask(process: subprocess.Popen[str], bag: Bag, folder: Path, report: Report) -> tuple[str, ...]:
    """Let a process build a recording; its faults."""
    assert process.stdin and process.stdout
    job = {"name": bag.name, "files": list(map(str, bag.files)), "declared": bag.declared, "folder": str(folder)}
    with suppress(BrokenPipeError):  # of a process that has ended, see below
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    for line in process.stdout:
        answer = json.loads(line)
        if "done" in answer:
            report(answer["done"])
        elif "no_room" in answer:
            raise NoRoom(*answer["no_room"])
        else:
            return tuple(answer["faults"])
    raise NoRoom(
        f"{bag.name}: the process that read it ended with code {process.wait()}; is the memory full? Run the same command "
        "to resume"
    )


def main() -> None:
    """Build what standard input names, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops this process
    signal.signal(signal.SIGTERM, end)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    cv2.setNumThreads(1)  # the cores are shared by processes
    decoders, data = int(sys.argv[1]), load(None, sys.argv[2:]).data

    def answer(**content: Any) -> None:
        try:
            print(json.dumps(content), flush=True)
        except BrokenPipeError:  # the parent is gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            end(signal.SIGTERM)

    try:
        for line in sys.stdin:
            job = json.loads(line)
            bag = Bag(job["name"], tuple(map(Path, job["files"])), job["declared"])
            try:
                answer(faults=build(bag, data, Path(job["folder"]), decoders, lambda done: answer(done=done)))
            except NoRoom as fault:
                answer(no_room=fault.args)
            except OSError as error:  # a disk that fails
                answer(no_room=[f"{error.filename or bag.name}: {error.strerror or error}"])
        end(signal.SIGTERM)
    finally:  # what a signal cut off, undisturbed by the one of the parent's end
        remove_abandoned(cache_of_this_code(data))


def build(bag: Bag, data: Data, folder: Path, decoders: int, report: Report) -> tuple[str, ...]:
    """Read a recording and decode the pictures that its ticks need, into a folder; its faults. Raises NoRoom."""
    try:
        _build(bag, data, folder, decoders, report)
    except NoRoom:
        raise
    except Fault as fault:
        return fault.args
    return ()


def _build(bag: Bag, data: Data, folder: Path, decoders: int, report: Report) -> None:
    """Rename the folder when it is complete. Raises Fault."""
    total = size(bag)
    with ThreadPoolExecutor(1) as beside:  # hashing releases the GIL
        hashes = beside.submit(lambda: {file.name: sha256(file) for file in bag.files if file.exists()})
        recording = read_recording(bag, data)
    report(first := int(FIRST_PASS * total))

    def report_share(share: float) -> None:
        report(int(share * (total - first)))

    try:
        with building(folder.parent) as unfinished:
            _write(bag, recording, hashes.result(), data, unfinished, decoders, report_share)
            unfinished.chmod(0o755)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.exists():  # else another run was faster
                    raise
    except OSError as error:
        raise NoRoom(
            f"{data.cache_dir}: cannot write the cache of {bag.name} ({error.strerror}); free some space, or set data.cache_dir"
        ) from None


def _write(
    bag: Bag,
    recording: Recording,
    hashes: dict[str, str],
    data: Data,
    folder: Path,
    decoders: int,
    report: Callable[[float], None],
) -> None:
    np.save(folder / "state.npy", np.concatenate([episode.state for episode in recording.episodes]))
    np.save(folder / "action.npy", np.concatenate([episode.action for episode in recording.episodes]))
    wanted: dict[str, np.ndarray] = {}
    row: dict[str, np.ndarray] = {}  # of each tick, in `wanted`
    for camera, topic in data.cameras.items():
        messages = np.concatenate([episode.frames[camera] for episode in recording.episodes])
        wanted[topic], row[topic] = np.unique(messages, return_inverse=True)
    spans = {topic: np.zeros((len(numbers), 3), np.int64) for topic, numbers in wanted.items()}
    total = sum(map(len, wanted.values()))
    with ExitStack() as stack:
        files = {t: stack.enter_context((folder / f"{camera}.jpegs").open("wb")) for camera, t in data.cameras.items()}

        def keep(topic: str, at: int, jpeg: bytes) -> None:
            spans[topic][at] = files[topic].tell(), len(jpeg), zlib.crc32(jpeg)
            files[topic].write(jpeg)
            report(1 / total)

        parts = {topic: data.part_of(camera) for camera, topic in data.cameras.items()}
        sizes = read_frames(bag, wanted, data.image_size, parts, keep, decoders) if wanted else {}
    for camera, topic in data.cameras.items():
        np.save(folder / f"{camera}.npy", spans[topic][row[topic]])
    meta: dict[str, Any] = {
        "episodes": [len(episode.state) for episode in recording.episodes],
        "notes": recording.notes,
        "warnings": recording.warnings,
        "state_names": recording.state_names,
        "action_names": recording.action_names,
        "picture_sizes": {camera: sizes[topic] for camera, topic in data.cameras.items()},
        "files": hashes,
        "arrays": {path.name: sha256(path) for path in sorted(folder.glob("*.npy"))},
    }
    (folder / "meta.json").write_text(json.dumps(meta | {"sha256": digest(meta)}, indent=2))


def size(bag: Bag) -> int:
    """The bytes of a recording's files."""
    return sum(file.stat().st_size for file in bag.files if file.exists())


@functools.cache
def _reader_version() -> str:
    """A hash of the code and the libraries that decide what is read from a bag."""
    room = Path(__file__).parents[1] / "recordings"
    code = b"".join(file.read_bytes() for file in sorted(room.glob("*.py")))
    return hashlib.sha256(
        code + f"{FORMAT} {cv2.__version__} {np.__version__} {version('rosbags')}".encode()
    ).hexdigest()


def cache_folder(bag: Bag, data: Data) -> Path:
    """The folder of a recording; its name depends on everything that its content depends on."""
    settings = {key: value for key, value in to_dict(data).items() if key not in NOT_IN_THE_KEY}
    stats = [(file.resolve(), file.stat()) for file in bag.files if file.exists()]
    files = [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    parts = [settings, files, bag.declared, _reader_version()]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return cache_of_this_code(data) / f"{Path(bag.name).name}-{key[:24]}"


def cache_of_this_code(data: Data) -> Path:
    """The cache of this version of the code and its libraries."""
    return data.cache_dir / f"{READER}{_reader_version()[:12]}"


def older_caches(data: Data) -> list[str]:
    """Caches of other versions of the code or its libraries: one line each, with its size and how to remove it."""
    lines = []
    for folder in sorted(data.cache_dir.glob("*")) if data.cache_dir.exists() else ():
        other = folder.name.startswith((READER, BUILDING)) or (folder / "meta.json").exists()
        if other and folder != cache_of_this_code(data):
            total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            lines.append(
                f"{folder}: {total / 1e6:.0f} MB, cache of another version of this code; rm -r {shlex.quote(str(folder))}"
            )
    return lines


if __name__ == "__main__":
    main()
