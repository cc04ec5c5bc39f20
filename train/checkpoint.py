"""Checkpoints of a run: written under a temporary name and renamed when whole; gone on from as if it had never stopped.

checkpoint_NNNNNN/
  pretrained_model/   the policy, see pretrained.py
  training_state/     state.safetensors (optimizer, random numbers, the log's open window), resume.json
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pretrained
from act_model import ACT
from config import Config, to_dict
from dataset import Dataset
from faults import Fault
from normalize import Normalizer
from pretrained import WEIGHTS, write_json


class TrainingState(NamedTuple):
    """All that a run needs to go on as if it had never stopped."""

    step: int
    model: ACT
    optimizer: torch.optim.Optimizer
    window: list[Tensor]  # the figures of the steps since the last line of the log


def save(state: TrainingState, normalizer: Normalizer, config: Config, dataset: Dataset) -> Path:
    """Write checkpoint_NNNNNN into the run's folder and let the oldest go. Raises Fault where the disk refuses."""
    final = config.output_dir / f"checkpoint_{state.step:06d}"
    writing = final.with_name(f".{final.name}.tmp")
    try:
        shutil.rmtree(writing, ignore_errors=True)
        (writing / "pretrained_model").mkdir(parents=True)
        (writing / "training_state").mkdir()
        robot = pretrained.robot_json(state.step, config, dataset)
        pretrained.save(writing / "pretrained_model", state.model, normalizer, config, robot)
        tensors = {
            f"optimizer.{name}.{key}": value.contiguous()
            for name, p in _optimized(state)
            for key, value in state.optimizer.state[p].items()
        }
        tensors["rng.cpu"] = torch.get_rng_state()
        tensors |= {f"rng.cuda.{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
        tensors |= {f"window.{i}": figures for i, figures in enumerate(state.window)}
        save_file(tensors, writing / "training_state/state.safetensors")
        write_json(writing / "training_state/resume.json", {"step": state.step, "settings": _settings(config, dataset)})
        for path in [*writing.rglob("*"), writing]:
            _settle(path)
        writing.rename(final)
        _settle(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        newest = newest_checkpoint(config.output_dir)
        raise Fault(
            f"{final}: cannot be written ({error}); free some space or set output_dir, and run the same command again: "
            f"{f'it goes on from {newest.name}' if newest else 'no checkpoint is there yet'}"
        ) from None
    for old in _checkpoints(config.output_dir)[: -config.training.keep_checkpoints]:
        leaving = old.rename(old.with_name(f".{old.name}.tmp"))
        shutil.rmtree(leaving, ignore_errors=True)
    return final


def restore(checkpoint: Path, state: TrainingState, config: Config, dataset: Dataset) -> TrainingState:
    """The state of a checkpoint, put into the model and the optimizer of `state` and into torch's random numbers.

    Raises Fault where the run had other data, another network, batch size or seed.
    """
    try:
        resume = json.loads((checkpoint / "training_state/resume.json").read_text())
        tensors = load_file(checkpoint / "training_state/state.safetensors")
        weights = load_file(checkpoint / "pretrained_model" / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise Fault(
            f"{checkpoint}: is damaged ({error}); remove it, and the same command goes on from the checkpoint before it"
        ) from None
    differ = [
        f"{key}: {_shown(here)} now, {_shown(there)} in {checkpoint.name}"
        for key, here, there in _differences(_settings(config, dataset), resume["settings"])
    ]
    if differ:
        raise Fault(
            *differ,
            f"{checkpoint.parent}: this run cannot go on from its newest checkpoint; give another output_dir to "
            "start a new run, or the old settings to go on",
        )
    state.model.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    whole = state.optimizer.state_dict()
    # the moments take their parameter's memory layout, on which the fused kernel relies
    whole["state"] = {
        i: {
            "step": tensors[f"optimizer.{name}.step"],
            **{key: torch.empty_like(p).copy_(tensors[f"optimizer.{name}.{key}"]) for key in ("exp_avg", "exp_avg_sq")},
        }
        for i, (name, p) in enumerate(_optimized(state))
    }
    state.optimizer.load_state_dict(whole)
    torch.set_rng_state(tensors["rng.cpu"])
    for i in range(torch.cuda.device_count()):
        if f"rng.cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{i}"], i)
    device = next(state.model.parameters()).device
    window = [tensors[f"window.{i}"].to(device) for i in range(sum(key.startswith("window.") for key in tensors))]
    return TrainingState(resume["step"], state.model, state.optimizer, window)


def _optimized(state: TrainingState) -> list[tuple[str, nn.Parameter]]:
    """The parameters by name, in the order in which the optimizer numbers them."""
    names = {p: name for name, p in state.model.named_parameters()}
    return [(names[p], p) for group in state.optimizer.param_groups for p in group["params"]]


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most steps in a run's folder."""
    return next(reversed(_checkpoints(run)), None)


def _settings(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What must be the same for a run to go on: flat, by dotted key."""
    tree = to_dict(config)
    data = {f"data.{key}": value for key, value in tree["data"].items() if key not in ("bag_dir", "cache_dir")}
    model = {f"model.{key}": value for key, value in tree["model"].items()}
    training = {f"training.{key}": tree["training"][key] for key in ("batch_size", "seed")}
    recordings = {f"recording {name}": sorted(files.values()) for name, files in dataset.recordings.items()}
    return json.loads(json.dumps(data | model | training | recordings))


def _differences(here: dict[str, Any], there: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, here.get(key), there.get(key)) for key in {**here, **there} if here.get(key) != there.get(key)]


def _shown(value: Any) -> str:
    return "absent" if value is None else str(value)


def _checkpoints(run: Path) -> list[Path]:
    found = [path for path in run.glob("checkpoint_*") if re.fullmatch(r"checkpoint_\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("_")[1]))


def _settle(path: Path) -> None:
    """Wait until a file or folder is on the disk itself: a rename must not outlive its content in a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
