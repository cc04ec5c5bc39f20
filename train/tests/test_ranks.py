"""Training in several processes under torchrun: the same result as one with their whole batch, and one end."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_dataset import recorded
from test_train import SCRIPT, logged, tiny, trained

from act_model import IMAGENET_WEIGHTS, ResNet18

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
# few steps: rounding differs, and sooner or later a ReLU or the sign of an error falls to the other side
SETTINGS = ("model.dropout=0", "training.steps=6", "training.save_every=3", "training.log_every=1")
QUICK = (*SETTINGS, "data.cameras={}", "training.steps=100000")


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Two processes that train."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def run(*arguments: str | Path) -> str:
    process = start(*arguments)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def children(process: subprocess.Popen[str]) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in map(int, found) if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the frozen norms, which only the first process loads: the other must get them."""
    file = tmp_path / "torch/hub/checkpoints" / Path(IMAGENET_WEIGHTS).name
    file.parent.mkdir(parents=True)
    weights = ResNet18().state_dict()
    torch.save({name: t + 0.1 if "running_mean" in name else t for name, t in weights.items()}, file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setitem(ENVIRONMENT, "TORCH_HOME", str(tmp_path / "torch"))
    path = tiny(recorded(tmp_path), *SETTINGS, "data.validation_fraction=0", "model.pretrained_backbone=true")
    one = trained(path, f"output_dir={tmp_path}/one", "training.batch_size=4")
    out = run("--config", path, f"output_dir={tmp_path}/two", "training.batch_size=2")
    assert out.count("training: ") == 1 and out.count("policy: ") == 1, "only the first prints"
    for before, after in (("one", "one_then_two"), ("two", "two_then_one")):
        shutil.copytree(tmp_path / before, tmp_path / after)
        shutil.rmtree(tmp_path / after / one.name)
    trained(path, f"output_dir={tmp_path}/two_then_one", "training.batch_size=4")
    out = run("--config", path, f"output_dir={tmp_path}/one_then_two", "training.batch_size=2")
    assert "resuming from" in out and "checkpoint_000003" in out
    expected = load_file(one / "pretrained_model/model.safetensors")
    for name in ("two", "one_then_two", "two_then_one"):
        for ours, theirs in zip(logged(tmp_path / name), logged(tmp_path / "one"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), f"the loss curve of {name}"
        weights = load_file(tmp_path / name / one.name / "pretrained_model/model.safetensors")
        worst = max((expected[key] - weights[key]).abs().max().item() for key in expected)
        assert worst < 1e-5, f"the weights of {name} differ by {worst}"


def test_a_stop_of_one_stops_all_at_the_same_step(tmp_path: Path) -> None:
    path = tiny(recorded(tmp_path), *QUICK)
    process = start("--config", path)
    wait_for(tmp_path / "run/checkpoint_000003", process)
    os.kill(children(process)[-1], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    stopped = re.findall(r"stopped at step (\d+); run the same command to resume from (\S+)", err)
    assert len(stopped) == 2 and stopped[0] == stopped[1] and Path(stopped[0][1]).exists(), err
    assert "exitcode  : 75" in err and "most recent call last" not in re.split(r"\nE\d{4} ", err)[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_other(tmp_path: Path, victim: int) -> None:
    path = tiny(recorded(tmp_path), *QUICK)
    process = start("--config", path)
    wait_for(tmp_path / "run/checkpoint_000003", process)
    os.kill(children(process)[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert f"process {1 - victim} of 2 ends: " in err and ("lost another process" in err or "process 0 ended" in err), (
        err
    )


def test_a_fault_of_one_ends_the_other_with_its_reason(tmp_path: Path) -> None:
    path = tiny(recorded(tmp_path), *SETTINGS, "training.steps=4000")
    run("--config", path, "--dry-run")
    process = start("--config", path, "training.save_every=2", "training.keep_checkpoints=20")
    wait_for(tmp_path / "run/checkpoint_000004", process)
    for frames in (tmp_path / "cache").rglob("color.jpegs"):
        os.truncate(frames, 0)
    _, err = process.communicate(timeout=60)
    assert re.search(r"error: \S+color.jpegs: is truncated", err), err
    assert re.search(r"process [01] of 2 ends: process [01]: Fault: \S+color.jpegs: is truncated", err), err


def test_a_fault_before_training_is_printed_once(tmp_path: Path) -> None:
    process = start("--config", tiny(tmp_path, "data.bag_dir=/nowhere"))
    _, err = process.communicate(timeout=60)
    assert err.count("error: /nowhere") == 1 or err.count("error: data.bag_dir") == 1, err
    assert "process 1 of 2 ends: process 0: Fault" in err
