"""One run: its configuration, dataset, device and processes; its report before training; the weights it starts from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from act_model import ACT, IMAGENET_WEIGHTS, calibrate_norms, load_imagenet_weights
from config import Config, Model, to_dict
from dataset.batches import Dataset, Split
from dataset.telling import FEW, needs_picture
from faults import Fault, printable
from policy import pretrained
from policy.card import CameraInfo, Robot, versions
from recordings import plausibility
from training.processes import Processes

CALIBRATION_PIXELS = 5_000_000  # of training pictures, for the norms of a backbone with random weights
NOT_OF_THE_NETWORK = ("n_action_steps", "dropout", "kl_weight", "pretrained_backbone")


@dataclass(frozen=True)
class Run:
    """What all parts of a run share."""

    config: Config
    dataset: Dataset
    device: torch.device = torch.device("cpu")
    processes: Processes = Processes()
    precision: str = "fp32"  # or bf16

    def new_model(self) -> ACT:
        """The network with fresh weights."""
        dataset = self.dataset
        cameras = len(self.config.data.cameras)
        return ACT(self.config.model, len(dataset.state_names), len(dataset.action_names), cameras)

    def robot(self, step: int, held_out: dict[str, Any]) -> Robot:
        """robot.json of a checkpoint."""
        data, dataset = self.config.data, self.dataset
        splits = {"train": dataset.train, "validation": dataset.validation}

        def amount(split: Split) -> dict[str, float]:
            return {"episodes": len(split.lengths), "seconds": round(len(split.state) / data.fps, 1)}

        return Robot(
            step=step,
            fps=data.fps,
            state_names=list(dataset.state_names),
            state_from=to_dict(data.state),
            action_names=list(dataset.action_names),
            action_from=to_dict(data.action)["from"],
            action_as=data.action.as_,
            cameras={
                name: CameraInfo(
                    topic, *data.image_size, [list(s) for s in dataset.picture_sizes[name]], [*data.part_of(name)]
                )
                for name, topic in data.cameras.items()
            },
            recordings={key: {n: dataset.recordings[n] for n in split.names} for key, split in splits.items()},
            amount={key: amount(split) for key, split in splits.items()},
            held_out=held_out,
            init_from=str(self.config.training.init_from) if self.config.training.init_from else None,
            versions=versions(),
        )

    @cached_property
    def parameters(self) -> int:
        """How many numbers the network learns; counted without memory for them."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.new_model().parameters())

    def check_memory(self) -> None:
        """Raises Fault if the network or a batch cannot fit into this machine's memory."""
        config, (height, width) = self.config, self.config.data.image_size
        sample = 3 * height * width * len(config.data.cameras)
        sample += 4 * config.model.chunk_size * len(self.dataset.action_names)
        each = 16 if self.device.type == "cpu" else 4  # bytes of a weight, with its gradient and moments
        needs = {"model": each * self.parameters, "training.batch_size": config.training.batch_size * sample}
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if faults := [
            f"{key}: needs {size / 1e9:.0f} GB of memory, this machine has {has / 1e9:.0f} GB; make it smaller"
            for key, size in needs.items()
            if size > has
        ]:
            raise Fault(*faults)

    def report(self) -> str:
        """What will be trained on: episodes, shapes, samples, sizes, warnings."""
        return "\n".join(map(printable, self._report()))

    def _report(self) -> Iterator[str]:
        config, dataset, data = self.config, self.dataset, self.config.data
        yield from (f"{name}: {note}" for name, notes in dataset.notes.items() for note in notes)
        yield from dataset.skipped_lines()
        for word, split in (("training", dataset.train), ("held out", dataset.validation)):
            samples = len(split.state)
            yield (
                f"{word}: {len(split.names)} recordings, {len(split.lengths)} episodes, {samples} samples, "
                f"{samples / data.fps:.0f} s at {data.fps:g} Hz"
                if split.names
                else f"{word}: none, so the policy cannot be judged; record more, or raise data.validation_fraction"
            )
        (height, width), batch, chunk = data.image_size, config.training.batch_size, config.model.chunk_size
        yield f"state   ({batch}, {len(dataset.state_names)}) {', '.join(dataset.state_names)}"
        yield (
            f"images  ({batch}, {len(data.cameras)}, {height}, {width}, 3) uint8 {', '.join(data.cameras)}"
            if data.cameras
            else "images  none: a policy on the state alone, which LeRobot cannot load"
        )
        source = "state one tick later" if data.action.from_ == "next_state" else "commands"
        names = ", ".join(dataset.action_names)
        yield f"action  ({batch}, {chunk}, {len(dataset.action_names)}) {data.action.as_}, {source}: {names}"
        yield f"cache   {dataset.cache_bytes / 1e6:.0f} MB in {data.cache_dir}"
        megabytes = self.parameters * 16 / 1e6  # weight, gradient and two moments, float32
        yield (
            f"memory  {self.parameters / 1e6:.1f} M parameters: {megabytes:.0f} MB for weights, gradients and optimizer, "
            "plus activations"
        )
        warned: dict[str, list[str]] = {}  # warning: names of its recordings
        for name, ticks in dataset.ticks(data.action.as_ == "delta"):
            for warning in (*dataset.warnings[name], *plausibility.warnings(ticks, config)):
                warned.setdefault(warning, []).append(name)
        for warning, found in warned.items():
            some = f"{len(found)} recordings ({', '.join(found[:3])}, ...)" if len(found) > 3 else ", ".join(found)
            yield f"warning: {some}: {warning}"
        split, chunk = dataset.train, config.model.chunk_size
        share = needs_picture(split.state, split.action, split.lengths, chunk) if data.cameras else None
        if share is not None and share < FEW:
            yield (
                f"warning: in {1 - share:.0%} of the samples the joints alone tell the actions, so a policy may learn late or "
                "never to look; begin demonstrations with one motion for all goals"
            )


