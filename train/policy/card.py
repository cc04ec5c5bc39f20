"""What a policy says of itself beside its weights: robot.json for programs, README.md for people."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from config import Config, to_dict

if TYPE_CHECKING:  # a robot loads policies without the readers of bags
    from dataset.batches import Dataset, Split


def robot_json(step: int, config: Config, dataset: Dataset, held_out: dict[str, Any]) -> dict[str, Any]:
    """What the robot must know beyond LeRobot's files, and where the policy comes from."""
    data, (height, width) = config.data, config.data.image_size
    lerobot = "loads in LeRobot >= 0.4.0" if data.cameras else "cannot be loaded by LeRobot, whose ACT needs a camera"

    def amount(split: Split) -> dict[str, Any]:
        return {"episodes": len(split.lengths), "seconds": round(len(split.state) / data.fps, 1)}

    return {
        "step": step,
        "lerobot": lerobot,
        "fps": data.fps,
        "state": {"names": dataset.state_names, "from": to_dict(data.state)},
        "action": {"names": dataset.action_names, **to_dict(data.action)},
        "cameras": {
            name: {"topic": topic, "height": height, "width": width, "recorded": dataset.picture_sizes[name]}
            for name, topic in data.cameras.items()
        },
        "recordings": {
            "train": {name: dataset.recordings[name] for name in dataset.train.names},
            "validation": {name: dataset.recordings[name] for name in dataset.validation.names},
        },
        "amount": {"train": amount(dataset.train), "validation": amount(dataset.validation)},
        "held_out": held_out,
        "init_from": str(config.training.init_from) if config.training.init_from else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "rosbags": importlib.metadata.version("rosbags"),
        },
    }


def in_words(robot: dict[str, Any]) -> str:
    """The model card of a robot.json, in Markdown."""
    amount, recordings, action, fps = robot["amount"], robot["recordings"], robot["action"], robot["fps"]
    meaning = {
        "absolute": "**Absolute**: the targets themselves.",
        "delta": "**Delta**: each action is to be added to the state at its tick.",
    }[action["as"]]
    source = "the state one tick later" if action["from"] == "next_state" else "the commands that were sent"
    cameras = [
        f"| picture `{name}` | `{one['topic']}`, recorded at {', '.join(f'{w}x{h}' for h, w in one['recorded'])}, "
        f"seen at {one['width']}x{one['height']} (width x height, pixels) |"
        for name, one in robot["cameras"].items()
    ]
    judged = "No recording was held out: how good this policy is, is not known."
    if recordings["validation"]:
        judged = (
            f"Held out: {len(recordings['validation'])} recordings, {_time(amount['validation']['seconds'])}. "
            + (", ".join(f"{key}: {value:.4g}" for key, value in robot["held_out"].items()) or "Not validated yet")
            + "."
        )
    start = [f"- its weights started from `{robot['init_from']}`"] if robot["init_from"] else []
    lerobot = _LEROBOT if cameras else f"This policy {robot['lerobot']}."
    return "\n".join(
        [
            "# ACT policy, trained from rosbags",
            "",
            f"- {robot['step']} steps on {len(recordings['train'])} recordings: {amount['train']['episodes']} episodes, "
            f"{_time(amount['train']['seconds'])}, at {fps:g} Hz",
            *start,
            "",
            f"{judged}",
            "",
            "| | |",
            "| --- | --- |",
            f"| rate | {fps:g} Hz: run it at this |",
            f"| state | {_names(robot['state']['names'])} |",
            *cameras,
            f"| action | {_names(action['names'])} |",
            f"| meaning of the action | {meaning} Learned from {source}. |",
            "",
            "Which recordings, by file and SHA-256, and the versions of the software stand in `robot.json`.",
            "",
            "## On a robot",
            "",
            "```python",
            "from policy.runner import Policy  # train/ of the project that trained it",
            "",
            f'policy = Policy.load("pretrained_model", fps={fps:g}, action_as="{action["as"]}")',
            "policy.reset()",
            f"action = policy.act({_OBSERVATION if cameras else _STATE})  # ({len(action['names'])},), every tick",
            "```",
            "",
            "## In LeRobot",
            "",
            lerobot,
            "",
        ]
    )


_STATE = '{"state": {name: number}}'
_OBSERVATION = '{"state": {name: number}, "images": {camera: (H, W, 3) uint8 RGB}}'
_LEROBOT = """\
LeRobot >= 0.4.0 does not resize pictures: give it the size that the network sees, in [0, 1], channels first.

```python
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors

policy = ACTPolicy.from_pretrained("pretrained_model", strict=True)
preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path="pretrained_model")
action = postprocess(policy.select_action(preprocess(observation)))
```"""


def _names(names: list[str]) -> str:
    return f"{len(names)}: " + ", ".join(f"`{name}`" for name in names)


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s"
