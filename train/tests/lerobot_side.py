"""Real LeRobot's side of the interoperability tests; runs in a LeRobot environment's Python (>= 0.4.0).

python lerobot_side.py forward WEIGHTS.safetensors CONFIG.json BATCH.safetensors OUT.safetensors
    a training-mode forward of ACTPolicy with these weights: actions_hat, mu, log_sigma_x2, loss, l1, kl
python lerobot_side.py load PRETRAINED_MODEL_DIR OBSERVATION.safetensors OUT.safetensors
    the action chunk of the checkpoint in this folder, in the robot's units: action
python lerobot_side.py make DIR OBSERVATION.safetensors OUT.safetensors
    a small checkpoint written by LeRobot itself, an observation for it, and the chunk that it gives: action
python lerobot_side.py loop PRETRAINED_MODEL_DIR OBSERVATIONS.safetensors [COEFFICIENT] OUT.safetensors
    the actions (N, A) of select_action for one observation after the other, with temporal ensembling if asked: action
python lerobot_side.py ensemble COEFFICIENT CHUNKS.safetensors OUT.safetensors
    the actions (N, A) of its temporal ensembler for chunks (N, T, A): action
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

try:
    import torchvision  # noqa: F401
except RuntimeError:  # its CUDA build beside a CPU torch: the operators that it registers for are missing
    for module in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[module]
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy, ACTTemporalEnsembler
from lerobot.policies.factory import make_pre_post_processors

NOISE_SEED = 7  # both sides set it right before the forward: the latent's noise is their first draw


def forward(weights: str, config: str, batch: str, out: str) -> None:
    fields = json.loads(Path(config).read_text())
    features = {
        side: {name: PolicyFeature(FeatureType[f["type"]], tuple(f["shape"])) for name, f in fields.pop(side).items()}
        for side in ("input_features", "output_features")
    }
    policy = ACTPolicy(ACTConfig(**features, **fields, device="cpu", pretrained_backbone_weights=None))
    policy.load_state_dict(load_file(weights), strict=True)
    policy.train()
    inputs = load_file(batch)

    torch.manual_seed(NOISE_SEED)
    loss, parts = policy(inputs)
    torch.manual_seed(NOISE_SEED)
    images = [inputs[name] for name in policy.config.image_features]
    actions_hat, (mu, log_sigma_x2) = policy.model({**inputs, "observation.images": images})
    result = {"actions_hat": actions_hat, "loss": loss, "l1": torch.tensor(parts["l1_loss"])}
    if mu is not None:
        result |= {"mu": mu, "log_sigma_x2": log_sigma_x2, "kl": torch.tensor(parts["kld_loss"])}
    save(result, out)


def load(directory: str, observation: str, out: str) -> None:
    policy = ACTPolicy.from_pretrained(directory, strict=True)
    save({"action": act(policy, directory, load_file(observation))}, out)


def make(directory: str, observation: str, out: str) -> None:
    shapes = {
        "observation.state": (6,),
        "observation.images.top": (3, 96, 128),
        "observation.images.wrist": (3, 96, 128),
        "action": (6,),
    }
    policy = untrained(
        directory,
        shapes,
        chunk_size=10,
        n_action_steps=7,
        dim_model=64,
        n_heads=4,
        dim_feedforward=128,
        n_encoder_layers=2,
        n_vae_encoder_layers=2,
    )
    sample = {name: torch.randint(256, (2, *shape)) / 255 for name, shape in shapes.items() if name != "action"}
    save(sample, observation)
    save({"action": act(policy, directory, sample)}, out)


def untrained(directory: str, shapes: dict[str, tuple[int, ...]], device: str = "cpu", **settings: int) -> ACTPolicy:
    """A checkpoint for features of these shapes, written by LeRobot itself, with random weights and statistics."""
    torch.manual_seed(1)
    kinds = {name: "VISUAL" if "images" in name else "STATE" for name in shapes} | {"action": "ACTION"}
    features = {name: PolicyFeature(FeatureType[kinds[name]], shape) for name, shape in shapes.items()}
    output_features = {"action": features.pop("action")}
    config = ACTConfig(
        input_features=features,
        output_features=output_features,
        device=device,
        pretrained_backbone_weights=None,
        **settings,
    )
    stats = {}
    for name, shape in shapes.items():
        shape = (3, 1, 1) if "images" in name else shape
        stats[name] = {"mean": torch.randn(shape), "std": torch.rand(shape) + 0.5}
    policy = ACTPolicy(config).eval()
    policy.save_pretrained(directory)
    for processor in make_pre_post_processors(config, dataset_stats=stats):
        processor.save_pretrained(directory)
    return policy


def loop(directory: str, observations: str, *rest: str) -> None:
    *coefficient, out = rest
    config = PreTrainedConfig.from_pretrained(directory)
    if coefficient:
        config.temporal_ensemble_coeff, config.n_action_steps = float(coefficient[0]), 1
    policy = ACTPolicy.from_pretrained(directory, config=config, strict=True)
    preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path=directory)
    inputs = load_file(observations)
    policy.reset()
    actions = []
    for i in range(len(inputs["observation.state"])):
        observation = preprocess({name: tensor[i] for name, tensor in inputs.items()})
        actions.append(postprocess(policy.select_action(observation))[0])
    save({"action": torch.stack(actions)}, out)


def ensemble(coefficient: str, chunks: str, out: str) -> None:
    inputs = load_file(chunks)["chunks"]
    ensembler = ACTTemporalEnsembler(float(coefficient), inputs.shape[1])
    save({"action": torch.stack([ensembler.update(chunk[None])[0] for chunk in inputs])}, out)


def act(policy: ACTPolicy, directory: str, observation: dict[str, torch.Tensor]) -> torch.Tensor:
    """The chunk (B, T, A) for an observation: states as they are, images float CHW in [0, 1]."""
    preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path=directory)
    return postprocess(policy.predict_action_chunk(preprocess(observation)))


def save(tensors: dict[str, torch.Tensor], out: str) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, out, metadata={"lerobot": version("lerobot")})


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {
        "forward": forward,
        "load": load,
        "make": make,
        "loop": loop,
        "ensemble": ensemble,
    }
    commands[sys.argv[1]](*sys.argv[2:])
