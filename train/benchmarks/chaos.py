"""Abuse that a run must survive: kills, damage, hostile configurations and recordings; each result beside its promise.

    python train/benchmarks/chaos.py                  # minutes
    python train/benchmarks/chaos.py --kills 300 --tries 5000

Seeded. It trains a tiny policy once as the truth. A kill or a damaged file must end in the same weights, log and list of files,
or in one Fault; hostile input in a Fault within 10 s. Prints what broke a promise, and one table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("", "tests"))
from test_dataset import recorded
from test_train import tiny, trained
from writing import KINDS, episode, write

import config as settings
import train
from config import load
from dataset.cache import load_dataset
from faults import Fault
from files import digest, sha256
from inspection.verdict import inspect
from policy.runner import Policy
from recordings.bags import find_bags
from training.run_folder import files_of

LIMIT_S = 10
STEPS = 15
OTHER_JSON = (b"[]", b"null", b"1", b"{}", b'{"step": 34}', b'{"files": []}', b"\xff", b"[" * 5000)
WORDS = (
    *(
        "1",
        "-1",
        "1e400",
        ".nan",
        "0x10",
        "true",
        "null",
        "[]",
        "{}",
        "[[1]]",
        "{a: [1]}",
        "x",
        "''",
        '"\\0"',
        '"\\ud800"',
    ),
    *(
        "9" * 400,
        "'" + "a" * 5000 + "'",
        "[" * 400,
        "2001-99-99",
        "1:30",
        "&a [*a]",
        "*x",
        "<<: 1",
        "'open",
        "a: b: c",
        "@",
        "\t",
    ),
    *(f"!!{tag} x" for tag in ("int", "float", "bool", "timestamp", "set", "omap", "binary", "python/name:os.system")),
    *(
        "https://",
        "~nosuch/x",
        "/dev/null/x",
        "a/../..",
        "{? [a] : b}",
        "{1: 2}",
        "{color: [0, 0, 2, 1]}",
        "[{topik: x}]",
    ),
)


def too_long(*_: object) -> None:
    """What an alarm does."""
    raise TimeoutError(f"more than {LIMIT_S} s")


class Promise:
    """How often a promise was tried, and what broke it."""

    def __init__(self, text: str) -> None:
        self.text, self.tried, self.broken = text, 0, 0

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """One attempt, which may end in a Fault; anything else, or more than LIMIT_S, breaks the promise."""
        self.tried += 1
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(LIMIT_S)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                yield
        except Fault:
            pass
        except Exception as error:
            self.broken += 1
            print(f"{self.text}: {what}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        finally:
            signal.alarm(0)


def truth(run: Path) -> str:
    """Everything that must be the same: weights, optimizer, log and the list of files."""
    checkpoint = run / train.run_folder.checkpoint_name(STEPS)
    sums = {path.name: sha256(path) for path in checkpoint.rglob("*.safetensors")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    log = [
        {key: value for key, value in line.items() if key not in ("steps_per_s", "waiting_for_data")} for line in lines
    ]
    ours = [path.relative_to(run) for path in files_of(run)]
    names = sorted(str(path) for path in ours if path.parts[0] not in ("tensorboard", "evaluation"))
    return digest({"sums": sums, "log": log, "names": names, "best": (run / "best.json").read_text()})


def damaged(content: bytes, other: bytes, rng: random.Random) -> list[bytes]:
    """A file with a flipped bit, cut, with the content of another, and, if it is JSON, other JSON."""
    at = rng.randrange(len(content))
    flipped = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    return [flipped, content[:at], other, *(OTHER_JSON if content[:1] in b"{[" else ())]


def damage(folder: Path, rng: random.Random) -> Iterator[Promise]:
    """Every file of a run's newest checkpoint, of its policy and of a cache, in each way."""
    path = tiny(recorded(folder, 3), f"training.steps={STEPS}")
    trained(path)
    run, cache = folder / "run", folder / "cache"
    expected, samples = truth(run), _samples(path)
    shutil.copytree(run, folder / "intact")

    of_run, of_policy, of_cache = map(Promise, ("damaged run", "damaged policy", "damaged cache"))
    files = [*files_of(run / train.run_folder.checkpoint_name(STEPS)), run / "best.json"]
    for file, other in zip(files, [*files[1:], files[0]], strict=True):
        for content in damaged(file.read_bytes(), other.read_bytes(), rng):
            if content == file.read_bytes():
                continue
            with of_run.attempt(f"{file.relative_to(run)}, {len(content)} bytes"):
                file.write_bytes(content)
                trained(path)
                assert truth(run) == expected, "other results, silently"
            shutil.rmtree(run)
            shutil.copytree(folder / "intact", run)
    policy = run / train.run_folder.checkpoint_name(STEPS) / "pretrained_model"
    acts = _act(policy)
    for file in files_of(policy):
        whole = file.read_bytes()
        for content in damaged(whole, (policy / "robot.json").read_bytes(), rng):
            with of_policy.attempt(f"{file.name}, {len(content)} bytes"):
                file.write_bytes(content)
                # a person may edit config.json, so only nonsense is found there
                assert file.name == "config.json" or np.array_equal(_act(policy), acts), "other actions, silently"
        file.write_bytes(whole)
    for file in [file for file in files_of(cache) if not file.name.startswith(".")]:
        for content in damaged(file.read_bytes(), file.with_name("state.npy").read_bytes(), rng):
            with of_cache.attempt(f"{file.name}, {len(content)} bytes"):
                file.write_bytes(content)
                with contextlib.suppress(Fault):  # of a picture
                    _samples(path)
                assert _samples(path) == samples, "other samples, silently"
    yield from (of_run, of_policy, of_cache)


