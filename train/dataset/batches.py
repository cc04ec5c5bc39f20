"""Batches of action chunks drawn from cached recordings, in an order that is a pure function of (seed, epoch, rank).

Frames are read by position, not memory-mapped: thousands of recordings would run out of file descriptors, and a file cut
short would be a bus error instead of a message.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config
from dataset.normalize import Moments, Normalizer, imagenet, moments
from faults import Fault
from recordings.plausibility import Ticks

PREFETCH = 4  # batches that are ready before they are asked for


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


class Split(NamedTuple):
    """Recordings that are trained on, or held out: N ticks of all of them, one after the other."""

    names: list[str]  # the recordings
    recording: np.ndarray  # (N,) int32, which of them
    lengths: list[int]  # of the episodes, in ticks
    state: np.ndarray  # (N, S) float32
    action: np.ndarray  # (N, A) float32
    end: np.ndarray  # (N,) int64, where the tick's episode ends
    frames: dict[str, Frames]  # by camera, in the order of the network's input
    chunk_size: int  # T
    image_size: tuple[int, int]  # height, width

    def gather(self, ticks: np.ndarray) -> Batch:
        """The samples at some ticks (B,)."""
        reach = ticks[:, None] + np.arange(self.chunk_size)
        end = self.end[ticks][:, None]
        images = None
        if self.frames:
            images = torch.empty(len(ticks), len(self.frames), *self.image_size, 3, dtype=torch.uint8)
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

    def ticks(self, delta: bool) -> Iterator[tuple[str, Ticks]]:
        """Each recording's name and ticks; `delta` says that actions are to be added to their states."""
        for split in (self.train, self.validation):
            owners = (
                split.recording[np.cumsum([0, *split.lengths[:-1]])] if split.names else np.zeros(0)
            )  # of the episodes
            for i, name in enumerate(split.names):
                of = slice(*np.searchsorted(split.recording, (i, i + 1)))
                state, action = split.state[of], split.action[of]
                yield (
                    name,
                    Ticks(
                        state,
                        action + state if delta else action,
                        {camera: frames.row[of] for camera, frames in split.frames.items()},
                        [split.lengths[episode] for episode in np.flatnonzero(owners == i)],
                        self.state_names,
                        self.action_names,
                    ),
                )

    def left_out_in_words(self) -> list[str]:
        """The recordings that were skipped, counted, and their faults, a line each."""
        if not self.left_out:
            return []
        count = f"left out by data.on_bad_bag=skip: {len(self.left_out)} recordings with faults"
        return [count, *(f"left out: {line}" for faults in self.left_out for line in faults)]


def batches(split: Split, config: Config, first_step: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """This process's share of the batches of the steps from first_step on, made ahead by one thread.

    Each epoch is a permutation that depends on the seed and the epoch alone, and the latent's noise depends on the seed
    and the step: a resumed run needs only its step, and `world` processes see together what one would with `world` times the batch.
    """
    ticks, size, seed = len(split.state), config.training.batch_size, config.training.seed
    chunk, whole, share = config.model.chunk_size, size * world, slice(rank * size, (rank + 1) * size)

    @functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(ticks)

    def make(step: int) -> Batch:
        chosen = np.array([order(p // ticks)[p % ticks] for p in range(step * whole, (step + 1) * whole)])
        real_steps = np.minimum(split.end[chosen] - chosen, chunk).sum() / world
        noise = np.random.default_rng((seed, step, 1)).standard_normal((whole, config.model.latent_dim), np.float32)
        return split.gather(chosen[share])._replace(
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
