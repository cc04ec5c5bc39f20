"""The page of an inspection: one HTML file that shows what the recordings contain.

Needs matplotlib (`pip install matplotlib`); everything else of inspect_bags.py works without it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import cv2
import numpy as np

from config import Config, Signal
from inspection.topics import GAP_PERIODS, SECOND, Topic
from inspection.verdict import BAD, GOOD, USABLE, Inspection
from page import BLUE, GREY, PALE_BLUE, UNIT, cards, chart, document, picture, section, table
from recordings.images import edges

STYLE = {BAD: "bad", USABLE: "usable", GOOD: "good"}  # the worst first
DETAILED = 20  # recordings to draw, at most
CHARTS = 12  # of joints of a recording, at most
FRAME = (29, 78, 216)
BINS = 250  # of a curve's time: a bin is about one column of pixels


def page(inspections: Sequence[Inspection], config: Config | None, faults: Sequence[str] = ()) -> str:
    """The page of some recordings; `faults` are of files that are no recordings."""
    worst_first = sorted(inspections, key=lambda one: list(STYLE).index(one.verdict))
    drawn = [one for one in worst_first if not one.is_empty][:DETAILED]
    verdicts = [one.verdict for one in inspections]
    figures = {verdict: f"{verdicts.count(verdict)}" for verdict in (GOOD, USABLE, BAD)}
    figures |= {"files that are no recordings": f"{len(faults)}"} if faults else {}
    if config:
        ticks = [ticks for one in inspections for _, ticks in one.episodes()]
        figures[f"episodes, {sum(ticks) / config.data.fps:.0f} s at {config.data.fps:g} Hz"] = f"{len(ticks)}"
    rows = []
    for one in worst_first:
        size = sum(one.files.values()) / 1e6
        rows.append((_in_color(one, escape(one.name)), [f"{one.seconds:.2f}", f"{size:.2f}", _in_color(one)]))
    left = len(inspections) - len(drawn)
    text = f"Not drawn below: {left}; `inspect_bags.py PATH --html FILE` draws one of them." if left else ""
    title = inspections[0].name if len(inspections) == 1 else f"{len(inspections)} recordings"
    headings = {"seconds": "length, s", "size": "size, MB", "text": "verdict"}
    all_faults = [*faults, *(f"{one.name}: {fault}" for one in worst_first for fault in one.faults)]
    parts = [cards(figures), _listed([("bad", fault) for fault in all_faults])]
    parts.append(section("Recordings", text, [], table(headings, rows)))
    return document(f"Inspection of {title}", [*parts, *(_detail(one, config) for one in drawn)])


def _in_color(one: Inspection, text: str = "") -> str:
    return f'<b class="{STYLE[one.verdict]}">{text or one.verdict}</b>'


def _listed(lines: Sequence[tuple[str, str]]) -> str:
    """A list of (class, text)."""
    return f"<ul>{''.join(f'<li class={kind!r}>{escape(text)}</li>' for kind, text in lines)}</ul>" if lines else ""


def _detail(one: Inspection, config: Config | None) -> str:
    """One recording: verdict, reasons, topics, pictures, curves."""
    cameras = config.data.cameras if config else {name: name for name in one.topics}
    wanted = list(one.topics)
    if config:
        signals = (*config.data.state, *config.data.commands)
        wanted = [n for n in dict.fromkeys([*cameras.values(), *(s.topic for s in signals)]) if n in one.topics]
    lines = [("bad", line) for line in one.faults] + [("usable", line) for line in one.warnings]
    headings = {
        "messages": "messages read (declared)",
        "rate": "rate, Hz (slowest second)",
        "gap": "largest gap, s (at)",
        "gaps": "gaps",
        "text": "clock, pictures",
    }
    rows = [(_cell(name, *one.topics[name].types), _cells(one.topics[name])) for name in wanted]
    figures = [
        picture(_framed(shown.pixels, config, camera), f"{camera} at t+{shown.at_s:.2f} s; {_kinds(one.topics[name])}.")
        for camera, name in cameras.items()
        if name in one.topics and (pictures := one.topics[name].pictures)
        for shown in pictures.shown
    ]
    figures += _curves(one, config) if config and one.series else []
    notes = _listed([*lines, *(("note", note) for note in one.notes)])
    return section(f"{one.name}: {one.verdict}", "", figures, notes + table(headings, rows))


def _framed(pixels: np.ndarray, config: Config | None, camera: str) -> np.ndarray:
    """A picture with a frame around the part that the network sees, if that is not all."""
    if not config or camera not in config.data.crop:
        return pixels
    (top, bottom), (left, right) = edges((pixels.shape[0], pixels.shape[1]), config.data.part_of(camera))
    return cv2.rectangle(pixels.copy(), (left, top), (right - 1, bottom - 1), FRAME, 2)


def _cell(first: str = "", *more: str) -> str:
    return escape(first) + "".join(f"<small>{escape(line)}</small>" for line in more if line)


def _cells(topic: Topic) -> list[str]:
    gap, slowest, pictures = topic.largest_gap, topic.slowest_second_hz, topic.pictures
    facts = [_kinds(topic), f"{len(pictures.frozen)} frozen"] if pictures else []
    if pictures and pictures.looked_at:
        facts.append(f"{pictures.black} black of {pictures.looked_at}")
    return [
        _cell(f"{topic.read}", "" if topic.declared is None else f"({topic.declared})"),
        _cell(f"{topic.rate_hz:.4g}" if topic.rate_hz else "", "" if slowest is None else f"({slowest:.0f})"),
        _cell(f"{gap.seconds:.3f}", f"(t+{gap.at_s:.2f} s)") if gap else "",
        f"{len(topic.gaps)}",
        _cell(f"by {topic.clock}", *facts),
    ]


def _kinds(topic: Topic) -> str:
    """Sizes and encodings of a topic's pictures."""
    kinds = topic.pictures.kinds if topic.pictures else {}
    return ", ".join(f"{count} of {kind.replace(' ', ' px ', 1)}" for kind, count in kinds.items())


