"""Building the cache in processes of their own: the same content, the same faults, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from test_dataset import configured, recorded
from writing import CAMERA, MS, START, STATE, image, joint_state, picture, write

import cores
from dataset import build
from dataset.cache import load_dataset
from faults import Fault, NoRoom

TRAIN = Path(build.__file__).parents[1]


def content(cache: Path) -> dict[str, bytes]:
    """Every file of a cache."""
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("[!.]*") if path.is_file()}


def test_processes_build_the_same_and_report_faults_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(tmp_path, 5)
    for broken in (1, 3):
        next((tmp_path / f"bags/episode_{broken}").glob("*.mcap")).write_bytes(b"x")
    skipping = "data.on_bad_bag=skip"
    alone = load_dataset(configured(tmp_path, skipping))
    (tmp_path / "cache").rename(tmp_path / "alone")
    monkeypatch.setattr(build, "WORTH_PROCESSES", 0)
    together = load_dataset(configured(tmp_path, skipping))
    assert content(tmp_path / "cache") == content(tmp_path / "alone")
    assert [line.split(".mcap")[0][-9:] for (line,) in together.skipped] == ["episode_1", "episode_3"]
    assert together.skipped == alone.skipped
    with pytest.raises(Fault) as caught:
        load_dataset(configured(tmp_path, "data.fps=10"))
    assert len(caught.value.args) == 2


def test_a_process_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "WORTH_PROCESSES", 0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(NoRoom, match="episode_0: the process that read it ended with code 1"):
        load_dataset(configured(recorded(tmp_path, 2)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_no_process_and_no_folder(tmp_path: Path, number: signal.Signals) -> None:
    for bag in range(4):
        stamps = [START + i * 33 * MS for i in range(40)]
        joints = [
            (STATE, "sensor_msgs/msg/JointState", t, joint_state(t, [1, 2, i / 100])) for i, t in enumerate(stamps)
        ]
        shots = [
            (CAMERA, "sensor_msgs/msg/Image", t, image(t, picture(i + bag, 480, 640))) for i, t in enumerate(stamps)
        ]
        write(tmp_path / f"bags/{bag}", sorted(joints + shots, key=lambda message: message[2]))
    (tmp_path / "c.yaml").write_text(
        f"data: {{bag_dir: bags, cache_dir: cache, image_size: [48, 64], cameras: {{color: {CAMERA}}}, "
        f"state: [{{topic: {STATE}, joints: [a, b, c]}}]}}"
    )
    command = [sys.executable, str(TRAIN / "train.py"), "--dry-run", "--config", str(tmp_path / "c.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list((tmp_path / "cache").glob("reader-*/[0-9]-*")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    for _ in range(20 if number != signal.SIGKILL else 0):  # impatient users, and torchrun's second one
        time.sleep(0.005)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    _, err = process.communicate(timeout=30)
    codes = {signal.SIGKILL: [-9], signal.SIGINT: [130, -2], signal.SIGTERM: [75]}  # a shell tells both as 130
    assert process.returncode in codes[number], err
    assert "Traceback" not in err
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (left := builders(tmp_path) + list(tmp_path.rglob(".building-*"))):
        time.sleep(0.05)
    assert not left
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "training: 3 recordings, 3 episodes" in done.stdout, done.stderr


def test_a_container_may_have_fewer_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64))
    assert cores.usable_cores() == 64
    for text, expected in (("max 100000\n", 64), ("800000 100000\n", 8), ("50000 100000\n", 1)):
        (tmp_path / "cpu.max").write_text(text)
        assert cores.usable_cores() == expected


def builders(folder: Path) -> list[str]:
    """The processes that build below a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_text()
        except OSError:
            continue
        if "dataset.build" in text and str(folder) in text:
            found.append(text)
    return found
