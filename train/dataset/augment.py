"""Augmentation: another light, another crop, a camera that was knocked a little; torchvision's transforms v2, on the device.

One draw for all cameras of a sample: they stand under the same lamps. Random numbers are torch's own, which train.py seeds
for each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from dataset.batches import Batch
from faults import Fault
from files import write_whole


class Augment:
    """The named augmentations, one after the other, of pictures of one size."""

    def __init__(self, names: Sequence[str], image_size: tuple[int, int]) -> None:
        self.steps: list[Callable[[Tensor], Tensor]] = []
        if not names:
            return
        try:
            from torchvision.transforms import v2
        except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
            raise Fault(
                f"training.augment: torchvision cannot be imported ({type(error).__name__}: {str(error)[:100]}); install the "
                "one that fits your torch, or set training.augment=[]"
            ) from None
        aspect = image_size[1] / image_size[0]
        known = {
            "color": v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
            "affine": v2.RandomAffine(degrees=2, translate=(0.03, 0.03), interpolation=v2.InterpolationMode.BILINEAR),
            # after the affine, whose black borders it cuts off for the most part
            "crop": v2.RandomResizedCrop(image_size, scale=(0.88, 0.96), ratio=(aspect, aspect), antialias=True),
        }
        self.steps = [step for name, step in known.items() if name in names]

    def __call__(self, batch: Batch) -> Batch:
        """A batch with its pictures augmented, each sample by a draw of its own."""
        if not self.steps or batch.images is None:
            return batch
        return batch._replace(images=self.pictures(batch.images))

    def pictures(self, images: Tensor) -> Tensor:
        """(B, C, H, W, 3) uint8, augmented."""
        samples = []
        for sample in images.permute(0, 1, 4, 2, 3):  # (C, 3, H, W)
            for step in self.steps:
                sample = step(sample)
            samples.append(sample)
        return torch.stack(samples).permute(0, 1, 3, 4, 2)

    def drawn(self, images: Tensor, count: int = 8) -> Tensor:
        """The cameras of a sample (C, H, W, 3) as they are and then augmented, (count, C, H, W, 3): to look at."""
        torch.manual_seed(0)
        return torch.cat([images[None], self.pictures(images.expand(count - 1, *images.shape))])

    def draw(self, images: Tensor, path: Path) -> None:
        """A picture of that: a row for each camera, a column for each draw."""
        sheet = np.concatenate([np.concatenate(list(column), 0) for column in self.drawn(images).numpy()], 1)
        encoded = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))[1]
        write_whole(path, encoded.tobytes())
