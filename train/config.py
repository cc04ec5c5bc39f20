"""python train/config.py: print every setting with its default and its reason.

A configuration is frozen dataclasses; a YAML file is a strict difference onto them, and `key=value` arguments a
difference onto that. All that is wrong with it is reported at once, each fault with its dotted key. No torch here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from blob_url import BlobUrl
from faults import Fault
from strict import UniqueKeys, anchor_paths, build, setting, yaml_key

ROOT = Path(__file__).resolve().parent.parent


UR10E_JOINTS = (
    "shoulder_pan_joint",
    "shoulder_lift_joint",
    "elbow_joint",
    "wrist_1_joint",
    "wrist_2_joint",
    "wrist_3_joint",
)


@dataclass(frozen=True)
class Signal:
    """Numbers out of the messages of one topic, in a fixed order."""

    topic: str
    joints: tuple[str, ...] = setting((), "joints to take by name, in this order (JointState, JointTrajectory)")
    index: tuple[int, ...] = setting((), "elements to take by place, of arrays and of joints without names", least=0)
    field: str = setting(
        "",
        "dotted path to the numbers; by default the obvious one: `position` of a JointState, "
        "`points.0.positions` of a JointTrajectory, `data` of a std_msgs type",
    )


@dataclass(frozen=True)
class Action:
    """What the policy learns to output."""

    from_: Literal["next_state"] | tuple[Signal, ...] = setting(
        "next_state", "`next_state` (the state one tick later) or a list like `state`: the commands that were sent"
    )
    as_: Literal["absolute", "delta"] = setting(
        "absolute", "`absolute` targets, or `delta`: target minus the state at that tick"
    )


@dataclass(frozen=True)
class Data:
    """From recordings to episodes."""

    bag_dir: Path | BlobUrl = setting(
        ROOT / "rosbag-to-lerobot/local_bags",
        "folder of recordings: .mcap, .db3, .bag, rosbag2 folders; or https://ACCOUNT.blob.core.windows.net/CONTAINER/PREFIX",
    )
    cache_dir: Path = setting(
        ROOT / "outputs/cache", "decoded recordings, shared by all runs; may be deleted at any time"
    )
    fps: float = setting(30.0, "ticks per second: the rate at which the robot will run the policy", above=0)
    image_size: tuple[int, int] = setting(
        (240, 320), "height, width in pixels at which the network sees", least=32, below=4097
    )
    cameras: dict[str, str] = setting(
        {"color": "/camera/color/image_raw"},
        "name: topic of each camera (Image or CompressedImage); `{}` trains on the state alone",
    )
    state: tuple[Signal, ...] = setting((Signal("/joint_states", UR10E_JOINTS),), "what the robot knows of itself")
    action: Action = setting(Action(), "what the policy outputs")
    validation_fraction: float = setting(
        0.1, "share of the recordings held out, whole, for validation", least=0, below=1
    )
    max_age_ms: dict[str, float] = setting(
        {},
        "topic: age at which its newest message is too old and the episode is "
        "split; by default 2.5 periods (one lost message is bridged), at least one tick",
        above=0,
    )
    on_bad_bag: Literal["fail", "skip"] = setting(
        "fail", "`fail` at a recording with a fault, or `skip` it: it is listed, and the exit code is 3"
    )

    @property
    def commands(self) -> tuple[Signal, ...]:
        """What the action is taken from; nothing for the next state."""
        return () if self.action.from_ == "next_state" else self.action.from_


@dataclass(frozen=True)
class Model:
    """ACT, under LeRobot's names and with its defaults."""

    chunk_size: int = setting(100, "actions predicted at once, in ticks", least=1)
    n_action_steps: int = setting(100, "actions of a chunk that the robot executes before it looks again", least=1)
    dim_model: int = setting(512, "width of the transformers", least=4)
    n_heads: int = setting(8, "attention heads; must divide dim_model", least=1)
    dim_feedforward: int = setting(3200, "width inside the feed-forward blocks", least=1)
    n_encoder_layers: int = setting(4, "layers of the encoder", least=1)
    n_decoder_layers: int = setting(1, "layers of the decoder; the original's other six never learned", least=1)
    use_vae: bool = setting(True, "a latent style variable while training: demonstrations differ in manner")
    latent_dim: int = setting(32, "size of that variable", least=1)
    n_vae_encoder_layers: int = setting(4, "layers of its encoder", least=1)
    dropout: float = setting(0.1, "share of activations dropped while training", least=0, below=1)
    kl_weight: float = setting(10.0, "weight of the KL term beside the L1 term", least=0)
    pretrained_backbone: bool = setting(
        True, "start the ResNet-18 from ImageNet weights (torchvision fetches 45 MB once)"
    )


