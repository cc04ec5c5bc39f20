"""pretrained_model/: a policy in the format of LeRobot >= 0.4.0, read and written. No pickle.

config.json, model.safetensors, and the two processors with their statistics are LeRobot's files;
robot.json and README.md, see card.py, say what LeRobot's files cannot say: it refuses unknown keys and ignores other files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from act_model import ACT
from config import Config, Model, to_dict
from dataset.normalize import EPS, Moments, Normalizer
from faults import Fault
from policy import card

if TYPE_CHECKING:  # a robot loads policies without the readers of bags
    from dataset.batches import Dataset

WEIGHTS = "model.safetensors"
ROBOT = "robot.json"
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
}  # what LeRobot offers and this network does not
NOT_OF_THE_NETWORK = ("n_action_steps", "dropout", "kl_weight", "pretrained_backbone")


class Pretrained(NamedTuple):
    """A policy as it stands in pretrained_model/."""

    config: Model
    model: ACT
    normalizer: Normalizer
    image_size: tuple[int, int]  # height, width; (0, 0) without a camera
    ensemble: float | None  # the coefficient of temporal ensembling that LeRobot's config.json may ask for
    robot: dict[str, Any]  # robot.json; empty for LeRobot's own checkpoints


def load(path: Path) -> Pretrained:
    """A policy out of pretrained_model/, ours or LeRobot's, or out of the checkpoint that holds one.

    Raises Fault where it is not whole, not finite, or of parts that do not belong together.
    """
    folder = path / "pretrained_model" if (path / "pretrained_model").is_dir() else path
    missing = [
        name
        for name in ("config.json", WEIGHTS, "policy_preprocessor.json", "policy_postprocessor.json")
        if not (folder / name).exists()
    ]
    if missing:
        raise Fault(
            f"{folder}: {', '.join(missing)} missing; expected a pretrained_model folder of this project or of LeRobot >= 0.4.0"
        )
    robot = folder / ROBOT
    try:
        written = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / WEIGHTS)
        with safe_open(folder / WEIGHTS, "pt") as file:
            beside = (file.metadata() or {}).get("beside")  # LeRobot's own have none
        normalizer = _read_normalizer(folder)
        about = json.loads(robot.read_text()) if beside or robot.exists() else {}
        inputs, state_dim, action_dim = _read_shapes(folder, written)
        config = Model(**{f.name: written[f.name] for f in dataclasses.fields(Model) if f.name in written})
        cameras = [key.removeprefix(CAMERA) for key in inputs if key.startswith(CAMERA)]
        model = ACT(config, state_dim, action_dim, len(cameras))
        model.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
        normalizer = normalizer._replace(cameras={camera: normalizer.cameras[camera] for camera in cameras})
        height, width = next(
            (feature["shape"][1:] for key, feature in inputs.items() if key.startswith(CAMERA)), (0, 0)
        )
        faults = _unfit(weights, normalizer, about, state_dim, action_dim)
        if beside and not faults and beside != _sums_of_those_beside(folder):
            faults = [
                f"{WEIGHTS}: its statistics and {ROBOT} are not those that were written with it; expected files of one "
                "checkpoint: copy it again"
            ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise Fault(f"{folder}: is damaged ({type(error).__name__}: {reason}); copy the checkpoint again") from None
    if faults:
        raise Fault(*(f"{folder}/{fault}" for fault in faults))
    return Pretrained(config, model.eval(), normalizer, (height, width), written.get("temporal_ensemble_coeff"), about)


def _sums_of_those_beside(folder: Path) -> str:
    """One checksum of what no robot may take from another checkpoint than the weights; shapes would not tell."""
    parts = [(folder / name).read_bytes() for name in (PREPROCESSOR_STATE, POSTPROCESSOR_STATE, ROBOT)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _unfit(
    weights: dict[str, Tensor], normalizer: Normalizer, robot: dict[str, Any], state_dim: int, action_dim: int
) -> list[str]:
    """What no robot may act by, in files that can be read each."""
    faults = [
        f"{WEIGHTS}: {key} holds NaN or Inf; expected finite weights; take an earlier checkpoint"
        for key, value in weights.items()
        if not value.isfinite().all()
    ][:3]
    cameras = {f"{CAMERA}{camera}": (one, (3, 1, 1)) for camera, one in normalizer.cameras.items()}
    expected = {"observation.state": (normalizer.state, (state_dim,)), "action": (normalizer.action, (action_dim,))}
    for feature, (one, shape) in (expected | cameras).items():
        if any(value.shape != shape for value in one):
            faults.append(
                f"config.json: {feature} has shape {shape}, its statistics {tuple(one.mean.shape)} and {tuple(one.std.shape)}; "
                "expected files of one checkpoint: copy it again"
            )
        elif not all(value.isfinite().all() for value in one) or (one.std < 0).any():
            faults.append(f"the statistics of {feature}: are not finite; expected numbers; take another checkpoint")
    if robot:
        known = {"state": len(robot["state"]["names"]), "action": len(robot["action"]["names"])}
        there = [known["state"], known["action"], list(robot["cameras"])]
        if there != [state_dim, action_dim, list(normalizer.cameras)]:
            faults.append(
                f"{ROBOT}: state, action and cameras are {there}, of the network {[state_dim, action_dim, list(normalizer.cameras)]}; "
                "expected files of one checkpoint: copy it again"
            )
        if any(not robot["cameras"][camera]["recorded"] for camera in normalizer.cameras):
            faults.append(f"{ROBOT}: a camera was recorded at no size; copy the checkpoint again")
        if robot["action"]["as"] not in ("absolute", "delta") or not robot["fps"] > 0:
            faults.append(
                f"{ROBOT}: action as {robot['action']['as']!r} at {robot['fps']!r} Hz; copy the checkpoint again"
            )
    return faults


def start_from(path: Path, model: ACT, config: Config, dataset: Dataset) -> str:
    """Give a new network the weights of a policy; what to know of it, in words. Raises Fault where it is another network."""
    try:
        found = load(path)
    except Fault as fault:
        raise Fault(*(f"training.init_from: {line}" for line in fault.args)) from None
    network = {
        "model." + f.name: (getattr(config.model, f.name), getattr(found.config, f.name))
        for f in dataclasses.fields(Model)
        if f.name not in NOT_OF_THE_NETWORK
    }
    network |= {
        "data.state, its size": (len(dataset.state_names), len(found.normalizer.state.mean)),
        "data.action, its size": (len(dataset.action_names), len(found.normalizer.action.mean)),
        "data.cameras, their number": (len(config.data.cameras), len(found.normalizer.cameras)),
    }
    faults = [
        f"training.init_from: {path}: {key} is {there} there, {here} here; expected the same network: set it to {there}, or "
        "start without init_from"
        for key, (here, there) in network.items()
        if here != there
    ]
    if faults:
        raise Fault(*faults)
    model.load_state_dict(found.model.state_dict())
    robot = found.robot or {"state": {}, "action": {}}
    meaning = {
        "data.image_size": (config.data.image_size, found.image_size),
        "data.cameras": (list(config.data.cameras), list(found.normalizer.cameras)),
        "data.fps": (config.data.fps, robot.get("fps")),
        "state": (list(dataset.state_names), robot["state"].get("names")),
        "action": (list(dataset.action_names), robot["action"].get("names")),
        "data.action.as": (config.data.action.as_, robot["action"].get("as")),
    }
    other = [
        f"; {key} was {'not said' if there is None else there}, is {here}"
        for key, (here, there) in meaning.items()
        if here != there
    ]
    return f"starting from {path}: its weights, and the statistics of this data{''.join(other)}"


def _read_shapes(folder: Path, written: dict[str, Any]) -> tuple[dict[str, Any], int, int]:
    """The input features and the sizes of state and action in a config.json. Raises Fault where ours is another network."""
    inputs = written["input_features"]
    faults = [
        f"{folder}/config.json: {key} is {written[key]!r}; this network has {value!r}"
        for key, value in {"type": "act", **OURS}.items()
        if written.get(key, value) != value
    ]
    if len({tuple(feature["shape"]) for key, feature in inputs.items() if key.startswith(CAMERA)}) > 1:
        faults.append(f"{folder}/config.json: has cameras of several sizes; this project has one size for all")
    if unknown := [key for key in inputs if key != "observation.state" and not key.startswith(CAMERA)]:
        faults.append(f"{folder}/config.json: input {', '.join(unknown)} is not known to this network")
    if "observation.state" not in inputs:
        faults.append(f"{folder}/config.json: has no observation.state; this network needs one")
    if faults:
        raise Fault(*faults)
    return inputs, inputs["observation.state"]["shape"][0], written["output_features"]["action"]["shape"][0]


def _read_normalizer(folder: Path) -> Normalizer:
    """The statistics of the two processors, wherever their JSON says that they stand."""
    moments: dict[str, Moments] = {}
    features: dict[str, Any] = {}
    for processor, step in (
        ("policy_preprocessor.json", "normalizer_processor"),
        ("policy_postprocessor.json", "unnormalizer_processor"),
    ):
        steps = json.loads((folder / processor).read_text())["steps"]
        found = next((one for one in steps if one.get("registry_name") == step), None)
        if found is None:
            raise Fault(f"{folder}/{processor}: has no {step}; expected one")
        other = {kind: norm for kind, norm in found["config"]["norm_map"].items() if norm != "MEAN_STD"}
        if other:
            raise Fault(f"{folder}/{processor}: normalises by {other}; expected MEAN_STD")
        tensors = load_file(folder / Path(found["state_file"]).name)
        features |= found["config"]["features"]
        for key in found["config"]["features"]:
            one = Moments(tensors[f"{key}.mean"], tensors[f"{key}.std"])
            if key in moments and not all(a.equal(b) for a, b in zip(one, moments[key], strict=True)):
                raise Fault(
                    f"{folder}: {key} has other statistics in {processor}; expected files of one checkpoint: copy it again"
                )
            moments[key] = one
    cameras = {key.removeprefix(CAMERA): moments[key] for key in features if key.startswith(CAMERA)}
    return Normalizer(moments["observation.state"], moments["action"], cameras)


def save(folder: Path, model: ACT, normalizer: Normalizer, config: Config, robot: dict[str, Any]) -> None:
    """Write the policy of a run, robot.json and its model card into a folder that is there."""
    inputs = {
        f"{CAMERA}{camera}": {"type": "VISUAL", "shape": [3, *config.data.image_size]} for camera in normalizer.cameras
    }
    inputs["observation.state"] = {"type": "STATE", "shape": list(normalizer.state.mean.shape)}
    outputs = {"action": {"type": "ACTION", "shape": list(normalizer.action.mean.shape)}}
    network = {key: value for key, value in to_dict(config.model).items() if key != "pretrained_backbone"}
    write_json(
        folder / "config.json",
        {  # LeRobot refuses a key that it does not know
            "type": "act",
            "input_features": inputs,
            "output_features": outputs,
            "device": "cpu",
            "use_amp": False,
            "normalization_mapping": NORM_MAP,
            **OURS,
            **network,
            "pretrained_backbone_weights": None,  # or LeRobot would fetch the ImageNet weights only to overwrite them
            "temporal_ensemble_coeff": None,
            "optimizer_lr": config.training.lr,
            "optimizer_lr_backbone": config.training.lr_backbone,
            "optimizer_weight_decay": config.training.weight_decay,
        },
    )
    statistics = {
        "observation.state": normalizer.state,
        "action": normalizer.action,
        **{f"{CAMERA}{camera}": one for camera, one in normalizer.cameras.items()},
    }
    tensors = {
        f"{feature}.{name}": getattr(one, name).cpu() for feature, one in statistics.items() for name in ("mean", "std")
    }
    save_file(tensors, folder / PREPROCESSOR_STATE)
    save_file({key: value for key, value in tensors.items() if key.startswith("action.")}, folder / POSTPROCESSOR_STATE)
    to_device = _step("device_processor", device="cpu", float_dtype=None)
    normalizing = {"eps": EPS, "norm_map": NORM_MAP}
    write_json(
        folder / "policy_preprocessor.json",
        {
            "name": "policy_preprocessor",
            "steps": [
                _step("rename_observations_processor", rename_map={}),
                _step("to_batch_processor"),
                to_device,
                _step("normalizer_processor", features=inputs | outputs, **normalizing)
                | {"state_file": PREPROCESSOR_STATE},
            ],
        },
    )
    write_json(
        folder / "policy_postprocessor.json",
        {
            "name": "policy_postprocessor",
            "steps": [
                _step("unnormalizer_processor", features=outputs, **normalizing) | {"state_file": POSTPROCESSOR_STATE},
                to_device,
            ],
        },
    )
    write_json(folder / ROBOT, robot)
    save_file(
        {f"model.{key}": value.contiguous().cpu() for key, value in model.state_dict().items()},
        folder / WEIGHTS,
        {"format": "pt", "beside": _sums_of_those_beside(folder)},
    )
    (folder / "README.md").write_text(card.in_words(robot))


def _step(name: str, **settings: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": settings}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
