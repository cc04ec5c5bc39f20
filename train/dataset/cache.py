"""Recordings as training samples: read once into a cache on disk, split into training and held-out recordings.

The cache has one folder for each version of the reading code. A cached recording is a folder in it, see build.py: meta.json,
state.npy, action.npy, and for each camera NAME.jpegs (its pictures at the training size, one after the other) and NAME.npy
(where each tick's picture begins, its bytes, and their CRC-32). What is damaged is made again.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from config import Config, Data
from dataset.batches import Dataset, Frames, Split
from dataset.build import build_all, cache_folder, cache_of_this_code, size
from faults import Fault, NoRoom
from files import digest, read_json, remove_abandoned, sha256
from recordings.azure_blob import local_folder
from recordings.bags import find_bags


class Cached(NamedTuple):
    """One recording in the cache."""

    meta: dict[str, Any]
    state: np.ndarray  # (N, S) float32
    action: np.ndarray  # (N, A) float32
    frames: dict[str, tuple[Path, np.ndarray]]  # camera: file of pictures; begin, bytes, CRC of each tick's (N, 3)


def load_dataset(config: Config, held_out: Collection[str] | None = None) -> Dataset:
    """All recordings of a configuration; held_out names those to validate on (default: data.validation_fraction).

    Raises Fault with the faults of all recordings. data.on_bad_bag=skip skips recordings with faults instead.
    """
    data = config.data
    bags, faults = find_bags(local_folder(data.bag_dir, data.cache_dir))
    skipped: list[tuple[str, ...]] = [(fault,) for fault in faults]
    folders = {bag.name: cache_folder(bag, data) for bag in bags}
    remove_abandoned(cache_of_this_code(data))
    cached = {bag.name: found for bag in bags if (found := _load(folders[bag.name], data))}
    missing = [bag for bag in bags if bag.name not in cached]
    to_read, read, written = sum(map(size, missing)), 0, 0
    with tqdm(total=to_read, desc="reading bags", unit="B", unit_scale=True, disable=not missing) as bar:
        for bag, faults_ in zip(missing, build_all(missing, folders, data, bar.update), strict=True):
            if faults_:
                skipped.append(faults_)
                del folders[bag.name]
                continue
            loaded = _load(folders[bag.name], data)
            if loaded is None:
                raise NoRoom(f"{folders[bag.name]}: is not what was just written; expected the same; check the disk")
            cached[bag.name] = loaded
            read, written = read + size(bag), written + _bytes(folders[bag.name])
            _check_room(written / read * (to_read - read), data)
    cached = {name: cached[name] for name in folders}
    skipped += _remove_duplicates(cached)
    if skipped and (data.on_bad_bag == "fail" or not cached):
        raise Fault(*(line for lines in skipped for line in lines))
    for key in ("state_names", "action_names"):
        first_with = {tuple(recording.meta[key]): name for name, recording in reversed(cached.items())}
        if len(first_with) > 1:
            expected = "expected the same in every recording"
            raise Fault(*(f"{name}: {key} are {', '.join(names)}; {expected}" for names, name in first_with.items()))
    if held_out is None:
        held_out = _choose_held_out(list(cached), data.validation_fraction, config.training.seed)
    elif gone := sorted(set(held_out) - {bag.name for bag in bags}):
        advice = "restore them to judge by them"
        raise Fault(
            f"{data.bag_dir}: missing recordings held out from training: {', '.join(gone)}; {advice}",
            *(line for lines in skipped for line in lines),
        )
    first = next(iter(cached.values()))
    train = {name: recording for name, recording in cached.items() if name not in held_out}
    validation = {name: recording for name, recording in cached.items() if name in held_out}
    sizes = {camera: {tuple(r.meta["picture_sizes"][camera]) for r in train.values()} for camera in data.cameras}
    return Dataset(
        train=_split(train, first, config),
        validation=_split(validation, first, config),
        state_names=tuple(first.meta["state_names"]),
        action_names=tuple(first.meta["action_names"]),
        picture_sizes={camera: sorted(each) for camera, each in sizes.items()},
        recordings={name: recording.meta["files"] for name, recording in cached.items()},
        notes={name: recording.meta["notes"] for name, recording in cached.items()},
        warnings={name: recording.meta["warnings"] for name, recording in cached.items()},
        skipped=skipped,
        cache_bytes=sum(map(_bytes, folders.values())),
    )


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _check_room(needed: float, data: Data) -> None:
    """Raises NoRoom if a disk is too small for what the cache will still need, by the recordings so far."""
    free = shutil.disk_usage(data.cache_dir).free
    if needed > free:
        advice = "free some space, set data.cache_dir or a smaller data.image_size"
        raise NoRoom(f"{data.cache_dir}: needs about {needed / 1e9:.1f} GB more, has {free / 1e9:.1f} GB; {advice}")


def _remove_duplicates(cached: dict[str, Cached]) -> list[tuple[str, ...]]:
    """Remove recordings that share a file with an earlier one, in place; their faults."""
    owner: dict[str, str] = {}  # SHA-256: name
    faults: list[tuple[str, ...]] = []
    for name, recording in list(cached.items()):
        if twins := {owner.setdefault(sha, name) for sha in recording.meta["files"].values()} - {name}:
            reason = "so training data could be held out, too"
            faults.append((f"{name}: duplicate of {', '.join(sorted(twins))} (same SHA-256), {reason}; remove one",))
            del cached[name]
    return faults


def _choose_held_out(names: list[str], fraction: float, seed: int) -> set[str]:
    """The recordings to validate on, by a hash of their names: a new recording changes the choice of few others."""
    count = min(max(round(len(names) * fraction), fraction > 0), len(names) - 1)
    return set(sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:count])


def _split(recordings: dict[str, Cached], example: Cached, config: Config) -> Split:
    """Recordings, concatenated; `example` gives the shapes where there is none."""
    lengths = [length for recording in recordings.values() for length in recording.meta["episodes"]]
    ticks = [len(recording.state) for recording in recordings.values()]
    index = np.repeat(np.arange(len(recordings), dtype=np.int32), ticks)
    frames = {}
    for camera in example.frames:
        files = [recording.frames[camera][0] for recording in recordings.values()]
        spans = [np.zeros((0, 3), np.int64), *(recording.frames[camera][1] for recording in recordings.values())]
        frames[camera] = Frames(files, index, np.concatenate(spans))
    return Split(
        list(recordings),
        index,
        lengths,
        np.concatenate([example.state[:0], *(recording.state for recording in recordings.values())]),
        np.concatenate([example.action[:0], *(recording.action for recording in recordings.values())]),
        np.repeat(np.cumsum(lengths, dtype=np.int64), lengths),
        frames,
        config.model.chunk_size,
        config.data.image_size,
    )


def _load(folder: Path, data: Data) -> Cached | None:
    """A recording from the cache; None if it is not there. One that is not what was written is removed, and said."""
    if not folder.exists():
        return None
    try:
        meta = read_json(folder / "meta.json")
        if meta.pop("sha256") != digest(meta):
            raise ValueError("meta.json is not what was written")
        if changed := [name for name, sha in meta["arrays"].items() if sha256(folder / name) != sha]:
            raise ValueError(f"{', '.join(changed)}: not what was written")
        frames = {}
        for camera in data.cameras:
            spans = np.load(folder / f"{camera}.npy")
            frames[camera] = folder / f"{camera}.jpegs", spans
            if (folder / f"{camera}.jpegs").stat().st_size != spans[:, :2].sum(1).max():
                raise ValueError(f"{camera}.jpegs is truncated")
        return Cached(meta, np.load(folder / "state.npy"), np.load(folder / "action.npy"), frames)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        print(f"{folder}: damaged cache ({error}); it is made again", file=sys.stderr)
        shutil.rmtree(folder)
        return None
