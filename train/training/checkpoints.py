"""Checkpoints of a run: written under a temporary name, renamed when complete; a run resumes exactly from one.

checkpoint_NNNNNN/
  pretrained_model/   the policy, see policy/pretrained.py
  training_state/     state.safetensors (optimizer, figures since the last log line), resume.json (settings, validation
                      error, every file's size and SHA-256)
best.json             names the checkpoint with the smallest validation error, which is kept besides the newest
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from act_model import ACT
from config import to_dict
from dataset.normalize import Normalizer
from faults import Fault
from files import digest, fsync, sha256, write_json
from policy import pretrained
from training.run import Run
from training.run_folder import (
    RESUME,
    best_checkpoint,
    checkpoint_name,
    complete_checkpoints,
    damaged,
    files_of,
    incomplete_checkpoints,
    newest_checkpoint,
    read_resume,
)

BEST = "best.json"
# settings that a resumed run may change
MAY_CHANGE = ("data.bag_dir", "data.cache_dir", "data.on_bad_bag", "model.n_action_steps")


class Figures(NamedTuple):
    """The figures of one step, each a scalar tensor; in a checkpoint's window (4,)."""

    loss: Tensor
    l1: Tensor
    kl: Tensor
    grad_norm: Tensor


class TrainingState(NamedTuple):
    """Everything a run needs to resume exactly."""

    step: int
    model: ACT
    optimizer: torch.optim.Optimizer
    window: list[Tensor]  # (4,) Figures of each step since the last log line
    held_out: dict[str, float]  # the last validation error in words, and its step


