"""Batches of action chunks from cached recordings. Their order is a pure function of (seed, epoch, rank).

Pictures are read from their files by position. A memory map of thousands of recordings would run out of file
descriptors, and a truncated file would be a bus error, not a message.
"""

from __future__ import annotations

import functools
import itertools
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config
from cores import usable_cores
from dataset.normalize import Normalizer, imagenet, moments
from faults import Fault
from recordings.images import decode
from recordings.plausibility import Ticks

PREFETCH = 4  # batches made ahead
MOST_DECODERS = 16


class Batch(NamedTuple):
    """B samples: an observation, and the chunk of T actions that starts at its tick."""

    state: Tensor  # (B, S) float32
    images: Tensor | None  # (B, C, H, W, 3) uint8
    action: Tensor  # (B, T, A) float32
    action_is_pad: Tensor  # (B, T) bool: past the episode's end, where the last action is repeated
    noise: Tensor | None = None  # (B, L) float32, standard normal, for the style latent
    real_steps: Tensor | None = None  # () float32: actions that are not padding, the mean over all processes

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*(None if tensor is None else change(tensor) for tensor in self))  # type: ignore[arg-type]


class Frames(NamedTuple):
    """The picture of one camera at each of N ticks."""

    files: list[Path]  # of JPEGs, one for each recording
    file: np.ndarray  # (N,) int32, index into files
    span: np.ndarray  # (N, 3) int64, where the picture begins in its file, its bytes, and their CRC-32

    def read(self, tick: int, out: np.ndarray) -> None:
        """Fill out (H, W, 3) uint8. Raises Fault if the picture is damaged; the next start then reads the recording again."""
        file, (begin, size, crc) = self.files[self.file[tick]], self.span[tick]
        with file.open("rb", buffering=0) as content:
            jpeg = os.pread(content.fileno(), size, begin)
        pixels = decode(jpeg) if len(jpeg) == size and zlib.crc32(jpeg) == crc else None
        if pixels is None or pixels.shape != out.shape:
            with suppress(OSError):
                (file.parent / "meta.json").unlink()
            raise Fault(f"{file}: is truncated or damaged; run the same command: it is made again")
        out[:] = pixels


@functools.cache
def _decoders() -> tuple[ThreadPoolExecutor, int]:
    """As many threads as this process may use cores, and their number; OpenCV releases the GIL."""
    shared_by = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes on this machine
    threads = max(1, min(MOST_DECODERS, usable_cores() // shared_by))
    return ThreadPoolExecutor(threads, "decode"), threads


class Split(NamedTuple):
    """The recordings of one split: their N ticks, concatenated."""

    names: list[str]  # of the recordings
    recording: np.ndarray  # (N,) int32, index into names
    lengths: list[int]  # of the episodes, in ticks
    state: np.ndarray  # (N, S) float32
    action: np.ndarray  # (N, A) float32
    end: np.ndarray  # (N,) int64, where the tick's episode ends
    frames: dict[str, Frames]  # by camera, in the order of the network's input
    chunk_size: int  # T
    image_size: tuple[int, int]  # height, width

    def gather(self, ticks: np.ndarray, pin: bool = False) -> Batch:
        """The samples at ticks (B,); `pin` puts them where a GPU can fetch them."""
        reach = ticks[:, None] + np.arange(self.chunk_size)
        end = self.end[ticks][:, None]
        images = None
        if self.frames:
            images = torch.empty(len(ticks), len(self.frames), *self.image_size, 3, dtype=torch.uint8, pin_memory=pin)
            wanted = list(itertools.product(enumerate(self.frames.values()), enumerate(ticks)))
            pixels, (pool, threads) = images.numpy(), _decoders()

            def decode_some(first: int) -> None:
                for (c, frames), (b, tick) in wanted[first::threads]:
                    frames.read(tick, pixels[b, c])

            list(pool.map(decode_some, range(threads)))  # raises what a thread raised
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
    picture_sizes: dict[str, list[tuple[int, int]]]  # camera: each height, width in the training recordings
    recordings: dict[str, dict[str, str]]  # name: file: SHA-256
    notes: dict[str, list[str]]  # name: facts about it
    warnings: dict[str, list[str]]  # name: what to check before training
    skipped: list[tuple[str, ...]]  # the faults of each recording that data.on_bad_bag=skip skipped
    cache_bytes: int

    def normalizer(self) -> Normalizer:
        """From the training recordings alone."""
        cameras = {camera: imagenet() for camera in self.train.frames}
        return Normalizer(moments(self.train.state), moments(self.train.action), cameras)

    def ticks(self, delta: bool) -> Iterator[tuple[str, Ticks]]:
        """Each recording's name and ticks; with `delta`, actions are added to their states to give targets."""
        for split in (self.train, self.validation):
            for i, name in enumerate(split.names):
                rows = slice(*np.searchsorted(split.recording, (i, i + 1)))
                state, action, ends = split.state[rows], split.action[rows], np.unique(split.end[rows])
                frames = {camera: frames.span[rows, 0] for camera, frames in split.frames.items()}
                lengths = np.diff(ends, prepend=rows.start).tolist()
                target = action + state if delta else action
                yield name, Ticks(state, target, frames, lengths, self.state_names, self.action_names)

    def skipped_lines(self) -> list[str]:
        """The number of skipped recordings, then their faults, one line each; nothing if none was skipped."""
        if not self.skipped:
            return []
        count = f"data.on_bad_bag=skip: skipped {len(self.skipped)} recordings with faults"
        return [count, *(f"skipped: {line}" for faults in self.skipped for line in faults)]


def batches(
    split: Split, config: Config, first_step: int, rank: int = 0, world: int = 1, pin: bool = False
) -> Iterator[Batch]:
    """This process's part of the batches of all steps after first_step, made ahead; `pin` pins them.

    Each epoch is a permutation that depends only on seed and epoch; the latent's noise depends only on seed and step.
    So a resumed run needs only its step, and `world` processes together see what one would with `world` times the batch.
    """
    ticks, size, seed = len(split.state), config.training.batch_size, config.training.seed
    total, share = size * world, slice(rank * size, (rank + 1) * size)

    @functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(ticks)

    def make(step: int) -> Batch:
        chosen = np.array([order(p // ticks)[p % ticks] for p in range(step * total, (step + 1) * total)])
        real_steps = np.minimum(split.end[chosen] - chosen, split.chunk_size).sum() / world
        noise = np.random.default_rng((seed, step, 1)).standard_normal((total, config.model.latent_dim), np.float32)
        batch = split.gather(chosen[share], pin)._replace(
            noise=torch.from_numpy(noise[share]), real_steps=torch.tensor(real_steps, dtype=torch.float32)
        )
        return batch.pin_memory() if pin else batch

    steps = iter(range(first_step, config.training.steps))
    pending: deque[Future[Batch]] = deque()
    pool = ThreadPoolExecutor(2, "batches")  # one prepares while the other's pictures are decoded
    try:
        while True:
            for step in itertools.islice(steps, PREFETCH + 1 - len(pending)):
                pending.append(pool.submit(make, step))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