def _samples(path: Path) -> str:
    """A hash of all samples of a configuration."""
    data = load_dataset(load(path))
    batches = [split.gather(np.arange(len(split.state))) for split in (data.train, data.validation)]
    return digest({str(i): t.double().sum().item() for b in batches for i, t in enumerate(b) if t is not None})


def _act(policy: Path) -> np.ndarray:
    size = (48, 64)
    return Policy.load(policy).act({"state": [0.1, 0.2, 0.3], "images": {"color": np.full((*size, 3), 90, np.uint8)}})


def kills(folder: Path, count: int, rng: random.Random) -> Promise:
    """A run that is killed at random moments and run again, in chains, against one that was not."""
    promise = Promise("kills, in chains")
    path = tiny(recorded(folder, 3), f"training.steps={STEPS}", "training.save_every=3")
    command = [sys.executable, train.__file__, "--config", str(path), "--no-evaluation"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    began = time.perf_counter()
    subprocess.run(command, check=True, **quiet)  # type: ignore[call-overload]
    whole, expected = time.perf_counter() - began, truth(folder / "run")
    while promise.tried < count:
        for place in ("run", "cache"):
            shutil.rmtree(folder / place, ignore_errors=True)
        chain = min(rng.randint(1, 5), count - promise.tried)
        for _ in range(chain):
            process = subprocess.Popen(command, **quiet)  # type: ignore[call-overload]
            time.sleep(rng.uniform(0.3, 1) * whole)
            process.kill()
            process.wait()
        subprocess.run(command, check=True, **quiet)  # type: ignore[call-overload]
        promise.tried += chain
        if truth(folder / "run") != expected:
            promise.broken += chain
            print(f"{promise.text}: a chain of {chain} ended otherwise", flush=True)
    return promise


def configurations(folder: Path, tries: int, rng: random.Random) -> Promise:
    """Values, mappings and texts that no configuration has."""
    promise, file = Promise("configurations"), folder / "config.yaml"
    keys = [key for key, _, _ in settings.rows() if "[]" not in key]
    default = settings.dump(load(None))

    def mutated() -> str:
        text = default
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(text))
            text = (
                text[:at]
                + rng.choice((*WORDS, "\n", "  - ", chr(rng.randrange(1, 768))))
                + text[at + rng.randint(0, 5) :]
            )
        return text

    make: list[Callable[[], tuple[str, list[str]]]] = [
        lambda: ("{}", [f"{rng.choice(keys)}={rng.choice(WORDS)}" for _ in range(rng.randint(1, 3))]),
        lambda: (f"{rng.choice(keys).replace('.', ': {')}: {rng.choice(WORDS)}}}", []),
        lambda: (mutated(), []),
    ]
    for _ in range(tries):
        text, overrides = rng.choice(make)()
        file.write_text(text)
        with promise.attempt(f"{text[:60]!r} {overrides}"):
            load(file, overrides)
    return promise


def recordings(folder: Path, tries: int, rng: random.Random) -> Promise:
    """Recordings of each kind with flipped, lost, repeated and huge numbers."""
    promise, place = Promise("hostile recordings"), folder / "hostile"
    sources = []
    for kind in KINDS:
        write(folder / kind, episode(0.5))
        sources += [file for file in files_of(folder) if file.stem == kind or file.parent.name == kind]
    storage = [file for file in dict.fromkeys(sources) if file.name != "metadata.yaml"]
    for number in range(tries):
        file = storage[number % len(storage)]
        content = file.read_bytes()
        for _ in range(rng.randint(1, 4)):
            near = rng.randrange(min(600, len(content)))  # the header or the end, where the structure is
            at = rng.choice((near, len(content) - 1 - near, rng.randrange(len(content))))
            new = rng.choice((b"", b"\xff" * 8, bytes(8), rng.randbytes(1), content[near : near + rng.randrange(2000)]))
            content = (
                content[:at] + new + content[at + rng.randrange(300) * (rng.random() < 0.3) + len(new) % 9 :] or b"\0"
            )
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / file.name).write_bytes(content)
        with promise.attempt(f"{file.name}, seed and number {number}"):
            for bag in find_bags(place)[0]:
                inspect(bag)
    return promise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--tries", type=int, default=1000, help="configurations, and recordings [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        folders = [Path(place, name) for name in ("kills", "damage", "input")]
        for folder in folders:
            folder.mkdir()
        promises = [kills(folders[0], options.kills, rng), *damage(folders[1], rng)]
        promises += [make(folders[2], options.tries, rng) for make in (configurations, recordings)]
    print(f"{'promise':24}{'tried':>8}{'broken':>8}")
    for promise in promises:
        print(f"{promise.text:24}{promise.tried:8}{promise.broken:8}")
    sys.exit(any(promise.broken for promise in promises))


if __name__ == "__main__":
    main()
