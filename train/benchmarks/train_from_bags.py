"""From bags to trained steps, ours against LeRobot 0.6.1, in turn: the same bags, the same network, the same steps.

    make -C train .venv-lerobot-0.6.1/training
    python benchmarks/train_from_bags.py               0.3 GB of bags, 6 minutes of one camera; 200 steps
    python benchmarks/train_from_bags.py --alone       ours only

Ours is train.py, from bags to a checkpoint. LeRobot's is a conversion to its dataset, as lerobot_dataset.py does it, then
lerobot-train with two workers. The bags hold 640x480 JPEG at 30 Hz. On a CPU network and pictures are the demo's; on a GPU they
are the default's at 240x320. Both sides train in fp32 on a CPU, ours with training.precision=auto on a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("", "tests"))
from read_bags import pictures, record, settings

from config import Config, dump, load

TRAIN = Path(__file__).parents[1]
LEROBOT = TRAIN / ".venv-lerobot-0.6.1/bin"
BAGS = 4
CUDA = torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--megabytes", type=float, default=300, help="of bags")
    parser.add_argument("--alone", action="store_true", help="without LeRobot")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = record_all(folder / "bags", options.megabytes)
        config = configuration(folder, options.steps)
        print(f"{options.megabytes:.0f} MB of bags, {count} pictures; {options.steps} steps of {describe(config)}\n")
        print(
            f"{'':>8} {'prepare, s':>11} {'train, s':>9} {'total, s':>9} {'steps/s':>8} {'waiting':>8} {'disk, MB':>9}"
        )
        for turn in range(options.rounds):
            sides = [ours] if options.alone else [ours, theirs] if turn % 2 == 0 else [theirs, ours]
            for side in sides:
                prepare, train, rate, waiting, disk = side(folder, config)
                times = f"{prepare:11.1f} {train:9.1f} {prepare + train:9.1f} {rate:8.2f}"
                print(f"{side.__name__:>8} {times} {waiting:8.2%} {disk / 1e6:9.1f}", flush=True)


def record_all(folder: Path, megabytes: float) -> int:
    """Write bags of so many megabytes; how many pictures they hold."""
    frames = pictures()
    for number in range(BAGS):
        record(folder / f"bag_{number}", frames, number, megabytes * 1e6 / BAGS, 100)
    return int(megabytes * 1e6 / (sum(frame.size for frame in frames) / len(frames)))


def configuration(folder: Path, steps: int) -> Config:
    """Of our side; LeRobot's follows from it."""
    file = None if CUDA else TRAIN / "demo.yaml"
    demo = load(file, [])
    return load(
        file,
        [
            *settings(folder / "bags", folder / "cache"),
            f"data.image_size={list((240, 320) if CUDA else demo.data.image_size)}",
            "data.action.from=next_state",
            f"training.precision={'auto' if CUDA else 'fp32'}",
            "model.pretrained_backbone=false",
            f"training.steps={steps}",
            "training.log_every=50",
            f"output_dir={folder / 'run'}",
        ],
    )


def describe(config: Config) -> str:
    height, width = config.data.image_size
    return f"{config.training.batch_size} samples, one camera of {height}x{width}, dim_model {config.model.dim_model}"


def ours(folder: Path, config: Config) -> tuple[float, float, float, float, int]:
    """Seconds to prepare and to train, steps/s, share of waiting for data, bytes on the disk."""
    file = folder / "ours.yaml"
    file.write_text(dump(config))
    prepare = seconds(sys.executable, TRAIN / "train.py", "--config", file, "--dry-run")
    train = seconds(sys.executable, TRAIN / "train.py", "--config", file)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    rows = [line for line in lines if "steps_per_s" in line][1:]  # the first warms up
    disk = size(folder / "cache")
    shutil.rmtree(folder / "cache")
    shutil.rmtree(folder / "run")
    waiting = sum(row["waiting_for_data"] for row in rows) / len(rows)
    return prepare, train, sum(row["steps_per_s"] for row in rows) / len(rows), waiting, disk


def theirs(folder: Path, config: Config) -> tuple[float, float, float, float, int]:
    """The same of LeRobot's."""
    dataset = folder / "dataset"
    prepare = convert(folder / "bags", dataset, config)
    model: dict[str, Any] = {
        key: getattr(config.model, key)
        for key in ("chunk_size", "n_action_steps", "dim_model", "n_heads", "dim_feedforward", "n_encoder_layers")
    }
    model |= {"n_vae_encoder_layers": config.model.n_vae_encoder_layers, "dropout": config.model.dropout}
    model |= {"device": "cuda" if CUDA else "cpu", "push_to_hub": False, "pretrained_backbone_weights": "null"}
    command: list[str | Path] = [LEROBOT / "lerobot-train", "--dataset.repo_id=local/bags", f"--dataset.root={dataset}"]
    command += ["--policy.type=act", *(f"--policy.{key}={str(value).lower()}" for key, value in model.items())]
    command += [f"--steps={config.training.steps}", f"--batch_size={config.training.batch_size}", "--num_workers=2"]
    command += ["--tolerance_s=0.001"]  # its default fails for videos of more than 18 minutes: float32
    command += ["--log_freq=50", f"--output_dir={folder / 'theirs'}", "--wandb.enable=false", "--env_eval_freq=0"]
    started = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    train = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    logged = re.findall(r"updt_s:([0-9.]+) data_s:([0-9.]+)", done.stderr + done.stdout)[1:]  # the first warms up
    updating, loading = (sum(map(float, column)) for column in zip(*logged, strict=True))
    disk = size(dataset)
    shutil.rmtree(dataset)
    shutil.rmtree(folder / "theirs")
    return prepare, train, len(logged) / (updating + loading), loading / (updating + loading), disk


def convert(bags: Path, dataset: Path, config: Config) -> float:
    """Seconds to convert bags to LeRobot's dataset."""
    script = Path(__file__).with_name("lerobot_dataset.py")
    return seconds(LEROBOT / "python", script, "convert", bags, dataset, *config.data.image_size)


def seconds(*command: Any) -> float:
    """Run a command to its end."""
    started = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command}: {done.stderr[-3000:]}")
    return time.perf_counter() - started


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
