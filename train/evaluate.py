"""Judge a checkpoint by recordings that it was not trained on.

    python train/evaluate.py outputs/train-rosbag-act/checkpoint_010000              # by those held out from its training
    python train/evaluate.py outputs/train-rosbag-act/checkpoint_010000 --bags DIR   # by all recordings in DIR
    python train/evaluate.py outputs/train-rosbag-act --all                          # every checkpoint of a run, and the best
    python train/evaluate.py outputs/demo/run/checkpoint_000500 --simulate 200       # the demo arm in closed loop, too

Prints errors in the robot's units, of the policy, of simple baselines, and of the policy without its cameras: one that uses
them is then worse. Writes evaluation.json and report.html to the run's evaluation/ folder.
"""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import Config, load
from dataset.batches import Dataset
from dataset.cache import load_dataset
from evaluation.closed_loop import simulate
from evaluation.errors import METHODS, measure, summary, warning
from evaluation.report import judge
from faults import Fault, exit_with_message
from files import write_json
from page import UNIT
from policy import pretrained
from policy.pretrained import Pretrained
from recordings.bags import find_bags
from training.run_folder import best_checkpoint, complete_checkpoints, validation


def table(figures: dict[str, Any]) -> str:
    """The figures of evaluation.json for the terminal, at most 100 characters wide."""
    errors, ahead, fps = figures["mean_absolute_error"], figures["ticks_ahead"], figures["fps"]
    headings = [[*textwrap.wrap(METHODS[method], 12), "", ""] for method in errors]
    recordings, moments = len(figures["recordings"]), figures["moments"]
    doubt = warning(figures)
    lines = [
        *(textwrap.wrap(f"warning: {doubt}", 100) if doubt else ()),
        f"{recordings} recordings not trained on, {moments} moments, {ahead} ticks ahead at {fps:g} Hz",
        f"mean absolute error, {figures['unit']}",
        *(" " * 22 + "".join(f"{words[row]:>13}" for words in headings) for row in (0, 1)),
    ]

    def row(name: str, values: list[float], form: str = ".4f") -> None:
        short = name if len(name) <= 22 else "…" + name[-21:]
        lines.append(f"{short:22}" + "".join(f"{value:13{form}}" for value in values))

    for a, name in enumerate(figures["actions"]):
        row(name, [each["by_action"][a] for each in errors.values()])
    row("all", [each["all"] for each in errors.values()])
    still = max(errors["holding_still"]["all"], 1e-12)
    row("of holding still", [each["all"] / still for each in errors.values()], ".0%")
    for step in _steps_ahead(figures):
        row(f"all, {(step + 1) / fps:.2f} s ahead", [each["by_step_ahead"][step] for each in errors.values()])
    starts = figures["at_the_first_tick_of_episodes"]
    row("all, at first ticks", [*starts["mean_absolute_error"].values()])
    for where, shares in (("", figures), (" at first ticks", starts)):
        if by := shares["share_of_error_explained_by_vision"]:
            words = ", ".join(f"{share:.0%} ({METHODS[method]})" for method, share in by.items())
            lines.append(f"share of the error that vision explains{where}: {words}")
    latency = figures["latency_ms"]
    lines.append(
        f"latency {latency['median']:.1f} ms (median), {latency['percentile_95']:.1f} ms (95 %), {latency['device']}"
    )
    return "\n".join(lines)


def _steps_ahead(figures: dict[str, Any]) -> list[int]:
    """Five steps ahead to print, from the first to the last that an episode reaches."""
    reached = sum(value is not None for value in figures["mean_absolute_error"]["policy"]["by_step_ahead"])
    return sorted({round(step) for step in np.linspace(0, reached - 1, min(5, reached))})


def compare(run: Path, config: Config, dataset: Dataset, device: str) -> tuple[list[dict[str, Any]], str]:
    """Every complete checkpoint of a run by the same recordings: their figures, and a table that names the best.

    The best has the smallest error in standard deviations: radians of an arm and millimetres of a gripper weigh the same.
    """
    compared: list[dict[str, Any]] = []
    for checkpoint in complete_checkpoints(run):
        judgement = measure(pretrained.load(checkpoint, device), config, dataset.validation, controls=False)
        error = validation(checkpoint)
        figures = summary(checkpoint.name, judgement)
        compared.append(figures | {"validation_l1": error if np.isfinite(error) else None})
    best = min(compared, key=lambda figures: figures["in_standard_deviations"])
    lines = [
        f"{len(dataset.validation.names)} recordings not trained on, {best['moments']} moments; mean absolute error, {UNIT}",
        f"{'':20}{'error':>12}{'of holding':>12}{'first step':>12}{'last step':>12}{'in standard':>13}{'validated':>12}",
        f"{'':20}{'':>12}{'still':>12}{'':>12}{'ahead':>12}{'deviations':>13}{'in training':>12}",
    ]
    for figures in compared:
        errors = figures["mean_absolute_error"]["policy"]
        first, last = (errors["by_step_ahead"][step] for step in (0, _steps_ahead(figures)[-1]))
        validated = "" if figures["validation_l1"] is None else f"{figures['validation_l1']:.4f}"
        lines.append(
            f"{figures['checkpoint']:20}{errors['all']:12.4f}{figures['share_of_holding_still']:12.0%}{first:12.4f}"
            f"{last:12.4f}{figures['in_standard_deviations']:13.4f}{validated:>12}{'  best' if figures is best else ''}"
        )
    return compared, "\n".join([*lines, f"best: {run / best['checkpoint']}"])


