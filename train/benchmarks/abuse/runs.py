"""Runs that are killed, interrupted, doubled or refused by the disk, each compared with one that was not.

A run is forked from this process, which has torch: importing it would take longer than training. disk.c is loaded here already.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

from abuse.promise import Promise
from azure.storage.blob import ContainerClient
from azurite import ACCOUNT, Azurite, why_not
from test_dataset import recorded
from test_train import logged, tiny

import train
from files import digest, sha256
from training.run_folder import checkpoint_name, files_of

for late in ("torch._dynamo", "torch.utils.tensorboard", "matplotlib.pyplot"):
    importlib.import_module(late)  # else each fork does

STEPS = 15
SETTINGS = (f"training.steps={STEPS}", "training.save_every=3", "training.log_every=2", "training.evaluate_every=5")
SMALL = ("data.cameras={}",)  # 50 kB a checkpoint, not 130 MB; such runs are not judged, most time would go into charts
WHOLE = ("training.save_every=6",)
KILL_BEFORE, KILL_HALF_WAY = -1, -2  # as in disk.c
FORK = multiprocessing.get_context("fork")
CHECKPOINTS = "list of checkpoints"
VARIES = ("tensorboard", "evaluation")  # hold times
# of the cache: locks of the living; and the time of a copy of a recording, which is in its entry and in the name of that
UNLIKE, HASH = re.compile(r"^\.(?!building).*lock$|^meta.json$"), re.compile(r"-[0-9a-f]{24}/")


def truth(folder: Path, steps: int = STEPS) -> dict[str, str]:
    """Everything that must be the same: weights, optimizer, log, best, list of files, and the cache."""
    run, cache = folder / "run", folder / "cache"
    names = [path.relative_to(run) for path in files_of(run) if path.relative_to(run).parts[0] not in VARIES]
    kept, others = (
        " ".join(str(path) for path in names if path.parts[0].startswith("checkpoint_") == kind)
        for kind in (True, False)
    )
    same = [path for path in files_of(run / checkpoint_name(steps)) if path.suffix == ".safetensors"]
    same += [path for path in files_of(cache) if not UNLIKE.search(path.name)]
    found = {HASH.sub("/", str(path.relative_to(folder))): sha256(path) for path in (*same, run / "best.json")}
    return found | {"log": digest({"log": logged(run)}), CHECKPOINTS: kept, "other files": others}


def differences(folder: Path, expected: dict[str, str], steps: int = STEPS, stopped: bool = False) -> str:
    """What is otherwise than it must be, in words; nothing if all is equal. A run that was stopped has a checkpoint more."""
    found, expected = truth(folder, steps), dict(expected)
    if stopped:
        expected[CHECKPOINTS] = found[CHECKPOINTS]
    return ", ".join(key for key in {**expected, **found} if found.get(key) != expected.get(key))


class Disk:
    """disk.c in this process, where it was loaded before."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)

    def arm(self, folder: Path, number: int, what: int, lasts: int = 0) -> None:
        self.library.disk_arm(os.fsencode(folder), ctypes.c_long(number), what, lasts)

    def count(self) -> int:
        self.library.disk_count.restype = ctypes.c_long
        return int(self.library.disk_count())


