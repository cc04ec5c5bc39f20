"""The errors of a policy on recordings, beside those of doing nothing clever and of the same policy without its eyes."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config
from dataset.batches import Batch, Split
from faults import Fault
from page import UNIT
from policy.runner import Policy

SAMPLES = 1024  # spread evenly over the ticks
BATCH = 32
METHODS = {
    "policy": "policy",
    "holding_still": "holding still",
    "last_action": "copying last action",
    "mean_action": "mean action repeated",
    "camera_blanked": "camera blanked",
    "camera_of_another": "camera of another",
}  # in words
LATENCIES, LATENCY_S = 100, 10.0  # as many times, or as long


class Judgement(NamedTuple):
    """What a policy does at N ticks of recordings, T ticks ahead, with A actions."""

    policy: Policy
    config: Config
    split: Split  # that it was judged by
    ticks: np.ndarray  # (N,) of the split
    errors: dict[str, np.ndarray]  # by METHODS: (N, T, A) absolute, in the robot's units, NaN beyond an episode's end
    latency_ms: np.ndarray  # (K,) from one observation to its chunk


def measure(policy: Policy, config: Config, split: Split, controls: bool = True) -> Judgement:
    """Judge a policy by all of a split; without controls neither its cameras nor its latency. Raises Fault where it is empty."""
    if not split.names:
        raise Fault(
            "data.validation_fraction: no recording was held out, so there is nothing to judge by; give others by "
            "--bags DIR, or record more and train anew"
        )
    ticks = np.unique(np.linspace(0, len(split.state) - 1, SAMPLES).round().astype(int))
    elsewhere = _in_another_episode(split, ticks)
    found: dict[str, list[Tensor]] = {name: [] for name in METHODS}
    for start in range(0, len(ticks), BATCH):
        here = ticks[start : start + BATCH]
        batch = split.gather(here)
        still, last = _baselines(split, here, batch, config)
        chunks = {
            "policy": policy.predict(batch.state, batch.images),
            "holding_still": still[:, None],
            "last_action": last[:, None],
            "mean_action": policy.normalizer.action.mean.cpu(),
        }
        if batch.images is not None and controls:
            chunks["camera_blanked"] = policy.predict(batch.state, torch.full_like(batch.images, 128))
            if elsewhere is not None:
                other = split.gather(elsewhere[start : start + BATCH])
                chunks["camera_of_another"] = policy.predict(batch.state, other.images)
        for name, chunk in chunks.items():
            error = (chunk - batch.action).abs().masked_fill(batch.action_is_pad[..., None], torch.nan)
            found[name].append(error)
    errors = {name: torch.cat(parts).numpy() for name, parts in found.items() if parts}
    return Judgement(
        policy, config, split, ticks, errors, _latency_ms(policy, config, split) if controls else np.zeros(0)
    )


def _baselines(split: Split, ticks: np.ndarray, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """The actions (B, A) that keep the arm where it is, or the command that is in force; and those of the tick before."""
    still = batch.state if config.data.action.from_ == "next_state" else batch.action[:, 0]
    if config.data.action.as_ == "delta":
        still = torch.zeros_like(batch.action[:, 0])
    begins = np.isin(ticks, split.end - np.repeat(split.lengths, split.lengths))  # no action was before
    before = torch.from_numpy(split.action[np.maximum(ticks - 1, 0)])
    return still, torch.where(torch.from_numpy(begins)[:, None], still, before)


def _in_another_episode(split: Split, ticks: np.ndarray) -> np.ndarray | None:
    """The ticks (N,) as far into an episode half of them away: the arm alike, the scene another. None if there is one."""
    lengths = np.array(split.lengths)
    if len(lengths) < 2:
        return None
    starts = np.cumsum(lengths) - lengths
    episode = np.searchsorted(starts, ticks, side="right") - 1
    other = (episode + len(lengths) // 2) % len(lengths)
    return starts[other] + np.minimum(ticks - starts[episode], lengths[other] - 1)


def _latency_ms(policy: Policy, config: Config, split: Split) -> np.ndarray:
    """Times (K,) from one observation at the training size to its chunk, on the host."""
    one = split.gather(np.zeros(1, int))
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < LATENCIES + 3 and (len(times) < 8 or time.perf_counter() - began < LATENCY_S):
        start = time.perf_counter()
        policy.predict(one.state, one.images)
        times.append((time.perf_counter() - start) * 1e3)
    return np.array(times[3:])  # the first ones warm up


def mean_error(errors: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """The mean of what is not NaN; NaN where there is nothing else, as further ahead than any episode is long."""
    count = (~np.isnan(errors)).sum(axis)
    return np.nansum(errors, axis) / np.where(count, count, np.nan)


def summary(checkpoint: str, judgement: Judgement) -> dict[str, Any]:
    """The content of evaluation.json: all figures, in the robot's units; null where there is no step so far ahead."""
    policy, config = judgement.policy, judgement.config
    errors = {}
    for method, one in judgement.errors.items():
        by_action = mean_error(one, (0, 1))
        errors[method] = {
            "all": by_action.mean().item(),
            "by_action": by_action.tolist(),
            "by_step_ahead": _or_null(mean_error(one, (0, 2))),
            "by_step_ahead_and_action": [_or_null(row) for row in mean_error(one, 0)],
        }
    ours = errors["policy"]["all"]
    std = policy.normalizer.action.std.cpu().numpy()
    found = {
        "checkpoint": checkpoint,
        "recordings": judgement.split.names,
        "moments": len(judgement.ticks),
        "ticks_ahead": config.model.chunk_size,
        "fps": config.data.fps,
        "unit": UNIT,
        "actions": list(policy.robot["action"]["names"]),
        "mean_absolute_error": errors,
        "in_standard_deviations": float((errors["policy"]["by_action"] / std).mean()),
        "share_of_holding_still": ours / max(errors["holding_still"]["all"], 1e-12),
        "share_of_error_explained_by_vision": {
            method: 1 - ours / max(one["all"], 1e-12) for method, one in errors.items() if method.startswith("camera")
        },
    }
    if len(judgement.latency_ms):
        found["latency_ms"] = {
            "median": float(np.median(judgement.latency_ms)),
            "percentile_95": float(np.percentile(judgement.latency_ms, 95)),
            "times": len(judgement.latency_ms),
            "device": str(policy.normalizer.state.mean.device),
            "threads": torch.get_num_threads(),
        }
    return found


def _or_null(row: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in row]
