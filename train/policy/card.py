"""robot.json and README.md of a policy: what a robot must know that LeRobot's files do not hold, and a model card."""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from string import Template
from typing import Any, NamedTuple

import torch

from config import WHOLE, Part
from faults import printable

FORMAT = 2


class CameraInfo(NamedTuple):
    """One camera: its topic, the network's picture size, the sizes of the recorded pictures, and the part it sees of them."""

    topic: str
    height: int
    width: int
    recorded: list[list[int]]  # height, width of each size in the training recordings
    crop: list[float] = [*WHOLE]  # noqa: RUF012 -- never changed; of checkpoints from before it


@dataclass(frozen=True)
class Robot:
    """The content of robot.json; recordings and amount are by split, `train` and `validation`."""

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
    weights: str = ""  # SHA-256 of model.safetensors' tensors; older ones have none
    format: int = FORMAT

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Robot:
        """The content of a robot.json of format 1 or 2. Raises KeyError, TypeError or ValueError if it is neither."""
        if tree.get("format", 1) == 1:  # nested, with a sentence on LeRobot
            names = {f"{key}_{part}": tree[key][part] for key in ("state", "action") for part in ("names", "from")}
            tree = {**tree, **names, "action_as": tree["action"]["as"], "format": FORMAT}
            tree = {key: value for key, value in tree.items() if key not in ("lerobot", "state", "action")}
        if tree["format"] != FORMAT:
            raise ValueError(f"format {tree['format']}, expected {FORMAT}; load it with the code that wrote it")
        return Robot(**{**tree, "cameras": {name: CameraInfo(**camera) for name, camera in tree["cameras"].items()}})

    @property
    def parts(self) -> list[Part]:
        """The part of each camera's picture that the network sees."""
        return [
            (top, left, height, width) for top, left, height, width in (each.crop for each in self.cameras.values())
        ]

    def to_json(self) -> dict[str, Any]:
        """The tree that from_json reads."""
        cameras = {name: camera._asdict() for name, camera in self.cameras.items()}
        return {"format": self.format} | dataclasses.asdict(self) | {"cameras": cameras}

    def card(self) -> str:
        """The model card, in Markdown."""
        rows = [f"rate | {self.fps:g} Hz: run it at this rate", f"state | {_plain(', '.join(self.state_names))}"]
        for name, camera in self.cameras.items():
            sizes = ", ".join(f"{w}x{h}" for h, w in camera.recorded)
            seen = f"seen at {camera.width}x{camera.height} (width x height)"
            if tuple(camera.crop) != WHOLE:
                top, left, height, width = (f"{share:.4g}" for share in camera.crop)
                seen += (
                    f", of it the part of height {height} and width {width} from top {top}, left {left}, in fractions"
                )
            rows.append(f"picture `{name}` | {_plain(camera.topic)}, recorded at {sizes}, {seen}")
        meaning = "**absolute** targets" if self.action_as == "absolute" else "**deltas**: add each to its tick's state"
        source = "the state one tick later" if self.action_from == "next_state" else "the commands sent to the robot"
        rows += [f"action | {_plain(', '.join(self.action_names))}", f"meaning | {meaning}; learned from {source}"]
        validated = ", ".join(f"{key}: {value:.4g}" for key, value in self.held_out.items()) or "not validated yet"
        return CARD.substitute(
            step=self.step,
            train=self._amount("train"),
            start=f", starting from the weights of {_plain(self.init_from)}" if self.init_from else "",
            judged=f"{self._amount('validation')}; {validated}" if self.recordings["validation"] else "nothing",
            rows="\n".join(f"| {row} |" for row in rows),
            fps=f"{self.fps:g}",
            action_as=self.action_as,
            images=', "images": {camera: (H, W, 3) uint8 RGB}' if self.cameras else "",
            actions=len(self.action_names),
            lerobot=LEROBOT if self.cameras else "LeRobot cannot load this policy: its ACT needs a camera.",
        )

    def _amount(self, split: str) -> str:
        episodes, seconds = self.amount[split]["episodes"], self.amount[split]["seconds"]
        time = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s"
        return f"{len(self.recordings[split])} recordings, {episodes} episodes, {time}"


def _plain(text: str) -> str:
    """A name as Markdown shows it: without HTML, control characters or the end of a cell."""
    return escape(printable(text), quote=False).replace("|", "\\|")


def versions() -> dict[str, str]:
    """Versions of what a training depends on."""
    packages = {package: version(package) for package in ("numpy", "rosbags")}
    return {"python": platform.python_version(), "torch": torch.__version__, **packages}


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

$step steps on $train$start. Held out: $judged.

| | |
| --- | --- |
$rows

`robot.json` lists the recordings by file and SHA-256, and the versions of the software.

## On a robot

```python
from policy.runner import Policy  # in train/ of the project that trained it

policy = Policy.load("pretrained_model", fps=$fps, action_as="$action_as")
policy.reset()
action = policy.act({"state": {name: number}$images})  # ($actions,), once per tick
```

## In LeRobot

$lerobot
""")