class Runs:
    """Runs of one configuration in a folder."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.small = SMALL[0] in overrides
        self.folder, self.said = folder, folder.with_name(f"{folder.name}.txt")
        self.path = tiny(recorded(folder, 3), *SETTINGS, *overrides)

    def start(self, *fate: int, said: Path | None = None) -> ForkProcess:
        """A run; `fate` is the number of the file operation and what happens to it, see disk.c."""
        process = FORK.Process(target=self._run, args=(said or self.said, fate), daemon=True)
        process.start()
        return process

    def _run(self, said: Path, fate: tuple[int, ...]) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with said.open("w") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
        sys.argv = [train.__file__, "--config", str(self.path), *(["--no-evaluation"] if self.small else [])]
        if fate:
            Disk().arm(self.folder, *fate)
        train.main()

    def forget(self) -> None:
        """Remove what runs left."""
        for name in ("run", "cache"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def whole(self) -> tuple[dict[str, str], float, int]:
        """One run without abuse: what it leaves, its seconds, and its file operations."""
        counted = self.folder.with_name("operations")
        process = FORK.Process(target=self._count, args=(counted,))
        began = time.perf_counter()
        process.start()
        process.join()
        seconds = time.perf_counter() - began
        assert process.exitcode == 0, self.said.read_text()
        return truth(self.folder), seconds, int(counted.read_text())

    def _count(self, counted: Path) -> None:
        self._run(self.said, (0, 0))
        counted.write_text(str(Disk().count()))

    def finish(self, expected: dict[str, str], stopped: bool = False) -> str:
        """Run again to the end; what is otherwise then, in words."""
        process = self.start()
        process.join()
        if process.exitcode:
            return f"ended with: {self.last_words()}"
        return differences(self.folder, expected, stopped=stopped)

    def unclear(self, process: ForkProcess, codes: tuple[int, ...]) -> str:
        """What is wrong with how a process ended: another exit code, a traceback, or an error without a place."""
        said = self.said.read_text()
        placed = process.exitcode != 1 or re.search(r"^error: \S+: ", said, re.MULTILINE)
        right = process.exitcode in codes and "Traceback" not in said and placed
        return "" if right else f"exit code {process.exitcode}: {said[-300:]}"

    def last_words(self) -> str:
        lines = self.said.read_text().splitlines()
        return next((line for line in reversed(lines) if line), "nothing")[-200:]


def whole_run(folder: Path, *overrides: str) -> tuple[Runs, dict[str, str], float, int]:
    """Runs in a new folder, and what one leaves, its seconds and its file operations."""
    folder.mkdir(parents=True)
    runs = Runs(folder, *overrides)
    return runs, *runs.whole()


def kills(folder: Path, count: int, rng: random.Random, overrides: tuple[str, ...], kind: str = "") -> Promise:
    """Killed up to five times in a row, at a random moment or before or half-way through a file operation."""
    runs, expected, seconds, operations = whole_run(folder, *overrides)
    promise = Promise(f"killed in chains, run again{kind}")
    while promise.tried < count:
        runs.forget()
        killed = 0
        for _ in range(rng.randint(1, 5)):
            how = rng.choice((None, KILL_BEFORE, KILL_HALF_WAY))
            process = runs.start() if how is None else runs.start(rng.randint(1, operations), how)
            process.join(rng.uniform(0.1, 1) * seconds if how is None else None)
            process.kill()
            process.join()
            if process.exitcode != -signal.SIGKILL:  # it was done before
                break
            killed += 1
        promise.judge_all(killed, f"a chain of {killed}", runs.finish(expected))
    return promise


def disk_faults(folder: Path, count: int, rng: random.Random, overrides: tuple[str, ...], kind: str = "") -> Promise:
    """A full disk, an error of the device once, or a permission that is lost."""
    runs, expected, _, operations = whole_run(folder, *overrides)
    promise = Promise(f"file operation fails, run again{kind}")
    for _ in range(count):
        runs.forget()
        error = rng.choice((errno.ENOSPC, errno.EIO, errno.EACCES))
        number = rng.randint(1, operations)
        process = runs.start(number, error, error != errno.EIO)
        process.join()
        wrong = runs.unclear(process, (0, 1))
        promise.judge(f"{errno.errorcode[error]} at operation {number}", wrong or runs.finish(expected))
    return promise


def kills_of_a_mirror(folder: Path, count: int, rng: random.Random) -> Promise:
    """Killed in chains; each chain begins with no copy of the recordings, which lie in Azure's emulator."""
    if reason := why_not():
        print(f"not tried: {reason}")
        return Promise("killed in chains, run again, from Azure Blob")
    emulator, bags = Azurite(folder / "emulator"), recorded(folder / "blobs") / "bags"
    address = f"http://127.0.0.1:{emulator.port}/{ACCOUNT}"
    os.environ |= {"AZURE_STORAGE_KEY": emulator.key, "NO_PROXY": "127.0.0.1"}
    try:
        with ContainerClient(address, "bags", credential=emulator.key) as container:
            container.create_container()
            for file in files_of(bags):
                container.upload_blob(f"day/{file.relative_to(bags)}", file.read_bytes())
        overrides = (*SMALL, f"data.bag_dir={address}/bags/day/", "training.steps=3")
        return kills(folder / "runs", count, rng, overrides, ", from Azure Blob")
    finally:
        emulator.stop()


