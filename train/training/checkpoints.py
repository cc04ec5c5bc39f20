"""Checkpoints of a run: written under a temporary name and renamed when whole; gone on from as if it had never stopped.

checkpoint_NNNNNN/
  pretrained_model/   the policy, see pretrained.py
  training_state/     state.safetensors (optimizer, the log's open window), resume.json (the settings, the validation
                      figure, every file's size)
best.json             the name of the checkpoint with the least validation figure, which is kept beside the newest
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from act_model import ACT
from config import Config, to_dict
from dataset.batches import Dataset
from dataset.normalize import Normalizer
from faults import Fault
from files import fsync, write_whole
from policy import pretrained
from policy.card import robot_json
from policy.pretrained import ROBOT, WEIGHTS, write_json
from training.processes import Processes
from training.run_folder import (
    RESUME,
    best_checkpoint,
    checkpoint_name,
    files_of,
    newest_checkpoint,
    whole_checkpoints,
)

BEST = "best.json"
FIGURES = ("loss", "l1", "kl", "grad_norm")  # of each step, in the window


class TrainingState(NamedTuple):
    """All that a run needs to go on as if it had never stopped."""

    step: int
    model: ACT
    optimizer: torch.optim.Optimizer
    window: list[Tensor]  # (4,) FIGURES of each step since the last line of the log
    held_out: dict[str, float]  # the figures of the last validation, in words


def save(
    state: TrainingState,
    normalizer: Normalizer,
    config: Config,
    dataset: Dataset,
    processes: int,
    validation_l1: float | None = None,
) -> None:
    """Write checkpoint_NNNNNN into the run's folder and let the oldest go, but never the one that validated best.

    Raises Fault where the disk refuses.
    """
    final = config.output_dir / checkpoint_name(state.step)
    writing = final.with_name(f".{final.name}.tmp")
    try:
        shutil.rmtree(writing, ignore_errors=True)
        (writing / "pretrained_model").mkdir(parents=True)
        (writing / "training_state").mkdir()
        robot = robot_json(state.step, config, dataset, state.held_out)
        pretrained.save(writing / "pretrained_model", state.model, normalizer, config, robot)
        tensors = {
            f"optimizer.{name}.{key}": value.contiguous()
            for name, p in _optimized(state)
            for key, value in state.optimizer.state[p].items()
        }
        tensors |= {f"window.{i}": figures for i, figures in enumerate(state.window)}
        save_file(tensors, writing / "training_state/state.safetensors")
        files = {str(path.relative_to(writing)): path.stat().st_size for path in files_of(writing)}
        settings = settings_to_keep(config, dataset, processes)
        resume = {"step": state.step, "validation_l1": validation_l1, "settings": settings, "files": files}
        write_json(writing / RESUME, resume)
        for path in [*writing.rglob("*"), writing]:
            fsync(path)
        if final.exists():  # only in part, see missing()
            shutil.rmtree(final)
        writing.rename(final)
        fsync(final.parent)
        best = best_checkpoint(config.output_dir)
        if best:
            unit = "standard deviations of the training actions"
            named = {"checkpoint": best[0].name, "validation_l1": best[1], "unit": unit}
            write_whole(config.output_dir / BEST, json.dumps(named, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        newest = newest_checkpoint(config.output_dir)
        raise Fault(
            f"{final}: cannot be written ({error}); free some space or set output_dir, and run the same command again: "
            f"{f'it goes on from {newest.name}' if newest else 'no checkpoint is there yet'}"
        ) from None
    for old in whole_checkpoints(config.output_dir)[: -config.training.keep_checkpoints]:
        if best and old == best[0]:
            continue
        leaving = old.rename(old.with_name(f".{old.name}.tmp"))
        shutil.rmtree(leaving, ignore_errors=True)


def restore(checkpoint: Path, state: TrainingState, config: Config, dataset: Dataset, processes: int) -> TrainingState:
    """The state of a checkpoint, put into the model and the optimizer of `state`.

    Raises Fault where the run had other data, another network, batch size or seed.
    """
    try:
        resume = json.loads((checkpoint / RESUME).read_text())
        tensors = load_file(checkpoint / "training_state/state.safetensors")
        weights = load_file(checkpoint / "pretrained_model" / WEIGHTS)
        held_out = json.loads((checkpoint / "pretrained_model" / ROBOT).read_text()).get("held_out", {})
    except (OSError, ValueError, SafetensorError) as error:
        raise Fault(
            f"{checkpoint}: is damaged ({error}); remove it, and the same command goes on from the checkpoint before it"
        ) from None
    differ = [
        f"{key}: {_shown(here)} now, {_shown(there)} in {checkpoint.name}"
        for key, here, there in _differences(settings_to_keep(config, dataset, processes), resume["settings"])
    ]
    if differ:
        raise Fault(
            *differ,
            f"{checkpoint.parent}: this run cannot go on from its newest checkpoint; give another output_dir to "
            "start a new run, or the old settings to go on",
        )
    state.model.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    _set_moments(state, lambda name, key, p: tensors[f"optimizer.{name}.{key}"])
    device = next(state.model.parameters()).device
    window = [tensors[f"window.{i}"].to(device) for i in range(sum(key.startswith("window.") for key in tensors))]
    return TrainingState(resume["step"], state.model, state.optimizer, window, held_out)


def receive(state: TrainingState, ranks: Processes) -> TrainingState:
    """The first process's step, optimizer and window in all of them: other machines may lack the checkpoint."""
    step, entries = ranks.from_first(torch.tensor([state.step, len(state.window)])).tolist()
    if step == 0:
        return state
    if not ranks.first:
        _set_moments(state, lambda name, key, p: torch.zeros(()) if key == "step" else torch.zeros_like(p))
        device = next(state.model.parameters()).device
        state = state._replace(step=step, window=[torch.zeros(len(FIGURES), device=device) for _ in range(entries)])
    for _, p in _optimized(state):
        for value in state.optimizer.state[p].values():
            ranks.from_first(value)
    for figures in state.window:
        ranks.from_first(figures)
    return state


