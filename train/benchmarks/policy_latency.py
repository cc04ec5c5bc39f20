"""From an observation to its action chunk, ours against LeRobot's, in turn: run it in a LeRobot environment's Python.

python benchmarks/policy_latency.py            all sizes, thirty rounds each
python benchmarks/policy_latency.py 100        a hundred rounds

One observation, fp32, both from the same checkpoint. Ours is Policy.act without a chunk in hand, from uint8 pictures on.
LeRobot's is its preprocessor, select_action with an empty queue and its postprocessor, as its documentation runs them; its pictures
come as floats in [0, 1], at no cost to it. Each time is the best of its rounds, for a shared machine only ever adds to a
time; `median` is of all rounds.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("", "tests"))
from lerobot_side import ACTPolicy, make_pre_post_processors, untrained

from policy.runner import Policy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATE, ACTION = 14, 14
SIZES = [(1, 224, 224), (2, 240, 320), (1, 480, 640)]  # cameras, height, width
Chunk = Callable[[], np.ndarray]  # (T, A) or its first action


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    torch.set_num_threads(2)
    print(f"torch {torch.__version__}, {DEVICE}, one observation, fp32, {rounds} rounds, ms\n")
    print(f"{'images':>12} {'LeRobot best':>13} {'median':>7} {'ours best':>10} {'median':>7} {'ratio of best':>14}")
    for cameras, height, width in SIZES:
        random = np.random.default_rng(0)
        state = random.standard_normal(STATE).astype(np.float32)
        images = {str(i): random.integers(256, size=(height, width, 3), dtype=np.uint8) for i in range(cameras)}
        with tempfile.TemporaryDirectory() as folder:
            shapes = {f"observation.images.{name}": (3, height, width) for name in images}
            untrained(folder, {"observation.state": (STATE,), **shapes, "action": (ACTION,)}, DEVICE)
            theirs, ours = lerobot(folder, state, images), here(folder, state, images)
        assert np.abs(theirs() - ours()).max() < 1e-4, "the same action"
        times: dict[Chunk, list[float]] = {theirs: [], ours: []}
        for _ in range(rounds):
            for look, taken in times.items():
                taken.append(seconds(look) * 1e3)
        best, middle = ({look: which(taken) for look, taken in times.items()} for which in (min, statistics.median))
        print(
            f"{f'{cameras} x {height}x{width}':>12} {best[theirs]:13.1f} {middle[theirs]:7.1f} {best[ours]:10.1f} "
            f"{middle[ours]:7.1f} {best[theirs] / best[ours]:14.2f}",
            flush=True,
        )


def here(folder: str, state: np.ndarray, images: dict[str, np.ndarray]) -> Chunk:
    policy = Policy.load(folder, DEVICE)

    def look() -> np.ndarray:
        policy.reset()
        return policy.act({"state": state, "images": images})

    return look


def lerobot(folder: str, state: np.ndarray, images: dict[str, np.ndarray]) -> Chunk:
    policy = ACTPolicy.from_pretrained(folder, strict=True)
    preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path=folder)
    pictures = {
        f"observation.images.{name}": torch.from_numpy(one).permute(2, 0, 1) / 255 for name, one in images.items()
    }
    observation = {"observation.state": torch.from_numpy(state), **pictures}

    def look() -> np.ndarray:
        policy.reset()
        return postprocess(policy.select_action(preprocess(dict(observation))))[0].numpy()

    return look


def seconds(look: Chunk) -> float:
    start = time.perf_counter()
    look()  # its result is on the CPU: the device has finished
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
