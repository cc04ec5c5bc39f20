"""The demonstration's arm in closed loop: how often does a policy bring the gripper over a disc that no recording shows?

    python train/evaluate.py outputs/demo/run/checkpoint_000700 --simulate 200

Each trial begins near HOME and lasts 4 s. As on a robot, the policy gets the joint angles and a camera picture, and
n_action_steps of its chunk are executed before it looks again. A policy of next states moves the arm to where it says
within a tick; one of commands drives the arm's lag. Two controls: a blanked camera, and the camera of another trial.

Shapes: B trials, N ticks; angles in radians, lengths in metres.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from config import Config
from evaluation.simulated_arm import (
    CAMERA_TOPIC,
    COMMAND_TOPIC,
    JOINT_TOPIC,
    JOINTS,
    Array,
    Image,
    camera_jpeg,
    follow,
    forward_kinematics,
    goal_point,
    sample_start,
    sample_target,
)
from faults import Fault
from files import write_whole
from policy.runner import Policy
from recordings.images import resize

TRIAL_S = 4.0
TOLERANCES = (0.05, 0.04, 0.03)  # of the flange from its place over the disc
HOLD_TICKS = 10
SHOWN_S = 0.5  # between two pictures of the contact sheet
ENLARGED = 2


class Controller(NamedTuple):
    """How the arm executes actions: what robot.json and the run's configuration say."""

    fps: float
    n_action_steps: int
    commands: bool  # or next states
    delta: bool  # or absolute

    def step(self, q: Array, action: Array) -> Array:
        """The angles (B, 6) one tick after action (B, 6) was given at q (B, 6)."""
        target = q + action if self.delta else action
        return follow(q, target, 1 / self.fps) if self.commands else target


class Scenes(NamedTuple):
    """Where trials begin, and what their cameras show."""

    starts: Array  # (B, 6)
    targets: Array  # (B, 3)

    def pictures(self, q: Array) -> Image:
        """What each camera publishes (B, H, W, 3), RGB, of the arm at q (B, 6); as in the recordings, out of a JPEG."""
        jpegs = (camera_jpeg(*one) for one in zip(q, self.targets, strict=True))
        return np.stack([np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), np.uint8)[..., ::-1] for jpeg in jpegs])

    def distances(self, states: Array) -> Array:
        """From the flange to its place over the disc (N, B), at angles (N, B, 6)."""
        goals = np.array([goal_point(target) for target in self.targets])
        return np.linalg.norm(np.array([[forward_kinematics(q)[-1] for q in row] for row in states]) - goals, axis=-1)


def unseen(trials: int) -> Scenes:
    """The same scenes each time, from random numbers that no recording has."""
    rngs = [np.random.default_rng((0, trial, 2)) for trial in range(trials)]
    return Scenes(*map(np.array, zip(*((sample_start(rng), sample_target(rng)) for rng in rngs), strict=True)))


def drive(
    predict: Callable[[Array, Image], Array], look: Callable[[int, Array], Image], starts: Array, arm: Controller
) -> Array:
    """The angles (N, B, 6) after each tick of all trials at once.

    `predict` makes chunks (B, T, 6) from angles and pictures; `look` makes the pictures from the tick and the angles.
    """
    q, states = starts, []
    for tick in range(round(TRIAL_S * arm.fps)):
        if tick % arm.n_action_steps == 0:
            chunk = predict(q, look(tick, q))
        q = arm.step(q, chunk[:, tick % arm.n_action_steps])
        states.append(q)
    return np.array(states)


def held(near: np.ndarray) -> np.ndarray:
    """Which trials (B,) were near for HOLD_TICKS ticks in a row; near (N, B) bool."""
    in_a_row = np.lib.stride_tricks.sliding_window_view(near, HOLD_TICKS, axis=0)
    return np.asarray(in_a_row.all(axis=-1).any(axis=0))


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % confidence interval of a rate."""
    z = 1.959964
    centre, spread = successes + z * z / 2, z * math.sqrt(successes * (trials - successes) / trials + z * z / 4)
    return (centre - spread) / (trials + z * z), (centre + spread) / (trials + z * z)


def controller(policy: Policy, config: Config) -> Controller:
    """Raises Fault where the policy was not trained for the demonstration's arm."""
    robot, joints = policy.robot, list(JOINTS)
    commands: Any = [{"topic": COMMAND_TOPIC, "joints": joints}]
    found = {
        "state": robot.get("state", {}).get("from"),
        "cameras": [camera["topic"] for camera in robot.get("cameras", {}).values()],
        "action": robot.get("action", {}).get("from"),
    }
    expected: dict[str, tuple[Any, ...]] = {
        "state": ([{"topic": JOINT_TOPIC, "joints": joints}],),
        "cameras": ([CAMERA_TOPIC],),
        "action": ("next_state", commands),
    }
    faults = [
        f"--simulate: the policy's {key}: {found[key]}; expected the demonstration's: {' or '.join(map(str, each))}; "
        "leave --simulate out"
        for key, each in expected.items()
        if found[key] not in each
    ]
    if robot.get("fps", 0) * TRIAL_S < HOLD_TICKS:
        faults.append(f"--simulate: the policy's fps: {robot.get('fps')}; expected at least {HOLD_TICKS / TRIAL_S:g}")
    if faults:
        raise Fault(*faults)
    return Controller(
        robot["fps"], config.model.n_action_steps, found["action"] != "next_state", robot["action"]["as"] == "delta"
    )


