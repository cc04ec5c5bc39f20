"""What in the numbers of a recording would spoil a training, in words a user acts on.

Works on ticks, from a bag or from the cache: inspect_bags.py and train.py --dry-run print the same warnings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from config import Config

STILL = 1e-4  # units: a joint that moves less in a whole recording never moves
BEGINS_TO_MOVE = 0.03  # of a joint's range; at least 1e-3 units, above the noise
IDLE_S = 3.0
LAG_S = 1.0  # the longest lag searched
EXPLAINED = 0.7  # least share of the motion that a command explains at its lag
LATE_TICKS, LATE_S = 5, 0.15
COPIED = 0.1  # of a joint's standard deviation: copying the state would come this close over a whole chunk
TWO_TURNS = 4 * np.pi  # rad
MAX_JOINT_SPEED = 30.0  # rad/s: the fastest axes of industrial robots turn at 20
SPIKE = 3  # messages, at most
FULL_TURN_WITHIN = 0.1  # rad: a jump this close to 2 pi is a wrapped angle
BUNCHED = 0.4  # share of pauses below a third of the mean, from which on messages come in bunches
SILENT_NS = 1_000_000_000
ECHO_NS = 150_000_000  # a command may equal a state so much older
SWITCH = 16  # a joint of at most so many positions is a switch, such as a gripper that is open or closed


class Ticks(NamedTuple):
    """One recording on the grid: the N ticks of its episodes, concatenated."""

    state: np.ndarray  # (N, S)
    target: np.ndarray  # (N, A): where the action sends the robot; for deltas state + action
    frames: dict[str, np.ndarray]  # camera: (N,) index of the picture
    lengths: list[int]  # of the episodes
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]

    def episodes(self) -> Iterator[slice]:
        end = 0
        for length in self.lengths:
            yield slice(end, end + length)
            end += length


class Lag(NamedTuple):
    """How long the state takes to follow a command."""

    seconds: float
    explained: float  # share of the state's motion that the command explains at this lag


def period_ns(stamps: np.ndarray) -> float:
    """The time between messages at stamps (M,) ns: the median pause, or the mean where they come in bunches."""
    pauses = np.diff(stamps)
    if not len(pauses):
        return 0.0
    mean = _mean_pause(pauses)
    return mean if np.mean(pauses < mean / 3) > BUNCHED else float(np.median(pauses))


def _mean_pause(pauses: np.ndarray) -> float:
    """The mean without silences."""
    return float(pauses[pauses <= max(SILENT_NS, 10 * np.median(pauses))].mean())


def bunches(stamps: np.ndarray) -> str:
    """Whether messages at stamps (M,) ns come in bunches, in words; empty if not."""
    pauses = np.diff(stamps)
    mean = _mean_pause(pauses) if len(pauses) >= 20 else 0.0
    if not 0 < mean < SILENT_NS / 2 or np.mean(pauses < mean / 3) <= BUNCHED:
        return ""
    size = len(stamps) / (np.count_nonzero(pauses > mean) + 1)
    every = f"about {size:.0f} every {size * mean / 1e6:.0f} ms, {1e9 / mean:.3g} per second"
    return f"messages arrive in bunches, {every}: check the network and the recorder's load"


def echo_age(sent_at: np.ndarray, commands: np.ndarray, seen_at: np.ndarray, states: np.ndarray) -> float | None:
    """Seconds by which commands (N, K) at sent_at (N,) ns repeat states (M, K) at seen_at (M,); None if they do not."""
    spread = np.ptp(states, axis=0)
    moves = np.any(np.abs(np.diff(commands, axis=0, prepend=commands[:1])) > 1e-6 * np.maximum(spread, 1), axis=1)
    if spread.max(initial=0.0) < STILL or moves.sum() < 10:
        return None
    newest = np.searchsorted(seen_at, sent_at[moves], side="right") - 1
    ages = np.full(len(newest), np.nan)
    for back in range(int(newest.max()) + 1):
        at = np.maximum(newest - back, 0)
        age = sent_at[moves] - seen_at[at]
        if age.min() > ECHO_NS:
            break
        same = np.all(np.abs(commands[moves] - states[at]) <= 1e-6 * np.maximum(spread, 1), axis=1)
        ages = np.where(np.isnan(ages) & same & (newest >= back), age, ages)
    return float(np.nanmedian(ages)) / 1e9 if np.mean(~np.isnan(ages)) > 0.95 else None


def jumps(stamps: np.ndarray, rows: np.ndarray, joints: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Where positions (M, K) at stamps (M,) ns jump as no arm can, in words: spikes that return, and lasting steps.

    A spike, of at most SPIKE messages, is a damaged number. A step may be an arm that was reset, or an angle that wraps,
    which may return. Only positions in rad are checked, and no switches.
    """
    spikes: list[str] = []
    steps: list[str] = []
    if len(rows) < 3:
        return spikes, steps
    # a busy machine delivers in bursts what was measured a period apart
    seconds = np.maximum(np.diff(stamps), max(1.0, period_ns(stamps))) / 1e9
    for column, name in zip(rows.T, joints, strict=True):
        if np.median(np.abs(column)) > TWO_TURNS or len(np.unique(column)) <= SWITCH:
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # damaged numbers
            size = np.abs(np.diff(column))
            at = np.flatnonzero(size > MAX_JOINT_SPEED * seconds)
            after = [column[np.minimum(at + ahead, len(column) - 1)] for ahead in range(2, 2 + SPIKE)]
            back = np.any([np.abs(later - column[at]) < size[at] / 2 for later in after], axis=0)
            back &= np.abs(size[at] - 2 * np.pi) > FULL_TURN_WITHIN
        for places, lines in ((at[back], spikes), (at[~back & ~np.isin(at - 1, at[back])], steps)):
            for i in places[:1]:
                place = f"at message {i + 1}, t+{(stamps[i + 1] - stamps[0]) / 1e9:.3f} s ({len(places)} such jumps)"
                jump = f"from {column[i]:.4g} to {column[i + 1]:.4g} in {seconds[i] * 1e3:.1f} ms"
                lines.append(f"{name} jumps {jump} {place}")
    return spikes, steps


