"""The page of an inspection, in a real browser: what it shows of a whole recording, one with a gap and broken ones."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import needs_browser, seen
from writing import CAMERA, COMMAND, MS, START, STATE, episode, image, picture, write

import inspect_bags
from config import Config, load
from inspection import report
from inspection.report import page, thinned
from inspection.verdict import BAD, GOOD, USABLE, Inspection, inspect
from recordings.bags import find_bags

JOINTS = "joints: [a, b, c]"
UNITS = r"rad\), over time \(s\)\.$|\d+x\d+ px"


def configured(folder: Path, *settings: str) -> Config:
    action = f"data.action.from=[{{topic: {COMMAND}, {JOINTS}}}]"
    state = f"data.state=[{{topic: {STATE}, {JOINTS}}}]"
    cameras = f"data.cameras={{front: {CAMERA}}}"
    return load(None, [f"data.bag_dir={folder}", cameras, state, action, "data.image_size=[48, 64]", *settings])


def inspected(folder: Path, config: Config | None) -> list[Inspection]:
    return [inspect(bag, config, pictures=True) for bag in find_bags(folder)[0]]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole one, one whose camera is silent from 1.2 to 2.7 s, one without a command, one cut short."""
    folder = tmp_path_factory.mktemp("recordings")
    write(folder / "whole", episode(3.0))
    write(
        folder / "silent_camera", [m for m in episode(4.0) if m[0] != CAMERA or not 1200 < (m[2] - START) / MS < 2700]
    )
    write(folder / "no_command", [m for m in episode(2.0) if m[0] != COMMAND])
    (cut,) = write(folder / "cut", episode(1.0)).glob("*.mcap")
    cut.write_bytes(cut.read_bytes()[:9000])
    return folder


@pytest.fixture(scope="module")
def shown(recordings: Path) -> str:
    """The page of the four."""
    config = configured(recordings)
    return page(inspected(recordings, config), config, ["half/metadata.yaml: cannot read"])


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(shown: str, width: int, tmp_path: Path) -> None:
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", shown)
    assert [caption for caption in captions if not re.search(UNITS, caption)] == [], "a unit in each"
    rendered = seen(shown, tmp_path, width)
    # three joints of two recordings, three pictures of three
    assert rendered["pictures"] == len(captions) == 3 * 2 + 3 * 3
    for words in (
        GOOD,
        USABLE,
        BAD,
        STATE,
        COMMAND,
        CAMERA,
        "half/metadata.yaml: cannot read",
        "cut.mcap: damaged at byte",
        "silent_camera: usable",
        "no_command: cannot be trained on",
        "/command: no such topic",
        "silent for 1.5 s from t+1.2 s",
    ):
        assert words in rendered["text"], words
    assert re.search(r"1\.5\d\d\s*\(t\+1\.1\d s\)\s*(gaps\s*)?1\b", rendered["text"]), "the gap and its place"


def test_any_recording_without_a_configuration(tmp_path: Path) -> None:
    write(tmp_path / "one", episode(2.0))
    drawn = page(inspected(tmp_path, None), None)
    assert all(f"<th>{topic}<small>" in drawn for topic in (STATE, COMMAND, CAMERA))
    assert drawn.count("data:image/jpeg") == 3 and "<h1>Inspection of one</h1>" in drawn


def test_no_picture_of_a_depth_camera_is_shown(tmp_path: Path) -> None:
    depth = [
        ("/depth", "sensor_msgs/msg/Image", START + i * 33 * MS, image(START, picture(i), "16UC1")) for i in range(5)
    ]
    write(tmp_path / "one", depth)
    drawn = page(inspected(tmp_path, None), None)
    assert "5 of 64x48 px 16UC1" in drawn and "<img" not in drawn


def test_of_many_recordings_the_worst_are_drawn(recordings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "DETAILED", 2)
    config = configured(recordings)
    drawn = page(inspected(recordings, config), config)
    assert re.findall(r"<h2>(\w+): ", drawn) == ["no_command", "silent_camera"] and "Not drawn below: 2" in drawn


def test_a_hostile_name_is_shown_not_obeyed(tmp_path: Path) -> None:
    write(tmp_path / "<img src=x onerror=alert(1)>", episode(0.5))
    assert "<img src=x" not in page(inspected(tmp_path, None), None)


def test_a_long_curve_keeps_its_peaks_and_breaks() -> None:
    seconds = np.delete(np.arange(100_000) / 100, np.s_[40_000:60_000])
    values = np.sin(seconds)
    values[12_345] = 9.0
    times, kept = thinned(seconds, values, 1000.0)
    assert len(kept) < 600 and np.nanmax(kept) == 9.0 and np.nanmin(kept) == values.min()
    (gap,) = np.flatnonzero(np.isnan(kept))
    assert times[gap - 1] <= 400 and times[gap + 1] >= 600


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspect_bags, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["inspect_bags.py", "nowhere", "--html", "page.html"])
    with pytest.raises(SystemExit):
        inspect_bags.main()
    assert "pip install matplotlib" in capsys.readouterr().err
