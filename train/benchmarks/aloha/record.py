"""Record demonstrations of a task as rosbag2 folders: joint states and commands at 50 Hz, the top camera's JPEGs at 25 Hz.

    python train/benchmarks/aloha/record.py cube outputs/aloha/cube/bags
    python train/benchmarks/aloha/record.py insertion outputs/aloha/insertion/bags --episodes 50 --paper

Only demonstrations that succeed are kept, as people do; the share is printed. An attempt depends on the seed and its number
alone, and is the same to the byte whenever it is recorded.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

sys.path.extend(str(Path(__file__).parents[up]) for up in (2, 1))
import expert
from cell import CAMERA, HZ, JOINTS, TASKS, Array, Cell

from demo_bags import CompressedImage, JointState, Message, header, write_bag
from faults import Fault, exit_with_message

CAMERA_TOPIC, JOINT_TOPIC, COMMAND_TOPIC = f"/camera/{CAMERA}/image/compressed", "/joint_states", "/joint_command"
BEGAN = 1_767_225_600 * 10**9  # 2026-01-01 00:00 UTC; each attempt begins a minute later
COMMAND_DELAY = 10**6  # ns; a command follows the state that it answers
QUALITY = 95


def demonstrate(
    cell: Cell, seed: int, attempt: int, camera_hz: int | None
) -> tuple[bool, list[tuple[int, str, Message]]]:
    """Whether the expert succeeded, and what was recorded: (stamp in ns, topic, message); no pictures without camera_hz."""
    cell.reset(np.random.default_rng((seed, attempt)))
    messages: list[tuple[int, str, Message]] = []
    best = 0
    for tick, command in enumerate(expert.commands(cell.name, cell.objects())):
        stamp = BEGAN + attempt * 60 * 10**9 + tick * 10**9 // HZ
        messages.append((stamp, JOINT_TOPIC, joints(stamp, cell.state())))
        if camera_hz and tick % (HZ // camera_hz) == 0:
            image = CompressedImage(header(stamp, CAMERA), "jpeg", jpeg(cell.picture()))
            messages.append((stamp, CAMERA_TOPIC, image))
        messages.append((stamp + COMMAND_DELAY, COMMAND_TOPIC, joints(stamp + COMMAND_DELAY, command)))
        best = max(best, cell.step(command))
    return best == 4, messages


def joints(stamp: int, positions: Array) -> JointState:
    """A message of all 14 joints."""
    return JointState(header(stamp, "world"), list(JOINTS), positions, np.zeros(0), np.zeros(0))


def jpeg(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) RGB as the bytes of a JPEG."""
    return cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].ravel()


def record_attempt(task: str, root: Path, seed: int, paper: bool, attempt: int) -> bool:
    """Record one attempt into its folder, if it succeeds; whether it did."""
    folder, cell = root / f"attempt_{attempt:03d}", Cell(task, twice=paper)
    if folder.exists():
        return True
    if not demonstrate(cell, seed, attempt, None)[0]:
        return False
    write_bag(folder, about(task, seed, paper), demonstrate(cell, seed, attempt, HZ if paper else HZ // 2)[1])
    cell.close()
    return True


def about(task: str, seed: int, paper: bool) -> str:
    """What a demonstration's metadata say of it."""
    return f"{task}{' paper' if paper else ''}, seed {seed}"


def record(task: str, root: Path, episodes: int, seed: int, paper: bool) -> int:
    """Record until there are so many successful demonstrations; the number of attempts. Raises Fault for a folder of others."""
    there = [folder for folder in root.glob("*") if folder.name != ".partial"]  # of a killed recording
    ours = f"demo_seed: {about(task, seed, paper)}"
    other = [folder for folder in there if ours not in (folder / "metadata.yaml").read_text()]
    if other or len(there) > episodes:
        found = f"has {other[0].name} of another task or seed" if other else f"has {len(there)} demonstrations"
        raise Fault(f"{root}: {found}; expected at most {episodes} of {task}, seed {seed}; use an empty folder")
    kept = attempts = 0
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool, tqdm(total=episodes) as bar:
        while kept < episodes:
            numbers = range(attempts, attempts + episodes - kept)
            for succeeded in pool.map(functools.partial(record_attempt, task, root, seed, paper), numbers):
                kept += succeeded
                bar.update(succeeded)
            attempts += len(numbers)
    return attempts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("folder", type=Path, help="for the bags, each in its own folder")
    parser.add_argument("--episodes", type=int, default=120, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--paper", action="store_true", help="480x640 pictures at 50 Hz, as in the paper")
    options = parser.parse_args()
    with exit_with_message():
        attempts = record(options.task, options.folder, options.episodes, options.seed, options.paper)
        print(f"{options.folder}: {options.episodes} of {attempts} attempts succeeded")


if __name__ == "__main__":
    main()
