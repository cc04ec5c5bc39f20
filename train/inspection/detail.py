"""One recording on the page of an inspection: its topics over time, its pictures, its joints, and tables of what was measured."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from config import Config, Signal
from inspection.timeline import Lane, Span, timeline
from inspection.topics import GAP_PERIODS, SECOND, Topic
from inspection.verdict import BAD, GOOD, USABLE, Inspection
from page import BLUE, GREY, PALE_BLUE, UNIT, chart, picture, table

CHARTS = 12  # of joints, at most
IRREGULAR = 0.1  # share of messages after a gap, beyond which a topic has no rate
BINS = 250  # of a curve's time: what lies within one is a single column of pixels


class Curve(NamedTuple):
    """A number over the recording's time."""

    name: str
    seconds: np.ndarray  # (M,) since the first message
    values: np.ndarray  # (M,)


def verdict(one: Inspection) -> str:
    """In its colour."""
    kind = {BAD: "bad", USABLE: "usable", GOOD: "good"}[one.verdict]
    return f'<span class="{kind}">{one.verdict}</span>'


def detail(one: Inspection, config: Config | None, place: str) -> str:
    """A recording in detail."""
    fps = config.data.fps if config else 1.0
    episodes = [(at, at + ticks / fps) for at, ticks in one.episodes()]
    asked = _asked(one, config)
    reasons = "".join(f'<li class="bad">{escape(line)}</li>' for line in one.faults)
    reasons += "".join(f'<li class="usable">{escape(line)}</li>' for line in one.warnings)
    facts = reasons + "".join(f"<li>{escape(fact)}</li>" for fact in _facts(one, config))
    pictures, curves = list(_pictures(one, config)), list(_curves(one, config, episodes))
    parts = [
        f"<h2>{escape(one.name)}: {verdict(one)}</h2><ul>{facts}</ul><h3>Topics over time</h3>",
        timeline([_lane(one, name, config is not None) for name in asked], one.seconds, episodes),
        f'<h3>Pictures</h3><div class="figures pictures">{"".join(pictures)}</div>' if pictures else "",
        f'<h3>State and action</h3><div class="figures">{"".join(curves)}</div>' if curves else "",
        f"<h3>Topics</h3>{_topics(one, asked)}",
        _joints(one, asked),
    ]
    return f'<section class="recording" id="{place}">{"".join(parts)}</section>'


def _asked(one: Inspection, config: Config | None) -> list[str]:
    """The topics to show: those of the configuration, or all that hold a message."""
    if not config:
        return [name for name, topic in one.topics.items() if topic.read]
    data = config.data
    return list(dict.fromkeys([*data.cameras.values(), *(signal.topic for signal in (*data.state, *data.commands))]))


