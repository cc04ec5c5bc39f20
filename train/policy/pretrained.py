"""pretrained_model/: a policy in the format of LeRobot >= 0.4.0, read and written. No pickle.

config.json, model.safetensors and two processors with their statistics are LeRobot's files. robot.json and README.md, see
card.py, are ours: LeRobot refuses unknown keys in its files and ignores other files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from act_model import ACT, fold_norms
from config import Config, Model, to_dict
from dataset.normalize import EPS, Moments, Normalizer
from faults import Fault
from files import write_json
from policy.card import Robot

WEIGHTS = "model.safetensors"
ROBOT = "robot.json"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
PREPROCESSOR_STATE = "policy_preprocessor_step_3_normalizer_processor.safetensors"
POSTPROCESSOR_STATE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
CAMERA = "observation.images."
NORM_MAP = {"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
OURS = {
    "n_obs_steps": 1,
    "vision_backbone": "resnet18",
    "replace_final_stride_with_dilation": False,
    "pre_norm": False,
    "feedforward_activation": "relu",
}  # LeRobot's options that this network does not have
OTHER = "expected files of one checkpoint; copy it again"
CPU_INFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


class Pretrained(NamedTuple):
    """A policy as pretrained_model/ holds it."""

    config: Model
    model: ACT
    normalizer: Normalizer
    image_size: tuple[int, int]  # height, width; (0, 0) without a camera
    ensemble: float | None  # temporal_ensemble_coeff of LeRobot's config.json
    robot: Robot | None  # None for a checkpoint of LeRobot's own

    @torch.inference_mode()
    def predict(self, state: Tensor, images: Tensor | None = None) -> Tensor:
        """Action chunks (B, T, A) on the CPU for states (B, S) float32 and pictures (B, C, H, W, 3) uint8 RGB.

        Pictures have the training size. Raises Fault if a shape is wrong, or a number is not finite.
        """
        cameras = list(self.normalizer.cameras)
        expected = [(len(self.normalizer.state.mean),), (len(cameras), *self.image_size, 3) if cameras else None]
        shapes = [tuple(state.shape[1:]), None if images is None else tuple(images.shape[1:])]
        if shapes != expected or not state.isfinite().all():
            raise Fault(
                f"observation: shapes {shapes}, finite: {bool(state.isfinite().all())}; expected {expected}, finite, "
                f"cameras in the order {cameras}; resize as images.resize does"
            )
        device = self.normalizer.state.mean.device
        pixels = None if images is None else images.to(device)
        output = self.model(self.normalizer.state.normalize(state.to(device)), self.normalizer.images(pixels))
        chunk = self.normalizer.action.unnormalize(output.actions).cpu()
        if not chunk.isfinite().all():
            raise Fault(
                "policy: actions are not finite; expected numbers; is the observation far from the training data?"
            )
        return chunk


def matmul_precision(device: torch.device) -> str:
    """The fastest setting of torch.set_float32_matmul_precision that is fp32 on a CPU, and TF32 on a GPU.

    On CPUs with AVX-512, "medium" selects oneDNN, up to twice as fast; with AMX it would compute in bf16.
    """
    if device.type != "cpu":
        return "high"
    return "medium" if "avx512f" in CPU_INFO and "amx" not in CPU_INFO else "highest"


def load(path: Path, device: str | None = None) -> Pretrained:
    """A policy from pretrained_model/, ours or LeRobot's, or from the checkpoint that contains it.

    With a `device` it is made ready to act there: its frozen norms are folded into its weights, and this process computes
    in true fp32 from here on, which you may change: on a GPU, TF32 moved actions by 0.01 rad.
    Raises Fault if files are missing, damaged, not finite, or of different checkpoints.
    """
    folder = path / "pretrained_model" if (path / "pretrained_model").is_dir() else path
    if missing := [n for n in ("config.json", WEIGHTS, PREPROCESSOR, POSTPROCESSOR) if not (folder / n).exists()]:
        raise Fault(
            f"{folder}: missing {', '.join(missing)}; expected a pretrained_model folder of this project or LeRobot >= 0.4.0"
        )
    try:
        policy = _read(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise Fault(f"{folder}: damaged ({type(error).__name__}: {reason}); copy the checkpoint again") from None
    if device is None:
        return policy
    if policy.normalizer.cameras:
        fold_norms(policy.model.backbone)
    torch.set_float32_matmul_precision(matmul_precision(torch.device(device)) if device == "cpu" else "highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        policy.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stubs lack it
        return policy._replace(normalizer=policy.normalizer.to(torch.device(device)))
    except (RuntimeError, AssertionError) as error:  # torch's, for a device that does not exist
        raise Fault(f"device: cannot use {device!r} ({str(error).splitlines()[0][:120]}); use cpu") from None


def _read(folder: Path) -> Pretrained:
    written = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, "pt") as file:
        written_beside = (file.metadata() or {}).get("beside")  # LeRobot's own have none
    normalizer = _read_normalizer(folder)
    has_robot = written_beside or (folder / ROBOT).exists()
    robot = Robot.from_json(json.loads((folder / ROBOT).read_text())) if has_robot else None
    inputs, state_dim, action_dim = _read_shapes(folder, written)
    config = Model(**{f.name: written[f.name] for f in dataclasses.fields(Model) if f.name in written})
    cameras = [key.removeprefix(CAMERA) for key in inputs if key.startswith(CAMERA)]
    model = ACT(config, state_dim, action_dim, len(cameras))
    model.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    normalizer = dataclasses.replace(normalizer, cameras={camera: normalizer.cameras[camera] for camera in cameras})
    height, width = inputs[CAMERA + cameras[0]]["shape"][1:] if cameras else (0, 0)
    faults = list(_contradictions(weights, normalizer, robot, state_dim, action_dim))
    if written_beside and not faults and written_beside != _hash_of_companions(folder):
        faults = [f"{WEIGHTS}: its statistics or {ROBOT} were not written with it; {OTHER}"]
    if faults:
        raise Fault(*(f"{folder}/{fault}" for fault in faults))
    ensemble = written.get("temporal_ensemble_coeff")
    return Pretrained(config, model.eval(), normalizer, (height, width), ensemble, robot)


def _hash_of_companions(folder: Path) -> str:
    """A hash of the files that must come from the same checkpoint as the weights; shapes would not tell."""
    parts = [(folder / name).read_bytes() for name in (PREPROCESSOR_STATE, POSTPROCESSOR_STATE, ROBOT)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _hash_of(weights: dict[str, Tensor]) -> str:
    """A hash of all numbers."""
    result = hashlib.sha256()
    for key in sorted(weights):
        result.update(weights[key].numpy().data)
    return result.hexdigest()


def _contradictions(
    weights: dict[str, Tensor], normalizer: Normalizer, robot: Robot | None, state_dim: int, action_dim: int
) -> Iterator[str]:
    """Faults in files that are readable each."""
    if bad := [key for key, value in weights.items() if not value.isfinite().all()]:
        yield f"{WEIGHTS}: NaN or Inf in {', '.join(bad[:3])}; expected finite weights; use an earlier checkpoint"
    elif robot and robot.weights and robot.weights != _hash_of(weights):
        yield f"{WEIGHTS}: not the numbers that were written; expected those of {ROBOT}; copy the checkpoint again"
    features: dict[str, tuple[Moments, tuple[int, ...]]] = {
        f"{CAMERA}{camera}": (moments, (3, 1, 1)) for camera, moments in normalizer.cameras.items()
    }
    features |= {"observation.state": (normalizer.state, (state_dim,)), "action": (normalizer.action, (action_dim,))}
    for feature, (moments, shape) in features.items():
        if any(value.shape != shape for value in moments):
            shapes = f"{tuple(moments.mean.shape)} and {tuple(moments.std.shape)}"
            yield f"config.json: {feature} has shape {shape}, its statistics {shapes}; {OTHER}"
        elif not all(value.isfinite().all() for value in moments) or (moments.std < 0).any():
            yield f"statistics of {feature}: not finite; expected numbers; use another checkpoint"
    if robot:
        theirs = [len(robot.state_names), len(robot.action_names), list(robot.cameras)]
        ours = [state_dim, action_dim, list(normalizer.cameras)]
        if theirs != ours:
            yield f"{ROBOT}: state, action and cameras are {theirs}, the network's are {ours}; {OTHER}"
        if not all(camera.recorded for camera in robot.cameras.values()):
            yield f"{ROBOT}: a camera has no recorded size; copy the checkpoint again"
        if robot.action_as not in ("absolute", "delta") or not robot.fps > 0:
            yield f"{ROBOT}: action as {robot.action_as!r} at {robot.fps!r} Hz; copy the checkpoint again"


def _read_shapes(folder: Path, written: dict[str, Any]) -> tuple[dict[str, Any], int, int]:
    """The input features and the sizes of state and action in a config.json. Raises Fault if it is another network."""
    inputs = written["input_features"]
    faults = [
        f"{folder}/config.json: {key} is {written[key]!r}; this network has {value!r}"
        for key, value in {"type": "act", **OURS}.items()
        if written.get(key, value) != value
    ]
    if len({tuple(feature["shape"]) for key, feature in inputs.items() if key.startswith(CAMERA)}) > 1:
        faults.append(f"{folder}/config.json: cameras of several sizes; this project uses one size for all")
    if unknown := [key for key in inputs if key != "observation.state" and not key.startswith(CAMERA)]:
        faults.append(f"{folder}/config.json: unknown input {', '.join(unknown)}; this network reads state and cameras")
    if "observation.state" not in inputs:
        faults.append(f"{folder}/config.json: missing observation.state; this network needs it")
    if faults:
        raise Fault(*faults)
    return inputs, inputs["observation.state"]["shape"][0], written["output_features"]["action"]["shape"][0]


def _read_normalizer(folder: Path) -> Normalizer:
    """The statistics of both processors, from the files that their JSON names."""
    moments: dict[str, Moments] = {}
    for processor, step in ((PREPROCESSOR, "normalizer_processor"), (POSTPROCESSOR, "unnormalizer_processor")):
        steps = json.loads((folder / processor).read_text())["steps"]
        settings = next((entry for entry in steps if entry.get("registry_name") == step), None)
        if settings is None:
            raise Fault(f"{folder}/{processor}: missing {step}; expected one")
        other = {kind: norm for kind, norm in settings["config"]["norm_map"].items() if norm != "MEAN_STD"}
        if other:
            raise Fault(f"{folder}/{processor}: normalizes by {other}; expected MEAN_STD")
        tensors = load_file(folder / Path(settings["state_file"]).name)
        for key in settings["config"]["features"]:
            pair = Moments(tensors[f"{key}.mean"], tensors[f"{key}.std"])
            if key in moments and not all(a.equal(b) for a, b in zip(pair, moments[key], strict=True)):
                raise Fault(f"{folder}: {key} has other statistics in {processor}; {OTHER}")
            moments[key] = pair
    cameras = {key.removeprefix(CAMERA): pair for key, pair in moments.items() if key.startswith(CAMERA)}
    return Normalizer(moments["observation.state"], moments["action"], cameras)


def save(folder: Path, model: ACT, normalizer: Normalizer, config: Config, robot: Robot) -> None:
    """Write a policy, its robot.json and its model card into an existing folder."""
    inputs = {
        f"{CAMERA}{camera}": {"type": "VISUAL", "shape": [3, *config.data.image_size]} for camera in normalizer.cameras
    }
    inputs["observation.state"] = {"type": "STATE", "shape": list(normalizer.state.mean.shape)}
    outputs = {"action": {"type": "ACTION", "shape": list(normalizer.action.mean.shape)}}
    network = {key: value for key, value in to_dict(config.model).items() if key != "pretrained_backbone"}
    tree = {  # LeRobot refuses a key that it does not know
        "type": "act",
        "input_features": inputs,
        "output_features": outputs,
        "device": "cpu",
        "use_amp": False,
        "normalization_mapping": NORM_MAP,
        **OURS,
        **network,
        "pretrained_backbone_weights": None,  # else LeRobot downloads ImageNet's weights, and overwrites them
        "temporal_ensemble_coeff": None,
        "optimizer_lr": config.training.lr,
        "optimizer_lr_backbone": config.training.lr_backbone,
        "optimizer_weight_decay": config.training.weight_decay,
    }
    write_json(folder / "config.json", tree)
    statistics = {"observation.state": normalizer.state, "action": normalizer.action}
    statistics |= {f"{CAMERA}{camera}": moments for camera, moments in normalizer.cameras.items()}
    tensors = {f"{feature}.mean": moments.mean.cpu() for feature, moments in statistics.items()}
    tensors |= {f"{feature}.std": moments.std.cpu() for feature, moments in statistics.items()}
    save_file(tensors, folder / PREPROCESSOR_STATE)
    save_file({key: value for key, value in tensors.items() if key.startswith("action.")}, folder / POSTPROCESSOR_STATE)
    to_device = _step("device_processor", device="cpu", float_dtype=None)
    normalizing = _step("normalizer_processor", features=inputs | outputs, eps=EPS, norm_map=NORM_MAP)
    unnormalizing = _step("unnormalizer_processor", features=outputs, eps=EPS, norm_map=NORM_MAP)
    steps = [_step("rename_observations_processor", rename_map={}), _step("to_batch_processor"), to_device]
    steps += [normalizing | {"state_file": PREPROCESSOR_STATE}]
    write_json(folder / PREPROCESSOR, {"name": "policy_preprocessor", "steps": steps})
    steps = [unnormalizing | {"state_file": POSTPROCESSOR_STATE}, to_device]
    write_json(folder / POSTPROCESSOR, {"name": "policy_postprocessor", "steps": steps})
    weights = {f"model.{key}": value.contiguous().cpu() for key, value in model.state_dict().items()}
    write_json(folder / ROBOT, dataclasses.replace(robot, weights=_hash_of(weights)).to_json())
    # of two entries the order would be random: a file is the same to the byte whenever it is written
    save_file(weights, folder / WEIGHTS, {"beside": _hash_of_companions(folder)})
    (folder / "README.md").write_text(robot.card())


def _step(name: str, **settings: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": settings}
