"""Recordings as training samples: decoded once into a cache on disk, split by whole recordings, drawn in batches of chunks.

A cached recording is a folder: meta.json, state.npy, action.npy, and per camera NAME.rgb (raw frames at the training
size) with NAME.npy (the frame of each tick). Frames are read by position, not memory-mapped: thousands of recordings
would run out of file descriptors, and a file cut short would be a bus error instead of a message.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import Config, Data, to_dict
from dataset.normalize import Moments, Normalizer, imagenet, moments
from faults import Fault, NoRoom
from recordings.azure_blob import local_folder
from recordings.bags import Bag, find_bags
from recordings.episodes import Recording, read_frames, read_recording
from recordings.integrity import check
from training.processes import Processes

ROOM = Path(__file__).parents[1] / "recordings"
PREFETCH = 4  # batches that are ready before they are asked for
# a change of how bags are read is a new cache
SOURCES = (
    *("bags", "chunks", "episodes", "images", "integrity", "layout", "plausibility", "signals"),
    *("walk_bag", "walk_mcap"),
)


class Batch(NamedTuple):
    """B samples: an observation, and the chunk of T actions from there on."""

    state: Tensor  # (B, S) float32
    images: Tensor | None  # (B, C, H, W, 3) uint8
    action: Tensor  # (B, T, A) float32
    action_is_pad: Tensor  # (B, T) bool: beyond the episode's end, where the last action is repeated
    noise: Tensor | None = None  # (B, L) float32, standard normal: for the style latent in training
    real_steps: Tensor | None = None  # () float32, in the chunks of all processes, divided by their number

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]  # as they were


class Frames(NamedTuple):
    """The picture of one camera at each of N ticks."""

    files: list[Path]  # of raw frames
    file: np.ndarray  # (N,) int32, which of them
    row: np.ndarray  # (N,) int64, which frame in it

    def read(self, tick: int, out: np.ndarray) -> None:
        """Fill out (H, W, 3) uint8."""
        file = self.files[self.file[tick]]
        with file.open("rb", buffering=0) as content:
            content.seek(int(self.row[tick]) * out.nbytes)
            if content.readinto(out.data) != out.nbytes:
                raise Fault(f"{file}: was cut short while training; run the same command again")


class Cached(NamedTuple):
    """One recording as it stands in the cache."""

    meta: dict[str, Any]
    state: np.ndarray  # (N, S) float32
    action: np.ndarray  # (N, A) float32
    frames: dict[str, tuple[Path, np.ndarray]]  # camera: raw frames, and which of them each tick shows (N,)


class Split(NamedTuple):
    """Recordings that are trained on, or held out: N ticks of all of them, one after the other."""

    names: list[str]  # the recordings
    recording: np.ndarray  # (N,) int32, which of them
    lengths: list[int]  # of the episodes, in ticks
    state: np.ndarray  # (N, S) float32
    action: np.ndarray  # (N, A) float32
    end: np.ndarray  # (N,) int64, where the tick's episode ends
    frames: dict[str, Frames]  # by camera, in the order of the network's input

    def gather(self, ticks: np.ndarray, chunk_size: int, image_size: tuple[int, int]) -> Batch:
        """The samples at some ticks (B,)."""
        reach = ticks[:, None] + np.arange(chunk_size)
        end = self.end[ticks][:, None]
        images = None
        if self.frames:
            images = torch.empty(len(ticks), len(self.frames), *image_size, 3, dtype=torch.uint8)
            for c, frames in enumerate(self.frames.values()):
                for b, tick in enumerate(ticks):
                    frames.read(tick, images[b, c].numpy())
        return Batch(
            torch.from_numpy(self.state[ticks]),
            images,
            torch.from_numpy(self.action[np.minimum(reach, end - 1)]),
            torch.from_numpy(reach >= end),
        )


class Dataset(NamedTuple):
    """All recordings of a configuration."""

    train: Split
    validation: Split
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    picture_sizes: dict[str, list[tuple[int, int]]]  # camera: each height, width in the recordings that are trained on
    recordings: dict[str, dict[str, str]]  # name: file: SHA-256
    notes: dict[str, list[str]]  # name: what there is to say of it
    warnings: dict[str, list[str]]  # name: what to look at before training
    left_out: list[tuple[str, ...]]  # the faults of each recording that data.on_bad_bag skipped
    cache_bytes: int

    def normalizer(self) -> Normalizer:
        """By the training recordings alone."""
        cameras: dict[str, Moments] = {camera: imagenet() for camera in self.train.frames}
        return Normalizer(moments(self.train.state), moments(self.train.action), cameras)

    def left_out_in_words(self) -> list[str]:
        """The recordings that were skipped, counted, and their faults, a line each."""
        if not self.left_out:
            return []
        count = f"left out by data.on_bad_bag=skip: {len(self.left_out)} recordings with faults"
        return [count, *(f"left out: {line}" for faults in self.left_out for line in faults)]


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
        train=_split({name: one for name, one in cached.items() if name not in held_out}, first),
        validation=_split({name: one for name, one in cached.items() if name in held_out}, first),
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


def _split(recordings: dict[str, Cached], example: Cached) -> Split:
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


def batches(split: Split, config: Config, first_step: int, ranks: Processes) -> Iterator[Batch]:
    """This process's share of the batches of the steps from first_step on, made ahead by one thread.

    Each epoch is a permutation that depends on the seed and the epoch alone, and the latent's noise depends on the seed
    and the step: a resumed run needs only its step, and n processes see together what one would with n times the batch.
    """
    ticks, size, seed = len(split.state), config.training.batch_size, config.training.seed
    chunk, whole, share = config.model.chunk_size, size * ranks.world, slice(ranks.rank * size, (ranks.rank + 1) * size)

    @functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(ticks)

    def make(step: int) -> Batch:
        chosen = np.array([order(p // ticks)[p % ticks] for p in range(step * whole, (step + 1) * whole)])
        real_steps = np.minimum(split.end[chosen] - chosen, chunk).sum() / ranks.world
        noise = np.random.default_rng((seed, step, 1)).standard_normal((whole, config.model.latent_dim), np.float32)
        return split.gather(chosen[share], chunk, config.data.image_size)._replace(
            noise=torch.from_numpy(noise[share]), real_steps=torch.tensor(real_steps, dtype=torch.float32)
        )

    ready: queue.Queue[Batch | BaseException] = queue.Queue(PREFETCH)
    stop = threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in range(first_step, config.training.steps):
                if stop.is_set():
                    return
                batch = make(step)
                put(batch.pin_memory() if torch.cuda.is_available() else batch)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        for _ in range(first_step, config.training.steps):
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
