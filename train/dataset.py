"""Recordings as training samples: decoded once into a cache on disk, split by whole recordings, drawn in batches of chunks.

A cached recording is a folder: meta.json, state.npy, action.npy, and per camera NAME.rgb (raw frames at the training
size) with NAME.npy (the frame of each tick). Frames are read by position, not memory-mapped: thousands of recordings
would run out of file descriptors, and a file cut short would be a bus error instead of a message.
"""

from __future__ import annotations

import functools
import hashlib
import json
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bags import Bag, find_bags
from config import Config, Data, Fault, to_dict
from episodes import Recording, read_frames, read_recording
from normalize import Moments, Normalizer, imagenet, moments

PREFETCH = 4  # batches that are ready before they are asked for
SOURCES = ("bags.py", "signals.py", "episodes.py", "images.py")  # a change of how bags are read is a new cache


class Batch(NamedTuple):
    """B samples: an observation, and the chunk of T actions from there on."""

    state: Tensor  # (B, S) float32
    images: Tensor | None  # (B, C, H, W, 3) uint8
    action: Tensor  # (B, T, A) float32
    action_is_pad: Tensor  # (B, T) bool: beyond the episode's end, where the last action is repeated

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        images = None if self.images is None else change(self.images)
        return Batch(change(self.state), images, change(self.action), change(self.action_is_pad))


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
                raise Fault(f"{file}: is shorter than it was written; remove {file.parent} and it is made anew")


class Split(NamedTuple):
    """Recordings that are trained on, or held out: N ticks of all of them, one after the other."""

    names: list[str]  # the recordings
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
    recordings: dict[str, dict[str, str]]  # name: file: SHA-256
    notes: dict[str, list[str]]  # name: what there is to say of it
    cache_bytes: int

    def normalizer(self) -> Normalizer:
        """By the training recordings alone."""
        cameras: dict[str, Moments] = {camera: imagenet() for camera in self.train.frames}
        return Normalizer(moments(self.train.state), moments(self.train.action), cameras)


def load_dataset(config: Config) -> Dataset:
    """Every recording of the configuration, cached. Raises Fault with the faults of all of them."""
    data = config.data
    bags, faults = find_bags(data.bag_dir)
    folders: dict[str, Path] = {}
    missing = [bag for bag in bags if not _cache_folder(bag, data).exists()]
    with tqdm(total=len(missing), desc="reading bags", unit="bag", disable=not missing) as bar:
        for bag in bags:
            folders[bag.name] = folder = _cache_folder(bag, data)
            if bag in missing:
                try:
                    _cache_recording(bag, data, folder)
                except Fault as fault:
                    faults += fault.args
                bar.update()
    if faults:
        raise Fault(*faults)
    metas = {name: json.loads((folder / "meta.json").read_text()) for name, folder in folders.items()}
    for key in ("state_names", "action_names"):
        found = {tuple(meta[key]): name for name, meta in reversed(metas.items())}
        if len(found) > 1:
            raise Fault(
                *(
                    f"{name}: {key} are {', '.join(names)}; expected the same in every recording"
                    for names, name in found.items()
                )
            )
    held_out = _held_out(list(folders), data.validation_fraction, config.training.seed)
    first = next(iter(metas.values()))
    return Dataset(
        train=_split({name: folder for name, folder in folders.items() if name not in held_out}, metas, data),
        validation=_split({name: folder for name, folder in folders.items() if name in held_out}, metas, data),
        state_names=tuple(first["state_names"]),
        action_names=tuple(first["action_names"]),
        recordings={name: meta["files"] for name, meta in metas.items()},
        notes={name: meta["notes"] for name, meta in metas.items()},
        cache_bytes=sum(file.stat().st_size for folder in folders.values() for file in folder.iterdir()),
    )


def _held_out(names: list[str], fraction: float, seed: int) -> set[str]:
    """The recordings to validate on: by a hash of their names, so that a new recording moves few others."""
    count = min(max(round(len(names) * fraction), fraction > 0), len(names) - 1)
    return set(sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:count])


