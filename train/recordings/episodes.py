"""A recording as episodes on one grid of ticks: state, action and the newest picture at each tick.

Each tick takes the newest message of each topic that is not after it: what the robot's own node would have seen; its action
is the last command before the next observation. Where a message is too old, the episode is split; nothing is filled in.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from config import Data, Part, Signal
from faults import Fault
from recordings.bags import Bag, Message, read_messages
from recordings.images import encode, jpeg_at_size, view
from recordings.plausibility import Ticks, bunches, echo_age, jumps, period_ns
from recordings.signals import Series, Source, read_series
from recordings.video import Video, codec, rgb

WORTH_A_NOTE_NS = 500_000_000


Shown = tuple[int, bytes, tuple[int, int]]  # a picture: its message's number, its JPEG, its own height and width


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


def cut(name: str, series: dict[Source, Series], data: Data) -> Recording:
    """The episodes of a bag's signals and cameras. Raises Fault if there is none."""
    warnings = [*_check_jumps(name, series, data), *_echoes(series, data)]
    warnings += [f"{one.topic}: {text}" for one in series.values() if (text := bunches(one.stamps))]
    ticks = _grid(name, series, data)
    newest, fresh, notes = _newest(series, ticks, data)
    notes += _unused(series, data)
    state = np.concatenate(
        [series[signal].at(ticks, newest[signal]) for signal in data.state], axis=1
    )  # (N, S) float64
    state_names, action_names = _names(series, data.state), _names(series, data.commands or data.state)
    target = state[1:]  # (N - 1, A): the last tick has no next one
    if data.commands:
        until = _next_observation(series[data.state[0]].stamps[newest[data.state[0]]], 1e9 / data.fps)
        sent = {signal: np.searchsorted(series[signal].stamps, until, side="right") - 1 for signal in data.commands}
        fresh[:-1] &= np.all([at >= 0 for at in sent.values()], axis=0)
        commands = [series[signal].at(ticks[1:], at.clip(0)) for signal, at in sent.items()]
        target = np.concatenate(commands, axis=1)
    if data.action.as_ == "delta" and action_names != state_names:
        pairs = ", ".join(f"{a} - {s}" for a, s in zip(action_names, state_names, strict=False))
        if len(action_names) != len(state_names) or set(action_names) == set(state_names):
            expected = "a delta needs one command for each state, in the same order"
            names = f"commands {', '.join(action_names)}, states {', '.join(state_names)}"
            raise Fault(f"{name}: data.action.as: {expected}; found {names}; list both in one order")
        notes.append(f"deltas are {pairs}")
    episodes, dropped = [], 0
    for start, end in _runs(fresh):
        stop = end - 1
        if stop == start:
            dropped += 1
            continue
        action = target[start:stop] - state[start:stop] if data.action.as_ == "delta" else target[start:stop]
        frames = {camera: series[topic].numbers[newest[topic][start:stop]] for camera, topic in data.cameras.items()}
        rows = state[start:stop].astype(np.float32), action.astype(np.float32)
        episodes.append(Episode(ticks[start:stop], *rows, frames))
    if dropped:
        notes.append(f"dropped {dropped} single ticks between gaps")
    notes = list(dict.fromkeys(notes))
    if not episodes:
        raise Fault(
            f"{name}: no episode of at least two ticks at {data.fps:g} Hz ({len(ticks)} ticks in the common time"
            f"{''.join('; ' + note for note in notes)}); remove it, or raise data.max_age_ms"
        )
    return Recording(episodes, state_names, action_names, notes, list(dict.fromkeys(warnings)))


def _next_observation(seen: np.ndarray, tick_ns: float) -> np.ndarray:
    """When the robot is observed next, (N - 1,) ns: the state after those `seen` (N,); while it repeats, a tick later.

    A controller reads the state, then sends: the answer to an observation is the last command before the next one.
    """
    return np.where(np.diff(seen) > 0, seen[1:], seen[:-1] + round(tick_ns))


def _names(series: dict[Source, Series], signals: tuple[Signal, ...]) -> tuple[str, ...]:
    """The names of all numbers; those that several topics share, such as the joints of two arms, with their topic."""
    names = [(signal.topic, name) for signal in signals for name in series[signal].names]
    count = Counter(name for _, name in names)
    return tuple(name if count[name] == 1 else f"{topic}.{name}" for topic, name in names)