def _set_moments(state: TrainingState, moment: Callable[[str, str, nn.Parameter], Tensor]) -> None:
    """Give the optimizer its moments, in their parameters' memory layout, on which the fused kernel relies."""
    whole = state.optimizer.state_dict()
    whole["state"] = {
        i: {
            "step": moment(name, "step", p),
            **{key: torch.empty_like(p).copy_(moment(name, key, p)) for key in ("exp_avg", "exp_avg_sq")},
        }
        for i, (name, p) in enumerate(_optimized(state))
    }
    state.optimizer.load_state_dict(whole)


def _optimized(state: TrainingState) -> list[tuple[str, nn.Parameter]]:
    """The parameters by name, in the order in which the optimizer numbers them."""
    names = {p: name for name, p in state.model.named_parameters()}
    return [(names[p], p) for group in state.optimizer.param_groups for p in group["params"]]


def settings_to_keep(config: Config, dataset: Dataset, processes: int) -> dict[str, Any]:
    """What must be the same for a run to go on: flat, by dotted key."""
    tree = to_dict(config)
    elsewhere = ("bag_dir", "cache_dir", "on_bad_bag")
    data = {f"data.{key}": value for key, value in tree["data"].items() if key not in elsewhere}
    model = {f"model.{key}": value for key, value in tree["model"].items()}
    training = {
        "training.batch_size times the processes": config.training.batch_size * processes,
        "training.seed": config.training.seed,
    }
    recordings = {f"recording {name}": sorted(files.values()) for name, files in dataset.recordings.items()}
    return json.loads(json.dumps(data | model | training | recordings))


def _differences(here: dict[str, Any], there: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, here.get(key), there.get(key)) for key in {**here, **there} if here.get(key) != there.get(key)]


def _shown(value: Any) -> str:
    return "absent" if value is None else str(value)
