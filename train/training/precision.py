"""fp32 or bf16: what training.precision=auto takes on this machine, and why, in words.

A GPU with bf16 units is faster in bf16, one that emulates it is not. CPUs differ by a factor of twenty: there the model's
largest product and convolution are timed in both; a resumed run keeps the choice.
"""

from __future__ import annotations

import json
import platform
import re
import time

import torch
from torch import Tensor
from torch.nn import functional

from config import Config
from policy.pretrained import CPU_INFO, matmul_precision
from training.processes import Processes
from training.run_folder import RESUME, newest_checkpoint

WORTH_IT = 1.3  # bf16 must be so many times as fast
SECONDS, ROUNDS = 0.4, 20  # of timing, at most
REST = 0.25  # share of a step in fp32 that is no product or convolution: 17 to 27 % by benchmarks/train_step.py
TOKENS = 512  # of the timed product, at most


def choose_precision(config: Config, device: torch.device, processes: Processes) -> tuple[str, str]:
    """The precision of a run, fp32 or bf16, and why; the first process chooses for all. Sets the fastest kind of fp32, too."""
    torch.set_float32_matmul_precision(matmul_precision(device))
    if not processes.first:
        return "bf16" if processes.any(False) else "fp32", "as process 0 chose"
    chosen = _choose(config, device)
    processes.any(chosen[0] == "bf16")
    return chosen


def _choose(config: Config, device: torch.device) -> tuple[str, str]:
    wanted = config.training.precision
    if wanted == "fp32" or (wanted == "bf16" and device.type != "cpu"):
        return wanted, "as set"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp32", f"this GPU has {'' if native else 'no '}bf16 units"
    newest = newest_checkpoint(config.output_dir)
    if newest and wanted == "auto":
        before = json.loads((newest / RESUME).read_text()).get("precision", "fp32 on cpu")  # older ones name none
        if before.endswith(" on cpu"):
            return before.split()[0], f"as in {newest.name}"
    speed = bf16_speed(config)
    measured = f"bf16 is {speed:.2g} times as fast as fp32 on this CPU"
    if wanted == "auto":
        return "bf16" if speed >= WORTH_IT else "fp32", f"{measured}; {WORTH_IT} is enough"
    return "bf16", f"as set; {measured}{'; warning: fp32 is faster, set training.precision=auto' if speed < 1 else ''}"


def bf16_speed(config: Config) -> float:
    """How many times as fast as in fp32 this CPU takes a step in bf16, by a product and a convolution of the model."""
    (height, width), model = config.data.image_size, config.model
    generator = torch.Generator().manual_seed(0)
    tokens = min(TOKENS, config.training.batch_size * (height // 32 * width // 32 * len(config.data.cameras) + 2))
    x = torch.randn(tokens, model.dim_model, generator=generator)
    weight = torch.randn(model.dim_feedforward, model.dim_model, generator=generator)
    pixels = torch.randn(1, 64, height // 4, width // 4, generator=generator).to(memory_format=torch.channels_last)
    kernel = torch.randn(64, 64, 3, 3, generator=generator).to(memory_format=torch.channels_last)

    def seconds(tensors: list[Tensor]) -> float:
        started = time.perf_counter()
        functional.linear(tensors[0], tensors[1])
        functional.conv2d(tensors[2], tensors[3], padding=1)
        return time.perf_counter() - started

    sides = [[tensor.to(kind) for tensor in (x, weight, pixels, kernel)] for kind in (torch.float32, torch.bfloat16)]
    with torch.no_grad():
        times = [[seconds(side) for side in sides]]  # the first warms up
        end = time.perf_counter() + SECONDS
        while len(times) < 2 or (time.perf_counter() < end and len(times) < ROUNDS):
            times.append([seconds(side) for side in sides])
    fp32, bf16 = (min(column) for column in zip(*times[1:], strict=True))
    return 1 / (REST + (1 - REST) * bf16 / fp32)


def describe(device: torch.device) -> str:
    """The device and its name, such as cuda:0, NVIDIA H200."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    name = re.search(r"^model name\s*: (.*)", CPU_INFO, re.M)
    return f"{device}, {name[1] if name else platform.machine()}, {torch.get_num_threads()} threads"
