"""python train/config.py: print every setting with its default and its reason.

A configuration is frozen dataclasses. A YAML file changes some of their values, and `key=value` arguments change more.
`load` reports every fault at once, each with its dotted key. No torch here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from blob_url import BlobUrl, is_url
from faults import Fault

ROOT = Path(__file__).resolve().parent.parent
Part = tuple[float, float, float, float]  # of a picture: top, left, height, width, in fractions
WHOLE: Part = (0.0, 0.0, 1.0, 1.0)
LONGEST, DEEPEST = 65_536, 20  # characters of a configuration, levels of it
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxlist, SHORT.maxdict = 3, 20, 20
SHORT.maxstring = SHORT.maxother = 300
RETIRED = ("training.matmul_precision",)  # in the config.yaml of older runs; ignored


def setting(
    default: Any, reason: str, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> Any:
    """A dataclass field with its reason and its bounds: least <= value, above < value < below."""
    metadata = {"reason": reason, "least": least, "above": above, "below": below}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


UR10E_JOINTS = tuple(
    f"{axis}_joint" for axis in ("shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3")
)


@dataclass(frozen=True)
class Signal:
    """Numbers from the messages of one topic, in a fixed order."""

    topic: str
    joints: tuple[str, ...] = setting((), "joints to take by name, in this order (JointState, JointTrajectory)")
    index: tuple[int, ...] = setting((), "elements to take by position: of arrays, or joints without names", least=0)
    field: str = setting("", "dotted path to the numbers; default: `position`, `points.0.positions`, `data`")


@dataclass(frozen=True)
class Action:
    """What the policy learns to output."""

    from_: Literal["next_state"] | tuple[Signal, ...] = setting(
        "next_state", "`next_state` (the state one tick later), or a list like `state`: the commands sent to the robot"
    )
    as_: Literal["absolute", "delta"] = setting("absolute", "`absolute` targets, or `delta`: target minus state")


@dataclass(frozen=True)
class Data:
    """From recordings to episodes."""

    bag_dir: Path | BlobUrl = setting(
        ROOT / "rosbag-to-lerobot/local_bags",
        "recordings: .mcap, .db3, .bag, rosbag2 folders; or https://ACCOUNT.blob.core.windows.net/CONTAINER/PREFIX",
    )
    cache_dir: Path = setting(ROOT / "outputs/cache", "decoded recordings, shared by all runs; can be deleted")
    fps: float = setting(30.0, "ticks per second: the rate at which the robot will run the policy", above=0, below=1001)
    image_size: tuple[int, int] = setting((240, 320), "height, width of the network's input", least=32, below=4097)
    cameras: dict[str, str] = setting(
        {"color": "/camera/color/image_raw"},
        "name: topic of each camera (Image, CompressedImage, H.264 or H.265 video); `{}` trains on the state alone",
    )
    crop: dict[str, Part] = setting(
        {}, "camera: [top, left, height, width], the part of its picture to use, in fractions; default: all", least=0
    )
    state: tuple[Signal, ...] = setting((Signal("/joint_states", UR10E_JOINTS),), "the robot's readings to train on")
    action: Action = setting(Action(), "what the policy outputs")
    validation_fraction: float = setting(0.1, "share of the recordings to hold out for validation", least=0, below=1)
    max_age_ms: dict[str, float] = setting(
        {},
        "topic: age of its newest message at which an episode is split; default 2.5 periods, at least a tick",
        above=0,
    )
    on_bad_bag: Literal["fail", "skip"] = setting("fail", "at a faulty recording: `fail`, or `skip` it (exit code 3)")

    def part_of(self, camera: str) -> Part:
        """The part of a camera's picture that is used."""
        return self.crop.get(camera, WHOLE)

    @property
    def commands(self) -> tuple[Signal, ...]:
        """The signals of the action; empty for `next_state`."""
        return () if self.action.from_ == "next_state" else self.action.from_