def warnings(ticks: Ticks, config: Config) -> list[str]:
    """What to check before training, one line each."""
    return [*_joints(ticks), *_actions(ticks, config), *_times(ticks, config), *_cameras(ticks, config)]


def _joints(ticks: Ticks) -> Iterator[str]:
    moved, angles = np.ptp(ticks.state, axis=0), np.abs(ticks.state).max(axis=0)
    if moved.max() < STILL:
        yield "nothing moves: no joint of data.state changes by more than 0.0001; remove the recording"
    for name, still, at in zip(ticks.state_names, moved < STILL, ticks.state[0], strict=True):
        if still and moved.max() >= STILL:
            yield f"{name} never moves (stays at {at:.4g}): remove it from data.state, or check its driver"
    if (angles > TWO_TURNS).mean() > 0.5:
        reach = f"{ticks.state_names[int(angles.argmax())]} reaches {angles.max():.4g}"
        yield f"{reach}, most joints more than two turns in rad: are these degrees? The policy will answer in the same unit"


def _actions(ticks: Ticks, config: Config) -> Iterator[str]:
    chunk, fps = config.model.chunk_size, config.data.fps
    copied = copying_error(ticks, chunk)
    if copied is not None and copied < COPIED:
        leaves = (
            f"over a chunk ({chunk} ticks, {chunk / fps:.2f} s) actions leave the state by {copied:.1%} of its spread"
        )
        yield f"a policy could copy its state: {leaves}; raise model.chunk_size, or lower data.fps"
    follows = lag(ticks, config)
    if follows and follows.seconds > max(LATE_TICKS / fps, LATE_S):
        late = f"{follows.seconds * 1e3:.0f} ms later ({follows.seconds * fps:.1f} ticks)"
        advice = "check that both topics use one clock, and use the command nearest to the drives"
        yield f"the state follows the command {late}: {advice}"


