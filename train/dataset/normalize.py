"""Normalization on the device, as LeRobot's MEAN_STD: (x - mean) / (std + 1e-8), and back x * std + mean.

State and action use the training recordings' statistics; pictures use ImageNet's, which the pretrained backbone expects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EPS = 1e-8
STD_FLOOR = 1e-2  # a joint that never moves must not explode, as in the original ACT
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Moments(NamedTuple):
    """Mean and standard deviation of one feature: (S,), (A,) or (3, 1, 1) for a camera."""

    mean: Tensor
    std: Tensor

    def normalize(self, x: Tensor) -> Tensor:
        return (x - self.mean) / (self.std + EPS)

    def unnormalize(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean

    def to(self, device: torch.device) -> Moments:
        return Moments(self.mean.to(device), self.std.to(device))


def moments(rows: np.ndarray) -> Moments:
    """Of rows (N, K), over N; the standard deviation is at least STD_FLOOR."""
    std = rows.std(axis=0, dtype=np.float64).clip(STD_FLOOR)
    return Moments(
        torch.tensor(rows.mean(axis=0, dtype=np.float64), dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
    )


def imagenet() -> Moments:
    """The moments of every camera."""
    return Moments(torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1))


@dataclass
class Normalizer:
    """The moments of everything that the network reads and writes."""

    state: Moments
    action: Moments
    cameras: dict[str, Moments]  # in the order of the network's input

    def __post_init__(self) -> None:
        if self.cameras:  # made once: of pixel values from 0 to 255, (C, 1, 1, 3) each
            mean, std = (torch.stack(each).view(-1, 1, 1, 3) for each in zip(*self.cameras.values(), strict=True))
            self.pixels = Moments(mean * 255, (std + EPS) * 255)

    def to(self, device: torch.device) -> Normalizer:
        cameras = {name: camera.to(device) for name, camera in self.cameras.items()}
        return Normalizer(self.state.to(device), self.action.to(device), cameras)

    def images(self, pixels: Tensor | None) -> Tensor | None:
        """(B, C, H, W, 3) uint8 as (B, C, 3, H, W) float, normalized, in channels-last memory; None stays None."""
        if pixels is None:
            return None
        return pixels.float().sub_(self.pixels.mean).div_(self.pixels.std).permute(0, 1, 4, 2, 3)
