"""Recordings as training samples: decoded once into a cache on disk, split by whole recordings.

A cached recording is a folder: meta.json, state.npy, action.npy, and per camera NAME.rgb (raw frames at the training
size) with NAME.npy (the frame of each tick).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from config import Config, Data, to_dict
from dataset.batches import Dataset, Frames, Split
from faults import Fault, NoRoom
from recordings.azure_blob import local_folder
from recordings.bags import Bag, find_bags
from recordings.episodes import Recording, read_frames, read_recording
from recordings.integrity import check

ROOM = Path(__file__).parents[1] / "recordings"
# a change of how bags are read is a new cache
SOURCES = (
    *("bags", "chunks", "episodes", "images", "integrity", "layout", "plausibility", "signals"),
    *("walk_bag", "walk_mcap"),
)


class Cached(NamedTuple):
    """One recording as it stands in the cache."""

    meta: dict[str, Any]
    state: np.ndarray  # (N, S) float32
    action: np.ndarray  # (N, A) float32
    frames: dict[str, tuple[Path, np.ndarray]]  # camera: raw frames, and which of them each tick shows (N,)


def load_dataset(config: Config, held_out: Collection[str] | None = None) -> Dataset:
    """Every recording of the configuration, cached; held_out names those to validate on, by default a share of them.

    Raises Fault with the faults of all of them, or with data.on_bad_bag skips those that have one.
    """
    data = config.data
    bags, unknown = find_bags(local_folder(data.bag_dir, data.cache_dir))
    code = hashlib.sha256(b"".join((ROOM / f"{source}.py").read_bytes() for source in SOURCES)).hexdigest()
    folders = {bag.name: _cache_folder(bag, data, code) for bag in bags}
    missing = [bag for bag in bags if not folders[bag.name].exists()]
    left_out: list[tuple[str, ...]] = [(fault,) for fault in unknown]
    for bag in tqdm(missing, desc="reading bags", unit="bag", disable=not missing):
        try:
            _cache_recording(bag, data, folders[bag.name])
        except NoRoom:
            raise
        except Fault as fault:
            left_out.append(fault.args)
            del folders[bag.name]
    cached = {name: _load(folder, data) for name, folder in folders.items()}
    holder: dict[str, str] = {}
    for name, one in list(cached.items()):
        if twins := {holder.setdefault(sha, name) for sha in one.meta["files"].values()} - {name}:
            same = f"holds the same file as {', '.join(sorted(twins))} (by its SHA-256), and might judge what was trained on it"
            left_out.append((f"{name}: {same}; remove one of them",))
            del cached[name]
    if left_out and (data.on_bad_bag == "fail" or not cached):
        raise Fault(*(line for faults in left_out for line in faults))
    for key in ("state_names", "action_names"):
        found = {tuple(one.meta[key]): name for name, one in reversed(cached.items())}
        if len(found) > 1:
            expected = "expected the same in every recording"
            raise Fault(*(f"{name}: {key} are {', '.join(names)}; {expected}" for names, name in found.items()))
    if held_out is None:
        held_out = _held_out(list(cached), data.validation_fraction, config.training.seed)
    elif gone := sorted(set(held_out) - {bag.name for bag in bags}):
        raise Fault(
            f"{data.bag_dir}: {', '.join(gone)} held out from training, no longer there; put back to judge by it",
            *(line for faults in left_out for line in faults),
        )
    first = next(iter(cached.values()))
    return Dataset(
        train=_split({name: one for name, one in cached.items() if name not in held_out}, first, config),
        validation=_split({name: one for name, one in cached.items() if name in held_out}, first, config),
        state_names=tuple(first.meta["state_names"]),
        action_names=tuple(first.meta["action_names"]),
        picture_sizes={
            camera: sorted(
                {tuple(one.meta["picture_sizes"][camera]) for name, one in cached.items() if name not in held_out}
            )
            for camera in data.cameras
        },
        recordings={name: one.meta["files"] for name, one in cached.items()},
        notes={name: one.meta["notes"] for name, one in cached.items()},
        warnings={name: one.meta["warnings"] for name, one in cached.items()},
        left_out=left_out,
        cache_bytes=sum(file.stat().st_size for folder in folders.values() for file in folder.iterdir()),
    )


def _held_out(names: list[str], fraction: float, seed: int) -> set[str]:
    """The recordings to validate on: by a hash of their names, so that a new recording moves few others."""
    count = min(max(round(len(names) * fraction), fraction > 0), len(names) - 1)
    return set(sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:count])


def _split(recordings: dict[str, Cached], example: Cached, config: Config) -> Split:
    """The named recordings, one after the other; shapes are those of the example where there is none."""
    lengths = [length for one in recordings.values() for length in one.meta["episodes"]]
    ticks = [len(one.state) for one in recordings.values()]
    recording = np.repeat(np.arange(len(recordings), dtype=np.int32), ticks)
    frames = {}
    for camera in example.frames:
        files = [one.frames[camera][0] for one in recordings.values()]
        rows = [np.zeros(0, np.int64), *(one.frames[camera][1] for one in recordings.values())]
        frames[camera] = Frames(files, recording, np.concatenate(rows))
    return Split(
        list(recordings),
        recording,
        lengths,
        np.concatenate([example.state[:0], *(one.state for one in recordings.values())]),
        np.concatenate([example.action[:0], *(one.action for one in recordings.values())]),
        np.repeat(np.cumsum(lengths, dtype=np.int64), lengths),
        frames,
        config.model.chunk_size,
        config.data.image_size,
    )


def _load(folder: Path, data: Data) -> Cached:
    """A recording out of the cache. Raises Fault where it is not as it was written."""
    height, width = data.image_size
    try:
        frames = {}
        for camera in data.cameras:
            rows = np.load(folder / f"{camera}.npy")
            frames[camera] = folder / f"{camera}.rgb", rows
            if (folder / f"{camera}.rgb").stat().st_size != (rows.max() + 1) * height * width * 3:
                raise ValueError(f"{camera}.rgb is cut short")
        meta = json.loads((folder / "meta.json").read_text())
        return Cached(meta, np.load(folder / "state.npy"), np.load(folder / "action.npy"), frames)
    except (OSError, ValueError, EOFError) as error:
        raise Fault(f"{folder}: the cached recording is damaged ({error}); remove it and it is made anew") from None


def _cache_folder(bag: Bag, data: Data, code: str) -> Path:
    """Where the recording is cached, named by all that its content depends on."""
    elsewhere = ("bag_dir", "cache_dir", "validation_fraction", "on_bad_bag")
    slice_ = {key: value for key, value in to_dict(data).items() if key not in elsewhere}
    stats = [(file.resolve(), file.stat()) for file in bag.files if file.exists()]
    files = [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    key = hashlib.sha256(json.dumps([slice_, files, bag.declared, code], sort_keys=True).encode()).hexdigest()
    return data.cache_dir / f"{Path(bag.name).name}-{key[:24]}"


def _cache_recording(bag: Bag, data: Data, folder: Path) -> None:
    """Read a recording and decode the pictures its ticks need, under a temporary name until it is whole."""
    with ThreadPoolExecutor(1) as beside:  # the interpreter is not needed to hash
        hashes = beside.submit(lambda: {file.name: _sha256(file) for file in bag.files})
        damage = beside.submit(lambda: [fault for file in bag.files for fault in check(file).faults])
        recording = read_recording(bag, data)
    if damage.result():
        raise Fault(*damage.result())
    try:
        data.cache_dir.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=data.cache_dir))
        try:
            _write_recording(bag, recording, hashes.result(), data, building)
            building.chmod(0o755)
            try:
                building.rename(folder)
            except OSError:
                if not folder.exists():  # else another run was as quick
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        height, width = data.image_size
        ticks = sum(len(episode.state) for episode in recording.episodes)
        raise NoRoom(
            f"{data.cache_dir}: cannot hold the cache of {bag.name} ({error.strerror}); it needs up to "
            f"{ticks * len(data.cameras) * height * width * 3 / 1e6:.0f} MB; free some, or set data.cache_dir"
        ) from None


def _write_recording(bag: Bag, recording: Recording, hashes: dict[str, str], data: Data, folder: Path) -> None:
    np.save(folder / "state.npy", np.concatenate([episode.state for episode in recording.episodes]))
    np.save(folder / "action.npy", np.concatenate([episode.action for episode in recording.episodes]))
    wanted: dict[str, np.ndarray] = {}
    length = data.image_size[0] * data.image_size[1] * 3  # of a picture
    for camera, topic in data.cameras.items():
        wanted[topic], rows = np.unique(
            np.concatenate([episode.frames[camera] for episode in recording.episodes]), return_inverse=True
        )
        np.save(folder / f"{camera}.npy", rows)
    with ExitStack() as opened:
        files = {
            topic: opened.enter_context((folder / f"{camera}.rgb").open("wb")) for camera, topic in data.cameras.items()
        }

        def keep(topic: str, row: int, pixels: np.ndarray) -> None:
            if os.pwrite(files[topic].fileno(), pixels.data, row * length) < length:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        sizes = read_frames(bag, wanted, data.image_size, keep) if wanted else {}
    meta = {
        "episodes": [len(episode.state) for episode in recording.episodes],
        "notes": recording.notes,
        "warnings": recording.warnings,
        "state_names": recording.state_names,
        "action_names": recording.action_names,
        "picture_sizes": {camera: sizes[topic] for camera, topic in data.cameras.items()},
        "files": hashes,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2))


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