def _facts(one: Inspection, config: Config | None) -> Iterator[str]:
    began = datetime.fromtimestamp(one.start_ns // SECOND, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    size, count = sum(one.files.values()) / 1e6, len(one.files)
    yield f"{one.seconds:.2f} s from {began}; {size:.2f} MB in {count} file{'s' * (count != 1)}"
    yield f"checksums in its storage: {one.checksums}"
    if one.overlap_s:
        yield f"all topics together from {_at(one.overlap_s[0])} to {_at(one.overlap_s[1])}"
    spreads = {f"picture of {camera}": spread for camera, spread in one.state_minus_image_ms.items()}
    spreads |= {f"command on {topic}": spread for topic, spread in one.state_minus_command_ms.items()}
    for what, spread in spreads.items():
        yield (
            f"a tick's state is {abs(spread.median):.1f} ms {'older' if spread.median < 0 else 'newer'} than its {what} "
            f"(median; 95 % within {spread.percentile_95:.1f} ms, all within {spread.greatest:.1f} ms)"
        )
    if one.lag:
        yield f"the state follows the command {one.lag.seconds * 1e3:.0f} ms later, which explains {one.lag.explained:.0%} of its motion"
    if one.idle_s:
        yield f"nothing moves in the first {one.idle_s[0]:.2f} s and the last {one.idle_s[1]:.2f} s of its episodes"
    yield from one.notes
    if left := [name for name, topic in one.topics.items() if topic.read and name not in _asked(one, config)]:
        yield f"not in the configuration, not shown: {', '.join(left)}"
    if empty := [name for name, topic in one.topics.items() if not topic.read]:
        yield f"no message came on {', '.join(empty)}"


def _lane(one: Inspection, name: str, asked_for: bool) -> Lane:
    topic = one.topics.get(name)
    if topic is None or topic.first_s is None or topic.last_s is None:
        return Lane(name, "no message" if topic else "no such topic", [], [])
    gaps = [(gap.at_s, gap.at_s + gap.seconds) for gap in topic.gaps]
    edges = [topic.first_s, *(edge for gap in gaps for edge in gap), topic.last_s]
    messages = list(zip(edges[::2], edges[1::2], strict=True))
    rate, largest = f" at {topic.rate_hz:.4g} Hz" if topic.rate_hz else "", ""
    if topic.gaps and topic.largest_gap:
        largest = f"{topic.largest_gap.seconds:.2f} s at {_at(topic.largest_gap.at_s)}"
    if not asked_for and len(gaps) > IRREGULAR * topic.read:  # events, which come when they come
        return Lane(name, f"{topic.read} messages, not regular, the longest silence {largest}", messages, [])
    said = f"{len(gaps)} gaps, the largest {largest}" if len(gaps) > 1 else f"a gap of {largest}" if gaps else "no gap"
    return Lane(name, f"{topic.read} messages{rate}, {said}", messages, gaps)


def _pictures(one: Inspection, config: Config | None) -> Iterator[str]:
    """The first, the middle and the last picture of each camera."""
    cameras = config.data.cameras if config else {name: name for name in one.topics}
    for camera, topic in cameras.items():
        pictures = one.topics[topic].pictures if topic in one.topics else None
        if not pictures:
            continue
        which = ["first", "middle", "last"] if len(pictures.shown) > 2 else ["first", "last"]
        for order, shown in zip(which, pictures.shown, strict=False):  # a camera of two pictures has no middle one
            yield picture(shown.pixels, f"{camera}: {order}, at {_at(shown.at_s)}; {_kinds(one.topics[topic])}.")


def _curves(one: Inspection, config: Config | None, episodes: Sequence[Span]) -> Iterator[str]:
    """State and action over the recording's time, a chart for each joint."""
    if not config or not one.series:
        return
    state, action = list(_recorded(one, config.data.state)), list(_recorded(one, config.data.commands))
    if one.recording:  # what is trained on
        ticks = _since_begin(one, np.concatenate([episode.ticks for episode in one.recording.episodes]))
        values = np.concatenate([episode.action for episode in one.recording.episodes])
        action = [Curve(name, ticks, values[:, k]) for k, name in enumerate(one.recording.action_names)]
    delta = config.data.action.as_ == "delta"
    pairs: list[dict[str, Curve]]
    if delta or len(state) != len(action):
        alone = zip_longest(
            ({"state": curve} for curve in state), ({"delta" if delta else "action": curve} for curve in action)
        )
        pairs = [one for both in alone for one in both if one]  # side by side
    else:
        named = {curve.name: curve for curve in action}
        same = set(named) == {curve.name for curve in state}  # else they belong together by place
        pairs = [{"state": s, "action": named[s.name] if same else a} for s, a in zip(state, action, strict=True)]

    def draw(pair: dict[str, Curve], axis: Any) -> None:
        for i, (start, stop) in enumerate(episodes):
            axis.axvspan(start, stop, color=PALE_BLUE, alpha=0.25, linewidth=0, label="" if i else "episode")
        for role, curve in pair.items():
            colour, width = (GREY, 3) if role == "state" else (BLUE, 1.2)
            axis.plot(*_thinned(curve, one.seconds), color=colour, linewidth=width, label=role)
        axis.set(xlabel="time, s", ylabel=UNIT, xlim=(0, one.seconds or None))

    for pair in pairs[:CHARTS]:
        names = dict.fromkeys(curve.name for curve in pair.values())
        yield chart(
            functools.partial(draw, pair), f"{' and '.join(names)}: {' and '.join(pair)}, {UNIT}, over time (s)."
        )
    if left := [curve.name for pair in pairs[CHARTS:] for curve in pair.values()]:
        yield f"<p>{len(left)} more are not drawn: {escape(', '.join(left))}.</p>"


def _recorded(one: Inspection, signals: Sequence[Signal]) -> Iterator[Curve]:
    for signal in signals:
        series = (one.series or {})[signal.topic]
        for k, name in enumerate(series.names[signal]):
            yield Curve(name, _since_begin(one, series.stamps), series.values[signal][:, k])


def _at(seconds: float) -> str:
    return f"t{round(seconds, 2) + 0.0:+.2f} s"  # no -0.00


def _since_begin(one: Inspection, stamps: np.ndarray) -> np.ndarray:
    return (stamps - one.start_ns) / SECOND


def _thinned(curve: Curve, seconds: float) -> tuple[list[float], list[float]]:
    """The least and the greatest value of each of BINS parts of the time; a break where nothing came for longer."""
    width, apart = max(seconds / BINS, 1e-9), np.diff(curve.seconds)
    breaks = apart > max(GAP_PERIODS * float(np.median(apart)), width) if len(apart) else np.zeros(0, bool)
    column = np.floor(curve.seconds / width)
    starts = np.flatnonzero(breaks | (np.diff(column) > 0)) + 1
    times: list[float] = []
    values: list[float] = []
    for few in np.split(np.arange(len(column)), starts):
        if few[0] and breaks[few[0] - 1]:
            times, values = [*times, np.nan], [*values, np.nan]
        ends = sorted({int(few[curve.values[few].argmin()]), int(few[curve.values[few].argmax()])})
        times, values = [*times, *curve.seconds[ends]], [*values, *curve.values[ends]]
    return times, values


def _topics(one: Inspection, asked: Sequence[str]) -> str:
    headings = {
        "messages": "messages read (declared)",
        "rate": "rate, Hz (slowest second)",
        "gap": "largest gap, s (at)",
        "delay": "header minus receive, ms (95 %, most)",
        "text": "clock, pictures",
    }
    rows = []
    for topic in (one.topics[name] for name in asked if name in one.topics):
        delay, gap, rate = topic.header_minus_receive_ms, topic.largest_gap, topic.rate_hz
        slowest = "" if topic.slowest_second_hz is None else f"({topic.slowest_second_hz:.0f})"
        cells = [
            _cell(f"{topic.read}", "" if topic.declared is None else f"({topic.declared})"),
            _cell(f"{rate:.4g}" if rate else "", slowest),
            _cell(f"{gap.seconds:.3f}", f"({_at(gap.at_s)})") if gap else "",
            _cell(f"{delay.median:.1f}", f"({delay.percentile_95:.1f}, {delay.greatest:.1f})") if delay else "",
            _cell(*_notes(topic)),
        ]
        rows.append((_cell(topic.name, *topic.types), cells))
    return table(headings, rows)


def _cell(first: str = "", *more: str) -> str:
    return escape(first) + "".join(f"<small>{escape(line)}</small>" for line in more if line)


def _notes(topic: Topic) -> Iterator[str]:
    yield f"by {topic.clock}"
    if topic.not_understood:
        yield "counted only, its type has no usable definition here"
    if topic.in_order is False:
        yield "header stamps run backwards"
    if topic.pictures:
        yield _kinds(topic)
        yield f"{len(topic.pictures.frozen)} frozen"
        if topic.pictures.looked_at:
            yield f"{topic.pictures.black} black of {topic.pictures.looked_at} looked at"


def _kinds(topic: Topic) -> str:
    """Sizes and encodings of a topic's pictures."""
    kinds = topic.pictures.kinds if topic.pictures else {}
    spoken = (re.sub(r"^(\d+)x(\d+) ", r"\1 x \2 px, ", kind) for kind in kinds)
    return ", ".join(
        f"{kind} ({count} of them)" if len(kinds) > 1 else kind
        for kind, count in zip(spoken, kinds.values(), strict=True)
    )


def _joints(one: Inspection, asked: Sequence[str]) -> str:
    headings = {"least": "least", "greatest": "greatest", "range": "range", "fastest": "fastest, a second (at)"}
    parts = []
    for topic in (one.topics[name] for name in asked if name in one.topics):
        rows = [
            (
                escape(joint.name),
                [
                    f"{joint.least:.4g}",
                    f"{joint.greatest:.4g}",
                    f"{joint.greatest - joint.least:.4g}",
                    f"{joint.fastest:.4g} ({_at(joint.fastest_at_s)})",
                ],
            )
            for joint in topic.joints
        ]
        if rows:
            parts.append(f"<h3>Joints of {escape(topic.name)}, {UNIT}</h3>{table(headings, rows)}")
    return "".join(parts)
