"""The page of an inspection: one HTML file, without outside references, on which a person sees what the recordings hold.

Needs matplotlib (`pip install matplotlib`); everything else that inspect_bags.py says comes without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from config import Config
from faults import Fault
from inspection.detail import detail, verdict
from inspection.timeline import STYLE as TIMELINE
from inspection.verdict import BAD, GOOD, USABLE, Inspection
from page import BLUE, PAGE, cards, chart, picture, section, table
from recordings.images import resize

WORST_FIRST = (BAD, USABLE, GOOD)
DETAILED = 20  # recordings to draw, at most
LINES = 12  # of faults or warnings of a recording that are seen at once
DRAWS = 6  # of an augmented picture
STYLE = """
ul { margin: .2rem 0 .8rem; padding-left: 1.2rem; max-width: 110ch } li { margin: .15rem 0 } summary { cursor: pointer }
.bad { color: #b91c1c } .usable { color: #b45309 } .good { color: #15803d } .bad, .usable, .good { font-weight: 600 }
li.bad, li.usable { font-weight: 400 }
.recording { border-top: 3px solid #e5e7eb; margin-top: 2.5rem }
a { color: #1d4ed8 } .text { text-align: left } small { display: block; color: #6b7280; font-size: .8rem; font-weight: 400 }
.pictures { grid-template-columns: repeat(3, 1fr) }
@media (min-width: 801px) { tbody th { min-width: 18rem } tbody td, tbody th { vertical-align: top } }
@media (max-width: 800px) {
  .cards { grid-template-columns: 1fr 1fr } .pictures { gap: .4rem } .pictures figure { padding: .3rem }
  .pictures figcaption { font-size: .75rem } tr { column-gap: .8rem } td.text { grid-column: 1 / -1 } td:empty { display: none }
}
"""


def page(found: Sequence[Inspection], config: Config | None, faults: Sequence[str] = ()) -> str:
    """The page of some recordings; `faults` are of files that could not be told to be one."""
    drawn = sorted(filter(_holds_anything, found), key=lambda one: WORST_FIRST.index(one.verdict))[:DETAILED]
    places = {id(one): f"recording-{place}" for place, one in enumerate(drawn)}
    title = f"Inspection of {found[0].name if len(found) == 1 else f'{len(found)} recordings'}"
    broken = {"Not a recording as it stands": faults}
    body = [
        f"<h1>{escape(title)}</h1>",
        _cards(found, config, faults),
        _told("fault", "bad", broken | {one.name: one.faults for one in found}, " to mend first"),
        _told("warning", "usable", {one.name: one.warnings for one in found}),
        _lengths(found, config),
        _overview(found, config, places),
        _augmented(found, config) if config and config.training.augment else "",
        *(detail(one, config, places[id(one)]) for one in drawn),
    ]
    return PAGE.substitute(title=escape(title), style=TIMELINE + STYLE, body="\n".join(filter(None, body)))


def _cards(found: Sequence[Inspection], config: Config | None, faults: Sequence[str]) -> str:
    verdicts = [one.verdict for one in found]
    shown = {
        f"recordings, {_duration(sum(one.seconds for one in found))}": f"{len(found)}",
        **{verdict: f"{verdicts.count(verdict)}" for verdict in (GOOD, USABLE, BAD)},
    }
    if faults:
        shown["faults of what is not a recording as it stands"] = f"{len(faults)}"
    if config:
        lengths = [ticks / config.data.fps for one in found for _, ticks in one.episodes()]
        shown[f"episodes to train on, {_duration(sum(lengths))} at {config.data.fps:g} Hz"] = f"{len(lengths)}"
    return cards(shown)


def _told(one: str, kind: str, told: dict[str, Sequence[str]], todo: str = "") -> str:
    """What is wrong, by recording; nothing where nothing is."""
    told = {name: lines for name, lines in told.items() if lines}
    if not told:
        return ""
    parts = []
    for name, lines in told.items():
        items = [f"<li>{escape(line)}</li>" for line in lines]
        more = f"<details><summary>{len(items) - LINES} more</summary><ul>{''.join(items[LINES:])}</ul></details>"
        parts.append(f"<h3>{escape(name)}</h3><ul>{''.join(items[:LINES])}</ul>{more if items[LINES:] else ''}")
    more = f"<details><summary>{len(parts) - LINES} more recordings</summary>{''.join(parts[LINES:])}</details>"
    count = sum(map(len, told.values()))
    return (
        f'<section><h2 class="{kind}">{count} {one}{"s" * (count > 1)}{todo}</h2>'
        f"{''.join(parts[:LINES])}{more if parts[LINES:] else ''}</section>"
    )


def _holds_anything(one: Inspection) -> bool:
    return any(topic.read for topic in one.topics.values())


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _lengths(found: Sequence[Inspection], config: Config | None) -> str:
    """How long the episodes are; without a configuration the recordings."""
    what, lengths = "recordings", [one.seconds for one in found if _holds_anything(one)]
    if config:
        what, lengths = "episodes", [ticks / config.data.fps for one in found for _, ticks in one.episodes()]
    if len(lengths) < 2:
        return ""

    def draw(axis: Any) -> None:
        axis.set_axisbelow(True)
        axis.hist(lengths, bins=min(30, max(5, len(lengths))), color=BLUE, edgecolor="white", linewidth=0.5)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set(xlabel="length, s", ylabel=what)

    text = f"The shortest of {len(lengths)} {what} takes {min(lengths):.2f} s, the median {np.median(lengths):.2f} s, the longest {max(lengths):.2f} s."
    return section("Lengths", text, [chart(draw, f"Number of {what} by their length (s).")])


def _overview(found: Sequence[Inspection], config: Config | None, places: dict[int, str]) -> str:
    headings = {
        "seconds": "length, s",
        "episodes": "episodes",
        "topics": "topics",
        "size": "size, MB",
        "text": "verdict",
    }
    if not config:
        del headings["episodes"]
    rows = []
    for one in found:
        name = escape(one.name)
        cells = {
            "seconds": f"{one.seconds:.2f}",
            "episodes": f"{len(one.episodes())}",
            "topics": f"{len(one.topics)}",
            "size": f"{sum(one.files.values()) / 1e6:.2f}",
            "text": verdict(one),
        }
        linked = f'<a href="#{places[id(one)]}">{name}</a>' if id(one) in places else name
        rows.append((linked, [cells[kind] for kind in headings]))
    text, left = "", sum(map(_holds_anything, found)) - len(places)
    if left:
        text = (
            f"{len(places)} of {len(found)} are drawn below: those that cannot be trained on, then those with warnings, then the "
            f"first others. Not drawn: {left}; `inspect_bags.py PATH --html FILE` draws one of them."
        )
    return section("Recordings", text, [], table(headings, rows))


def _augmented(found: Sequence[Inspection], config: Config) -> str:
    """What training.augment does to the first pictures of the first recording that has one of each camera."""
    cameras = config.data.cameras
    names = ", ".join(config.training.augment)
    for one in found:
        shown = [one.topics[t].pictures for t in cameras.values() if t in one.topics]
        first = [pictures.shown[0].pixels for pictures in shown if pictures and pictures.shown]
        if cameras and len(first) == len(cameras):
            break
    else:
        return section("Augmentation", f"training.augment: {names}; no recording holds a picture of each camera.", [])
    import torch

    from dataset.augment import Augment  # which takes torchvision

    height, width = config.data.image_size
    try:
        sample = torch.from_numpy(np.stack([resize(pixels, config.data.image_size) for pixels in first]))
        drawn = Augment(config.training.augment, config.data.image_size).drawn(sample, DRAWS).numpy()
    except Fault as fault:
        return section("Augmentation", str(fault), [])
    figures = [
        picture(
            drawn[n, c],
            f"{camera}, {width} x {height} px, {f'augmented, draw {n} of {DRAWS - 1}' if n else 'as it is'}.",
        )
        for c, camera in enumerate(cameras)
        for n in range(DRAWS)
    ]
    text = f"What training.augment = {names} does to the first pictures of {one.name}: what the policy needs must still be seen."
    return section("Augmentation", text, [], f'<div class="figures pictures">{"".join(figures)}</div>')
