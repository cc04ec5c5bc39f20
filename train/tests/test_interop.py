"""Against real LeRobot, run as a script by each Python in LEROBOT_PYTHONS (separated as PATH is)."""

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_train import tiny
from writing import COMMAND, STATE, episode, write

import train
from act_model import ACT, FrozenBatchNorm, act_loss
from config import Model, load
from dataset.cache import load_dataset
from faults import Fault
from policy import pretrained
from policy.runner import Ensembler, Policy
from training.run import Run

PYTHONS = [python for python in os.environ.get("LEROBOT_PYTHONS", "").split(os.pathsep) if python]
NOISE_SEED = 7  # lerobot_side.py sets the same right before its forward

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not PYTHONS, reason="LEROBOT_PYTHONS names no Python with LeRobot"),
]


@pytest.fixture(params=PYTHONS or [""])
def lerobot_python(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run_lerobot(python: str, command: str, *paths: Path | str) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
    """Run a command of lerobot_side.py: the tensors of its last path, and LeRobot's version."""
    script = Path(__file__).with_name("lerobot_side.py")
    done = subprocess.run([python, script, command, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with safe_open(paths[-1], framework="pt") as file:
        version = tuple(int(part) for part in file.metadata()["lerobot"].split(".")[:3])
        return {name: file.get_tensor(name) for name in file.keys()}, version  # noqa: SIM118


@pytest.mark.parametrize(("height", "width"), [(224, 224), (240, 320)])
def test_forward_and_loss_are_lerobots(lerobot_python: str, tmp_path: Path, height: int, width: int) -> None:
    config = Model(dropout=0.0)
    torch.manual_seed(0)
    model = ACT(config, state_dim=14, action_dim=14, cameras=1).train()
    for norm in model.modules():
        if isinstance(norm, FrozenBatchNorm):  # about what ImageNet's do: far from the identity, activations stay small
            norm.weight.uniform_(0.5, 1.0)
            norm.bias.normal_(std=0.1)
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.8, 1.5)
    save_file({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "weights")

    features = {
        "input_features": {
            "observation.state": {"type": "STATE", "shape": [14]},
            "observation.images.top": {"type": "VISUAL", "shape": [3, height, width]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [14]}},
    }
    fields = asdict(config)
    del fields["pretrained_backbone"]  # the one name of ours
    (tmp_path / "config").write_text(json.dumps(features | fields))
    state, image, actions = torch.randn(2, 14), torch.randn(2, 3, height, width), torch.randn(2, config.chunk_size, 14)
    pad = torch.zeros(2, config.chunk_size, dtype=torch.bool)
    pad[0, 60:] = True
    batch = {"observation.state": state, "observation.images.top": image, "action": actions, "action_is_pad": pad}
    save_file(batch, tmp_path / "batch")

    theirs, version = run_lerobot(
        lerobot_python, "forward", tmp_path / "weights", tmp_path / "config", tmp_path / "batch", tmp_path / "out"
    )
    torch.manual_seed(NOISE_SEED)
    output = model(state, image[:, None], actions, pad)
    loss, l1, kl = act_loss(output, actions, pad, config.kl_weight)
    ours = {"actions_hat": output.actions, "mu": output.mu, "log_sigma_x2": output.log_sigma_x2, "kl": kl}
    if version >= (0, 6, 0):  # older ones count the padding in the mean
        ours |= {"loss": loss, "l1": l1}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-5)


def as_lerobot(state: torch.Tensor, images: torch.Tensor, cameras: list[str]) -> dict[str, torch.Tensor]:
    """Our (B, S) and (B, C, H, W, 3) uint8 as LeRobot's observation."""
    pictures = {f"observation.images.{name}": images[:, c].permute(0, 3, 1, 2) / 255 for c, name in enumerate(cameras)}
    return {"observation.state": state, **{name: one.contiguous() for name, one in pictures.items()}}


@pytest.mark.parametrize("use_vae", ["true", "false"])
def test_our_checkpoint_acts_the_same_in_lerobot(lerobot_python: str, tmp_path: Path, use_vae: str) -> None:
    """Two cameras, commands as actions, trained a few steps; LeRobot loads it with strict=True."""
    for i in range(2):
        messages = episode(seed=i)
        wrist = [("/wrist", kind, stamp, content) for topic, kind, stamp, content in messages if topic == "/camera"]
        write(tmp_path / f"bags/{i}", sorted(messages + wrist, key=lambda message: message[2]))
    cameras = "data.cameras={color: /camera, wrist: /wrist}"
    commands = f"data.action.from=[{{topic: {COMMAND}, joints: [c, a]}}]"
    as_recorded = "data.image_size=[48, 64]"  # LeRobot does not resize: both are given the same pictures
    config = load(tiny(tmp_path, cameras, commands, as_recorded, f"model.use_vae={use_vae}"))
    folder = train.train(Run(config, load_dataset(config))) / "pretrained_model"
    state, images = torch.randn(3, 3), torch.randint(256, (3, 2, *config.data.image_size, 3), dtype=torch.uint8)
    save_file(as_lerobot(state, images, ["color", "wrist"]), tmp_path / "observation")
    theirs, _ = run_lerobot(lerobot_python, "load", folder, tmp_path / "observation", tmp_path / "out")
    assert theirs["action"].shape == (3, 10, 2)
    torch.testing.assert_close(pretrained.load(folder).predict(state, images), theirs["action"], atol=1e-5, rtol=0)
    assert (folder / "README.md").exists(), "the model card, which LeRobot ignores"
    states, pictures = a_robots_day(3, 2, *config.data.image_size)
    save_file(as_lerobot(states, pictures, ["color", "wrist"]), tmp_path / "day")
    for coefficient in (None, 0.01):
        theirs, _ = run_lerobot(
            lerobot_python,
            "loop",
            folder,
            tmp_path / "day",
            *[str(coefficient)] * (coefficient is not None),
            tmp_path / "out",
        )
        ours = acted(Policy.load(folder, ensemble=coefficient), states, pictures)
        torch.testing.assert_close(ours, theirs["action"], atol=1e-5, rtol=0)


def a_robots_day(state_dim: int, cameras: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States (200, S) and pictures (200, C, H, W, 3) of a loop of 200 ticks."""
    ticks = torch.arange(200)[:, None] / 30
    states = torch.sin(ticks + torch.arange(state_dim))
    return states, torch.randint(256, (200, cameras, height, width, 3), dtype=torch.uint8)


def acted(policy: Policy, states: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """What the policy does (N, A) in a loop."""
    actions = [
        policy.act({"state": state.numpy(), "images": dict(zip(policy.cameras, shot.numpy(), strict=True))})
        for state, shot in zip(states, pictures, strict=True)
    ]
    return torch.from_numpy(np.stack(actions))


@pytest.mark.parametrize("coefficient", ["0.01", "0", "-0.05"])
def test_ensembling_is_lerobots(lerobot_python: str, tmp_path: Path, coefficient: str) -> None:
    chunks = torch.randn(250, 100, 6) * 3
    save_file({"chunks": chunks}, tmp_path / "chunks")
    theirs, _ = run_lerobot(lerobot_python, "ensemble", coefficient, tmp_path / "chunks", tmp_path / "out")
    ensembler = Ensembler(float(coefficient), 100)
    ours = torch.stack([ensembler.update(chunk) for chunk in chunks])
    torch.testing.assert_close(ours, theirs["action"], atol=1e-6, rtol=0)


def test_lerobots_checkpoint_acts_the_same_here(lerobot_python: str, tmp_path: Path) -> None:
    theirs, _ = run_lerobot(lerobot_python, "make", tmp_path / "theirs", tmp_path / "observation", tmp_path / "out")
    observation = load_file(tmp_path / "observation")
    pictures = [observation[f"observation.images.{name}"] for name in ("top", "wrist")]
    images = (torch.stack(pictures, 1).permute(0, 1, 3, 4, 2) * 255).round().to(torch.uint8)
    policy = Policy.load(tmp_path / "theirs")
    chunk = policy.pretrained.predict(observation["observation.state"], images)
    torch.testing.assert_close(chunk, theirs["action"], atol=1e-5, rtol=0)
    assert (policy.action_as, policy.fps, policy.action_names) == ("unknown", None, ())
    with pytest.raises(Fault, match="action_as: the robot has 'absolute', LeRobot's checkpoint does not say"):
        Policy.load(tmp_path / "theirs", action_as="absolute")
    with pytest.raises(Fault, match="state by name"):
        policy.act({"state": dict.fromkeys("abcdef", 0.0), "images": {}})
    states, shots = a_robots_day(6, 2, 96, 128)
    save_file(as_lerobot(states, shots, ["top", "wrist"]), tmp_path / "day")
    theirs, _ = run_lerobot(lerobot_python, "loop", tmp_path / "theirs", tmp_path / "day", tmp_path / "out")
    torch.testing.assert_close(acted(policy, states, shots), theirs["action"], atol=1e-5, rtol=0)


def test_training_starts_from_lerobots_checkpoint(lerobot_python: str, tmp_path: Path) -> None:
    run_lerobot(lerobot_python, "make", tmp_path / "theirs", tmp_path / "observation", tmp_path / "out")
    for i in range(2):
        messages = episode(seed=i)
        wrist = [("/wrist", kind, stamp, content) for topic, kind, stamp, content in messages if topic == "/camera"]
        write(tmp_path / f"bags/{i}", sorted(messages + wrist, key=lambda message: message[2]))
    joints = f"[{{topic: {STATE}, joints: [a, b, c]}}, {{topic: {COMMAND}, joints: [a, b, c]}}]"
    network = {"dim_model": 64, "n_heads": 4, "dim_feedforward": 128, "n_encoder_layers": 2, "n_vae_encoder_layers": 2}
    path = tiny(
        tmp_path,
        "data.cameras={top: /camera, wrist: /wrist}",
        f"data.state={joints}",
        f"training.init_from={tmp_path}/theirs",
        "training.steps=2",
        *(f"model.{key}={value}" for key, value in network.items()),
    )
    config = load(path)
    last = train.train(Run(config, load_dataset(config)))
    before, after = (load_file(one / "model.safetensors") for one in (tmp_path / "theirs", last / "pretrained_model"))
    assert 0 < max((before[key] - after[key]).abs().max() for key in before) < 1e-4
