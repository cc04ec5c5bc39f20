"""Judge a checkpoint: evaluation.json, and report.html, one page that shows what the policy does.

The page needs matplotlib (`pip install matplotlib`); everything else works without it.
"""

from __future__ import annotations

import functools
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from config import Config
from dataset.batches import Dataset
from evaluation.errors import METHODS, Judgement, measure, seconds_to_measure, summary, warning
from faults import Fault, Stopped
from files import LOCK, locked, write_json, write_whole
from page import BLACK, BLUE, GREEN, GREY, ORANGE, PALE_BLUE, PINK, UNIT, cards, chart, document, section, table
from policy import pretrained
from training.run_folder import best_checkpoint

LINES = {
    "policy": (BLUE, "-"),
    "holding_still": (BLACK, "-"),
    "last_action": (GREEN, ":"),
    "mean_action": (GREY, "--"),
    "camera_blanked": (ORANGE, "-"),
    "camera_of_another": (PINK, "--"),
}
CHUNKS = 12  # of an episode to draw, at most


def judge(checkpoint: Path, folder: Path, config: Config, dataset: Dataset, device: str) -> tuple[dict[str, Any], str]:
    """Judge a checkpoint by dataset.validation and write the result into a folder; the figures, and where the page is."""
    with locked(folder / LOCK):  # the training and a person may judge the same one
        judgement = measure(pretrained.load(checkpoint, device), config, dataset.validation)
        figures = summary(checkpoint.name, judgement)
        write_json(folder / "evaluation.json", figures, indent=1)
        if not find_spec("matplotlib"):
            return figures, f"figures: {folder}/evaluation.json; for the page, pip install matplotlib"
        write_whole(folder / "report.html", page(checkpoint, judgement, figures))
    return figures, f"page: {folder}/report.html"


def judge_at_the_end(last: Path, config: Config, dataset: Dataset, device: str) -> None:
    """Judge a run's last checkpoint, and its best if that is another. A failure here is printed; the training stands."""
    best = best_checkpoint(last.parent)
    for checkpoint in dict.fromkeys([last, best[0] if best else last]):
        again = f"judge it by: python {Path(__file__).parents[1] / 'evaluate.py'} {checkpoint}"
        try:
            if dataset.validation.names:
                seconds = seconds_to_measure(pretrained.load(checkpoint, device), dataset.validation)
                print(f"judging {checkpoint.name}: about {seconds:.0f} s, left out by --no-evaluation", flush=True)
            figures, where = judge(checkpoint, last.parent / "evaluation" / checkpoint.name, config, dataset, device)
        except (KeyboardInterrupt, SystemExit):
            raise Stopped(f"the policy is trained; stopped while judging {checkpoint.name}; {again}") from None
        except Exception as error:
            kind = "" if isinstance(error, Fault) else f" ({type(error).__name__})"
            print(f"not judged: {checkpoint.name}: {' '.join(str(error).split())[:300]}{kind}; {again}")
            continue
        error_, share = figures["mean_absolute_error"]["policy"]["all"], figures["share_of_holding_still"]
        word = "best" if best and checkpoint == best[0] else "last"
        if doubt := warning(figures):
            print(f"warning: {doubt}")
        print(f"{word}: {checkpoint.name}, mean absolute error {error_:.4f}, {UNIT}, {share:.0%} of holding still")
        print(where, flush=True)


def page(checkpoint: Path, judgement: Judgement, figures: dict[str, Any]) -> str:
    """The page of a checkpoint; `figures` is the content of evaluation.json."""
    split, action = judgement.split, judgement.config.data.action
    intro = (
        f"Judged by {len(split.names)} recordings that it was not trained on: {figures['moments']} moments, "
        f"{figures['ticks_ahead']} ticks ahead at {figures['fps']:g} Hz. Actions and errors are in the units of the "
        "recordings: rad for joints."
    )
    text = (
        f"Mean absolute error, {UNIT}. A policy that has learned something beats three baselines: holding still, repeating "
        "the last action, and the mean action of the training recordings."
    )
    if split.frames:
        text += " A policy that uses its cameras is worse with a grey picture, or with that of another recording."
    if action.from_ == "next_state" and action.as_ == "absolute":
        text += " Where an action is the next state, as here, repeating the last action is holding still."
    errors = figures["mean_absolute_error"]
    rows = [
        (escape(n), [f"{e['by_action'][a]:.4f}" for e in errors.values()]) for a, n in enumerate(figures["actions"])
    ]
    rows.append(("all", [f"{each['all']:.4f}" for each in errors.values()]))
    titles = {"A typical episode": _typical(judgement, 0.5), "The worst episode": _typical(judgement, 1.0)}
    return document(
        f"{checkpoint.parent.name}, {checkpoint.name}",
        [
            *(f'<p class="bad">{escape(doubt)}</p>' for doubt in [warning(figures)] if doubt),
            f"<p>{escape(intro)}</p>",
            cards(_key_figures(figures)),
            section("Errors", text, _errors_ahead(figures), table({m: METHODS[m] for m in errors}, rows)),
            *(_episode(judgement, title, start) for title, start in titles.items()),
        ],
    )


