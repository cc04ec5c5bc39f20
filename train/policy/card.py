"""robot.json and README.md of a policy: everything a robot must know that LeRobot's files do not hold, and a model card."""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from string import Template
from typing import Any, NamedTuple

FORMAT = 2


class CameraInfo(NamedTuple):
    """One camera: its topic, the network's picture size, and the sizes of the recorded pictures."""

    topic: str
    height: int
    width: int
    recorded: list[list[int]]  # height, width of each size in the training recordings


@dataclass(frozen=True)
class Robot:
    """The content of robot.json. `train` and `validation` are the keys of recordings and amount."""

    step: int
    fps: float
    state_names: list[str]
    state_from: list[dict[str, Any]]  # data.state of the configuration
    action_names: list[str]
    action_from: str | list[dict[str, Any]]  # data.action.from
    action_as: str  # absolute or delta
    cameras: dict[str, CameraInfo]
    recordings: dict[str, dict[str, dict[str, str]]]  # split: recording: file: SHA-256
    amount: dict[str, dict[str, float]]  # split: episodes, seconds
    held_out: dict[str, Any]  # the last validation error, and its step
    init_from: str | None
    versions: dict[str, str]
    format: int = field(default=FORMAT)

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Robot:
        """The content of a robot.json of format 1 or 2. Raises KeyError, TypeError or ValueError if it is neither."""
        if tree.get("format", 1) == 1:  # nested, with a sentence on LeRobot
            names = {f"{key}_{part}": tree[key][part] for key in ("state", "action") for part in ("names", "from")}
            tree = {**tree, **names, "action_as": tree["action"]["as"], "format": FORMAT}
            tree = {key: value for key, value in tree.items() if key not in ("lerobot", "state", "action")}
        if tree["format"] != FORMAT:
            raise ValueError(f"format {tree['format']}, expected {FORMAT}; load it with the code that wrote it")
        cameras = {name: CameraInfo(**camera) for name, camera in tree["cameras"].items()}
        return Robot(**{**tree, "cameras": cameras})

    def to_json(self) -> dict[str, Any]:
        """The tree that from_json reads."""
        cameras = {name: camera._asdict() for name, camera in self.cameras.items()}
        return {"format": self.format} | dataclasses.asdict(self) | {"cameras": cameras}

    def card(self) -> str:
        """The model card, in Markdown."""
        sizes = {name: ", ".join(f"{w}x{h}" for h, w in camera.recorded) for name, camera in self.cameras.items()}
        validated = ", ".join(f"{key}: {value:.4g}" for key, value in self.held_out.items()) or "not validated yet"
        held_out = len(self.recordings["validation"])
        return CARD.substitute(
            step=self.step,
            train=f"{len(self.recordings['train'])} recordings, {_amount(self.amount['train'])}",
            start=f"\n- started from the weights of `{self.init_from}`" if self.init_from else "",
            judged=f"Held out: {held_out} recordings, {_amount(self.amount['validation'])}; {validated}."
            if held_out
            else "No recording was held out: this policy was not validated.",
            fps=f"{self.fps:g}",
            state=_names(self.state_names),
            cameras="".join(
                f"\n| picture `{name}` | `{c.topic}`, recorded at {sizes[name]}, seen at {c.width}x{c.height} (width x height) |"
                for name, c in self.cameras.items()
            ),
            action=_names(self.action_names),
            meaning="**absolute** targets"
            if self.action_as == "absolute"
            else "**deltas**: add each to its tick's state",
            source="the state one tick later" if self.action_from == "next_state" else "the commands sent to the robot",
            action_as=self.action_as,
            observation='"state": {name: number}'
            + (', "images": {camera: (H, W, 3) uint8 RGB}' if self.cameras else ""),
            actions=len(self.action_names),
            lerobot=LEROBOT if self.cameras else "LeRobot cannot load this policy: its ACT needs a camera.",
        )


def versions() -> dict[str, str]:
    """Versions of what a training depends on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "rosbags"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # NGC's torch has no metadata in some images
            found[package] = "unknown"
    return found


def _names(names: list[str]) -> str:
    return f"{len(names)}: " + ", ".join(f"`{name}`" for name in names)


def _amount(amount: dict[str, float]) -> str:
    seconds = amount["seconds"]
    return f"{amount['episodes']} episodes, {f'{seconds / 3600:.1f} h' if seconds >= 3600 else f'{seconds:.0f} s'}"


LEROBOT = """\
LeRobot >= 0.4.0 does not resize: pass pictures at the size that the network sees, in [0, 1], channels first.

```python
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors

policy = ACTPolicy.from_pretrained("pretrained_model", strict=True)
preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path="pretrained_model")
action = postprocess(policy.select_action(preprocess(observation)))
```"""
CARD = Template("""\
# ACT policy, trained from rosbags

- $step steps on $train$start

$judged

| | |
| --- | --- |
| rate | $fps Hz: run it at this rate |
| state | $state |$cameras
| action | $action |
| meaning | $meaning; learned from $source |

`robot.json` lists the recordings by file and SHA-256, and the versions of the software.

## On a robot

```python
from policy.runner import Policy  # in train/ of the project that trained it

policy = Policy.load("pretrained_model", fps=$fps, action_as="$action_as")
policy.reset()
action = policy.act({$observation})  # ($actions,), once per tick
```

## In LeRobot

$lerobot
""")
