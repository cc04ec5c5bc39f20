"""The page of an inspection, in a real browser: what it shows of a whole recording, one with a gap and broken ones."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import needs_browser, seen
from writing import CAMERA, COMMAND, MS, START, STATE, episode, image, joint_state, picture, write

import inspect_bags
from config import Config, load
from inspection import report
from inspection.detail import Curve, _thinned
from inspection.report import page
from inspection.verdict import BAD, GOOD, USABLE, Inspection, inspect
from recordings.bags import find_bags

JOINTS = "joints: [a, b, c]"
UNITS = r"rad\), over time \(s\)\.$|\d+ x \d+ px|length \(s\)\.$"


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
    config = configured(recordings, "training.augment=[color, crop]")
    return page(inspected(recordings, config), config, ["half/metadata.yaml: is broken"])


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(shown: str, width: int, tmp_path: Path) -> None:
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", shown)
    assert [said for said in captions if not re.search(UNITS, said)] == [], "a unit in each"
    there = seen(shown, tmp_path, width)
    # lengths; six draws; three joints of two recordings, three pictures of three
    assert there["pictures"] == len(captions) == 1 + 6 + 3 * 2 + 3 * 3
    text = there["text"]
    for said in (
        GOOD,
        USABLE,
        BAD,
        STATE,
        COMMAND,
        CAMERA,
        "half/metadata.yaml: is broken",
        "cut.mcap: cannot be opened",
    ):
        assert said in text, said
    assert re.search(r"/camera\s*76 messages at 30.3 Hz, a gap of 1\.5\d s at t\+1\.1\d s", text), text
    assert re.search(r"/command\s*no such topic", text)
    assert "silent_camera: usable" in text and "no_command: cannot be trained on" in text and "whole: good" in text


def test_the_gap_is_drawn_where_it_is(shown: str) -> None:
    """In a lane of 1000 units for 4 s."""
    part = shown[shown.index("<h2>silent_camera") :]
    lane = part[part.index(f"<b>{CAMERA}</b>") : part.index(f"<b>{STATE}</b>")]
    bars = {
        kind: re.findall(rf'class="of-{kind}" x="([\d.]+)" y="\d+" width="([\d.]+)"', lane)
        for kind in ("gap", "episode")
    }
    ((begin, width),) = bars["gap"]
    assert float(begin) == pytest.approx(1.19 / 4 * 1000, abs=10) and float(width) == pytest.approx(
        1.52 / 4 * 1000, abs=10
    )
    first, second = [(float(x), float(x) + float(w)) for x, w in bars["episode"]]
    assert first[1] < float(begin) + 30 and second[0] > float(begin) + float(width) - 1, "the episodes stop for it"


def test_any_recording_without_a_configuration(tmp_path: Path) -> None:
    """All its topics; events that come when they come have no gaps."""
    messages = episode(2.0)
    for at in (0.1, 0.11, 0.5, 0.52, 1.9):
        stamp = START + int(at * 1e9)
        messages.append(("/events", "sensor_msgs/msg/JointState", stamp, joint_state(stamp, [0.0, 0.0, 0.0])))
    write(tmp_path / "one", sorted(messages, key=lambda message: message[2]))
    drawn = page(inspected(tmp_path, None), None)
    assert all(f"<b>{topic}</b>" in drawn for topic in (STATE, COMMAND, CAMERA, "/events"))
    assert (
        "5 messages, not regular, the longest silence 1.38 s at t+0.52 s" in drawn and 'class="of-gap" x=' not in drawn
    )
    assert drawn.count("data:image/jpeg") == 3 and "<h1>Inspection of one</h1>" in drawn


def test_of_a_depth_camera_no_picture_is_shown(tmp_path: Path) -> None:
    depth = [
        ("/depth", "sensor_msgs/msg/Image", START + i * 33 * MS, image(START, picture(i), "16UC1")) for i in range(5)
    ]
    write(tmp_path / "one", depth)
    drawn = page(inspected(tmp_path, None), None)
    assert "64 x 48 px, 16UC1" in drawn and "<img" not in drawn


def test_of_many_recordings_the_worst_are_drawn(recordings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "DETAILED", 2)
    config = configured(recordings)
    drawn = page(inspected(recordings, config), config)
    assert re.findall(r'<section class="recording" id="recording-\d"><h2>(\w+)', drawn) == [
        "no_command",
        "silent_camera",
    ]
    assert "2 of 4 are drawn" in drawn and "Not drawn: 1" in drawn


def test_a_hostile_name_is_shown_not_obeyed(tmp_path: Path) -> None:
    write(tmp_path / "<img src=x onerror=alert(1)>", episode(0.5))
    assert "<img src=x" not in page(inspected(tmp_path, None), None)


def test_a_long_curve_keeps_its_peaks_and_breaks() -> None:
    seconds = np.delete(np.arange(100_000) / 100, np.s_[40_000:60_000])
    values = np.sin(seconds)
    values[12_345] = 9.0
    times, kept = _thinned(Curve("a", seconds, values), 1000.0)
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
