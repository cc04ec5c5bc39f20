"""The CUDA paths, on a machine with an NVIDIA GPU: `make gpu`. Elsewhere they skip."""

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_dataset import recorded
from test_train import SCRIPT, kill_at, logged, tiny

import train
from act_model import ACT
from config import load
from dataset.batches import Batch
from dataset.cache import load_dataset
from dataset.normalize import Moments, Normalizer, imagenet
from policy import pretrained
from training import run_folder
from training.run import Run

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
ON_GPU = ("training.device=cuda", "training.steps=50", "training.save_every=25", "training.lr=1e-3")


def loss_and_gradients(device: str, precision: str) -> tuple[float, torch.Tensor]:
    """Of one step of a small network without dropout, on the same batch and weights everywhere."""
    config = load(None, ["model.dropout=0", "model.n_encoder_layers=2", "model.dim_model=128"])
    torch.manual_seed(0)
    model, where = ACT(config.model, 3, 3, 2).train(), torch.device(device)
    three, random = Moments(torch.zeros(3), torch.ones(3)), torch.Generator().manual_seed(1)
    images = torch.randint(256, (4, 2, 96, 128, 3), dtype=torch.uint8, generator=random)
    action, noise = (torch.randn(4, *shape, generator=random) for shape in ((100, 3), (config.model.latent_dim,)))
    batch = Batch(action[:, 0], images, action, torch.arange(100).expand(4, 100) > 70, noise).to(where)
    normalizer = Normalizer(three, three, {"a": imagenet(), "b": imagenet()}).to(where)
    model.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stubs lack it
    loss, _, _ = train.losses(model, normalizer, batch, Run(config, cast(Any, None), where, precision=precision))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-3), ("bf16", 5e-2)])
def test_loss_and_gradients_are_the_cpus(precision: str, bound: float) -> None:
    torch.set_float32_matmul_precision("highest")
    loss, gradients = loss_and_gradients("cpu", "fp32")
    ours, our_gradients = loss_and_gradients("cuda", precision)
    assert ours == pytest.approx(loss, rel=bound)
    assert (our_gradients - gradients).norm() < bound * gradients.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_and_its_policy_is_the_same_on_the_cpu(tmp_path: Path, precision: str) -> None:
    config = load(tiny(recorded(tmp_path), *ON_GPU, f"training.precision={precision}"))
    data = load_dataset(config)
    last = train.train(Run(config, data, torch.device("cuda"), precision=precision))
    losses = [line["loss"] for line in logged(tmp_path / "run") if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    batch = data.validation.gather(np.arange(8)).to
    here, there = (pretrained.load(last, on).predict(*batch(torch.device(on))[:2]) for on in ("cpu", "cuda"))
    assert (here - there).abs().max() < 1e-3


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    path = tiny(recorded(tmp_path), *ON_GPU)
    kill_at(tmp_path / "run/checkpoint_000025", path)
    newest = run_folder.newest_checkpoint(tmp_path / "run")
    assert newest is not None
    steps = int(newest.name[-6:]) + 25
    done = subprocess.run(
        [sys.executable, SCRIPT, "--config", path, f"training.steps={steps}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"resuming from {newest}" in done.stdout and (tmp_path / f"run/checkpoint_{steps:06}").exists()


def test_one_process_of_torchrun_trains_over_nccl(tmp_path: Path) -> None:
    path = tiny(recorded(tmp_path), *ON_GPU)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    for name, options in (("alone", []), ("launched", launcher)):
        command = [sys.executable, *options, str(SCRIPT), "--config", str(path), f"output_dir={tmp_path / name}"]
        subprocess.run(command, check=True)
    weights = "checkpoint_000050/pretrained_model/model.safetensors"
    alone, launched = load_file(tmp_path / "alone" / weights), load_file(tmp_path / "launched" / weights)
    assert max((alone[key] - launched[key]).abs().max().item() for key in alone) < 1e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_it_has_the_same_losses(tmp_path: Path, precision: str) -> None:
    path = tiny(recorded(tmp_path), *ON_GPU, "model.dropout=0", "training.log_every=1", "training.lr=1e-5")
    curves = []
    for compiled in ("true", "false"):
        out = tmp_path / compiled
        config = load(path, [f"output_dir={out}", "training.steps=20", f"training.compile={compiled}"])
        train.train(Run(config, load_dataset(config), torch.device("cuda"), precision=precision))
        curves.append([line["loss"] for line in logged(out) if "loss" in line])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4 if precision == "fp32" else 1e-2)