def set_first_weights(model: ACT, run: Run) -> None:
    """Set the weights that a new run starts from: training.init_from, ImageNet's, or random ones with calibrated norms.

    Raises Fault if they cannot be loaded.
    """
    config = run.config
    if config.training.init_from:
        print(_init_from(model, run), flush=True)
    elif not config.data.cameras:
        return
    elif not config.model.pretrained_backbone:
        calibrate_norms(model.backbone, _some_pictures(run))
    else:
        try:
            load_imagenet_weights(model)
        except Exception as error:  # no network, a damaged file
            file = Path(torch.hub.get_dir(), "checkpoints", Path(IMAGENET_WEIGHTS).name)
            problem = "damaged" if file.exists() else f"missing, and {IMAGENET_WEIGHTS} cannot be downloaded"
            raise Fault(
                f"model.pretrained_backbone: {file}: {problem} ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:120]}); put the file there, or set model.pretrained_backbone=false"
            ) from None


def _some_pictures(run: Run) -> Tensor:
    """Random training pictures (N, 3, H, W) of all cameras, normalized."""
    split, (height, width) = run.dataset.train, run.config.data.image_size
    count = max(1, CALIBRATION_PIXELS // (height * width * len(split.frames)))
    rng = np.random.default_rng((run.config.training.seed, 0, 2))  # batches() uses (seed, step) and (seed, step, 1)
    ticks = rng.choice(len(split.state), min(count, len(split.state)), replace=False)
    images = run.dataset.normalizer().images(split.gather(ticks).images)
    assert images is not None
    return images.flatten(0, 1)


def _init_from(model: ACT, run: Run) -> str:
    """Load the weights of training.init_from; what differs in meaning, in words. Raises Fault if the network differs."""
    config, dataset = run.config, run.dataset
    path = config.training.init_from
    assert path is not None
    try:
        policy = pretrained.load(path)
    except Fault as fault:
        raise fault.at("training.init_from") from None
    network = {
        "model." + f.name: (getattr(config.model, f.name), getattr(policy.config, f.name))
        for f in dataclasses.fields(Model)
        if f.name not in NOT_OF_THE_NETWORK
    }
    network |= {
        "size of data.state": (len(dataset.state_names), len(policy.normalizer.state.mean)),
        "size of data.action": (len(dataset.action_names), len(policy.normalizer.action.mean)),
        "number of data.cameras": (len(config.data.cameras), len(policy.normalizer.cameras)),
    }
    faults = [
        f"training.init_from: {path}: {key} is {theirs}, of this run {ours}; expected the same network; set it to "
        f"{theirs}, or train without init_from"
        for key, (ours, theirs) in network.items()
        if ours != theirs
    ]
    if faults:
        raise Fault(*faults)
    model.load_state_dict(policy.model.state_dict())
    robot = policy.robot
    meaning = {
        "data.image_size": (config.data.image_size, policy.image_size),
        "data.cameras": (list(config.data.cameras), list(policy.normalizer.cameras)),
        "data.crop": ([config.data.part_of(name) for name in config.data.cameras], robot and robot.parts),
        "data.fps": (config.data.fps, robot and robot.fps),
        "state": (list(dataset.state_names), robot and robot.state_names),
        "action": (list(dataset.action_names), robot and robot.action_names),
        "data.action.as": (config.data.action.as_, robot and robot.action_as),
    }
    other = [
        f"; {key} was {'unknown' if theirs is None else theirs}, now {ours}"
        for key, (ours, theirs) in meaning.items()
        if ours != theirs
    ]
    return f"starting from {path}: its weights, and the statistics of this data{''.join(other)}"
