"""A recording as episodes on one grid of ticks: state, action and the newest picture at each tick.

Each tick takes the newest message of each topic that is not after it: what the robot's own node would have seen. Where
one is too old, the episode is split; nothing is filled in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from config import Data, Signal
from faults import Fault
from recordings.bags import Bag, Message, read_messages
from recordings.images import at_size
from recordings.plausibility import Ticks, jumps
from recordings.signals import Series, read_series

WORTH_A_NOTE_NS = 500_000_000
DECODERS = 2  # threads that decode pictures; OpenCV releases the GIL


class Episode(NamedTuple):
    """N ticks without a gap."""

    ticks: np.ndarray  # (N,) int64, ns
    state: np.ndarray  # (N, S) float32, the robot's units
    action: np.ndarray  # (N, A) float32
    frames: dict[str, np.ndarray]  # camera: (N,) int64, the number of its message in the bag


class Recording(NamedTuple):
    """The episodes of one bag, and what to know about them."""

    episodes: list[Episode]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    notes: list[str]  # clocks, splits and skipped data, in words
    warnings: list[str]  # faults of the messages that the ticks no longer show

    def ticks(self, data: Data) -> Ticks:
        """The episodes, concatenated, for plausibility."""
        state = np.concatenate([episode.state for episode in self.episodes])
        action = np.concatenate([episode.action for episode in self.episodes])
        target = action + state if data.action.as_ == "delta" else action
        frames = {name: np.concatenate([episode.frames[name] for episode in self.episodes]) for name in data.cameras}
        lengths = [len(episode.state) for episode in self.episodes]
        return Ticks(state, target, frames, lengths, self.state_names, self.action_names)


def read_recording(bag: Bag, data: Data) -> Recording:
    """The episodes of a bag. Raises Fault with everything wrong with it."""
    return cut(bag.name, read_series(bag, {*data.state, *data.commands}, set(data.cameras.values())), data)


def cut(name: str, series: dict[str, Series], data: Data) -> Recording:
    """The episodes of a bag's topics. Raises Fault if there is none."""
    warnings = _check_jumps(name, series, data)
    ticks = _grid(name, series, data.fps)
    newest, fresh, notes = _newest(series, ticks, data)
    notes += _unused(series)

    def at_ticks(signals: tuple[Signal, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
        rows = [series[s.topic].values[s][newest[s.topic]] for s in signals]
        return np.concatenate(rows, axis=1), tuple(name for s in signals for name in series[s.topic].names[s])

    state, state_names = at_ticks(data.state)  # (N, S) float64
    target, action_names = at_ticks(data.commands) if data.commands else (state[1:], state_names)
    if data.action.as_ == "delta" and action_names != state_names:
        pairs = ", ".join(f"{a} - {s}" for a, s in zip(action_names, state_names, strict=False))
        if len(action_names) != len(state_names) or set(action_names) == set(state_names):
            expected = "a delta needs one command for each state, in the same order"
            names = f"commands {', '.join(action_names)}, states {', '.join(state_names)}"
            raise Fault(f"{name}: data.action.as: {expected}; found {names}; list both in one order")
        notes.append(f"deltas are {pairs}")
    episodes, dropped = [], 0
    for start, stop in _runs(fresh):
        if stop - start < 2:
            dropped += stop - start
            continue
        if not data.commands:
            stop -= 1  # the last tick has no next state
        action = target[start:stop] - state[start:stop] if data.action.as_ == "delta" else target[start:stop]
        frames = {camera: newest[topic][start:stop] for camera, topic in data.cameras.items()}
        rows = state[start:stop].astype(np.float32), action.astype(np.float32)
        episodes.append(Episode(ticks[start:stop], *rows, frames))
    if dropped:
        notes.append(f"dropped {dropped} single ticks between gaps")
    if not episodes:
        raise Fault(
            f"{name}: no episode of at least two ticks at {data.fps:g} Hz ({len(ticks)} ticks in the common time"
            f"{''.join('; ' + note for note in notes)}); remove it, or raise data.max_age_ms"
        )
    return Recording(episodes, state_names, action_names, notes, warnings)


def _check_jumps(name: str, series: dict[str, Series], data: Data) -> list[str]:
    """Warnings of steps in the state that no arm can make. Raises Fault for spikes in state or commands."""
    spikes: dict[str, None] = {}
    warnings = []
    for signal in (*data.state, *data.commands):
        rows, names = series[signal.topic].values[signal], series[signal.topic].names[signal]
        is_position = signal.field in ("", "position") and (signal.joints or ".position[" in names[0])
        found = jumps(series[signal.topic].stamps, rows, names) if is_position else ([], [])
        spikes |= dict.fromkeys(f"{name}: {signal.topic}: {spike} and back" for spike in found[0])
        if signal in data.state:  # a command may step
            warnings += [f"{signal.topic}: {step} and stays" for step in found[1]]
    if spikes:
        raise Fault(*(f"{spike}; no arm can: check the driver, cut the recording, or remove it" for spike in spikes))
    advice = "no arm can: was it reset, or does the angle wrap? Cut the recording there, or unwrap the joint"
    return [f"{step}; {advice}" for step in dict.fromkeys(warnings)]


def _grid(name: str, series: dict[str, Series], fps: float) -> np.ndarray:
    """Ticks (N,) int64 ns over the time that all topics share.

    The first is half a tick in: on the beat of a camera of the same rate, jitter would repeat one picture and skip the
    next.
    """
    start = max(one.stamps[0] for one in series.values())
    stop = min(one.stamps[-1] for one in series.values())
    if stop < start:
        first = min(one.stamps[0] for one in series.values())
        spans = "; ".join(
            f"{topic} t+{(one.stamps[0] - first) / 1e9:.3f} to {(one.stamps[-1] - first) / 1e9:.3f} s ({one.clock})"
            for topic, one in sorted(series.items())
        )
        raise Fault(f"{name}: its topics share no time: {spans}; remove the recording")
    count = int((stop - start) * fps / 1e9 + 0.5)
    return start + np.rint((np.arange(count) + 0.5) * (1e9 / fps)).astype(np.int64)


def _unused(series: dict[str, Series]) -> list[str]:
    """Notes on messages of other joints, and on time in which a topic had not begun or had ended."""
    begin = min(one.stamps[0] for one in series.values())
    end = max(one.stamps[-1] for one in series.values())
    topics = sorted(series.items())
    notes = [f"{name}: skipped {one.skipped} messages of other joints" for name, one in topics if one.skipped]
    for name, one in topics:
        for word, lost in (("begins late", one.stamps[0] - begin), ("ends early", end - one.stamps[-1])):
            if lost > WORTH_A_NOTE_NS:
                notes.append(f"{name} {word}: skipped {lost / 1e9:.1f} s of other topics")
    return notes


def _newest(
    series: dict[str, Series], ticks: np.ndarray, data: Data
) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
    """Each topic's newest message (N,) not after each tick; whether all are fresh (N,) bool; notes."""
    newest, fresh, notes = {}, np.ones(len(ticks), bool), []
    for name, one in sorted(series.items()):
        newest[name] = np.searchsorted(one.stamps, ticks, side="right") - 1
        period_ms = np.median(np.diff(one.stamps)) / 1e6 if len(one.stamps) > 1 else 0.0
        max_age_ms = data.max_age_ms.get(name, max(2.5 * period_ms, 1e3 / data.fps))
        old = (ticks - one.stamps[newest[name]]) / 1e6 > max_age_ms
        if one.clock != "header":
            notes.append(f"{name} by {one.clock}")
        if old.any():
            at = (ticks[int(np.argmax(old))] - ticks[0]) / 1e9
            longest = np.diff(one.stamps, append=ticks[-1]).max() / 1e9
            notes.append(
                f"{name} silent for more than {max_age_ms:.0f} ms {len(_runs(old))} times, {old.sum()} ticks, first at "
                f"t+{at:.2f} s, longest {longest:.1f} s"
            )
        fresh &= ~old
    return newest, fresh, notes


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.view(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def read_frames(
    bag: Bag, wanted: dict[str, np.ndarray], size: tuple[int, int], keep: Callable[[str, int, np.ndarray], None]
) -> dict[str, tuple[int, int]]:
    """Decode the wanted message numbers of each topic, increasing, and no others; each topic's height and width in the bag.

    keep(topic, i, RGB (*size, 3) uint8) gets the picture of the i-th wanted number, from several threads, in any order.
    """
    native: dict[str, tuple[int, int]] = {}
    row_of = {topic: {int(number): row for row, number in enumerate(numbers)} for topic, numbers in wanted.items()}

    def decode(message: Message, row: int) -> tuple[Message, tuple[int, int]]:
        try:
            pixels, shape = at_size(message.content(), size)
        except Fault as fault:
            raise fault.at(message.place) from None
        keep(message.topic, row, pixels)
        return message, shape

    def finish(job: Future[tuple[Message, tuple[int, int]]]) -> None:
        message, shape = job.result()
        first = native.setdefault(message.topic, shape)
        if first != shape:
            sizes = f"is {shape[1]}x{shape[0]}, earlier pictures {first[1]}x{first[0]}"
            raise Fault(f"{message.place}: {sizes}; expected one size in a recording; remove it")

    pending: deque[Future[tuple[Message, tuple[int, int]]]] = deque()
    with ThreadPoolExecutor(DECODERS) as pool:
        for message in read_messages(bag, wanted):
            row = row_of[message.topic].get(message.number)
            if row is not None:
                pending.append(pool.submit(decode, message, row))
            if len(pending) > 4 * DECODERS:  # bounds the memory
                finish(pending.popleft())
        while pending:
            finish(pending.popleft())
    return native