def simulate(policy: Policy, config: Config, trials: int, folder: Path) -> str:
    """The success rates in words; simulation.json and a contact sheet, simulation.png, in the folder. Raises Fault."""
    if trials < 2:
        raise Fault(f"--simulate {trials}: expected at least 2 trials, since one gets the camera of another; raise it")
    arm, scenes = controller(policy, config), unseen(trials)
    others = np.roll(np.arange(trials), 1)
    seen: dict[int, Image] = {}

    def look(tick: int, q: Array) -> Image:
        seen[tick] = scenes.pictures(q)
        return seen[tick]

    def predict(q: Array, pictures: Image) -> Array:
        pixels = np.stack([resize(picture, policy.image_size) for picture in pictures])[:, None]
        return policy.predict(torch.from_numpy(q).float(), torch.from_numpy(pixels)).double().numpy()

    go = functools.partial(drive, predict, starts=scenes.starts, arm=arm)
    states = go(look)
    blanked = go(lambda tick, _: np.full_like(seen[tick], 128))
    misled = go(lambda tick, _: seen[tick][others])
    distances = {
        "the camera on": scenes.distances(states),
        "the camera blanked": scenes.distances(blanked),
        "another's camera: own disc": scenes.distances(misled),
        "another's camera: disc in view": scenes._replace(targets=scenes.targets[others]).distances(misled),
    }
    figures = {name: rates(each) for name, each in distances.items()}
    meant = f"{'deltas to ' if arm.delta else ''}{'commands' if arm.commands else 'next states'}"
    about = (
        f"{trials} unseen discs, {TRIAL_S:g} s at {arm.fps:g} Hz, {arm.n_action_steps} of each chunk's {meant} executed"
    )
    sheet = contact_sheet(scenes, states, distances["the camera on"], arm.fps)
    write_whole(folder / "simulation.json", json.dumps({"about": about, "reached": figures}, indent=2) + "\n")
    write_whole(folder / "simulation.png", cv2.imencode(".png", sheet[..., ::-1])[1].tobytes())
    return f"{about}\n{table(figures)}\npicture: simulation.png in {folder}"


def rates(distances: Array) -> dict[str, dict[str, dict[str, float]]]:
    """By rule and tolerance: the share of trials that reached their disc, and its interval; distances (N, B)."""
    reached = {
        f"for {HOLD_TICKS} ticks in a row": [held(distances < tolerance) for tolerance in TOLERANCES],
        "at the end": [distances[-1] < tolerance for tolerance in TOLERANCES],
    }
    return {
        rule: {
            f"{tolerance * 100:g} cm": dict(
                zip(("share", "from", "to"), (float(one.mean()), *wilson(int(one.sum()), len(one))), strict=True)
            )
            for tolerance, one in zip(TOLERANCES, each, strict=True)
        }
        for rule, each in reached.items()
    }


def table(figures: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """The shares with their 95 % intervals."""
    wide = max(len(f"{name}, {rule}") for name, rules in figures.items() for rule in rules)
    lines = [f"{'reached (95 % interval)':{wide}}" + "".join(f"{f'{cm * 100:g} cm':>22}" for cm in TOLERANCES)]
    for name, rules in figures.items():
        for rule, each in rules.items():
            cells = (f"{one['share']:.1%} ({one['from']:.1%}-{one['to']:.1%})" for one in each.values())
            lines.append(f"{f'{name}, {rule}':{wide}}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def contact_sheet(scenes: Scenes, states: Array, distances: Array, fps: float) -> Image:
    """Camera pictures over time, RGB, of an ordinary success and of the worst failure, or what there is of them."""
    reached, order = held(distances < TOLERANCES[1]), np.argsort(distances[-1])
    good, bad = order[reached[order]], order[~reached[order]]
    rule = f"within {TOLERANCES[1] * 100:g} cm for {HOLD_TICKS} ticks in a row"
    rows = []
    for title, trial in (
        (f"reached, {rule} ({len(good)} of {len(order)}); of these the median", good[len(good) // 2 :][:1]),
        (f"not reached ({len(bad)} of {len(order)}); of these the one that ends farthest off", bad[-1:]),
    ):
        if not len(trial):
            continue
        one = Scenes(scenes.starts[trial], scenes.targets[trial])
        path = np.concatenate([one.starts[None], states[:, trial]])
        off = one.distances(path)[:, 0]
        cells = []
        for tick in range(0, len(path), round(SHOWN_S * fps)):
            picture = cv2.resize(one.pictures(path[tick])[0], None, fx=ENLARGED, fy=ENLARGED)
            cells.append(np.vstack([picture, _caption(f"{tick / fps:.1f} s: {off[tick] * 100:.1f} cm off", picture)]))
        row = np.hstack(cells)
        rows.append(np.vstack([_caption(f"{title}: trial {trial[0]}", row), row]))
    return np.vstack(rows)


def _caption(text: str, under: Image) -> Image:
    """A white strip as wide as the picture."""
    strip = np.full((26, under.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, text, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return strip