def _check_jumps(name: str, series: dict[Source, Series], data: Data) -> list[str]:
    """Warnings of steps in the state that no arm can make. Raises Fault for spikes in state or commands."""
    spikes: dict[str, None] = {}
    warnings = []
    for signal in (*data.state, *data.commands):
        rows, names = series[signal].rows, series[signal].names
        is_position = signal.field.split(".")[-1] in ("", "position", "positions") and (
            signal.joints or ".position[" in names[0]
        )
        found = jumps(series[signal].stamps, rows, names) if is_position else ([], [])
        spikes |= dict.fromkeys(f"{name}: {signal.topic}: {spike} and back" for spike in found[0])
        if signal in data.state:  # a command may step
            warnings += [f"{signal.topic}: {step} and stays" for step in found[1]]
    if spikes:
        raise Fault(*(f"{spike}; no arm can: check the driver, cut the recording, or remove it" for spike in spikes))
    advice = "no arm can: was it reset, or does the angle wrap? Cut the recording there, or unwrap the joint"
    return [f"{step}; {advice}" for step in dict.fromkeys(warnings)]


def _echoes(series: dict[Source, Series], data: Data) -> list[str]:
    """Warnings of commands that are a state of shortly before: somebody publishes what is measured as a command."""
    lines = []
    for command in data.commands:
        for state in data.state:
            sent, seen = series[command], series[state]
            if sent.plans or len(sent.names) != len(seen.names):
                continue
            order = [seen.names.index(n) for n in sent.names] if set(sent.names) == set(seen.names) else slice(None)
            age = echo_age(sent.stamps, sent.rows, seen.stamps, seen.rows[:, order])
            if age is not None:
                what = f"{command.topic}: the action equals the state, {state.topic}, of {age * 1e3:.0f} ms before"
                advice = "set data.action.from to the topic of the commands, or to next_state"
                lines.append(f"{what}: it is measured, not commanded; {advice}")
    return lines


def _held_ns(one: Series, source: Source, data: Data) -> float:
    """How long the last message of a signal may count by the configuration, in ns; a controller holds its last point."""
    return data.max_age_ms.get(one.topic, np.inf if one.plans else 0.0) * 1e6 if isinstance(source, Signal) else 0.0


def _grid(name: str, series: dict[Source, Series], data: Data) -> np.ndarray:
    """Ticks (N,) int64 ns over the time that all topics share; a signal that may be held does not end it.

    The first is half a tick in: on the beat of a camera of the same rate, jitter would repeat one picture and skip the
    next.
    """
    start = max(one.stamps[0] for one in series.values())
    last = max(int(one.stamps[-1]) for one in series.values())
    stop = int(min(last, *(one.stamps[-1] + _held_ns(one, source, data) for source, one in series.items())))
    if stop < start:
        first = min(one.stamps[0] for one in series.values())
        spans = "; ".join(
            f"{one.topic} t+{(one.stamps[0] - first) / 1e9:.3f} to {(one.stamps[-1] - first) / 1e9:.3f} s ({one.clock})"
            for one in sorted(series.values(), key=lambda one: one.topic)
        )
        raise Fault(f"{name}: its topics share no time: {spans}; remove the recording")
    count = int((stop - start) * data.fps / 1e9 + 0.5)
    return start + np.rint((np.arange(count) + 0.5) * (1e9 / data.fps)).astype(np.int64)


def _unused(series: dict[Source, Series], data: Data) -> list[str]:
    """Notes on messages of other joints, and on time in which a topic had not begun or had ended."""
    begin = min(one.stamps[0] for one in series.values())
    end = max(one.stamps[-1] for one in series.values())
    notes = [
        f"{one.topic}: skipped {one.skipped} messages {'of other joints' if one.names else 'without a picture to begin with'}"
        for one in series.values()
        if one.skipped
    ]
    for source, one in series.items():
        late, early = int(one.stamps[0] - begin), int(end - one.stamps[-1])
        if late > WORTH_A_NOTE_NS:
            notes.append(f"{one.topic} begins late: skipped {late / 1e9:.1f} s of other topics")
        if early > max(WORTH_A_NOTE_NS, _held_ns(one, source, data)):
            held = _holding(source, one, early)
            notes.append(f"{one.topic} ends early: skipped {early / 1e9:.1f} s of other topics{held}")
    return sorted(notes)


def _holding(source: Source, one: Series, silence_ns: float) -> str:
    """The setting that would hold a signal's last message over a silence."""
    setting = "{" + f"{one.topic}: {np.ceil(silence_ns / 1e8) * 100:.0f}" + "}"
    return f" (published on change? data.max_age_ms: {setting} holds it)" if isinstance(source, Signal) else ""