def _key_figures(figures: dict[str, Any]) -> dict[str, str]:
    latency = figures["latency_ms"]
    shown = {
        f"mean absolute error, {UNIT}": f"{figures['mean_absolute_error']['policy']['all']:.4f}",
        "of the error of holding still": f"{figures['share_of_holding_still']:.0%}",
    }
    for method, share in figures["share_of_error_explained_by_vision"].items():
        shown[f"of the error with the {METHODS[method]} is explained by vision"] = f"{share:.0%}"
    at_starts = figures["at_the_first_tick_of_episodes"]["share_of_error_explained_by_vision"]
    if "camera_of_another" in at_starts:
        shown["of the same at the first tick of episodes"] = f"{at_starts['camera_of_another']:.0%}"
    shown[f"from an observation to its chunk, median ({latency['device']})"] = f"{latency['median']:.1f} ms"
    return shown


def _errors_ahead(figures: dict[str, Any]) -> list[str]:
    """The error against the time ahead: of all methods, and of the policy by action."""
    errors = figures["mean_absolute_error"]
    seconds = (np.arange(figures["ticks_ahead"]) + 1) / figures["fps"]
    label = f"mean absolute error,\n{UNIT}"

    def methods(axis: Any) -> None:
        for method, each in errors.items():
            color, line = LINES[method]
            axis.plot(seconds, np.array(each["by_step_ahead"], float), line, color=color, label=METHODS[method])
        axis.set(xlabel="time ahead, s", ylabel=label, ylim=(0, None))

    def actions(axis: Any) -> None:
        by_action = np.array(errors["policy"]["by_step_ahead_and_action"], float)  # (T, A)
        for name, column in zip(figures["actions"], by_action.T, strict=True):
            axis.plot(seconds, column, label=name if len(name) <= 26 else "…" + name[-25:])
        axis.set(xlabel="time ahead, s", ylabel=label, ylim=(0, None))

    return [
        chart(methods, f"Error against the time ahead (s), mean of all actions, {UNIT}."),
        chart(actions, f"Error of the policy against the time ahead (s), by action, {UNIT}."),
    ]


def _typical(judgement: Judgement, quantile: float) -> int:
    """The first tick of the episode at a quantile of the mean error, in standard deviations."""
    std = judgement.policy.normalizer.action.std.cpu().numpy()
    scores = np.nanmean(judgement.errors["policy"] / std, (1, 2))  # (N,)
    ends = judgement.split.end[judgement.ticks]
    ranked = sorted(np.unique(ends), key=lambda end: float(scores[ends == end].mean()))
    return int(np.searchsorted(judgement.split.end, ranked[int(quantile * (len(ranked) - 1))]))


def _episode(judgement: Judgement, title: str, start: int) -> str:
    """Recorded and predicted actions over the time of the episode that starts at a tick."""
    split, config = judgement.split, judgement.config
    fps, ahead, length = config.data.fps, config.model.chunk_size, int(split.end[start]) - start
    every = max(config.model.n_action_steps, length // CHUNKS)
    ticks = np.arange(0, length, every)  # of the episode
    batch = split.gather(start + ticks)
    chunks = judgement.policy.predict(batch.state, batch.images).numpy()
    recorded = split.action[start : start + length]

    def draw(a: int, axis: Any) -> None:
        axis.plot(np.arange(length) / fps, recorded[:, a], color=GREY, linewidth=3, label="recorded")
        for b, tick in enumerate(ticks.tolist()):
            real = min(ahead, length - tick)
            times, values = np.arange(tick, tick + real) / fps, chunks[b, :real, a]
            axis.plot(times, values, color=PALE_BLUE, linewidth=0.9, label="" if b else "rest of a chunk")
            near = slice(0, every + 1)
            axis.plot(times[near], values[near], color=BLUE, linewidth=1.5, label="" if b else "predicted")
            axis.plot(times[:1], values[:1], "o", color=BLUE, markersize=4)
        axis.set(xlabel="time, s", ylabel=UNIT)

    names = judgement.policy.robot.action_names if judgement.policy.robot else []
    figures = [
        chart(functools.partial(draw, a), f"{name}: recorded and predicted action, {UNIT}, over time (s).")
        for a, name in enumerate(names)
    ]
    ends = np.unique(split.end[split.recording == split.recording[start]])
    which = f", episode {np.searchsorted(ends, split.end[start]) + 1} of {len(ends)}" if len(ends) > 1 else ""
    text = f"Each chunk of {ahead} ticks is predicted at its dot; it is dark up to the next dot, {every} ticks later."
    return section(f"{title}: {split.names[split.recording[start]]}{which}", text, figures)