def interrupts(folder: Path, count: int, rng: random.Random) -> Promise:
    """Ctrl-C, and every other time once more soon after."""
    promise = Promise("Ctrl-C once or twice, run again")
    runs, expected, seconds, _ = whole_run(folder, *SMALL)
    while promise.tried < count:
        runs.forget()
        process, times = runs.start(), 1 + promise.tried % 2
        for wait in (rng.uniform(0.1, 1) * seconds, rng.uniform(0, 0.2))[:times]:
            process.join(wait)
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGINT)
        process.join()
        if process.exitcode:  # else it was done before
            wrong = runs.unclear(process, (75, 130, -signal.SIGINT))  # the second one ends it at once
            promise.judge(f"{times} times", wrong or runs.finish(expected, stopped=True))
    return promise


def twice_at_once(folder: Path, count: int, rng: random.Random) -> Promise:
    """The same run started again while it is at work: one trains, the other says who does."""
    promise = Promise("started twice at once")
    runs, expected, seconds, _ = whole_run(folder, *SMALL)
    for _ in range(count):
        runs.forget()
        said = [folder.with_name(f"{name}.txt") for name in ("first", "second")]
        first = runs.start(said=said[0])
        time.sleep(rng.uniform(0, 0.5) * seconds)
        second = runs.start(said=said[1])
        for process in (first, second):
            process.join()
        words = "".join(path.read_text() for path in said)
        named = re.search(
            r"error: output_dir: \S+: (in use by process \d+ on \S+ since |another process has just left)", words
        )
        fair = {first.exitcode, second.exitcode} == {0, 1} and named and "Traceback" not in words
        promise.judge("a pair", differences(folder, expected) if fair else words[-300:])
    return promise


def one_of_two_processes(folder: Path, count: int, rng: random.Random) -> Promise:
    """Under torchrun, one of two is killed: the other ends within 60 s and says why; run again, all is equal."""
    promise = Promise("one of two processes killed, run again")
    folder.mkdir(parents=True)
    runs = Runs(folder, *SMALL, "training.save_every=20", "training.steps=60")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, train.__file__, "--config", str(runs.path), "--no-evaluation"]
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"} | {"OMP_NUM_THREADS": "1"}

    def started() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)

    started().communicate()
    expected = truth(folder, 60)
    while promise.tried < count:
        runs.forget()
        launched, victim, wrong = started(), rng.randrange(2), ""
        while not (folder / "run/config.yaml").exists() and launched.poll() is None:  # both are in the group
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.5))
        children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(int(children[victim]), signal.SIGKILL)
        try:
            _, said = launched.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            launched.terminate()
            _, said = launched.communicate()
            wrong = "the other did not end within 60 s"
        if not launched.returncode:  # it was done before
            continue
        if not re.search(r"process [01] of 2 ends: ", said):
            wrong = wrong or f"no reason: {said[-300:]}"
        again = started()
        _, said = again.communicate()
        promise.judge(
            f"process {victim}", wrong or (said[-300:] if again.returncode else differences(folder, expected, 60))
        )
    return promise


def soak(folder: Path, steps: int) -> Promise:
    """Memory and handles over many steps of training: the last tenth of the time within 2 % of the second."""
    promise = Promise(f"{steps} steps in flat memory and handles")
    folder.mkdir(parents=True)
    runs = Runs(folder, *SMALL, f"training.steps={steps}", f"training.save_every={steps // 20}")
    process, seen = runs.start(), []
    place, run = Path(f"/proc/{process.pid}"), folder / "run"
    while process.is_alive() and not (run / checkpoint_name(steps)).exists():
        process.join(0.1)
        with contextlib.suppress(OSError):
            handles, memory = len(list((place / "fd").iterdir())), int((place / "statm").read_text().split()[1])
            if (run / "metrics.jsonl").exists():
                seen.append((memory, handles))
    process.join()
    tenth = max(1, len(seen) // 10)
    (memory, handles), (memory_then, handles_then) = (
        (sorted(pages)[tenth // 2], min(handles))  # some files are open for a moment
        for pages, handles in (zip(*part, strict=True) for part in (seen[tenth : 2 * tenth], seen[-tenth:]))
    )
    grown = memory_then / memory - 1
    wrong = "" if grown <= 0.02 and handles_then <= handles and process.exitcode == 0 else runs.last_words()
    promise.text += f" ({grown:+.1%}, {handles_then - handles:+})"
    promise.judge(f"{len(seen)} looks", wrong)
    return promise
