"""Image augmentation on the device: color, crop and a small affine change, by torchvision's transforms v2.

All cameras of a sample get the same draw: they stand under the same lamps. The random numbers are torch's, which train.py
seeds for each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from dataset.batches import Batch, Split
from faults import Fault
from files import write_whole

DRAWS = 8  # pictures in a row of the sheet: the original, then augmented ones


class Augment:
    """The named augmentations, in a fixed order, for pictures of one size."""

    def __init__(self, names: Sequence[str], image_size: tuple[int, int]) -> None:
        self.steps: list[Callable[[Tensor], Tensor]] = []
        if not names:
            return
        try:
            from torchvision.transforms import v2
        except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
            raise Fault(
                f"training.augment: cannot import torchvision ({type(error).__name__}: {str(error)[:100]}); install the "
                "version that fits your torch, or set training.augment=[]"
            ) from None
        aspect = image_size[1] / image_size[0]
        known = {
            "color": v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
            "affine": v2.RandomAffine(degrees=2, translate=(0.03, 0.03), interpolation=v2.InterpolationMode.BILINEAR),
            # after the affine change: it cuts off most of its black borders
            "crop": v2.RandomResizedCrop(image_size, scale=(0.88, 0.96), ratio=(aspect, aspect), antialias=True),
        }
        self.steps = [step for name, step in known.items() if name in names]

    def __call__(self, batch: Batch) -> Batch:
        """A batch with augmented pictures; each sample gets its own draw."""
        if not self.steps or batch.images is None:
            return batch
        samples = []
        for sample in batch.images.permute(0, 1, 4, 2, 3):  # (C, 3, H, W)
            for step in self.steps:
                sample = step(sample)
            samples.append(sample)
        # as the network reads them: channels last
        return batch._replace(images=torch.stack(samples).permute(0, 1, 3, 4, 2).contiguous())

    def draw(self, split: Split, path: Path) -> None:
        """Write a PNG of the first sample: one row for each camera, the original first, then augmented draws."""
        torch.manual_seed(0)
        batch = split.gather(np.zeros(DRAWS, int))
        assert batch.images is not None
        augmented = self(batch).images
        assert augmented is not None
        pictures = torch.cat([batch.images[:1], augmented[1:]]).numpy()  # (DRAWS, C, H, W, 3)
        sheet = np.concatenate([np.concatenate(list(cameras), 0) for cameras in pictures], 1)
        write_whole(path, cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))[1].tobytes())
