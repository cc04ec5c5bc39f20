"""One training step, ours against LeRobot's, in turn on the same batch: run it in a LeRobot environment's Python.

python benchmarks/train_step.py                        all sizes, ten rounds each
python benchmarks/train_step.py --rounds 20 --batch 32
python benchmarks/train_step.py --alone                ours only, in any Python with torch
python benchmarks/train_step.py --alone --compile      with training.compile=true

Ours is train.py's training_step, from uint8 images on. LeRobot's is ACTPolicy.forward, backward, clipping and its own
optimizer; its images are normalized floats, prepared in advance. Each time is the best of its rounds, because a shared
machine only adds to a time; the ratio is to LeRobot in fp32, its default. `of rate` is the step's FLOPs, as torch counts them,
by its time, as a share of the best rate at which this device multiplies matrices in that precision.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("", "tests"))
import train
from act_model import ACT
from config import Config, Model
from dataset.batches import Batch
from dataset.normalize import Moments, Normalizer, imagenet
from policy.pretrained import matmul_precision
from training.precision import bf16_speed
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
    parser.add_argument("--compile", action="store_true", help="ours with training.compile=true")
    options = parser.parse_args()
    torch.set_num_threads(2)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    print(f"torch {torch.__version__}, {device}, batch {options.batch}, best of {options.rounds} rounds, ms\n")
    heads = ("LeRobot", "ours", "ratio", "samples/s", "of rate", "peak, MB", "kernels", "watts")
    print(f"{'images':>12} {'precision':>10}", *(f"{head:>9}" for head in heads))
    kinds = (False, True) if DEVICE == "cuda" or bf16_speed(Config()) > 1 else (False,)
    rates = {bf16: matrix_rate(bf16) for bf16 in kinds}
    for cameras, height, width in SIZES:
        torch.manual_seed(0)
        size, chunk = options.batch, Model().chunk_size
        batch = {
            "images": torch.randint(256, (size, cameras, height, width, 3), dtype=torch.uint8, device=DEVICE),
            "state": torch.randn(size, STATE, device=DEVICE),
            "action": torch.randn(size, chunk, ACTION, device=DEVICE),
            "action_is_pad": torch.zeros(size, chunk, dtype=torch.bool, device=DEVICE),
        }
        ours, theirs = our_step(batch, options.compile), None if options.alone else lerobot_step(batch)
        with FlopCounterMode(display=False) as counter:
            our_step(batch)(False)
        flops = counter.get_total_flops()
        best: dict[tuple[Step | None, bool], float] = {}
        for _ in range(options.rounds):
            for bf16 in kinds:
                for step in (theirs, ours):
                    if step:
                        precision = matmul_precision(torch.device(DEVICE)) if step is ours else "highest"
                        torch.set_float32_matmul_precision(precision)
                        best[step, bf16] = min(best.get((step, bf16), float("inf")), seconds(step, bf16) * 1e3)
        for bf16 in kinds:
            compared = "" if not theirs else f"{best[theirs, bf16]:.0f}"
            ratio = "" if not theirs else f"{best[theirs, False] / best[ours, bf16]:.2f}"
            rate = flops / best[ours, bf16] * 1e3
            figures = (
                f"{best[ours, bf16]:.1f}",
                ratio,
                f"{size / best[ours, bf16] * 1e3:.1f}",
                f"{rate / rates[bf16]:.0%}",
            )
            name, precision = f"{cameras} x {height}x{width}", "bf16" if bf16 else "fp32"
            cells = (compared, *figures, *(on_gpu(ours, bf16) if DEVICE == "cuda" else ()))
            print(f"{name:>12} {precision:>10}", *(f"{cell:>9}" for cell in cells), flush=True)


def matrix_rate(bf16: bool) -> float:
    """The best rate of a large matrix product on this device, in FLOP/s."""
    torch.set_float32_matmul_precision(matmul_precision(torch.device(DEVICE)))
    n = 8192 if DEVICE == "cuda" else 1536
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))

    def multiply(_: bool) -> None:
        torch.mm(a, b)

    return 2 * n**3 / min(seconds(multiply, bf16) for _ in range(10))


def on_gpu(step: Step, bf16: bool) -> tuple[str, str, str]:
    """Peak memory in MB, kernels in a step, and the GPU's watts while it works."""
    torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds(step, bf16)
    kernels = sum(event.count for event in profile.key_averages())
    for _ in range(30):
        step(bf16)
    query = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    try:
        watts = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        watts = "?"
    torch.cuda.synchronize()
    return f"{torch.cuda.max_memory_allocated() / 1e6:.0f}", str(kernels), watts


def our_step(batch: dict[str, torch.Tensor], compiled: bool = False) -> Step:
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
    compute = torch.compile(train.losses) if compiled else train.losses
    samples = Batch(batch["state"], batch["images"], batch["action"], batch["action_is_pad"])

    def step(bf16: bool) -> None:
        train.training_step(compute, model, optimizer, normalizer, samples, runs[bf16])

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
