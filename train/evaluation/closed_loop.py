"""The demo arm in closed loop: how often does a policy bring the gripper over a disc that no recording shows?

    python train/evaluate.py outputs/demo/run/checkpoint_000500 --simulate 200

Each trial starts near HOME and lasts 4 s. As on a robot, the policy gets joint angles and a camera picture, and
n_action_steps of its chunk are executed before it observes again. A policy of next states moves the arm to its target in
one tick; one of commands drives the arm's lag. Two controls: a blanked camera, and the camera of another trial.

Shapes: B trials, N ticks; angles in radians, lengths in metres.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from config import WHOLE
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
from files import write_json, write_whole
from policy.pretrained import Pretrained
from recordings.images import view

TRIAL_S = 4.0
TOLERANCES = (0.05, 0.04, 0.03)  # of the flange from its goal over the disc
HOLD_TICKS = 10
SHOWN_S = 0.5  # between two pictures of the contact sheet
ENLARGED = 2


class Controller(NamedTuple):
    """How the arm executes actions."""

    fps: float
    n_action_steps: int
    commands: bool  # or next states
    delta: bool  # or absolute

    def step(self, q: Array, action: Array) -> Array:
        """The angles (B, 6) one tick after action (B, 6) was given at q (B, 6)."""
        target = q + action if self.delta else action
        return follow(q, target, 1 / self.fps) if self.commands else target


class Scenes(NamedTuple):
    """Where trials start, and where their discs are."""

    starts: Array  # (B, 6)
    targets: Array  # (B, 3)

    def pictures(self, q: Array) -> Image:
        """The cameras' pictures (B, H, W, 3) RGB of the arms at q (B, 6); from a JPEG, as in the recordings."""
        jpegs = (camera_jpeg(*pair) for pair in zip(q, self.targets, strict=True))
        return np.stack([np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), np.uint8)[..., ::-1] for jpeg in jpegs])

    def distances(self, states: Array) -> Array:
        """From the flange to its goal over the disc (N, B), at angles (N, B, 6)."""
        goals = np.array([goal_point(target) for target in self.targets])
        return np.linalg.norm(np.array([[forward_kinematics(q)[-1] for q in row] for row in states]) - goals, axis=-1)


def unseen(trials: int) -> Scenes:
    """The same scenes each time, from random numbers that no recording uses."""
    rngs = [np.random.default_rng((0, trial, 2)) for trial in range(trials)]
    pairs = [(sample_start(rng), sample_target(rng)) for rng in rngs]
    return Scenes(np.array([start for start, _ in pairs]), np.array([target for _, target in pairs]))


