"""Recordings as training samples: read once into a cache on disk, split into training and held-out recordings.

The cache has one folder for each version of the reading code. A cached recording is a folder in it: meta.json, state.npy, action.npy, and for each camera NAME.jpegs (its pictures at the training size, one after the other) and NAME.npy
(where each tick's picture begins, and its bytes).
"""

from __future__ import annotations

import functools
import hashlib
import json
import shlex
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from config import Config, Data, to_dict
from dataset.batches import Dataset, Frames, Split
from faults import Fault, NoRoom
from files import BUILDING, building, remove_abandoned
from recordings.azure_blob import local_folder
from recordings.bags import Bag, find_bags
from recordings.episodes import Recording, read_frames, read_recording

FORMAT = 2  # of a cached recording
READER = "reader-"  # and a version: the cache of that version
NOT_IN_THE_KEY = ("bag_dir", "cache_dir", "validation_fraction", "on_bad_bag")  # settings that change no sample


class Cached(NamedTuple):
    """One recording in the cache."""

    meta: dict[str, Any]
    state: np.ndarray  # (N, S) float32
    action: np.ndarray  # (N, A) float32
    frames: dict[str, tuple[Path, np.ndarray]]  # camera: file of pictures; begin and bytes of each tick's (N, 2)


def load_dataset(config: Config, held_out: Collection[str] | None = None) -> Dataset:
    """All recordings of a configuration; held_out names those to validate on (default: data.validation_fraction).

    Raises Fault with the faults of all recordings. data.on_bad_bag=skip skips recordings with faults instead.
    """
    data = config.data
    bags, faults = find_bags(local_folder(data.bag_dir, data.cache_dir))
    skipped: list[tuple[str, ...]] = [(fault,) for fault in faults]
    folders = {bag.name: _cache_folder(bag, data) for bag in bags}
    if _cache_of_this_code(data).exists():
        remove_abandoned(_cache_of_this_code(data))
    missing = [bag for bag in bags if not folders[bag.name].exists()]
    for bag in tqdm(missing, desc="reading bags", unit="bag", disable=not missing):
        try:
            _cache_recording(bag, data, folders[bag.name])
        except NoRoom:
            raise
        except Fault as fault:
            skipped.append(fault.args)
            del folders[bag.name]
    cached = {name: _load(folder, data) for name, folder in folders.items()}
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
        cache_bytes=sum(file.stat().st_size for folder in folders.values() for file in folder.iterdir()),
    )


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
        spans = [np.zeros((0, 2), np.int64), *(recording.frames[camera][1] for recording in recordings.values())]
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


def _load(folder: Path, data: Data) -> Cached:
    """A recording from the cache. Raises Fault if it changed since it was written."""
    try:
        frames = {}
        for camera in data.cameras:
            spans = np.load(folder / f"{camera}.npy")
            frames[camera] = folder / f"{camera}.jpegs", spans
            if (folder / f"{camera}.jpegs").stat().st_size != spans.sum(1).max():
                raise ValueError(f"{camera}.jpegs is truncated")
        meta = json.loads((folder / "meta.json").read_text())
        return Cached(meta, np.load(folder / "state.npy"), np.load(folder / "action.npy"), frames)
    except (OSError, ValueError, EOFError) as error:
        raise Fault(f"{folder}: damaged cache ({error}); delete this folder and run the same command again") from None


@functools.cache
def _reader_version() -> str:
    """A hash of the code and the libraries that decide what is read from a bag."""
    room = Path(__file__).parents[1] / "recordings"
    code = b"".join(file.read_bytes() for file in sorted(room.glob("*.py")))
    return hashlib.sha256(
        code + f"{FORMAT} {cv2.__version__} {np.__version__} {version('rosbags')}".encode()
    ).hexdigest()


def _cache_folder(bag: Bag, data: Data) -> Path:
    """The folder of a recording; its name depends on everything that its content depends on."""
    settings = {key: value for key, value in to_dict(data).items() if key not in NOT_IN_THE_KEY}
    stats = [(file.resolve(), file.stat()) for file in bag.files if file.exists()]
    files = [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    parts = [settings, files, bag.declared, _reader_version()]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return _cache_of_this_code(data) / f"{Path(bag.name).name}-{key[:24]}"


def _cache_of_this_code(data: Data) -> Path:
    return data.cache_dir / f"{READER}{_reader_version()[:12]}"


def older_caches(data: Data) -> list[str]:
    """Caches of other versions of the code or its libraries: one line each, with its size and how to remove it."""
    lines = []
    for folder in sorted(data.cache_dir.glob("*")) if data.cache_dir.exists() else ():
        other = folder.name.startswith((READER, BUILDING)) or (folder / "meta.json").exists()
        if other and folder != _cache_of_this_code(data):
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            lines.append(
                f"{folder}: {size / 1e6:.0f} MB, cache of another version of this code; rm -r {shlex.quote(str(folder))}"
            )
    return lines


def _cache_recording(bag: Bag, data: Data, folder: Path) -> None:
    """Read a recording and decode the pictures that its ticks need; rename the folder when it is complete."""
    with ThreadPoolExecutor(1) as beside:  # hashing releases the GIL
        hashes = beside.submit(lambda: {file.name: _sha256(file) for file in bag.files if file.exists()})
        recording = read_recording(bag, data)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with building(folder.parent) as unfinished:
            _write_recording(bag, recording, hashes.result(), data, unfinished)
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


def _write_recording(bag: Bag, recording: Recording, hashes: dict[str, str], data: Data, folder: Path) -> None:
    np.save(folder / "state.npy", np.concatenate([episode.state for episode in recording.episodes]))
    np.save(folder / "action.npy", np.concatenate([episode.action for episode in recording.episodes]))
    wanted: dict[str, np.ndarray] = {}
    row: dict[str, np.ndarray] = {}  # of each tick, in `wanted`
    for camera, topic in data.cameras.items():
        messages = np.concatenate([episode.frames[camera] for episode in recording.episodes])
        wanted[topic], row[topic] = np.unique(messages, return_inverse=True)
    spans = {topic: np.zeros((len(numbers), 2), np.int64) for topic, numbers in wanted.items()}
    with ExitStack() as stack:
        files = {t: stack.enter_context((folder / f"{camera}.jpegs").open("wb")) for camera, t in data.cameras.items()}

        def keep(topic: str, at: int, jpeg: bytes) -> None:
            spans[topic][at] = files[topic].tell(), len(jpeg)
            files[topic].write(jpeg)

        sizes = read_frames(bag, wanted, data.image_size, keep) if wanted else {}
    for camera, topic in data.cameras.items():
        np.save(folder / f"{camera}.npy", spans[topic][row[topic]])
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
