"""The errors of a policy on recordings, beside those of simple baselines and of the same policy without its cameras."""

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
from policy.pretrained import Pretrained

SAMPLES = 512  # spread evenly over the ticks
BATCH = 32
LOOKS = 0.15  # least share of the error that vision explains: blind policies had 0.06 to 0.08, seeing ones 0.40 to 0.45
METHODS = {
    "policy": "policy",
    "holding_still": "holding still",
    "last_action": "last action",
    "mean_action": "mean action",
    "camera_blanked": "camera blanked",
    "camera_of_another": "camera of another",
}  # in words
LATENCIES, LATENCY_S = 100, 10.0  # at most so many measurements, and so long


class Judgement(NamedTuple):
    """What a policy does at N ticks of recordings, T ticks ahead, with A actions."""

    policy: Pretrained
    config: Config
    split: Split  # judged by
    ticks: np.ndarray  # (N,) of the split
    errors: dict[str, np.ndarray]  # method: (N, T, A) absolute, in the robot's units; NaN past an episode's end
    at_starts: dict[str, np.ndarray]  # the same at the first tick of each episode, where only cameras tell the scene
    latency_ms: np.ndarray  # (K,) from one observation to its chunk


def measure(policy: Pretrained, config: Config, split: Split, controls: bool = True) -> Judgement:
    """Judge a policy by a split; without controls neither its cameras nor its latency. Raises Fault if the split is empty."""
    if not split.names:
        raise Fault(
            "no recording was held out; judge by other recordings (--bags DIR), or raise data.validation_fraction"
        )
    ticks = np.unique(np.linspace(0, len(split.state) - 1, SAMPLES).round().astype(int))
    starts = np.unique(split.end - np.repeat(split.lengths, split.lengths))[:SAMPLES]
    errors, at_starts = (_errors(policy, config, split, each, controls) for each in (ticks, starts))
    latency = _latency_ms(policy, split) if controls else np.zeros(0)
    return Judgement(policy, config, split, ticks, errors, at_starts, latency)


def seconds_to_measure(policy: Pretrained, split: Split) -> float:
    """About how long `measure` will take, by one batch."""
    batch = split.gather(np.zeros(BATCH, int))
    began = time.perf_counter()
    policy.predict(batch.state, batch.images)
    each = time.perf_counter() - began
    batches = (min(SAMPLES, len(split.state)) + min(SAMPLES, len(split.lengths))) / BATCH
    return each * batches * (3 if split.frames else 1) + min(LATENCY_S, each * LATENCIES / BATCH)


def _errors(
    policy: Pretrained, config: Config, split: Split, ticks: np.ndarray, controls: bool
) -> dict[str, np.ndarray]:
    """By method, the absolute errors (N, T, A) at ticks (N,)."""
    elsewhere = _in_another_recording(split, ticks)
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(ticks), BATCH):
        chosen = ticks[start : start + BATCH]
        batch = split.gather(chosen)
        still, last = _baselines(split, chosen, batch, config)
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
        for method, chunk in chunks.items():
            error = (chunk - batch.action).abs().masked_fill(batch.action_is_pad[..., None], torch.nan)
            parts.setdefault(method, []).append(error)
    return {method: torch.cat(each).numpy() for method, each in parts.items()}