def drive(
    predict: Callable[[Array, Image], Array], look: Callable[[int, Array], Image], starts: Array, arm: Controller
) -> Array:
    """The angles (N, B, 6) after each tick of all trials.

    `predict` makes chunks (B, T, 6) from angles and pictures; `look` makes pictures from the tick and the angles.
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
    center, spread = successes + z * z / 2, z * math.sqrt(successes * (trials - successes) / trials + z * z / 4)
    return (center - spread) / (trials + z * z), (center + spread) / (trials + z * z)


def controller(policy: Pretrained) -> Controller:
    """Raises Fault if the policy was not trained for the demo arm."""
    robot, joints = policy.robot, list(JOINTS)
    if robot is None:
        raise Fault("--simulate: no robot.json in this checkpoint; judge a policy that train.py wrote for the demo")
    commands = [{"topic": COMMAND_TOPIC, "joints": joints}]
    compared: dict[str, tuple[Any, list[Any]]] = {
        "state": (robot.state_from, [[{"topic": JOINT_TOPIC, "joints": joints}]]),
        "cameras": ([camera.topic for camera in robot.cameras.values()], [[CAMERA_TOPIC]]),
        "action": (robot.action_from, ["next_state", commands]),
    }
    faults = [
        f"--simulate: the policy's {key} is {theirs}; expected the demo's {' or '.join(map(str, ours))}; omit --simulate"
        for key, (theirs, ours) in compared.items()
        if theirs not in ours
    ]
    if robot.fps * TRIAL_S < HOLD_TICKS:
        faults.append(f"--simulate: the policy's fps is {robot.fps}; expected at least {HOLD_TICKS / TRIAL_S:g}")
    if faults:
        raise Fault(*faults)
    is_delta = robot.action_as == "delta"
    return Controller(robot.fps, policy.config.n_action_steps, robot.action_from != "next_state", is_delta)


def simulate(policy: Pretrained, trials: int, folder: Path) -> str:
    """The success rates in words; writes simulation.json and simulation.png, a contact sheet. Raises Fault."""
    if trials < 2:
        raise Fault(f"--simulate {trials}: expected at least 2 trials: each gets the camera of another as a control")
    arm, scenes = controller(policy), unseen(trials)
    part = policy.robot.parts[0] if policy.robot else WHOLE
    others = np.roll(np.arange(trials), 1)
    seen: dict[int, Image] = {}

    def look(tick: int, q: Array) -> Image:
        seen[tick] = scenes.pictures(q)
        return seen[tick]

    def predict(q: Array, pictures: Image) -> Array:
        pixels = np.stack([view(picture, policy.image_size, part) for picture in pictures])[:, None]
        return policy.predict(torch.from_numpy(q).float(), torch.from_numpy(pixels)).double().numpy()

    run = functools.partial(drive, predict, starts=scenes.starts, arm=arm)
    states = run(look)
    misled = run(lambda tick, _: seen[tick][others])
    distances = {
        "camera on": scenes.distances(states),
        "camera blanked": scenes.distances(run(lambda tick, _: np.full_like(seen[tick], 128))),
        "another trial's camera: own disc": scenes.distances(misled),
        "another trial's camera: disc in view": scenes._replace(targets=scenes.targets[others]).distances(misled),
    }
    figures = {name: rates(each) for name, each in distances.items()}
    actions = f"{'deltas to ' if arm.delta else ''}{'commands' if arm.commands else 'next states'}"
    about = (
        f"{trials} unseen discs, {TRIAL_S:g} s at {arm.fps:g} Hz, {arm.n_action_steps} {actions} of each chunk executed"
    )
    sheet = contact_sheet(scenes, states, distances["camera on"], arm.fps)
    write_json(folder / "simulation.json", {"about": about, "reached": figures})
    write_whole(folder / "simulation.png", cv2.imencode(".png", sheet[..., ::-1])[1].tobytes())
    return f"{about}\n{table(figures)}\npicture: {folder / 'simulation.png'}"


def rates(distances: Array) -> dict[str, dict[str, dict[str, float]]]:
    """By rule and tolerance: the share of trials that reached their disc, and its interval; distances (N, B)."""
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for tolerance in TOLERANCES:
        near = distances < tolerance
        for rule, reached in ((f"for {HOLD_TICKS} ticks in a row", held(near)), ("at the end", near[-1])):
            low, high = wilson(int(reached.sum()), len(reached))
            share = {"share": float(reached.mean()), "from": low, "to": high}
            figures.setdefault(rule, {})[f"{tolerance * 100:g} cm"] = share
    return figures


def table(figures: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """The shares with their 95 % intervals."""
    width = max(len(f"{name}, {rule}") for name, rules in figures.items() for rule in rules)
    lines = [f"{'reached (95 % interval)':{width}}" + "".join(f"{f'{cm * 100:g} cm':>22}" for cm in TOLERANCES)]
    for name, rules in figures.items():
        for rule, each in rules.items():
            cells = (f"{cell['share']:.1%} ({cell['from']:.1%}-{cell['to']:.1%})" for cell in each.values())
            lines.append(f"{f'{name}, {rule}':{width}}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def contact_sheet(scenes: Scenes, states: Array, distances: Array, fps: float) -> Image:
    """Camera pictures over time, RGB, of the median success and of the worst failure, if there are any."""
    reached, order = held(distances < TOLERANCES[1]), np.argsort(distances[-1])
    good, bad = order[reached[order]], order[~reached[order]]
    rule = f"within {TOLERANCES[1] * 100:g} cm for {HOLD_TICKS} ticks in a row"
    rows = []
    for title, trial in (
        (f"reached, {rule}: {len(good)} of {len(order)}; the median", good[len(good) // 2 :][:1]),
        (f"not reached: {len(bad)} of {len(order)}; the farthest at the end", bad[-1:]),
    ):
        if not len(trial):
            continue
        scene = Scenes(scenes.starts[trial], scenes.targets[trial])
        path = np.concatenate([scene.starts[None], states[:, trial]])
        off = scene.distances(path)[:, 0]
        cells = []
        for tick in range(0, len(path), round(SHOWN_S * fps)):
            picture = cv2.resize(scene.pictures(path[tick])[0], None, fx=ENLARGED, fy=ENLARGED)
            cells.append(np.vstack([picture, _caption(f"{tick / fps:.1f} s: {off[tick] * 100:.1f} cm off", picture)]))
        row = np.hstack(cells)
        rows.append(np.vstack([_caption(f"{title}: trial {trial[0]}", row), row]))
    return np.vstack(rows)


def _caption(text: str, under: Image) -> Image:
    """A white strip with a text, as wide as the picture."""
    strip = np.full((26, under.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, text, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return strip