@dataclass(frozen=True)
class Training:
    """The optimisation."""

    init_from: Path | None = setting(
        None, "start a new run from this policy's weights: a checkpoint or pretrained_model folder, ours or LeRobot's"
    )
    steps: int = setting(100_000, "optimizer steps", least=1)
    batch_size: int = setting(8, "samples a step, on each GPU", least=1)
    lr: float = setting(1e-5, "AdamW rate of the transformers; ACT's own", above=0)
    lr_backbone: float = setting(1e-5, "AdamW rate of the ResNet", least=0)
    weight_decay: float = setting(1e-4, "AdamW's, on all parameters", least=0)
    grad_clip_norm: float = setting(10.0, "bound on the gradient's norm; 0 for none", least=0)
    warmup_steps: int = setting(0, "steps over which the rates rise from zero", least=0)
    schedule: Literal["constant", "cosine"] = setting(
        "constant", "`constant` as in ACT, or `cosine` down to zero at the last step"
    )
    augment: tuple[Literal["color", "crop", "affine"], ...] = setting(
        (), "changes of the pictures while training: any of `color`, `crop`, `affine`; needs torchvision"
    )
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "autocast; `auto` is bf16 on a GPU that has it, else fp32"
    )
    matmul_precision: Literal["highest", "high", "medium"] = setting(
        "medium", "torch.set_float32_matmul_precision: TF32 on a GPU; on a CPU without AMX the fast kernels, still fp32"
    )
    seed: int = setting(0, "of weights, sample order, dropout and the held-out choice", least=0, below=2**63)
    device: str = setting("auto", "`auto` (cuda where there is one), `cpu`, `cuda` or `cuda:N`")
    log_every: int = setting(100, "steps between two lines of metrics.jsonl", least=1)
    evaluate_every: int = setting(2000, "steps between two validations", least=1)
    save_every: int = setting(5000, "steps between two checkpoints", least=1)
    keep_checkpoints: int = setting(3, "newest checkpoints to keep, besides the one that validated best", least=1)
    resume: Literal["auto", "never", "must"] = setting(
        "auto", "`auto` goes on from the newest checkpoint of output_dir, `never` starts anew, `must` fails without one"
    )


@dataclass(frozen=True)
class Config:
    """One run: what, from which data, with which network, where to."""

    data: Data = setting(Data(), "")
    model: Model = setting(Model(), "")
    training: Training = setting(Training(), "")
    output_dir: Path = setting(ROOT / "outputs/train-rosbag-act", "the run's folder")


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file `path` (None: the defaults), changed by `key=value` arguments.

    A relative path is relative to the file's folder, on the command line to the working folder.
    Raises Fault with every fault found.
    """
    faults: list[str] = []
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = yaml.load(path.read_text(), UniqueKeys) or {}
        except FileNotFoundError:
            raise Fault(f"{path}: no such configuration file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise Fault(f"{path}: cannot be read: {error}") from None
        except (yaml.YAMLError, ValueError) as error:  # a ValueError from a date that is none
            raise Fault(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict):
            raise Fault(f"{path}: expected a mapping with keys such as training, found {tree!r}")
        anchor_paths(tree, Config, path.resolve().parent)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            faults.append(f"{override}: expected key=value, such as training.steps=20000")
            continue
        try:
            value = yaml.load(text, UniqueKeys)
        except (yaml.YAMLError, ValueError) as error:  # a ValueError from a date that is none
            faults.append(f"{key}: the value {text!r} is not valid YAML: {' '.join(str(error).split())}")
            continue
        branch: dict[str, Any] = {}
        leaf = branch
        *parents, last = key.split(".")
        for name in parents:
            leaf[name] = leaf = {}
        leaf[last] = value
        anchor_paths(branch, Config, Path.cwd())
        _merge(tree, branch)
    config = build(Config, tree, "", faults)
    if not faults:
        _check_together(config, faults)
    if faults:
        raise Fault(*faults)
    return config


def to_dict(value: Any) -> Any:
    """The plain tree of lists, mappings and scalars that `load` reads back as the same configuration."""
    if dataclasses.is_dataclass(value):
        tree = {yaml_key(f): to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {key: item for key, item in tree.items() if item} if isinstance(value, Signal) else tree
    if isinstance(value, tuple):
        return [to_dict(item) for item in value]
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    return str(value) if isinstance(value, (Path, BlobUrl)) else value


def dump(config: Config) -> str:
    """The whole configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)