def _baselines(split: Split, ticks: np.ndarray, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """The actions (B, A) that hold the arm still, and the actions of the tick before."""
    still = batch.state if config.data.action.from_ == "next_state" else batch.action[:, 0]
    if config.data.action.as_ == "delta":
        still = torch.zeros_like(batch.action[:, 0])
    is_first = np.isin(ticks, split.end - np.repeat(split.lengths, split.lengths))  # of its episode
    before = torch.from_numpy(split.action[np.maximum(ticks - 1, 0)])
    return still, torch.where(torch.from_numpy(is_first)[:, None], still, before)


def _in_another_recording(split: Split, ticks: np.ndarray) -> np.ndarray | None:
    """For each tick (N,) one of another recording, as far from its episode's start: a similar pose, another scene."""
    recordings = len(split.names)
    if recordings < 2:
        return None
    lengths = np.array(split.lengths)
    starts = np.cumsum(lengths) - lengths
    episode = np.searchsorted(starts, ticks, side="right") - 1
    first = np.searchsorted(split.recording[starts], np.arange(recordings + 1))  # of each recording's episodes
    own = split.recording[ticks]
    theirs = (own + recordings // 2) % recordings
    other = first[theirs] + (episode - first[own]) % np.diff(first)[theirs]
    return starts[other] + np.minimum(ticks - starts[episode], lengths[other] - 1)


def _latency_ms(policy: Pretrained, split: Split) -> np.ndarray:
    """Times (K,) from one observation at the training size to its chunk, on the host."""
    batch = split.gather(np.zeros(1, int))
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < LATENCIES + 3 and (len(times) < 8 or time.perf_counter() - began < LATENCY_S):
        start = time.perf_counter()
        policy.predict(batch.state, batch.images)
        times.append((time.perf_counter() - start) * 1e3)
    return np.array(times[3:])  # the first three warm up


def _mean(errors: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """The mean without NaN; NaN where everything is."""
    count = (~np.isnan(errors)).sum(axis)
    return np.nansum(errors, axis) / np.where(count, count, np.nan)


def summary(checkpoint: str, judgement: Judgement) -> dict[str, Any]:
    """The content of evaluation.json, in the robot's units; null where no episode reaches so far ahead."""
    policy, config, latency = judgement.policy, judgement.config, judgement.latency_ms
    errors = {}
    for method, each in judgement.errors.items():
        by_action = _mean(each, (0, 1))
        errors[method] = {
            "all": by_action.mean().item(),
            "by_action": by_action.tolist(),
            "by_step_ahead": _or_null(_mean(each, (0, 2))),
            "by_step_ahead_and_action": [_or_null(row) for row in _mean(each, 0)],
        }
    ours, std = errors["policy"]["all"], policy.normalizer.action.std.cpu().numpy()
    figures = {
        "checkpoint": checkpoint,
        "recordings": judgement.split.names,
        "moments": len(judgement.ticks),
        "ticks_ahead": config.model.chunk_size,
        "fps": config.data.fps,
        "unit": UNIT,
        "actions": list(policy.robot.action_names) if policy.robot else [],
        "mean_absolute_error": errors,
        "in_standard_deviations": float((errors["policy"]["by_action"] / std).mean()),
        "share_of_holding_still": ours / max(errors["holding_still"]["all"], 1e-12),
        "share_of_error_explained_by_vision": _explained_by_vision(judgement.errors),
        "at_the_first_tick_of_episodes": {
            "mean_absolute_error": {m: _mean(each, (0, 1)).mean().item() for m, each in judgement.at_starts.items()},
            "share_of_error_explained_by_vision": _explained_by_vision(judgement.at_starts),
        },
    }
    if len(latency):
        figures["latency_ms"] = {
            "median": float(np.median(latency)),
            "percentile_95": float(np.percentile(latency, 95)),
            "times": len(latency),
            "device": str(policy.normalizer.state.mean.device),
            "threads": torch.get_num_threads(),
        }
    return figures


def _explained_by_vision(errors: dict[str, np.ndarray]) -> dict[str, float]:
    means = {method: _mean(each, (0, 1)).mean().item() for method, each in errors.items()}
    return {m: 1 - means["policy"] / max(mean, 1e-12) for m, mean in means.items() if "camera" in m}


def warning(figures: dict[str, Any]) -> str:
    """That a policy does not look, in words; empty if it does, or if there was no other recording's picture to try."""
    share = figures["share_of_error_explained_by_vision"].get("camera_of_another", 1.0)
    if share >= LOOKS:
        return ""
    return (
        f"the policy hardly looks: with another recording's picture its error is the same to {max(share, 0):.0%}; expected "
        f"{LOOKS:.0%} or more; try data.crop, model.pretrained_backbone, more training.steps, or recordings whose first "
        "motion does not tell the goal"
    )


def _or_null(row: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in row]