def _newest(
    series: dict[Source, Series], ticks: np.ndarray, data: Data
) -> tuple[dict[Source, np.ndarray], np.ndarray, list[str]]:
    """Each source's newest message (N,) not after each tick; whether all are fresh (N,) bool; notes."""
    newest, fresh, notes = {}, np.ones(len(ticks), bool), []
    for source, one in sorted(series.items(), key=lambda item: item[1].topic):
        newest[source] = np.searchsorted(one.stamps, ticks, side="right") - 1
        since = one.stamps
        usual_ms = max(2.5 * period_ns(one.stamps) / 1e6, 1e3 / data.fps)
        if one.plans:  # a controller holds the last point
            usual_ms, since = np.inf, one.stamps + one.plans.after_ns[one.plans.first[1:] - 1]
            steps = np.diff(one.plans.first)
            span = one.plans.after_ns.max() / 1e9
            notes.append(f"{one.topic}: trajectories of up to {steps.max()} points, {span:.2f} s, sampled a tick later")
        max_age_ms = data.max_age_ms.get(one.topic, usual_ms)
        old = (ticks - since[newest[source]]) / 1e6 > max_age_ms
        if one.clock != "header":
            notes.append(f"{one.topic} by {one.clock}")
        if old.any():
            at = (ticks[int(np.argmax(old))] - ticks[0]) / 1e9
            longest = np.diff(one.stamps, append=max(ticks[-1], one.stamps[-1])).max()
            notes.append(
                f"{one.topic} silent for more than {max_age_ms:.0f} ms {len(_runs(old))} times, {old.sum()} ticks, first at "
                f"t+{at:.2f} s, longest {longest / 1e9:.1f} s{_holding(source, one, longest)}"
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
    parts: dict[str, Part],
    keep: Callable[[str, int, bytes], None],
    decoders: int,
) -> dict[str, tuple[int, int]]:
    """Decode the wanted message numbers of each topic, increasing, and no others; each topic's height and width in the bag.

    keep(topic, i, JPEG of the size) gets the topic's part of the picture of the i-th wanted number, in the order in which they are decoded.
    """
    native: dict[str, tuple[int, int]] = {}
    row_of = {topic: {int(number): row for row, number in enumerate(numbers)} for topic, numbers in wanted.items()}

    videos: dict[str, Video | None] = {}
    kept: Counter[str] = Counter()

    def decode(message: Message, video: Video | None, is_end: bool = False) -> tuple[Message, list[Shown]]:
        """The picture of a message, or the wanted ones that its video shows with it or, at the end, after it."""
        try:
            content = message.content()
            if not video:
                return message, [(message.number, *jpeg_at_size(content, size, parts[message.topic]))]
            frames = video.decode(message.number, None if is_end else content.data.tobytes())
            shown = [(number, frame) for number, frame in frames if number in row_of[message.topic]]
            return message, [
                (n, encode(view(rgb(frame), size, parts[message.topic])), (frame.height, frame.width))
                for n, frame in shown
            ]
        except Fault as fault:
            raise fault.at(message.place) from None

    def finish(job: Future[tuple[Message, list[Shown]]]) -> None:
        message, shown = job.result()
        kept[message.topic] += len(shown)
        for number, jpeg, shape in shown:
            keep(message.topic, row_of[message.topic][number], jpeg)
            first = native.setdefault(message.topic, shape)
            if first != shape:
                sizes = f"is {shape[1]}x{shape[0]}, earlier pictures {first[1]}x{first[0]}"
                raise Fault(f"{message.place}: {sizes}; expected one size in a recording; remove it")

    pending: deque[Future[tuple[Message, list[Shown]]]] = deque()
    last: dict[str, Message] = {}
    with ExitStack() as stack:
        of_pictures = stack.enter_context(ThreadPoolExecutor(decoders))  # OpenCV releases the GIL
        pools: dict[str, ThreadPoolExecutor] = {}
        for message in read_messages(bag, wanted):
            topic = message.topic
            if topic not in videos:
                name = codec(message.content())
                videos[topic] = Video(name) if name else None
                pools[topic] = stack.enter_context(ThreadPoolExecutor(1)) if name else of_pictures  # in order
            if videos[topic] or message.number in row_of[topic]:
                pending.append(pools[topic].submit(decode, message, videos[topic]))
                last[topic] = message
            if len(pending) > 4 * decoders:  # bounds the memory
                finish(pending.popleft())
        pending += [pools[topic].submit(decode, last[topic], video, True) for topic, video in videos.items() if video]
        while pending:
            finish(pending.popleft())
    faults = [
        f"{bag.name}: {topic}: {len(rows) - kept[topic]} messages show no picture; cut the recording, or remove it"
        for topic, rows in row_of.items()
        if kept[topic] < len(rows)
    ]
    if faults:
        raise Fault(*faults)
    return native