@dataclass(frozen=True)
class Model:
    """ACT, with LeRobot's names and defaults."""

    chunk_size: int = setting(100, "actions in one chunk, in ticks", least=1, below=100_001)
    n_action_steps: int = setting(100, "actions of a chunk that the robot executes before it observes again", least=1)
    dim_model: int = setting(512, "width of the transformers", least=4, below=65_537)
    n_heads: int = setting(8, "attention heads; must divide dim_model", least=1)
    dim_feedforward: int = setting(3200, "width inside the feed-forward blocks", least=1, below=1_000_001)
    n_encoder_layers: int = setting(4, "layers of the encoder", least=1, below=1001)
    n_decoder_layers: int = setting(
        1, "layers of the decoder; the original trains only one of its seven", least=1, below=1001
    )
    use_vae: bool = setting(True, "train with a latent style variable: demonstrations differ in style")
    latent_dim: int = setting(32, "size of that variable", least=1, below=65_537)
    n_vae_encoder_layers: int = setting(4, "layers of its encoder", least=1, below=1001)
    dropout: float = setting(0.1, "share of activations dropped in training", least=0, below=1)
    kl_weight: float = setting(10.0, "weight of the KL term beside the L1 term", least=0)
    pretrained_backbone: bool = setting(True, "start ResNet-18 from ImageNet weights (45 MB, downloaded once)")


@dataclass(frozen=True)
class Training:
    """The optimization."""

    init_from: Path | None = setting(None, "checkpoint or pretrained_model folder, ours or LeRobot's, to start from")
    steps: int = setting(100_000, "optimizer steps", least=1)
    batch_size: int = setting(8, "samples per step and GPU", least=1, below=1_000_001)
    lr: float = setting(1e-5, "AdamW rate of the transformers; the paper's value", above=0)
    lr_backbone: float = setting(1e-5, "AdamW rate of the ResNet", least=0)
    weight_decay: float = setting(1e-4, "AdamW's, on all parameters", least=0)
    grad_clip_norm: float = setting(10.0, "largest gradient norm; 0 turns clipping off", least=0)
    warmup_steps: int = setting(0, "steps in which the rates rise from zero", least=0)
    schedule: Literal["constant", "cosine"] = setting("constant", "`constant` as in ACT, or `cosine` down to zero")
    augment: tuple[Literal["color", "crop", "affine"], ...] = setting((), "any of `color`, `crop`, `affine`")
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "`auto` is bf16 on a GPU with bf16 units, or a CPU where it is 1.3 times as fast, else fp32"
    )
    compile: bool = setting(
        False, "compile forward, loss and backward by torch.compile; takes minutes, needs a C++ compiler"
    )
    seed: int = setting(0, "seed of weights, sample order, dropout and held-out choice", least=0, below=2**63)
    device: str = setting("auto", "`auto` (cuda if available), `cpu`, `cuda` or `cuda:N`")
    log_every: int = setting(100, "steps between two lines of metrics.jsonl", least=1)
    evaluate_every: int = setting(2000, "steps between two validations", least=1)
    save_every: int = setting(5000, "steps between two checkpoints", least=1)
    keep_checkpoints: int = setting(3, "newest checkpoints to keep, besides the best one", least=1)
    resume: Literal["auto", "never", "must"] = setting("auto", "`auto`, `never`, or `must` resume from a checkpoint")


