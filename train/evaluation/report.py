"""report.html: one page, without outside references, on which a person sees at a glance what a policy does.

Needs matplotlib (`pip install matplotlib`); everything else that evaluate.py says comes without it.
"""

from __future__ import annotations

import functools
import json
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dataset.batches import Batch, Split
from evaluation.attention import attention, enlarged, overlay
from evaluation.errors import METHODS, Judgement
from page import BLACK, BLUE, GREEN, GREY, ORANGE, PAGE, PALE_BLUE, PINK, UNIT, cards, chart, picture, section, table

RECORDED, PREDICTED, BEYOND = GREY, BLUE, PALE_BLUE
LINES = {
    "policy": (PREDICTED, "-"),
    "holding_still": (BLACK, "-"),
    "last_action": (GREEN, ":"),
    "mean_action": (GREY, "--"),
    "camera_blanked": (ORANGE, "-"),
    "camera_of_another": (PINK, "--"),
}
WORST, LOOKS, CHUNKS = 6, 6, 12  # moments and chunks to show, at most


def page(checkpoint: Path, judged: Judgement, found: dict[str, Any]) -> str:
    """The page of a checkpoint that was judged; `found` is the content of evaluation.json."""
    title = f"{checkpoint.parent.name}, {checkpoint.name}"
    explained = (
        "A policy that has learnt something is better than the three that do nothing clever: holding still, copying the last "
        "action, repeating the mean action of the training recordings."
    )
    if judged.split.frames:
        explained += " One that looks is worse with a grey picture, or with that of another episode."
    if judged.config.data.action.from_ == "next_state" and judged.config.data.action.as_ == "absolute":
        explained += " Where an action is the next state, as here, copying the last action is holding still."
    typical, worst = _typical_and_worst(judged)
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>Judged by {len(judged.split.names)} recordings that it was not trained on: {found['moments']} moments, "
        f"{found['ticks_ahead']} ticks ahead at {found['fps']:g} Hz. Actions and their errors are in the units of the recordings: "
        "rad for joints.</p>",
        _cards(found),
        section("Errors", f"Mean absolute error, {UNIT}. {explained}", _errors_ahead(found), _table(found)),
        _episode(judged, "A typical episode", typical),
        _episode(judged, "The worst episode", worst) if worst != typical else "",
        _curves(checkpoint),
        *_worst(judged),
        _looks(judged, typical) if judged.split.frames else "",
    ]
    return PAGE.substitute(title=escape(title), style="", body="\n".join(body))


def _cards(found: dict[str, Any]) -> str:
    errors, latency = found["mean_absolute_error"], found["latency_ms"]
    shown = {
        f"mean absolute error, {UNIT}": f"{errors['policy']['all']:.4f}",
        "of the error of holding still": f"{found['share_of_holding_still']:.0%}",
    }
    for method, share in found["share_of_error_explained_by_vision"].items():
        shown[f"of the error with the {METHODS[method]} is explained by vision"] = f"{share:.0%}"
    shown[
        f"from an observation to its chunk, median of {latency['times']}; 95 % within {latency['percentile_95']:.1f} ms "
        f"({latency['device']}, {latency['threads']} threads)"
    ] = f"{latency['median']:.1f} ms"
    return cards(shown)


def _table(found: dict[str, Any]) -> str:
    errors = found["mean_absolute_error"]
    rows = {name: [one["by_action"][a] for one in errors.values()] for a, name in enumerate(found["actions"])}
    rows["all"] = [one["all"] for one in errors.values()]
    return table(
        {method: METHODS[method] for method in errors},
        ((escape(name), [f"{value:.4f}" for value in values]) for name, values in rows.items()),
    )


def _errors_ahead(found: dict[str, Any]) -> list[str]:
    """The error against the time ahead: of all methods, and of the policy by action."""
    errors, names = found["mean_absolute_error"], found["actions"]
    seconds = (np.arange(found["ticks_ahead"]) + 1) / found["fps"]
    label = f"mean absolute error,\n{UNIT}"

    def methods(axis: Any) -> None:
        for method, one in errors.items():
            colour, line = LINES[method]
            axis.plot(seconds, np.array(one["by_step_ahead"], float), line, color=colour, label=METHODS[method])
        axis.set(xlabel="time ahead, s", ylabel=label, ylim=(0, None))

    def actions(axis: Any) -> None:
        by_action = np.array(errors["policy"]["by_step_ahead_and_action"], float)  # (T, A)
        for name, column in zip(names, by_action.T, strict=True):
            axis.plot(seconds, column, label=name if len(name) <= 26 else "…" + name[-25:])
        axis.set(xlabel="time ahead, s", ylabel=label, ylim=(0, None))

    return [
        chart(methods, f"Error against the time ahead (s), mean of all actions, {UNIT}."),
        chart(actions, f"Error of the policy against the time ahead (s), by action, {UNIT}."),
    ]


