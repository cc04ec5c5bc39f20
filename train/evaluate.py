"""Judge a checkpoint by recordings that it was not trained on.

    python train/evaluate.py outputs/train-rosbag-act/checkpoint_010000              # those held out from its training
    python train/evaluate.py outputs/train-rosbag-act/checkpoint_010000 --bags DIR   # all recordings in DIR
    python train/evaluate.py outputs/train-rosbag-act --all                          # every checkpoint of a run, and the best
    python train/evaluate.py outputs/demo/run/checkpoint_000700 --simulate 200       # the demonstration's arm, in closed loop

Prints the errors in the robot's units beside those of doing nothing clever, and of the same policy without its eyes: one
that looks is worse without them. Writes evaluation.json and report.html into the run's evaluation/ folder.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import Config, load
from dataset.batches import Dataset
from dataset.cache import load_dataset
from evaluation import report
from evaluation.errors import METHODS, measure, summary
from faults import Fault, Stopped, exit_with_message
from files import write_whole
from page import UNIT
from policy.runner import Policy
from recordings.bags import find_bags
from training.run_folder import best_checkpoint, validation, whole_checkpoints


def table(found: dict[str, Any]) -> str:
    """A summary for the terminal, no wider than 100 characters."""
    errors, ahead, fps = found["mean_absolute_error"], found["ticks_ahead"], found["fps"]
    headings = [textwrap.wrap(METHODS[method], 12) for method in errors]
    lines = [
        f"{len(found['recordings'])} recordings not trained on, {found['moments']} moments, {ahead} ticks ahead at {fps:g} Hz",
        f"mean absolute error, {found['unit']}",
        *("".join([" " * 22, *(f"{(words + ['', ''])[row]:>13}" for words in headings)]) for row in (0, 1)),
    ]

    def row(name: str, values: list[float], form: str = ".4f") -> None:
        short = name if len(name) <= 22 else "…" + name[-21:]
        lines.append(f"{short:22}" + "".join(f"{value:13{form}}" for value in values))

    for a, name in enumerate(found["actions"]):
        row(name, [one["by_action"][a] for one in errors.values()])
    row("all", [one["all"] for one in errors.values()])
    still = max(errors["holding_still"]["all"], 1e-12)
    row("of holding still", [one["all"] / still for one in errors.values()], ".0%")
    for step in horizon(found):
        row(f"all, {(step + 1) / fps:.2f} s ahead", [one["by_step_ahead"][step] for one in errors.values()])
    if shares := found["share_of_error_explained_by_vision"]:
        said = (f"{share:.0%} ({METHODS[method]})" for method, share in shares.items())
        lines.append(f"share of the error without it that vision explains: {', '.join(said)}")
    if latency := found.get("latency_ms"):
        lines.append(
            f"latency {latency['median']:.1f} ms (median), {latency['percentile_95']:.1f} ms (95 %): one observation to its "
            f"chunk, {latency['device']}"
        )
    return "\n".join(lines)


def horizon(found: dict[str, Any]) -> list[int]:
    """Five steps ahead to speak of, from the first to the last that some episode reaches."""
    reached = sum(value is not None for value in found["mean_absolute_error"]["policy"]["by_step_ahead"])
    return sorted({round(step) for step in np.linspace(0, reached - 1, min(5, reached))})


def judge(checkpoint: Path, out: Path, config: Config, dataset: Dataset, device: str) -> tuple[dict[str, Any], str]:
    """Judge a checkpoint and write all that there is to show into a folder; the figures, and where the rest is."""
    policy = Policy.load(checkpoint / "pretrained_model", device)
    judgement = measure(policy, config, dataset.validation)
    found = summary(checkpoint.name, judgement)
    write_whole(out / "evaluation.json", json.dumps(found, indent=1) + "\n")
    if not find_spec("matplotlib"):
        return (
            found,
            f"figures: {out}/evaluation.json; no page with pictures, it takes matplotlib: pip install matplotlib",
        )
    write_whole(out / "report.html", report.page(checkpoint, judgement, found))
    return found, f"page: {out}/report.html"


def judge_at_the_end(last: Path, config: Config, dataset: Dataset, device: str) -> None:
    """Judge a run's last checkpoint, and its best if that is another. What fails here is said, and fails no training."""
    best = best_checkpoint(last.parent)
    for checkpoint in dict.fromkeys([last, best[0] if best else last]):
        again = f"judge it by: python {__file__} {checkpoint}"
        try:
            found, where = judge(checkpoint, last.parent / "evaluation" / checkpoint.name, config, dataset, device)
        except (KeyboardInterrupt, SystemExit):
            raise Stopped(f"the policy is trained; stopped while judging {checkpoint.name}; {again}") from None
        except Exception as error:
            print(
                f"not judged: {checkpoint.name}: {' '.join(str(error).split())[:300]} ({type(error).__name__}); {again}"
            )
            continue
        ours = found["mean_absolute_error"]["policy"]["all"]
        print(
            f"{'best' if best and checkpoint == best[0] else 'last'}: {checkpoint.name}, mean absolute error {ours:.4f}, {UNIT}, "
            f"{found['share_of_holding_still']:.0%} of holding still"
        )
        print(where, flush=True)


