"""A recording as episodes on one grid of ticks: state, action and which picture was the newest.

At each tick the newest message of each topic that is not after it is taken: what the robot's own node would have seen.
Where one is too old the episode is split, never filled in.
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
from recordings.plausibility import Ticks
from recordings.signals import Series, jumps, read_series

WORTH_SAYING_NS = 500_000_000
DECODERS = 2  # threads that decode pictures; OpenCV lets go of the interpreter while it does


class Episode(NamedTuple):
    """N ticks without a gap."""

    ticks: np.ndarray  # (N,) int64, ns
    state: np.ndarray  # (N, S) float32, the robot's units
    action: np.ndarray  # (N, A) float32
    frames: dict[str, np.ndarray]  # camera: (N,) int64, the number of its message within the bag


class Recording(NamedTuple):
    """The episodes of one bag and what there is to say of them."""

    episodes: list[Episode]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    notes: list[str]  # clocks, splits and what was dropped, in words
    warnings: list[str]  # what the messages show, and the ticks no longer do

    def ticks(self, data: Data) -> Ticks:
        """Its episodes, one after the other, for plausibility."""
        state = np.concatenate([episode.state for episode in self.episodes])
        action = np.concatenate([episode.action for episode in self.episodes])
        return Ticks(
            state,
            action + state if data.action.as_ == "delta" else action,
            {camera: np.concatenate([episode.frames[camera] for episode in self.episodes]) for camera in data.cameras},
            [len(episode.state) for episode in self.episodes],
            self.state_names,
            self.action_names,
        )


def read_recording(bag: Bag, data: Data) -> Recording:
    """The episodes of a bag. Raises Fault with all that is wrong with it."""
    return cut(bag.name, read_series(bag, {*data.state, *data.commands}, set(data.cameras.values())), data)


def cut(name: str, series: dict[str, Series], data: Data) -> Recording:
    """The episodes of a bag's topics. Raises Fault where there is none."""
    commands = data.commands
    found = [jumps(series[signal.topic], signal) for signal in dict.fromkeys((*data.state, *commands))]
    if spikes := [spike for some, _ in found for spike in some]:
        advice = "and back; no arm can: its driver or the file is at fault: cut the recording, or leave it out"
        raise Fault(*(f"{name}: {spike} {advice}" for spike in spikes))
    advice = (
        "and stays; no arm can: was it reset, or is it a turn of 2 pi? Cut the recording there, or unwrap the joint"
    )
    warnings = [f"{step} {advice}" for _, some in found[: len(data.state)] for step in some]  # a command may step
    ticks = _grid(name, series, data.fps)
    newest, fresh, notes = _newest(series, ticks, data)
    notes += _left_out(series)

    def gather(signals: tuple[Signal, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
        rows = [series[s.topic].values[s][newest[s.topic]] for s in signals]
        return np.concatenate(rows, axis=1), tuple(name for s in signals for name in series[s.topic].names[s])

    state, state_names = gather(data.state)  # (N, S) float64
    target, action_names = gather(commands) if commands else (state[1:], state_names)
    if data.action.as_ == "delta" and target.shape[1] != state.shape[1]:
        raise Fault(
            f"{name}: data.action.as: a delta needs as many commands as states; found {target.shape[1]} "
            f"({', '.join(action_names)}) for {state.shape[1]} ({', '.join(state_names)})"
        )
    if data.action.as_ == "delta" and action_names != state_names:
        if set(action_names) == set(state_names):
            raise Fault(
                f"{name}: data.action.as: a delta takes the state from the command, place by place; found commands of "
                f"{', '.join(action_names)} and a state of {', '.join(state_names)}; give both in one order"
            )
        pairs = ", ".join(f"{a} - {s}" for a, s in zip(action_names, state_names, strict=True))
        notes.append(f"deltas are {pairs}")
    episodes, dropped = [], 0
    for start, stop in _runs(fresh):
        if stop - start < 2:
            dropped += stop - start
            continue
        if not commands:
            stop -= 1  # the last tick has no next state
        action = target[start:stop] - state[start:stop] if data.action.as_ == "delta" else target[start:stop]
        frames = {camera: newest[topic][start:stop] for camera, topic in data.cameras.items()}
        episodes.append(
            Episode(ticks[start:stop], state[start:stop].astype(np.float32), action.astype(np.float32), frames)
        )
    if dropped:
        notes.append(f"{dropped} lone ticks between gaps dropped")
    if not episodes:
        raise Fault(
            f"{name}: holds no episode of at least two ticks at {data.fps:g} Hz ({len(ticks)} in the time that all topics "
            f"share{''.join('; ' + note for note in notes)}); leave it out, or allow older messages by data.max_age_ms"
        )
    return Recording(episodes, state_names, action_names, notes, warnings)


def _grid(name: str, series: dict[str, Series], fps: float) -> np.ndarray:
    """Ticks (N,) int64 ns over the time that all topics share.

    The first comes half a tick in: on the beat of a camera at the same rate, jitter would show one picture twice and
    skip the next.
    """
    start = max(one.stamps[0] for one in series.values())
    stop = min(one.stamps[-1] for one in series.values())
    if stop < start:
        first = min(one.stamps[0] for one in series.values())
        spans = "; ".join(
            f"{topic} t+{(one.stamps[0] - first) / 1e9:.3f} to {(one.stamps[-1] - first) / 1e9:.3f} s ({one.clock})"
            for topic, one in sorted(series.items())
        )
        raise Fault(f"{name}: its topics share no time: {spans}; leave the recording out")
    count = int((stop - start) * fps / 1e9 + 0.5)
    return start + np.rint((np.arange(count) + 0.5) * (1e9 / fps)).astype(np.int64)


def _left_out(series: dict[str, Series]) -> list[str]:
    """What is not used: messages of other joints, and the time in which a topic had not begun, or had ended."""
    begin = min(one.stamps[0] for one in series.values())
    end = max(one.stamps[-1] for one in series.values())
    notes = [
        f"{topic}: {one.others} messages are of other joints alone, and left out"
        for topic, one in sorted(series.items())
        if one.others
    ]
    for topic, one in sorted(series.items()):
        for word, lost in (("begins late", one.stamps[0] - begin), ("ends early", end - one.stamps[-1])):
            if lost > WORTH_SAYING_NS:
                notes.append(f"{topic} {word}: {lost / 1e9:.1f} s of other topics are left out")
    return notes


def _max_age_ms(topic: str, one: Series, data: Data) -> float:
    period = np.median(np.diff(one.stamps)) / 1e6 if len(one.stamps) > 1 else 0.0
    return data.max_age_ms.get(topic, max(2.5 * period, 1e3 / data.fps))


def _newest(
    series: dict[str, Series], ticks: np.ndarray, data: Data
) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
    """For each topic the newest message (N,) not after each tick; whether all are fresh (N,) bool; notes."""
    newest, fresh, notes = {}, np.ones(len(ticks), bool), []
    for topic, one in sorted(series.items()):
        newest[topic] = np.searchsorted(one.stamps, ticks, side="right") - 1
        max_age = _max_age_ms(topic, one, data)
        old = (ticks - one.stamps[newest[topic]]) / 1e6 > max_age
        if one.clock != "header":
            notes.append(f"{topic} by {one.clock}")
        if old.any():
            at = (ticks[int(np.argmax(old))] - ticks[0]) / 1e9
            notes.append(
                f"{topic} silent for more than {max_age:.0f} ms {len(_runs(old))} times, {old.sum()} ticks, first at t+{at:.2f} s, "
                f"the longest time {np.diff(one.stamps, append=ticks[-1]).max() / 1e9:.1f} s"
            )
        fresh &= ~old
    return newest, fresh, notes


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.view(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def read_frames(
    bag: Bag,
    wanted: dict[str, np.ndarray],
    size: tuple[int, int],
    keep: Callable[[str, int, np.ndarray], None],
) -> dict[str, tuple[int, int]]:
    """Decode the wanted message numbers of each topic, rising, and no other picture; each topic's height and width in the bag.

    keep(topic, i, RGB (*size, 3) uint8) gets the picture of its i-th wanted number, from several threads and in any order.
    """
    native: dict[str, tuple[int, int]] = {}
    row_of = {topic: {int(number): row for row, number in enumerate(numbers)} for topic, numbers in wanted.items()}

    def decode(message: Message, row: int) -> tuple[Message, tuple[int, int]]:
        pixels, shape = at_size(message.content(), message.place, size)
        keep(message.topic, row, pixels)
        return message, shape

    def finish(job: Future[tuple[Message, tuple[int, int]]]) -> None:
        message, shape = job.result()
        first = native.setdefault(message.topic, shape)
        if first != shape:
            raise Fault(
                f"{message.place}: is {shape[1]}x{shape[0]}, the pictures before it {first[1]}x{first[0]}; "
                "expected one size in a recording: leave it out"
            )

    count = dict.fromkeys(wanted, 0)
    pending: deque[Future[tuple[Message, tuple[int, int]]]] = deque()
    with ThreadPoolExecutor(DECODERS) as pool:
        for message in read_messages(bag, wanted):
            number, count[message.topic] = count[message.topic], count[message.topic] + 1
            row = row_of[message.topic].get(number)
            if row is not None:
                pending.append(pool.submit(decode, message, row))
            if len(pending) > 4 * DECODERS:  # bounds the memory
                finish(pending.popleft())
        while pending:
            finish(pending.popleft())
    return native
