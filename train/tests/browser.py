"""A page in a real headless browser, at a width: what it measures there, and whether it stands alone and nothing is cut."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no browser here: apt-get install chromium")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--allow-file-access-from-files",
]
MEASURE = """<body style="margin:0"><iframe id="f" src="page.html" style="border:0; height:900px; width:WIDTHpx"></iframe>
<script>
f.onload = () => { const d = f.contentDocument, all = [...d.body.querySelectorAll("*")];
  document.title = JSON.stringify({
    inner: f.contentWindow.innerWidth, scroll: d.documentElement.scrollWidth, pictures: d.images.length,
    broken: [...d.images].filter(i => !i.naturalWidth).length, right: Math.max(...all.map(e => e.getBoundingClientRect().right)),
    cut: all.filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != "inline").map(e => e.outerHTML.slice(0, 80)),
    text: d.body.innerText }) }
</script>"""


def seen(page: str, folder: Path, width: int) -> dict[str, Any]:
    """What a browser shows of a page: its visible text and the number of its pictures.

    Asserts that the page needs nothing from outside, that all pictures load and that nothing is wider than the window.
    """
    assert not re.search(r"""(src|href)=["'](?!data:|#)|url\(|@import|<link|<script""", page), "it stands alone"
    (folder / "page.html").write_text(page)
    (folder / "frame.html").write_text(MEASURE.replace("WIDTH", str(width)))  # no window is narrower than 500 pixels
    arguments = [f"--user-data-dir={folder}/profile", "--window-size=1280,900", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *QUIET, *arguments, f"file://{folder}/frame.html"], capture_output=True, text=True, timeout=90
    )
    found = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert found, done.stderr[-2000:]
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    assert measured["inner"] == width and measured["broken"] == 0, measured
    assert measured["scroll"] <= width and measured["right"] <= width and not measured["cut"], measured
    return measured
