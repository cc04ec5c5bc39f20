"""Samples per second that the loaders deliver, without a network, ours against LeRobot 0.6.1's, in turn.

    make -C train .venv-lerobot-0.6.1/training
    python benchmarks/loading.py

The same bags on both sides: 640x480 JPEG at 30 Hz, delivered at 240x320 in batches of 8 with chunks of 100 actions. Ours is
dataset/batches.py on its cache, LeRobot's the DataLoader of lerobot-train on its dataset, with two workers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("", "tests"))
from read_bags import settings
from train_from_bags import LEROBOT, convert, record_all

from config import Config, load
from dataset.batches import batches
from dataset.cache import load_dataset

OURS, THEIRS = 2000, 100  # batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record_all(folder / "bags", 109)
        config = load(None, [*settings(folder / "bags", folder / "cache"), f"training.steps={OURS}"])
        convert(folder / "bags", folder / "dataset", config)
        for turn in range(options.rounds):
            if turn % 2:
                theirs, ours = lerobot(folder / "dataset", config), deliver(config)
            else:
                ours, theirs = deliver(config), lerobot(folder / "dataset", config)
            print(f"samples/s: ours {ours:.0f}, LeRobot {theirs:.0f}, {ours / theirs:.1f} times as many", flush=True)


def deliver(config: Config) -> float:
    """Our samples per second."""
    dataset = load_dataset(config)
    source = batches(dataset.train, config, 0)
    next(source)
    start = time.perf_counter()
    count = sum(len(batch.state) for batch in source)
    return count / (time.perf_counter() - start)


def lerobot(dataset: Path, config: Config) -> float:
    """LeRobot's samples per second."""
    script = Path(__file__).with_name("lerobot_dataset.py")
    sizes = [config.model.chunk_size, config.training.batch_size, THEIRS]
    command = [LEROBOT / "python", script, "load", dataset, *sizes]
    return float(subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