@dataclass(frozen=True)
class Config:
    """One training run."""

    data: Data = setting(Data(), "")
    model: Model = setting(Model(), "")
    training: Training = setting(Training(), "")
    output_dir: Path = setting(ROOT / "outputs/train-rosbag-act", "the run's folder")


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file `path` (None: the defaults), changed by `key=value` arguments.

    A relative path is relative to the file's folder; in an argument, to the working folder.
    Raises Fault with every fault found.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = _parse(path.read_text()) or {}
        except FileNotFoundError:
            raise Fault(f"{path}: no such configuration file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise Fault(f"{path}: cannot read: {error}") from None
        except yaml.YAMLError as error:
            raise Fault(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict):
            raise Fault(f"{path}: expected a mapping with keys such as training, found {_shown(tree)}")
        for dotted in RETIRED:
            room, key = dotted.split(".")
            if isinstance(tree.get(room), dict) and tree[room].pop(key, None) is not None:
                print(f"{path}: {dotted} is no longer a setting; ignored", flush=True)
        _make_paths_absolute(tree, Config, path.resolve().parent)
    faults: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            faults.append(f"{override[:300]}: expected key=value, such as training.steps=20000")
            continue
        try:
            branch = _parse(text)
        except (yaml.YAMLError, ValueError) as error:
            faults.append(f"{key}: the value {_shown(text)} is not valid YAML: {' '.join(str(error).split())}")
            continue
        for name in reversed(key.split(".")):
            branch = {name: branch}
        _make_paths_absolute(branch, Config, Path.cwd())
        _merge(tree, branch)
    config = _build(Config, tree, "", faults)
    faults = faults or list(_contradictions(config))
    if faults:
        raise Fault(*faults)
    return typing.cast(Config, config)


def to_dict(value: Any) -> Any:
    """The plain tree of lists, mappings and scalars that `load` reads back as the same configuration."""
    if dataclasses.is_dataclass(value):
        tree = {_yaml_key(f): to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
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
    """(dotted key, default, reason) of every setting; the table in dataset/README.md is these rows."""
    table = []
    for f in dataclasses.fields(kind):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        key = prefix + _yaml_key(f)
        if dataclasses.is_dataclass(default):
            table += rows(type(default), key + ".")
        elif f.metadata:
            shown = str(default.relative_to(ROOT)) if isinstance(default, Path) else _on_one_line(to_dict(default))
            table.append((key, shown, f.metadata["reason"]))
        if f.name == "state":
            table += [(f"{key}[].topic", "", "the topic's name")] + rows(Signal, f"{key}[].")
    return table


def _on_one_line(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).removesuffix("\n...\n").strip()


def _parse(text: str) -> Any:
    """Plain data from YAML of a sane size and depth. Raises yaml.YAMLError."""
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"{len(text)} characters; expected a configuration of at most {LONGEST}")
    depth = 0
    try:
        for event in yaml.parse(text, _UniqueKeys):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise yaml.YAMLError(f"nested more than {DEEPEST} deep")
        return yaml.load(text, _UniqueKeys)
    # of an impossible date, an explicit tag, an alias within itself
    except (ValueError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def _shown(value: Any) -> str:
    """A value as an error shows it: a short part of what is long."""
    text = SHORT.repr(value)
    return text if len(text) <= 300 else text[:297] + "..."


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a duplicate key: PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen = set()
        for key in keys:
            if not isinstance(key, Hashable):
                break  # the parent names it
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _yaml_key(f: dataclasses.Field[Any]) -> str:
    return f.name.rstrip("_")  # `from_` and `as_`: keywords of Python


def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {_yaml_key(f): hints[f.name] for f in dataclasses.fields(kind)}


def _make_paths_absolute(tree: Any, kind: type, folder: Path) -> None:
    """Make the relative paths in a tree absolute, in place."""
    for key, hint in _hints(kind).items():
        value = tree.get(key) if isinstance(tree, dict) else None
        if dataclasses.is_dataclass(hint):
            _make_paths_absolute(value, typing.cast(type, hint), folder)
            continue
        if not isinstance(value, str) or not value or not _is_path(value) or Path not in (hint, *typing.get_args(hint)):
            continue
        if not (BlobUrl in typing.get_args(hint) and is_url(value)):
            tree[key] = str((folder / os.path.expanduser(value)).resolve())  # noqa: PTH111 -- Path's raises


def _is_path(value: str) -> bool:
    return "\0" not in value and not re.search("[\ud800-\udfff]", value)


def _merge(tree: dict[str, Any], branch: Mapping[str, Any], key: str = "") -> None:
    """Merge a branch into a tree, in place; a mapping of free names (cameras, max_age_ms) is replaced."""
    for name, value in branch.items():
        merges = f"{key}{name}" in ("data", "model", "training", "data.action")
        if merges and isinstance(value, dict) and isinstance(tree.get(name), dict):
            _merge(tree[name], value, f"{key}{name}.")
        else:
            tree[name] = value


def _build(kind: type, tree: Any, key: str, faults: list[str]) -> Any:
    """The dataclass `kind` from a tree; None if there are faults, which are appended."""
    if not isinstance(tree, dict):
        faults.append(f"{key.rstrip('.')}: expected a mapping, found {_shown(tree)}")
        return None
    hints, values = _hints(kind), {}
    for name in tree:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.5)
            advice = f"did you mean {key}{near[0]}?" if near else f"known keys: {', '.join(hints)}"
            faults.append(f"{key}{str(name)[:80]}: unknown key (value {_shown(tree[name])}); {advice}")
    for f in dataclasses.fields(kind):
        name = _yaml_key(f)
        if name in tree:
            values[f.name] = _value(hints[name], tree[name], key + name, f.metadata, faults)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            faults.append(f"{key}{name}: missing")
    return kind(**values) if not faults else None


def _value(hint: Any, value: Any, key: str, bounds: Mapping[str, Any], faults: list[str]) -> Any:
    """`value` as the type `hint` within its bounds; faults are appended."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, key + ".", faults)
    if value is None and type(None) in inner:
        return None
    if BlobUrl in inner and isinstance(value, str) and is_url(value):
        try:
            return BlobUrl(value)
        except ValueError as error:
            faults += [f"{key}: {line}" for line in error.args]
            return value
    if origin in (typing.Union, types.UnionType):  # a word or a list; a path, where it is no URL
        lists = [each for each in inner if typing.get_origin(each) is tuple]
        return _value(lists[0] if lists and isinstance(value, list) else inner[0], value, key, bounds, faults)
    if origin is Literal:
        if value not in inner:
            faults.append(f"{key}: expected {' or '.join(map(str, inner))}, found {_shown(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list) or (inner[-1] is not ... and len(value) != len(inner)):
            length = "" if inner[-1] is ... else f" of {len(inner)}"
            faults.append(f"{key}: expected a list{length}, found {_shown(value)}")
            return value
        return tuple(_value(inner[0], item, f"{key}[{i}]", bounds, faults) for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            faults.append(f"{key}: expected a mapping of names, found {_shown(value)}")
            return value
        return {
            _value(str, name, f"{key} (a name)", {}, faults): _value(inner[1], item, f"{key}.{name}", bounds, faults)
            for name, item in value.items()
        }
    return _scalar(hint, value, key, bounds, faults)


def _scalar(hint: Any, value: Any, key: str, bounds: Mapping[str, Any], faults: list[str]) -> Any:
    if hint is float and isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-5 as a string
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        value = float(value)
    expected = {int: "an integer", float: "a number", bool: "true or false", str: "a text", Path: "a path"}[hint]
    if not isinstance(value, str if hint is Path else hint) or (hint is int and isinstance(value, bool)) or value == "":
        faults.append(f"{key}: expected {expected}, found {_shown(value)}")
        return value
    if hint is Path and not _is_path(value):
        faults.append(f"{key}: expected a path, found characters that none has: {_shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        faults.append(f"{key}: expected a finite number, found {value}")
    least, above, below = (bounds.get(name) for name in ("least", "above", "below"))
    limits = [("at least", least, lambda x: x >= least), ("above", above, lambda x: x > above)]
    limits.append(("below", below, lambda x: x < below))
    given = [(word, limit, holds) for word, limit, holds in limits if limit is not None]
    if not all(holds(value) for _, _, holds in given):
        faults.append(f"{key}: expected {' and '.join(f'{word} {limit:g}' for word, limit, _ in given)}, found {value}")
    return Path(value) if hint is Path else value


def _contradictions(config: Config) -> Iterator[str]:
    """Faults that no single key shows."""
    data, model, commands = config.data, config.model, config.data.commands
    if model.dim_model % model.n_heads:
        yield f"model.n_heads: {model.n_heads} does not divide model.dim_model = {model.dim_model}"
    if model.dim_model % 4:
        yield f"model.dim_model: expected a multiple of 4 (two sine and cosine pairs), found {model.dim_model}"
    if model.n_action_steps > model.chunk_size:
        yield f"model.n_action_steps: {model.n_action_steps} is more than model.chunk_size = {model.chunk_size}"
    if not data.state:
        yield "data.state: expected at least one entry, such as {topic: /joint_states, joints: [...]}"
    if not commands and data.action.from_ != "next_state":
        yield "data.action.from: expected next_state or at least one entry, such as {topic: /command}"
    for key, signals in (("data.state", data.state), ("data.action.from", commands)):
        for i, signal in enumerate(signals):
            if signal.joints and signal.index:
                yield f"{key}[{i}]: has joints and index; remove one of them"
            for name, chosen in (("joints", signal.joints), ("index", signal.index)):
                if len(set(chosen)) < len(chosen):
                    yield f"{key}[{i}].{name}: has a duplicate: {list(chosen)}"
    for name in data.cameras:
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            yield f"data.cameras.{name}: expected a name of letters, digits and _"
    for name, (top, left, height, width) in data.crop.items():
        if name not in data.cameras:
            yield f"data.crop.{name}: no such camera; known: {', '.join(data.cameras)}"
        if not (height > 0 and width > 0 and top + height <= 1 + 1e-9 and left + width <= 1 + 1e-9):
            yield f"data.crop.{name}: expected [top, left, height, width] in fractions, within the picture"
    if len(set(data.cameras.values())) < len(data.cameras):
        yield f"data.cameras: two cameras share a topic: {data.cameras}"
    topics = {*data.cameras.values(), *(signal.topic for signal in (*data.state, *commands))}
    for topic in data.max_age_ms:
        if topic not in topics:
            known = ", ".join(sorted(topics))
            yield f"data.max_age_ms.{topic}: no camera, state or action uses this topic; known: {known}"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.training.device):
        yield f"training.device: expected auto, cpu, cuda or cuda:N, found {_shown(config.training.device)}"


if __name__ == "__main__":
    for dotted, default, reason in rows():
        print(f"{dotted:30} {default:40} {reason}")
