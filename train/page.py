"""The look of both reports: a page in one HTML file, cards, tables, charts, pictures. Imports no room."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from string import Template
from typing import Any

import cv2
import numpy as np

UNIT = "as recorded (joints: rad)"
GREY, BLACK, BLUE, PALE_BLUE = "#9ca3af", "#111827", "#1d4ed8", "#93c5fd"
GREEN, ORANGE, RED, PINK = "#16a34a", "#ea580c", "#dc2626", "#be185d"
STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "report"}

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: #111827;
  background: #f9fafb; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: .5rem 0 } h2 { font-size: 1.2rem; margin: 2.2rem 0 .3rem } p { margin: .3rem 0 .8rem; max-width: 75ch }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
.cards, .figures { display: grid; gap: 1rem; align-items: start; margin: .6rem 0 }
.figures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); align-items: stretch }
.card, figure, .table { background: #fff; border: 1px solid #e5e7eb; border-radius: .5rem; padding: .8rem; margin: 0 }
figure img { display: block; width: 100%; height: auto }
figcaption, .card { color: #4b5563; font-size: .875rem }
figcaption { margin-top: .4rem }
.card b { display: block; color: #111827; font-size: 1.5rem; line-height: 1.3 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .25rem .5rem; text-align: right; border-top: 1px solid #e5e7eb; vertical-align: bottom }
thead th { border: 0; color: #4b5563; font-weight: 600 }
th:first-child { text-align: left }
td.policy { color: #1d4ed8; font-weight: 600 }
@media (max-width: 800px) {
  thead { display: none } table, tbody { display: block }
  tr { display: grid; grid-template-columns: 1fr 1fr; border-top: 1px solid #e5e7eb; padding: .4rem 0 }
  tr th { grid-column: 1 / -1 } th, td { border: 0; text-align: left; padding: .1rem 0 }
  td::before { content: attr(data-of); display: block; color: #6b7280; font-size: .75rem; font-weight: 400 }
}
.bad { color: #b91c1c } .usable { color: #b45309 } .good { color: #15803d } .text { text-align: left }
ul { margin: .2rem 0 .8rem; padding-left: 1.2rem } small { display: block; color: #6b7280; font-size: .8rem }
</style></head><body>
<h1>$title</h1>
$body
</body></html>
""")


def document(title: str, parts: Iterable[str]) -> str:
    """The page: a title, which is escaped, and parts that are HTML."""
    return PAGE.substitute(title=escape(title), body="\n".join(parts))


def section(title: str, text: str, figures: Iterable[str], before: str = "") -> str:
    """A section: title and text, which are escaped; then HTML: `before`, and a grid of figures."""
    grid = "".join(figures)
    grid = f'<div class="figures">{grid}</div>' if grid else ""
    paragraph = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{paragraph}{before}{grid}</section>"


def cards(shown: Mapping[str, str]) -> str:
    """Key figures, large, above their captions: {caption: figure}; both are escaped."""
    each = "".join(f'<div class="card"><b>{escape(figure)}</b>{escape(text)}</div>' for text, figure in shown.items())
    return f'<div class="cards">{each}</div>'


def table(headings: Mapping[str, str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table: headings {class: text}, which are escaped; rows of a name and its cells, which are HTML.

    A narrow window shows each row as a card.
    """
    body = ""
    for name, values in rows:
        body += f"<tr><th>{name}</th>"
        for (kind, heading), value in zip(headings.items(), values, strict=True):
            body += f'<td class="{kind}" data-of="{escape(heading)}">{value}</td>'
        body += "</tr>"
    head = "".join(f'<th class="{kind}">{escape(heading)}</th>' for kind, heading in headings.items())
    return f'<div class="table"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def chart(draw: Callable[[Any], None], caption: str) -> str:
    """A figure with one plot, legible at 300 to 600 pixels."""
    import matplotlib
    from matplotlib.figure import Figure

    content = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        drawing = Figure(layout="constrained")
        axis = drawing.add_subplot()
        draw(axis)
        axis.grid(alpha=0.25)
        labels = axis.get_legend_handles_labels()[1]
        columns = 3 if max(map(len, labels), default=0) <= 20 else 2
        drawing.set_size_inches(4.6, 2.8 + 0.17 * -(-len(labels) // columns))
        if labels:  # outside the plot
            drawing.legend(loc="outside upper left", ncols=columns, fontsize=8, frameon=False)
        drawing.savefig(content, format="svg", metadata={"Date": None})
    return _figure("svg+xml", content.getvalue(), caption)


def picture(pixels: np.ndarray, caption: str) -> str:
    """A figure of (H, W, 3) uint8 RGB."""
    encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
    return _figure("jpeg", encoded.tobytes(), caption)


def _figure(kind: str, content: bytes, caption: str) -> str:
    source, caption = f"data:image/{kind};base64,{base64.b64encode(content).decode()}", escape(caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