def _episode(judged: Judgement, title: str, start: int) -> str:
    """Actions recorded and predicted over the time of the episode that begins at a tick."""
    split, config = judged.split, judged.config
    fps, ahead, length = config.data.fps, config.model.chunk_size, int(split.end[start]) - start
    every = max(config.model.n_action_steps, length // CHUNKS)
    ticks = np.arange(0, length, every)  # of the episode
    batch = split.gather(start + ticks)
    chunks = judged.policy.predict(batch.state, batch.images).numpy()
    recorded = split.action[start : start + length]

    def draw(a: int, axis: Any) -> None:
        axis.plot(np.arange(length) / fps, recorded[:, a], color=RECORDED, linewidth=3, label="recorded")
        for b, tick in enumerate(ticks.tolist()):
            real = min(ahead, length - tick)
            times, values = np.arange(tick, tick + real) / fps, chunks[b, :real, a]
            axis.plot(times, values, color=BEYOND, linewidth=0.9, label="" if b else "the rest of a chunk")
            near = slice(0, every + 1)
            axis.plot(times[near], values[near], color=PREDICTED, linewidth=1.5, label="" if b else "predicted")
            axis.plot(times[:1], values[:1], "o", color=PREDICTED, markersize=4)
        axis.set(xlabel="time, s", ylabel=UNIT)

    figures = [
        chart(functools.partial(draw, a), f"{name}: recorded and predicted action, {UNIT}, over time (s).")
        for a, name in enumerate(judged.policy.robot["action"]["names"])
    ]
    text = (
        f"Each chunk of {ahead} ticks is predicted at its dot from what was observed there; it is dark until the next dot, "
        f"{every} ticks later."
    )
    return section(f"{title}: {_where(split, start)}", text, figures)


def _curves(checkpoint: Path) -> str:
    """Training curves out of metrics.jsonl."""
    log = checkpoint.parent / "metrics.jsonl"
    lines = []
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:  # cut short by a kill
            continue
    here = int(checkpoint.name.split("_")[1])

    def curve(labels: dict[str, str], unit: str, caption: str) -> list[str]:
        points = {key: [(line["step"], line[key]) for line in lines if line.get(key)] for key in labels}
        if not any(points.values()):
            return []

        def draw(axis: Any) -> None:
            for key, label in labels.items():
                marker = "o-" if len(points[key]) < 40 else "-"
                axis.plot(*zip(*points[key] or [(np.nan, np.nan)], strict=True), marker, markersize=3, label=label)
            axis.axvline(here, color=RECORDED, linestyle=":", label="this checkpoint")
            axis.set(xlabel="step", ylabel=unit, yscale="log")

        return [chart(draw, caption)]

    said = (
        "L1 error of the training batches, and of the recordings held out, standard deviations of the actions, by step."
    )
    figures = [
        *curve({"l1": "training", "validation_l1": "held out"}, "standard deviations", said),
        *curve({"kl": "KL"}, "nats", "KL divergence of the style latent from its prior, nats, by step."),
        *curve({"lr": "rate"}, "learning rate, a step", "Learning rate of the transformers, change a step, by step."),
    ]
    return section("Training", "" if figures else f"{log.name} is not there, or holds no line.", figures)


def _worst(judged: Judgement) -> list[str]:
    """The moments with the largest errors, far from each other, with what the cameras saw there."""
    split, config, ticks, fps = judged.split, judged.config, judged.ticks, judged.config.data.fps
    ahead, scores, std = config.model.chunk_size, _scores(judged), judged.policy.normalizer.action.std.cpu().numpy()
    chosen: list[int] = []
    for n in np.argsort(-scores).tolist():
        near = (split.end[ticks[n]] == split.end[ticks[m]] and abs(ticks[n] - ticks[m]) < ahead for m in chosen)
        if len(chosen) < WORST and not any(near):
            chosen.append(n)
    batch = split.gather(ticks[chosen])
    chunks = judged.policy.predict(batch.state, batch.images).numpy()
    seen = _seen(judged, batch, plain=True)
    sections = []
    for b, n in enumerate(chosen):
        real = int((~batch.action_is_pad[b]).sum())
        a = int((judged.errors["policy"][n, :real].mean(0) / std).argmax())

        def draw(axis: Any, b: int = b, a: int = a, real: int = real) -> None:
            times, marker = np.arange(real) / fps, "o-" if real < 3 else "-"
            axis.plot(times, batch.action[b, :real, a], marker, color=RECORDED, linewidth=3, label="recorded")
            axis.plot(times, chunks[b, :real, a], marker, color=PREDICTED, label="predicted")
            axis.set(xlabel="time ahead, s", ylabel=UNIT)

        name = judged.policy.robot["action"]["names"][a]
        figure = chart(draw, f"{name}: recorded and predicted action, {UNIT}, over the time ahead (s).")
        text = (
            f"{_where(split, ticks[n])}, {_seconds(judged, ticks[n]):.2f} s after its begin: the mean error of this chunk is "
            f"{scores[n]:.2f} standard deviations of the training actions, {scores[n] / scores.mean():.1f} times that of all moments; "
            f"furthest off is {name}."
        )
        sections.append(section(f"Worst moment {b + 1} of {len(chosen)}", text, [*seen[b], figure]))
    return sections


def _looks(judged: Judgement, start: int) -> str:
    """Where the policy looked in the course of the episode that begins at a tick."""
    split, config = judged.split, judged.config
    ticks = np.unique(np.linspace(start, split.end[start] - 1, LOOKS).round().astype(int))
    batch = split.gather(ticks)
    figures = [figure for figures in _seen(judged, batch, plain=False, ticks=ticks) for figure in figures]
    text = (
        f"{_where(split, start)}. The decoder's attention to the cells of the picture, one for 32 x 32 px, the mean of its heads and of the "
        f"{config.model.n_action_steps} ticks that are executed; blurred: blue is little, red the most. What lacks to 100 % is on the state "
        "and the latent. A cell knows of the picture far around it, so this tells less than the errors without the camera."
    )
    return section("Where it looks", text, figures)


def _seen(judged: Judgement, batch: Batch, plain: bool, ticks: np.ndarray | None = None) -> list[list[str]]:
    """For each moment, figures of where the policy looked in the picture of each camera; before it the plain picture."""
    figures: list[list[str]] = [[] for _ in batch.state]
    if batch.images is None:
        return figures
    shares = attention(judged.policy, batch, judged.config.model.n_action_steps).numpy()  # (B, C, h, w)
    for b, of_moment in enumerate(figures):
        when = "" if ticks is None else f"{_seconds(judged, ticks[b]):.2f} s: "
        for c, camera in enumerate(judged.split.frames):
            pixels = batch.images[b, c].numpy()
            if plain:
                said = f"What camera {camera} showed the policy, {pixels.shape[1]} x {pixels.shape[0]} px."
                of_moment.append(picture(enlarged(pixels), said))
            said = f"{when}{shares[b, c].sum():.0%} of the attention is on camera {camera}, {shares[b, c].max():.0%} on the reddest cell."
            of_moment.append(picture(overlay(pixels, shares[b, c]), said))
    return figures


def _scores(judged: Judgement) -> np.ndarray:
    """The mean error of each moment's chunk (N,), in standard deviations of the training actions."""
    return np.nanmean(judged.errors["policy"] / judged.policy.normalizer.action.std.cpu().numpy(), (1, 2))


def _typical_and_worst(judged: Judgement) -> tuple[int, int]:
    """The first ticks of the episodes with the median and with the largest error, of those that were judged."""
    ends, scores = judged.split.end[judged.ticks], _scores(judged)
    ranked = sorted(set(ends.tolist()), key=lambda end: float(scores[ends == end].mean()))
    typical, worst = (
        int(np.searchsorted(judged.split.end, end)) for end in (ranked[(len(ranked) - 1) // 2], ranked[-1])
    )
    return typical, worst


def _seconds(judged: Judgement, tick: int) -> float:
    """The time since the tick's episode began."""
    return (tick - np.searchsorted(judged.split.end, judged.split.end[tick])) / judged.config.data.fps


def _where(split: Split, tick: int) -> str:
    """The tick's recording, and which of its episodes it is where it has several."""
    ends = np.unique(split.end[split.recording == split.recording[tick]])
    episode = f", episode {np.searchsorted(ends, split.end[tick]) + 1} of {len(ends)}" if len(ends) > 1 else ""
    return split.names[split.recording[tick]] + episode
