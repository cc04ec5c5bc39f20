"""Roll a policy out in its cell, on objects that no recording shows: how often does it do the task, and how far does it get?

    python train/benchmarks/aloha/rollout.py cube outputs/aloha/cube/run
    python train/benchmarks/aloha/rollout.py cube outputs/aloha/cube/run/checkpoint_000500 --trials 50 --seed 7

The objects of trial i depend on the seed and i alone. Two controls use the same objects: the camera blanked, and a
demonstration of other objects replayed. Writes rollout-SEED.json and rollout-SEED.html beside the checkpoint's evaluation.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.extend(str(Path(__file__).parents[up]) for up in (2, 1))
import expert
from cell import CAMERA, HZ, JOINTS, TASKS, TICKS, Array, Cell
from record import jpeg

from evaluation.closed_loop import wilson
from faults import Fault, exit_with_message
from files import write_json, write_whole
from page import document, picture, section, table
from policy.runner import Policy
from recordings.images import decode
from training.run_folder import complete_checkpoints

DEMONSTRATION = (0, 0)  # seed and attempt of the replayed one
STRIP = 8  # pictures of a trial on the page
Choose = Callable[[Cell, int], Array]  # the command (14,) of a tick


class Trial(NamedTuple):
    """What happened in one trial."""

    best: int  # reward
    at_end: int
    pictures: list[np.ndarray]  # at STRIP moments


def roll_out(cell: Cell, seed: int, number: int, choose: Choose, strip: bool = False) -> Trial:
    """One trial of 8 s."""
    cell.reset(np.random.default_rng((seed, number)))
    best, pictures = 0, []
    for tick in range(TICKS):
        if strip and tick % (TICKS // STRIP) == 0:
            pictures.append(cell.picture())
        reward = cell.step(choose(cell, tick))
        best = max(best, reward)
    return Trial(best, reward, pictures)


def driven_by(policy: Policy, blank: bool = False) -> Choose:
    """Commands of a policy, each held until its next tick; it sees pictures from JPEGs, as in the recordings."""
    every = round(HZ / (policy.fps or HZ))
    command = np.zeros(len(JOINTS))

    def choose(cell: Cell, tick: int) -> Array:
        nonlocal command
        if tick == 0:
            policy.reset()
        if tick % every == 0:
            observation = {"state": dict(zip(JOINTS, cell.state(), strict=True))}
            if policy.needs_observation:
                seen = decode(jpeg(cell.picture()).tobytes())
                observation["images"] = {CAMERA: np.full_like(seen, 128) if blank else seen}
            command = policy.act(observation).astype(np.float64)
        return command

    return choose


def replayed(cell: Cell) -> Choose:
    """The commands of one demonstration, of other objects."""
    cell.reset(np.random.default_rng(DEMONSTRATION))
    commands = expert.commands(cell.name, cell.objects())
    return lambda _, tick: commands[tick]


def share(count: int, trials: int) -> str:
    """A share with its 95 % interval."""
    low, high = wilson(count, trials)
    return f"{count / trials:.0%} ({low:.0%}-{high:.0%})"


def judge(task: str, checkpoint: Path, trials: int, seed: int) -> tuple[dict[str, list[int]], list[str]]:
    """By method the trials that reached each stage, and those at the last one in the last tick; figures for the page."""
    cell, policy = Cell(task), Policy.load(checkpoint, action_names=JOINTS, action_as="absolute")
    methods = {"policy": driven_by(policy), "camera blanked": driven_by(policy, blank=True), "replayed": replayed(cell)}
    reached: dict[str, list[int]] = {}
    for method, choose in methods.items():
        began = time.perf_counter()
        done = [roll_out(cell, seed, number, choose) for number in range(trials)]
        reached[method] = [sum(trial.best >= stage for trial in done) for stage in (1, 2, 3, 4)]
        reached[method].append(sum(trial.at_end == 4 for trial in done))
        print(f"{method}: {share(reached[method][3], trials)}, {time.perf_counter() - began:.0f} s", flush=True)
        if method == "policy":
            best = [trial.best for trial in done]
            shown = [i for i in (best.index(4) if 4 in best else -1, int(np.argmin(best))) if i >= 0]
            strips = {number: roll_out(cell, seed, number, choose, strip=True) for number in shown}
    cell.close()
    figures = []
    for number, trial in strips.items():
        word = "success" if trial.best == 4 else "failure"
        text = f"A {word}: trial {number}, {TASKS[task].stages[trial.best - 1] if trial.best else 'nothing'}."
        rows = [np.hstack(trial.pictures[i : i + 4]) for i in range(0, STRIP, 4)]
        figures.append(picture(np.vstack(rows), f"{text} A picture each {TICKS / HZ / STRIP:g} s."))
    return reached, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run: its newest one")
    parser.add_argument("--trials", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=26, help="of the objects; recordings use 0; default: %(default)s")
    options = parser.parse_args()
    with exit_with_message():
        folder = options.checkpoint.resolve()
        if not folder.name.startswith("checkpoint_"):
            if not (found := complete_checkpoints(folder)):
                raise Fault(f"{folder}: no complete checkpoint; give a run's folder, or a checkpoint_NNNNNN")
            folder = found[-1]
        reached, figures = judge(options.task, folder, options.trials, options.seed)
        stages = [*TASKS[options.task].stages, f"{TASKS[options.task].stages[3]} in the last tick"]
        out = folder.parent / "evaluation" / folder.name
        about = {"task": options.task, "trials": options.trials, "seed": options.seed, "stages": stages}
        write_json(out / f"rollout-{options.seed}.json", about | {"reached": reached}, indent=1)
        headings = {f"stage{i}": stage for i, stage in enumerate(stages)}
        rows = [(name, [share(count, options.trials) for count in counts]) for name, counts in reached.items()]
        text = f"{options.trials} trials of {TICKS / HZ:g} s with objects of seed {options.seed}; 95 % intervals."
        html = document(
            f"{options.task}: {folder.parent.name}, {folder.name}",
            [section("Closed loop", text, [], table(headings, rows)), *figures],
        )
        write_whole(out / f"rollout-{options.seed}.html", html)
        print(f"page: {out / f'rollout-{options.seed}.html'}")


if __name__ == "__main__":
    main()
