"""Every file of a run, of its policy and of a cache, damaged in each way: the same result, or one Fault."""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from abuse.promise import Promise
from abuse.runs import STEPS, differences, truth
from test_dataset import recorded
from test_train import tiny, trained

from config import load
from dataset.cache import load_dataset
from faults import Fault
from policy.runner import Policy
from training.run_folder import checkpoint_name, files_of

OTHER_JSON = (b"[]", b"null", b"1", b"{}", b'{"step": 34}', b'{"files": []}', b"\xff", b"[" * 5000)


def damaged(content: bytes, other: bytes, rng: random.Random) -> list[bytes]:
    """A file with a flipped bit, cut, with the content of another, and, if it is JSON, other JSON."""
    at = rng.randrange(len(content))
    flipped = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    return [flipped, content[:at], other, *(OTHER_JSON if content[:1] in b"{[" else ())]


def damage(folder: Path, rng: random.Random) -> Iterator[Promise]:
    """Every file of a run's newest checkpoint, of its policy and of a cache, in each way."""
    folder.mkdir()
    path = tiny(recorded(folder, 3), f"training.steps={STEPS}")
    with contextlib.redirect_stderr(io.StringIO()):
        trained(path)
    run, cache = folder / "run", folder / "cache"
    expected, samples = truth(folder), _samples(path)
    shutil.copytree(run, folder / "intact")

    of_run, of_policy, of_cache = map(Promise, ("damaged run", "damaged policy", "damaged cache"))
    files = [*files_of(run / checkpoint_name(STEPS)), run / "best.json"]
    for file, other in zip(files, [*files[1:], files[0]], strict=True):
        for content in damaged(file.read_bytes(), other.read_bytes(), rng):
            if content == file.read_bytes():
                continue
            with of_run.attempt(f"{file.relative_to(run)}, {len(content)} bytes", 60):
                file.write_bytes(content)
                trained(path)
                assert not (wrong := differences(folder, expected)), f"other results, silently: {wrong}"
            shutil.rmtree(run)
            shutil.copytree(folder / "intact", run)
    policy = run / checkpoint_name(STEPS) / "pretrained_model"
    acts = _act(policy)
    for file in files_of(policy):
        whole = file.read_bytes()
        for content in damaged(whole, (policy / "robot.json").read_bytes(), rng):
            with of_policy.attempt(f"{file.name}, {len(content)} bytes", 60):
                file.write_bytes(content)
                # a person may edit config.json, so only nonsense is found there
                assert file.name == "config.json" or np.array_equal(_act(policy), acts), "other actions, silently"
        file.write_bytes(whole)
    for file in [file for file in files_of(cache) if not file.name.startswith(".")]:
        for content in damaged(file.read_bytes(), file.with_name("state.npy").read_bytes(), rng):
            with of_cache.attempt(f"{file.name}, {len(content)} bytes", 60):
                file.write_bytes(content)
                with contextlib.suppress(Fault):  # of a picture
                    _samples(path)
                assert _samples(path) == samples, "other samples, silently"
    yield from (of_run, of_policy, of_cache)


def _samples(path: Path) -> list[str]:
    """The hash of each tensor of a configuration's samples, of training and held out."""
    data = load_dataset(load(path))
    batches = [split.gather(np.arange(len(split.state))) for split in (data.train, data.validation)]
    return [hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for b in batches for t in b if t is not None]


def _act(policy: Path) -> np.ndarray:
    size = (48, 64)
    return Policy.load(policy).act({"state": [0.1, 0.2, 0.3], "images": {"color": np.full((*size, 3), 90, np.uint8)}})