def _split(folders: dict[str, Path], metas: dict[str, Any], data: Data) -> Split:
    """The named cached recordings, one after the other."""
    lengths = [length for name in folders for length in metas[name]["episodes"]]
    meta = next(iter(metas.values()))

    def stack(name: str, *width: int) -> np.ndarray:
        loaded = [np.load(folder / name) for folder in folders.values()]
        return np.concatenate(loaded) if loaded else np.zeros((0, *width), np.float32)

    frames = {}
    for camera in data.cameras:
        ticks = [sum(metas[name]["episodes"]) for name in folders]
        frames[camera] = Frames(
            [folder / f"{camera}.rgb" for folder in folders.values()],
            np.repeat(np.arange(len(folders), dtype=np.int32), ticks),
            stack(f"{camera}.npy"),
        )
    return Split(
        list(folders),
        lengths,
        stack("state.npy", len(meta["state_names"])),
        stack("action.npy", len(meta["action_names"])),
        np.repeat(np.cumsum(lengths, dtype=np.int64), lengths),
        frames,
    )


def _cache_folder(bag: Bag, data: Data) -> Path:
    """Where the recording is cached, named by all that its content depends on."""
    slice_ = {
        key: value for key, value in to_dict(data).items() if key not in ("bag_dir", "cache_dir", "validation_fraction")
    }
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in bag.files]
    code = [hashlib.sha256((Path(__file__).parent / source).read_bytes()).hexdigest() for source in SOURCES]
    key = hashlib.sha256(json.dumps([slice_, files, bag.declared, code], sort_keys=True).encode()).hexdigest()
    return data.cache_dir / f"{Path(bag.name).name}-{key[:24]}"


def _cache_recording(bag: Bag, data: Data, folder: Path) -> None:
    """Read a recording and decode the pictures its ticks need, under a temporary name until it is whole."""
    recording = read_recording(bag, data)
    try:
        data.cache_dir.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=data.cache_dir))
        try:
            _write_recording(bag, recording, data, building)
            building.chmod(0o755)
            building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        height, width = data.image_size
        ticks = sum(len(episode.state) for episode in recording.episodes)
        raise Fault(
            f"{data.cache_dir}: cannot hold the cache of {bag.name} ({error.strerror}); it needs up to "
            f"{ticks * len(data.cameras) * height * width * 3 / 1e6:.0f} MB; free some, or set data.cache_dir"
        ) from None


def _write_recording(bag: Bag, recording: Recording, data: Data, folder: Path) -> None:
    np.save(folder / "state.npy", np.concatenate([episode.state for episode in recording.episodes]))
    np.save(folder / "action.npy", np.concatenate([episode.action for episode in recording.episodes]))
    wanted = {}
    for camera, topic in data.cameras.items():
        wanted[topic], rows = np.unique(
            np.concatenate([episode.frames[camera] for episode in recording.episodes]), return_inverse=True
        )
        np.save(folder / f"{camera}.npy", rows)
    files = {topic: (folder / f"{camera}.rgb").open("wb") for camera, topic in data.cameras.items()}
    try:
        for topic, pixels in read_frames(bag, wanted, data.image_size) if wanted else ():
            files[topic].write(pixels.data)
    finally:
        for file in files.values():
            file.close()
    meta = {
        "bag": bag.name,
        "episodes": [len(episode.state) for episode in recording.episodes],
        "notes": recording.notes,
        "state_names": recording.state_names,
        "action_names": recording.action_names,
        "files": {file.name: _sha256(file) for file in bag.files},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2))


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def batches(split: Split, config: Config, first_step: int) -> Iterator[Batch]:
    """The batches of the steps from first_step on, made ahead by one thread.

    Each epoch is a permutation that depends on the seed and the epoch alone, so a resumed run needs only its step.
    """
    ticks, size, seed = len(split.state), config.training.batch_size, config.training.seed

    @functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(ticks)

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
                chosen = np.array([order(p // ticks)[p % ticks] for p in range(step * size, (step + 1) * size)])
                batch = split.gather(chosen, config.model.chunk_size, config.data.image_size)
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