def _curves(one: Inspection, config: Config) -> Iterator[str]:
    """State and action over the recording's time, one chart for each joint."""
    state = list(_recorded(one, config.data.state))
    action = list(_recorded(one, config.data.commands))
    if one.recording:  # what would be trained on
        ticks = (np.concatenate([episode.ticks for episode in one.recording.episodes]) - one.start_ns) / SECOND
        values = np.concatenate([episode.action for episode in one.recording.episodes])
        action = [(name, ticks, values[:, k]) for k, name in enumerate(one.recording.action_names)]
    by_name = {name: (ticks, values) for name, ticks, values in action}
    spans = [(at, at + ticks / config.data.fps) for at, ticks in one.episodes()]

    def draw(name: str, axis: Any) -> None:
        for i, (start, stop) in enumerate(spans):
            axis.axvspan(start, stop, color=PALE_BLUE, alpha=0.25, linewidth=0, label="" if i else "episode")
        for joint, seconds, column in state:
            if joint == name:
                axis.plot(*thinned(seconds, column, one.seconds), color=GREY, linewidth=3, label="state")
        if name in by_name:
            word = "delta" if config.data.action.as_ == "delta" else "action"
            axis.plot(*thinned(*by_name[name], one.seconds), color=BLUE, linewidth=1.2, label=word)
        axis.set(xlabel="time, s", ylabel=UNIT, xlim=(0, one.seconds or None))

    for name in [*dict.fromkeys([joint for joint, _, _ in state] + list(by_name))][:CHARTS]:
        yield chart(functools.partial(draw, name), f"{name}: state and action, {UNIT}, over time (s).")


def _recorded(one: Inspection, signals: Sequence[Signal]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, seconds, values) of each number of some signals."""
    for signal in signals:
        series = (one.series or {})[signal]
        for k, name in enumerate(series.names):
            yield name, (series.stamps - one.start_ns) / SECOND, series.rows[:, k]


def thinned(seconds: np.ndarray, values: np.ndarray, total: float) -> tuple[list[float], list[float]]:
    """The smallest and the largest value of each of BINS parts of the time; NaN where a gap is."""
    width, pauses = max(total / BINS, 1e-9), np.diff(seconds)
    gaps = pauses > max(GAP_PERIODS * float(np.median(pauses)), width) if len(pauses) else np.zeros(0, bool)
    starts = np.flatnonzero(gaps | (np.diff(np.floor(seconds / width)) > 0)) + 1
    times: list[float] = []
    kept: list[float] = []
    for rows in np.split(np.arange(len(seconds)), starts):
        if rows[0] and gaps[rows[0] - 1]:
            times, kept = [*times, np.nan], [*kept, np.nan]
        ends = sorted({int(rows[values[rows].argmin()]), int(rows[values[rows].argmax()])})
        times, kept = [*times, *seconds[ends]], [*kept, *values[ends]]
    return times, kept