def compare(run: Path, config: Config, dataset: Dataset, device: str) -> tuple[list[dict[str, Any]], str]:
    """Every whole checkpoint of a run by the same recordings: their figures and a table that names the best.

    The best has the least error in standard deviations, in which an arm's radians and a gripper's millimetres weigh alike.
    """
    all_: list[dict[str, Any]] = []
    for checkpoint in whole_checkpoints(run):
        policy = Policy.load(checkpoint / "pretrained_model", device)
        judgement = measure(policy, config, dataset.validation, controls=False)
        found = summary(checkpoint.name, judgement)
        figure = validation(checkpoint)
        all_.append(found | {"validation_l1": figure if np.isfinite(figure) else None})
    best = min(all_, key=lambda one: one["in_standard_deviations"])
    lines = [
        f"{len(dataset.validation.names)} recordings not trained on, {best['moments']} moments; mean absolute error, {UNIT}",
        f"{'':20}{'error':>12}{'of holding':>12}{'first step':>12}{'last step':>12}{'in standard':>13}{'validated':>12}",
        f"{'':20}{'':>12}{'still':>12}{'':>12}{'ahead':>12}{'deviations':>13}{'in training':>12}",
    ]
    for one in all_:
        policy_error = one["mean_absolute_error"]["policy"]
        first, last = (policy_error["by_step_ahead"][step] for step in (0, horizon(one)[-1]))
        validated = "" if one["validation_l1"] is None else f"{one['validation_l1']:.4f}"
        lines.append(
            f"{one['checkpoint']:20}{policy_error['all']:12.4f}{one['share_of_holding_still']:12.0%}{first:12.4f}"
            f"{last:12.4f}{one['in_standard_deviations']:13.4f}{validated:>12}{'  best' if one is best else ''}"
        )
    return all_, "\n".join([*lines, f"best: {run / best['checkpoint']}"])


def _recordings(policy: Policy, config: Config, bags: Path | None) -> Dataset:
    """The recordings to judge by, all of them in `validation`. Raises Fault where the policy was trained on one."""
    if "recordings" not in policy.robot:
        raise Fault(
            "robot.json: names no recordings, as in a checkpoint of another program; judge one that train.py wrote"
        )
    faults = []
    if bags is None:  # not a new choice: recordings may have come since, and none that was trained on may judge
        dataset = load_dataset(config, held_out=policy.robot["recordings"]["validation"])
    elif not bags.exists():
        raise Fault(f"--bags: {bags} does not exist; give a folder of recordings")
    else:
        config = replace(config, data=replace(config.data, bag_dir=bags.resolve()))
        dataset = load_dataset(config, held_out=[bag.name for bag in find_bags(bags.resolve())[0]])
        trained = {sha: name for name, files in policy.robot["recordings"]["train"].items() for sha in files.values()}
        faults = [
            f"--bags: {bags / name}: the policy was trained on it, as {trained[sha]} (the same SHA-256); leave it out"
            for name, files in dataset.recordings.items()
            for sha in files.values()
            if sha in trained
        ]
    meaning = {
        "data.fps": (config.data.fps, policy.fps),
        "data.image_size": (
            config.data.image_size,
            policy.image_size if config.data.cameras else config.data.image_size,
        ),
        "data.cameras": (tuple(config.data.cameras), policy.cameras),
        "data.state": (dataset.state_names, policy.state_names),
        "data.action": (dataset.action_names, policy.action_names),
        "data.action.as": (config.data.action.as_, policy.action_as),
    }
    faults += [
        f"config.yaml: {key} is {here}, of the policy {there}; expected the configuration that it was trained with"
        for key, (here, there) in meaning.items()
        if here != there
    ]
    if faults:
        raise Fault(*faults)
    return dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint_NNNNNN folder of a run; with --all a run's folder")
    parser.add_argument("--bags", type=Path, metavar="DIR", help="judge by these recordings, all of them")
    parser.add_argument("--all", action="store_true", help="compare every checkpoint of the run")
    parser.add_argument("--simulate", type=int, metavar="TRIALS", help="the demonstration's policy in closed loop, too")
    arguments = parser.parse_args()
    if arguments.all and arguments.simulate is not None:
        parser.error("--all compares by recordings alone; give one checkpoint to --simulate")
    folder = arguments.checkpoint.resolve()
    folder = folder.parent if folder.name == "pretrained_model" else folder
    run = folder.parent if folder.name.startswith("checkpoint_") else folder
    with exit_with_message():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if arguments.all or run == folder:
            best, there = best_checkpoint(run), whole_checkpoints(run)
            if not there:
                raise Fault(f"{run}: holds no whole checkpoint; expected a checkpoint_NNNNNN folder, or a run's folder")
            folder = best[0] if best else there[-1]
            if not arguments.all:
                raise Fault(f"{run}: is a run; give one of its checkpoints, such as {folder}, or --all to compare them")
        config = load(run / "config.yaml")
        dataset = _recordings(Policy.load(folder / "pretrained_model"), config, arguments.bags)
        for line in dataset.left_out_in_words():
            print(line)
        place = f"-{arguments.bags.resolve().name}" if arguments.bags else ""
        if arguments.all:
            figures, text = compare(run, config, dataset, device)
            write_whole(run / f"evaluation/checkpoints{place}.json", json.dumps(figures, indent=1) + "\n")
            print(text)
            return
        out = run / f"evaluation/{folder.name}{place}"
        found, where = judge(folder, out, config, dataset, device)
        print(table(found))
        print(where)
        if arguments.simulate is not None:
            from evaluation.closed_loop import simulate  # which only the demonstration needs

            print(simulate(Policy.load(folder / "pretrained_model", device), config, arguments.simulate, out))


if __name__ == "__main__":
    main()