def save(state: TrainingState, normalizer: Normalizer, run: Run, validation_l1: float | None) -> None:
    """Write checkpoint_NNNNNN into the run's folder, then remove the oldest, but never the best.

    Raises Fault if the disk is full.
    """
    folder = run.config.output_dir
    final = folder / checkpoint_name(state.step)
    writing = final.with_name(f".{final.name}.tmp")
    try:
        shutil.rmtree(writing, ignore_errors=True)
        (writing / "pretrained_model").mkdir(parents=True)
        (writing / "training_state").mkdir()
        robot = run.robot(state.step, state.held_out)
        pretrained.save(writing / "pretrained_model", state.model, normalizer, run.config, robot)
        tensors = {
            f"optimizer.{name}.{key}": value.contiguous()
            for name, p in _optimized(state)
            for key, value in state.optimizer.state[p].items()
        }
        tensors |= {f"window.{i}": figures for i, figures in enumerate(state.window)}
        save_file(tensors, writing / "training_state/state.safetensors")
        files = {str(path.relative_to(writing)): [path.stat().st_size, sha256(path)] for path in files_of(writing)}
        settings = settings_to_keep(run)
        about: dict[str, Any] = {
            "step": state.step,
            "validation_l1": validation_l1,
            "precision": f"{run.precision} on {run.device.type}",
        }
        about |= {"steps": run.config.training.steps, "settings": settings, "files": files}
        write_json(writing / RESUME, about | {"sha256": digest(about)})
        for path in [*writing.rglob("*"), writing]:
            fsync(path)
        if final.exists():  # incomplete, else it would have been resumed
            shutil.rmtree(final)
        writing.rename(final)
        fsync(final.parent)
        tidy(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        newest = newest_checkpoint(folder)
        again = f"run the same command to resume from {newest.name}" if newest else "run the same command again"
        raise Fault(f"{final}: cannot write ({error}); free some space or set output_dir, then {again}") from None


def tidy(run: Run) -> None:
    """Name the best checkpoint, and remove what is no longer kept or was half-written; nothing else may write there."""
    folder, keep = run.config.output_dir, run.config.training.keep_checkpoints
    for killed in (*folder.glob(".checkpoint_*.tmp"), *folder.glob(".*.json.tmp"), *folder.glob(".*.yaml.tmp")):
        shutil.rmtree(killed) if killed.is_dir() else killed.unlink()
    best = best_checkpoint(folder)
    if best:
        unit = "standard deviations of the training actions"
        content = {"checkpoint": best[0].name, "validation_l1": best[1], "unit": unit}
        write_json(folder / BEST, content)
    for old in complete_checkpoints(folder)[:-keep]:
        if not best or old != best[0]:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.tmp")), ignore_errors=True)


def newest_sound_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is what was written; each newer one is named."""
    for path, lack in incomplete_checkpoints(run).items():
        print(f"{path}: skipping incomplete checkpoint: {lack}")
    for path in reversed(complete_checkpoints(run)):
        if not (faults := damaged(path)):
            return path
        print(f"{path}: skipping damaged checkpoint: {faults}")
    return None


def check_room(run: Run, step: int) -> None:
    """Raises Fault if the disk has no room for the checkpoints that will be kept after a step."""
    folder, settings = run.config.output_dir, run.config.training
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise Fault(f"output_dir: cannot write to {there}; expected a folder of yours; set another")
    each = 12 * run.parameters  # weight and two moments, float32
    to_write = math.ceil(settings.steps / settings.save_every) - step // settings.save_every
    kept = settings.keep_checkpoints + 2 - len(complete_checkpoints(folder))  # the best, and the one being written
    count = min(to_write, max(kept, 1))
    free = shutil.disk_usage(there).free
    if count * each > free:
        raise Fault(
            f"{folder}: needs {count * each / 1e6:.0f} MB for {count} checkpoints, {free / 1e6:.0f} MB are free; free some "
            "space, set output_dir or a smaller training.keep_checkpoints"
        )


def restore(checkpoint: Path, state: TrainingState, run: Run) -> TrainingState:
    """The state of a checkpoint; its tensors are loaded into the model and the optimizer of `state`.

    Raises Fault if the run had other data, another network, batch size or seed.
    """
    try:
        resume = read_resume(checkpoint)
        tensors = load_file(checkpoint / "training_state/state.safetensors")
        weights = load_file(checkpoint / "pretrained_model" / pretrained.WEIGHTS)
        held_out = json.loads((checkpoint / "pretrained_model" / pretrained.ROBOT).read_text()).get("held_out", {})
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise Fault(
            f"{checkpoint}: damaged ({error}); remove it and run the same command to resume from the one before"
        ) from None
    now, then = settings_to_keep(run), {k: v for k, v in resume["settings"].items() if k not in MAY_CHANGE}
    then.setdefault("data.crop", {})  # of runs from before it
    differ = [
        f"{key}: {now.get(key, 'absent')} now, {then.get(key, 'absent')} in {checkpoint.name}"
        for key in {**now, **then}
        if now.get(key) != then.get(key)
    ]
    if differ:
        advice = "restore the settings, or set another output_dir to start a new run"
        raise Fault(*differ, f"{checkpoint.parent}: cannot resume with other settings; {advice}")
    training, steps = run.config.training, resume.get("steps")
    if training.schedule == "cosine" and steps not in (None, training.steps):
        print(f"note: training.steps: {training.steps} now, {steps} before: the cosine schedule's rates jump")
    state.model.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    _set_moments(state, lambda name, key, p: tensors[f"optimizer.{name}.{key}"])
    device = next(state.model.parameters()).device
    window = [tensors[f"window.{i}"].to(device) for i in range(sum(key.startswith("window.") for key in tensors))]
    return TrainingState(resume["step"], state.model, state.optimizer, window, held_out)


def receive(state: TrainingState, run: Run) -> TrainingState:
    """The first process's step, optimizer and window, in all processes: other machines may lack the checkpoint."""
    from_first = run.processes.from_first
    step, entries = from_first(torch.tensor([state.step, len(state.window)])).tolist()
    if step == 0:
        return state
    if not run.processes.first:
        _set_moments(state, lambda name, key, p: torch.zeros(()) if key == "step" else torch.zeros_like(p))
        window = [torch.zeros(len(Figures._fields), device=run.device) for _ in range(entries)]
        state = state._replace(step=step, window=window)
    for _, p in _optimized(state):
        for value in state.optimizer.state[p].values():
            from_first(value)
    for figures in state.window:
        from_first(figures)
    return state


def _set_moments(state: TrainingState, moment: Callable[[str, str, nn.Parameter], Tensor]) -> None:
    """Give the optimizer its moments, in their parameters' memory layout, as the fused kernel requires."""
    tree = state.optimizer.state_dict()
    tree["state"] = {
        i: {
            "step": moment(name, "step", p),
            **{key: torch.empty_like(p).copy_(moment(name, key, p)) for key in ("exp_avg", "exp_avg_sq")},
        }
        for i, (name, p) in enumerate(_optimized(state))
    }
    state.optimizer.load_state_dict(tree)


def _optimized(state: TrainingState) -> list[tuple[str, nn.Parameter]]:
    """The parameters and their names, in the optimizer's order."""
    names = {p: name for name, p in state.model.named_parameters()}
    return [(names[p], p) for group in state.optimizer.param_groups for p in group["params"]]


def settings_to_keep(run: Run) -> dict[str, Any]:
    """Everything that a resumed run must not change: flat, by dotted key."""
    tree = to_dict(run.config)
    rooms = {f"{room}.{key}": value for room in ("data", "model") for key, value in tree[room].items()}
    settings = {key: value for key, value in rooms.items() if key not in MAY_CHANGE}
    settings["training.batch_size times the processes"] = run.config.training.batch_size * run.processes.world
    settings["training.seed"] = run.config.training.seed
    files = {f"recording {name}": sorted(hashes.values()) for name, hashes in run.dataset.recordings.items()}
    return json.loads(json.dumps(settings | files))