def rows(kind: Any = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, default, reason) of every setting; the README's table is these rows."""
    table = []
    for f in dataclasses.fields(kind):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        key = prefix + yaml_key(f)
        if dataclasses.is_dataclass(default):
            table += rows(type(default), key + ".")
        elif f.metadata:
            shown = str(default.relative_to(ROOT)) if isinstance(default, Path) else _flow(to_dict(default))
            table.append((key, shown, f.metadata["reason"]))
        if f.name == "state":
            table += [(f"{key}[].topic", "", "the topic's name")] + rows(Signal, f"{key}[].")
    return table


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).removesuffix("\n...\n").strip()


def _merge(tree: dict[str, Any], branch: Mapping[str, Any], key: str = "") -> None:
    """Lay a branch over a tree; a mapping of free names (cameras, max_age_ms) is replaced, not merged."""
    for name, value in branch.items():
        dotted = f"{key}{name}"
        if (
            isinstance(value, dict)
            and isinstance(tree.get(name), dict)
            and dotted in ("data", "model", "training", "data.action")
        ):
            _merge(tree[name], value, f"{dotted}.")
        else:
            tree[name] = value


def _check_together(config: Config, faults: list[str]) -> None:
    """What no single key can tell."""
    data, model = config.data, config.model
    if model.dim_model % model.n_heads:
        faults.append(f"model.n_heads: {model.n_heads} heads do not divide model.dim_model = {model.dim_model}")
    if model.dim_model % 4:
        faults.append(f"model.dim_model: expected a multiple of 4 (two sine and cosine pairs), found {model.dim_model}")
    if model.n_action_steps > model.chunk_size:
        faults.append(
            f"model.n_action_steps: {model.n_action_steps} is more than model.chunk_size = {model.chunk_size}"
        )
    if not data.state:
        faults.append("data.state: expected at least one entry, such as {topic: /joint_states, joints: [...]}")
    commands = data.commands
    if not commands and data.action.from_ != "next_state":
        faults.append("data.action.from: expected next_state or at least one entry, such as {topic: /command}")
    for key, signals in (("data.state", data.state), ("data.action.from", commands)):
        for i, signal in enumerate(signals):
            if signal.joints and signal.index:
                faults.append(f"{key}[{i}]: has joints and index; give one of them")
            for name, chosen in (("joints", signal.joints), ("index", signal.index)):
                if len(set(chosen)) < len(chosen):
                    faults.append(f"{key}[{i}].{name}: something stands twice in {list(chosen)}")
    for name in data.cameras:
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            faults.append(f"data.cameras.{name}: a camera's name is made of letters, digits and _")
    if len(set(data.cameras.values())) < len(data.cameras):
        faults.append(f"data.cameras: two cameras share a topic: {data.cameras}")
    topics = {*data.cameras.values(), *(signal.topic for signal in (*data.state, *commands))}
    for topic in data.max_age_ms:
        if topic not in topics:
            faults.append(
                f"data.max_age_ms.{topic}: no camera, state or action has this topic; known: {', '.join(sorted(topics))}"
            )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.training.device):
        faults.append(f"training.device: expected auto, cpu, cuda or cuda:N, found {config.training.device!r}")


if __name__ == "__main__":
    for dotted, default, reason in rows():
        print(f"{dotted:30} {default:40} {reason}")
