"""One training step, ours against LeRobot's, in turn on the same batch: run it in a LeRobot environment's Python.

python benchmarks/train_step.py                        all sizes, ten rounds each
python benchmarks/train_step.py --rounds 20 --batch 32
python benchmarks/train_step.py --alone                ours only, in any Python with torch

Ours is train.py's training_step, from uint8 images on. LeRobot's is ACTPolicy.forward, backward, clipping and its own
optimizer; its images are normalized floats, prepared in advance. Each time is the best of its rounds, because a shared
machine only adds to a time; the ratio is to LeRobot in fp32, its default.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("", "tests"))
import train
from act_model import ACT
from config import Config, Model
from dataset.batches import Batch
from dataset.normalize import Moments, Normalizer, imagenet
from policy.pretrained import matmul_precision
from training.run import Run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATE, ACTION = 14, 14
SIZES = [(1, 224, 224), (2, 240, 320), (1, 480, 640)]  # cameras, height, width
Step = Callable[[bool], None]  # in bf16 or not


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--alone", action="store_true", help="without LeRobot")
    options = parser.parse_args()
    torch.set_num_threads(2)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    print(f"torch {torch.__version__}, {device}, batch {options.batch}, best of {options.rounds} rounds, ms\n")
    print(f"{'images':>12} {'precision':>10} {'LeRobot':>8} {'ours':>8} {'ratio':>6}")
    for cameras, height, width in SIZES:
        torch.manual_seed(0)
        size, chunk = options.batch, Model().chunk_size
        batch = {
            "images": torch.randint(256, (size, cameras, height, width, 3), dtype=torch.uint8, device=DEVICE),
            "state": torch.randn(size, STATE, device=DEVICE),
            "action": torch.randn(size, chunk, ACTION, device=DEVICE),
            "action_is_pad": torch.zeros(size, chunk, dtype=torch.bool, device=DEVICE),
        }
        ours, theirs = our_step(batch), None if options.alone else lerobot_step(batch)
        best: dict[tuple[Step | None, bool], float] = {}
        for _ in range(options.rounds):
            for bf16 in (False, True):
                for step in (theirs, ours):
                    if step:
                        precision = matmul_precision(torch.device(DEVICE)) if step is ours else "highest"
                        torch.set_float32_matmul_precision(precision)
                        best[step, bf16] = min(best.get((step, bf16), float("inf")), seconds(step, bf16) * 1e3)
        for bf16 in (False, True):
            compared = "" if not theirs else f"{best[theirs, bf16]:.0f}"
            ratio = "" if not theirs else f"{best[theirs, False] / best[ours, bf16]:.2f}"
            name, precision = f"{cameras} x {height}x{width}", "bf16" if bf16 else "fp32"
            print(f"{name:>12} {precision:>10} {compared:>8} {best[ours, bf16]:8.1f} {ratio:>6}", flush=True)


def our_step(batch: dict[str, torch.Tensor]) -> Step:
    """A step of train.py."""
    model = ACT(Model(), STATE, ACTION, batch["images"].shape[1])
    model.to(DEVICE, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # its stubs lack it
    backbone = list(model.backbone.parameters())
    others = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": backbone}], lr=1e-5, weight_decay=1e-4, fused=True)
    normalizer, nothing = normalizer_of(batch), cast(Any, None)
    runs = {
        bf16: Run(Config(), nothing, torch.device(DEVICE), precision="bf16" if bf16 else "fp32")
        for bf16 in (False, True)
    }
    samples = Batch(batch["state"], batch["images"], batch["action"], batch["action_is_pad"])

    def step(bf16: bool) -> None:
        train.training_step(model, optimizer, normalizer, samples, runs[bf16])

    return step


def lerobot_step(batch: dict[str, torch.Tensor]) -> Step:
    """LeRobot's step, on normalized float images."""
    from lerobot_side import ACTConfig, ACTPolicy, FeatureType, PolicyFeature

    images = normalizer_of(batch).images(batch["images"])
    assert images is not None
    cameras = {f"observation.images.{i}": image.contiguous() for i, image in enumerate(images.unbind(1))}
    config = ACTConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (STATE,)),
            **{name: PolicyFeature(FeatureType.VISUAL, tuple(image.shape[1:])) for name, image in cameras.items()},
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
        device=DEVICE,
        pretrained_backbone_weights=None,
    )
    policy = ACTPolicy(config).to(DEVICE).train()
    optimizer = config.get_optimizer_preset().build(policy.get_optim_params())
    inputs = {
        "observation.state": batch["state"],
        "action": batch["action"],
        "action_is_pad": batch["action_is_pad"],
        **cameras,
    }

    def step(bf16: bool) -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            loss, _ = policy(inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def normalizer_of(batch: dict[str, torch.Tensor]) -> Normalizer:
    """ImageNet's statistics for each camera; state and action need none."""
    state, action = (Moments(torch.zeros(n), torch.ones(n)) for n in (STATE, ACTION))
    cameras = {str(i): imagenet() for i in range(batch["images"].shape[1])}
    return Normalizer(state, action, cameras).to(torch.device(DEVICE))


def seconds(step: Step, bf16: bool) -> float:
    start = time.perf_counter()
    step(bf16)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