def load_recordings(policy: Pretrained, config: Config, bags: Path | None) -> Dataset:
    """The recordings to judge by, all in `validation`. Raises Fault if the policy was trained on one of them."""
    robot = policy.robot
    if robot is None:
        raise Fault("robot.json: missing, as in LeRobot's own checkpoints; judge a checkpoint that train.py wrote")
    faults = []
    if bags is None:  # the choice of the training: recordings may have been added since
        dataset = load_dataset(config, held_out=robot.recordings["validation"])
    elif not bags.exists():
        raise Fault(f"--bags: {bags} does not exist; give a folder of recordings")
    else:
        config = replace(config, data=replace(config.data, bag_dir=bags.resolve()))
        dataset = load_dataset(config, held_out=[bag.name for bag in find_bags(bags.resolve())[0]])
        trained = {sha: name for name, files in robot.recordings["train"].items() for sha in files.values()}
        faults = [
            f"--bags: {bags / name}: the policy was trained on it, as {trained[sha]} (same SHA-256); remove it"
            for name, files in dataset.recordings.items()
            for sha in files.values()
            if sha in trained
        ]
    image_size = policy.image_size if robot.cameras else config.data.image_size
    meaning = {
        "data.fps": (config.data.fps, robot.fps),
        "data.image_size": (config.data.image_size, image_size),
        "data.cameras": (list(config.data.cameras), list(robot.cameras)),
        "data.crop": ([config.data.part_of(name) for name in config.data.cameras], robot.parts),
        "data.state": (list(dataset.state_names), robot.state_names),
        "data.action": (list(dataset.action_names), robot.action_names),
        "data.action.as": (config.data.action.as_, robot.action_as),
    }
    faults += [
        f"config.yaml: {key} is {ours}, the policy's is {theirs}; expected the configuration of its training"
        for key, (ours, theirs) in meaning.items()
        if ours != theirs
    ]
    if faults:
        raise Fault(*faults)
    return dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint_NNNNNN folder; with --all a run's folder")
    parser.add_argument("--bags", type=Path, metavar="DIR", help="judge by all recordings in DIR")
    parser.add_argument("--all", action="store_true", help="compare every checkpoint of the run")
    parser.add_argument("--simulate", type=int, metavar="TRIALS", help="also run the demo's policy in closed loop")
    arguments = parser.parse_args()
    if arguments.all and arguments.simulate is not None:
        parser.error("--all compares by recordings only; give one checkpoint to --simulate")
    folder = arguments.checkpoint.resolve()
    folder = folder.parent if folder.name == "pretrained_model" else folder
    run = folder.parent if folder.name.startswith("checkpoint_") else folder
    with exit_with_message():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if arguments.all or run == folder:
            best, complete = best_checkpoint(run), complete_checkpoints(run)
            if not complete:
                raise Fault(f"{run}: no complete checkpoint; expected a checkpoint_NNNNNN folder, or a run's folder")
            folder = best[0] if best else complete[-1]
            if not arguments.all:
                raise Fault(f"{run}: is a run; give one of its checkpoints, such as {folder}, or --all to compare them")
        config = load(run / "config.yaml")
        dataset = load_recordings(pretrained.load(folder), config, arguments.bags)
        for line in dataset.skipped_lines():
            print(line)
        suffix = f"-{arguments.bags.resolve().name}" if arguments.bags else ""
        if arguments.all:
            compared, text = compare(run, config, dataset, device)
            write_json(run / f"evaluation/checkpoints{suffix}.json", compared, indent=1)
            print(text)
            return
        out = run / f"evaluation/{folder.name}{suffix}"
        figures, where = judge(folder, out, config, dataset, device)
        print(table(figures))
        print(where)
        if arguments.simulate is not None:
            print(simulate(pretrained.load(folder, device), arguments.simulate, out))


if __name__ == "__main__":
    main()
