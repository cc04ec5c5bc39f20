"""A recording's topics over its time as one drawing of HTML: a lane each, with its messages, its gaps and the episodes.

Not a chart: a lane is as wide as the window and its name stands above it, so that it is read on a phone, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

Span = tuple[float, float]  # from, to: seconds since the recording began
WIDTH, HEIGHT = 1000, 14  # of a lane, in units of its own: it is stretched to the window
SEEN = 4  # units: a shorter gap is drawn as long as this
STYLE = """
.timeline { background: #fff; border: 1px solid #e5e7eb; border-radius: .5rem; padding: .8rem; margin: .6rem 0 }
.lane { margin-bottom: .5rem; font-size: .875rem; line-height: 1.35 } .lane span { color: #4b5563 }
.lane b { margin-right: .4rem } .lane svg { display: block; width: 100%; height: 16px; background: #f3f4f6 }
.of-messages { fill: #1d4ed8 } .of-gap { fill: #dc2626 } .of-episode { fill: #bfdbfe }
.axis { display: flex; font-size: .75rem; color: #4b5563 }
.axis i { flex: none; font-style: normal; text-align: right; border-right: 1px solid #9ca3af; padding-right: 3px }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin-top: .5rem; font-size: .8rem; color: #4b5563 }
.legend svg { width: 10px; height: 10px }
"""


class Lane(NamedTuple):
    """A topic: its name, what to say of it, when its messages come and when they fail to."""

    name: str
    said: str
    messages: Sequence[Span]
    gaps: Sequence[Span]


def timeline(lanes: Iterable[Lane], seconds: float, episodes: Sequence[Span]) -> str:
    """The lanes, one below the other, over the seconds of the recording."""
    drawn = ""
    for lane in lanes:
        marks = _bars("of-episode", episodes, seconds, 0, 1)
        marks += _bars("of-messages", lane.messages, seconds, 4, 1) + _bars("of-gap", lane.gaps, seconds, 1, SEEN)
        drawn += (
            f'<div class="lane"><div><b>{escape(lane.name)}</b><span>{escape(lane.said)}</span></div>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(lane.name)} over time: {escape(lane.said)}">{marks}</svg></div>'
        )
    return f'<div class="timeline">{drawn}{_axis(seconds)}{_legend(bool(episodes))}</div>'


def _bars(kind: str, spans: Sequence[Span], seconds: float, top: int, least: float) -> str:
    """Rectangles of at least that width, those that would touch as one."""
    scale = WIDTH / max(seconds, 1e-9)
    bars: list[list[float]] = []
    for start, stop in sorted(spans):
        begin = min(max(start * scale, 0), WIDTH - least)
        end = min(max(stop * scale, begin + least), WIDTH)
        if bars and begin < bars[-1][1] + 0.2:
            bars[-1][1] = max(bars[-1][1], end)
        else:
            bars.append([begin, end])
    return "".join(
        f'<rect class="{kind}" x="{begin:.1f}" y="{top}" width="{end - begin:.1f}" height="{HEIGHT - 2 * top}"/>'
        for begin, end in bars
    )


def _axis(seconds: float) -> str:
    """Round times below the lanes, each at the right end of its box."""
    steps = (digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5))
    step = next((step for step in steps if seconds <= 6 * step), seconds)
    times = [step * i for i in range(1, int(seconds / step + 1e-6) + 1)] if step else []
    boxes = "".join(f'<i style="width:{100 * step / seconds:.3f}%">{time:g} s</i>' for time in times)
    return f'<div class="axis">{boxes}</div>'


def _legend(episodes: bool) -> str:
    shown = [("of-messages", "messages"), ("of-gap", "gap")] + [("of-episode", "episode")] * episodes
    marks = "".join(
        f'<span><svg viewBox="0 0 10 10"><rect class="{kind}" width="10" height="10"/></svg> {said}</span>'
        for kind, said in shown
    )
    return f'<div class="legend">{marks}<span>over the seconds since the recording began</span></div>'
