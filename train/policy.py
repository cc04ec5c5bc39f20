"""A trained policy: from what the robot observes to the actions of the next ticks, in the robot's units.

policy = Policy.load("outputs/train-rosbag-act/checkpoint_100000/pretrained_model")
chunk = policy.predict(state, images)      # (B, S) and (B, C, H, W, 3) in, (B, T, A) out
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pretrained
from act_model import ACT
from faults import Fault
from normalize import Normalizer


class Policy:
    """A network in evaluation mode with its statistics."""

    def __init__(self, model: ACT, normalizer: Normalizer, image_size: tuple[int, int], robot: dict[str, Any]) -> None:
        self.model = model.eval()
        self.normalizer = normalizer
        self.image_size = image_size  # height, width
        self.robot = robot  # robot.json: joint names, fps, cameras, how actions are meant

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> Policy:
        """From a pretrained_model folder of ours or of LeRobot >= 0.4.0. Raises Fault."""
        found = pretrained.load(Path(folder))
        return cls(found.model.to(device), found.normalizer.to(torch.device(device)), found.image_size, found.robot)

    @torch.inference_mode()
    def predict(self, state: Tensor, images: Tensor | None = None) -> Tensor:
        """Action chunks (B, T, A) for states (B, S) float32 and pictures (B, C, H, W, 3) uint8 RGB at the training size.

        Raises Fault where the observation is not what the policy was trained on.
        """
        cameras = list(self.normalizer.cameras)
        expected = [(len(self.normalizer.state.mean),), (len(cameras), *self.image_size, 3) if cameras else None]
        found = [tuple(state.shape[1:]), None if images is None else tuple(images.shape[1:])]
        if found != expected or not state.isfinite().all():
            raise Fault(
                f"the observation: state and pictures of shapes {found}, finite: {bool(state.isfinite().all())}; expected "
                f"{expected}, the cameras in the order {cameras}; resize as images.resize does"
            )
        device = self.normalizer.state.mean.device
        pixels = None if images is None else images.to(device)
        output = self.model(self.normalizer.state.normalize(state.to(device)), self.normalizer.images(pixels))
        return self.normalizer.action.unnormalize(output.actions).cpu()