def _times(ticks: Ticks, config: Config) -> Iterator[str]:
    head, tail = idle(ticks, config.data.fps) if np.ptp(ticks.state, axis=0).max() >= STILL else (0.0, 0.0)
    for seconds, where in ((head, "begins"), (tail, "ends")):
        if seconds > IDLE_S:
            yield f"{where} with {seconds:.1f} s without motion: cut the recording, or the policy learns to wait"
    chunk, count = config.model.chunk_size, len(ticks.lengths)
    short = sum(length < chunk / 2 for length in ticks.lengths)
    if short > count / 2:
        lengths = f"{short} of {count} episodes are shorter than half of model.chunk_size = {chunk} (longest {max(ticks.lengths)})"
        yield f"{lengths}: chunks would be mostly padding; lower model.chunk_size, or fix what splits them"


def _cameras(ticks: Ticks, config: Config) -> Iterator[str]:
    fps = config.data.fps
    for camera, frames in ticks.frames.items():
        new = sum(int(np.count_nonzero(np.diff(frames[episode]))) for episode in ticks.episodes())
        rate = fps * new / max(1, len(frames) - len(ticks.lengths))
        if rate < 0.7 * fps and len(frames) > 10:
            advice = f"most ticks repeat one; set data.fps to about {rate:.0f}, or record faster"
            yield f"camera {camera} has {rate:.3g} new pictures per second at data.fps = {fps:g}: {advice}"


def idle(ticks: Ticks, fps: float) -> tuple[float, float]:
    """Seconds before the first motion of any joint, and after the last; both are the whole time if nothing moves."""
    enough = np.maximum(BEGINS_TO_MOVE * np.ptp(ticks.state, axis=0), 1e-3)
    away = np.any(np.abs(ticks.state - ticks.state[0]) > enough, axis=1)
    before = np.any(np.abs(ticks.state - ticks.state[-1]) > enough, axis=1)
    head = int(away.argmax()) if away.any() else len(away)
    tail = int(before[::-1].argmax()) if before.any() else len(before)
    return head / fps, tail / fps


def copying_error(ticks: Ticks, chunk_size: int) -> float | None:
    """Mean distance of an action from the state at its chunk's start, over all chunks and moving joints.

    In standard deviations of the joint; None if actions are of other joints, or nothing moves.
    """
    spread = ticks.state.std(axis=0)
    if ticks.target.shape != ticks.state.shape or not (spread > STILL).any():
        return None
    total, count = np.zeros(len(spread)), 0
    for episode in ticks.episodes():
        state, target = ticks.state[episode], ticks.target[episode]
        for ahead in np.unique(np.linspace(0, min(chunk_size, len(state)) - 1, 20).astype(int)):
            off = np.abs(target[ahead:] - state[: len(state) - ahead])
            total, count = total + off.sum(axis=0), count + len(off)
    moving = spread > STILL
    return float((total / count / np.where(moving, spread, 1.0))[moving].mean())


def lag(ticks: Ticks, config: Config) -> Lag | None:
    """How long the state lags behind the command; None if there is no command, or it does not explain the motion.

    The lag minimizes the variance of state minus earlier command; a parabola refines it between ticks. A tick's target is
    the command of the next tick.
    """
    fps, names = config.data.fps, ticks.state_names
    if not config.data.commands or ticks.target.shape != ticks.state.shape:
        return None
    # the same joints are matched by name, others by position
    order = [ticks.action_names.index(n) for n in names] if set(names) == set(ticks.action_names) else range(len(names))
    target, reach = ticks.target[:, list(order)], min(round(LAG_S * fps), max(ticks.lengths) // 2)
    left, total = np.zeros(reach + 1), 0.0
    for episode in ticks.episodes():
        state, command = ticks.state[episode].astype(np.float64), target[episode].astype(np.float64)
        compared = len(state) - reach
        if compared < reach:  # too short
            continue
        total += compared * state[reach:].var(axis=0).sum()
        for ticks_late in range(reach + 1):
            begin = reach - ticks_late
            left[ticks_late] += compared * (state[reach:] - command[begin : begin + compared]).var(axis=0).sum()
    if total <= STILL**2 * len(ticks.state):
        return None
    best = int(left.argmin())
    explained = 1 - left[best] / total
    if explained < EXPLAINED or best == reach:
        return None
    between = 0.0
    if best > 0:
        a, b, c = left[best - 1 : best + 2]
        between = 0.5 * (a - c) / (a - 2 * b + c) if a - 2 * b + c > 0 else 0.0
    return Lag((best + between - 1) / fps, float(explained))
