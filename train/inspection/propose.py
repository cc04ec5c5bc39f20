"""Propose a configuration from some recordings, as YAML with reasons."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import yaml
from tqdm import tqdm

from blob_url import is_url
from config import UR10E_JOINTS
from faults import Fault
from inspection.topics import Topic
from inspection.verdict import inspect
from recordings.bags import Bag, read_messages
from recordings.images import DEPTH
from recordings.signals import IMAGES, JOINT_STATE, TRAJECTORY

USUAL_FPS = (5, 10, 15, 20, 25, 30, 50, 60, 100)
HEIGHT = 240  # pixels, about the network's input
ARRAYS = re.compile(r"std_msgs/msg/(Float|U?Int|Bool|Byte)\w*")
COMMANDS = re.compile(r"command|cmd|goal|target|desired|setpoint|reference|controller|/in/")
COMMON_WORDS = {"image_raw", "image", "image_rect", "image_color", "image_rect_color", "camera", "raw", ""}


class Joints(NamedTuple):
    """A topic of joints."""

    topic: str
    type: str
    names: tuple[str, ...]  # empty where messages have no names
    size: int

    def signal(self) -> str:
        """The entry of data.state or data.action.from."""
        picked = f"index: {list(range(self.size))}" if not self.names else f"joints: {_flow(_from_base(self.names))}"
        return f"{{topic: {_flow(self.topic)}, {picked}}}"


def propose(bags: list[Bag], place: str) -> str:
    """The configuration, for the topics that all recordings at a place share. Raises Fault if they have no joint states."""
    inspections = [inspect(bag) for bag in tqdm(bags, desc="inspecting", unit="bag")]
    readable = [one for one in inspections if not one.is_empty]
    if not readable:
        raise Fault(*(f"{one.name}: {fault}" for one in inspections for fault in one.faults))
    shared = {
        name: topic
        for name, topic in readable[0].topics.items()
        if all(name in one.topics and one.topics[name].read for one in readable) and len(topic.types) == 1
    }
    others = sorted({name for one in readable for name, topic in one.topics.items() if topic.read} - set(shared))
    first = next(bag for bag in bags if bag.name == readable[0].name)
    joints = [
        j
        for topic in shared.values()
        if topic.types[0] in (JOINT_STATE, TRAJECTORY)
        if (j := _joints(first, topic)).size
    ]
    state = _choose_state(joints)
    cameras = [topic for topic in shared.values() if _is_camera(topic)]
    bag_dir = place if is_url(place) else str(Path(place).resolve())
    lines = [
        f"# Proposed from {len(readable)} recordings; message contents are those of {readable[0].name}.",
        "# Check it, then run: python train/train.py --config THIS_FILE --dry-run",
        "",
        "data:",
        f"  bag_dir: {_flow(bag_dir)}",
        _rate(cameras, shared[state.topic]),
        *_size(cameras),
        *_cameras(cameras, shared),
        *_state(state, joints, shared),
        *_action(state, joints),
    ]
    if others:
        lines.append(f"  # skipped, not in every recording: {', '.join(others)}")
    lines += ["", "output_dir: outputs/train-rosbag-act  # below the folder of this file"]
    return "\n".join([*lines, *(f"# {one.name}: {fault}" for one in inspections for fault in one.faults), ""])


def _joints(bag: Bag, topic: Topic) -> Joints:
    content = next(read_messages(bag, [topic.name])).content()
    names = tuple(content.joint_names if topic.types[0] == TRAJECTORY else content.name)
    size = len(names) if topic.types[0] == TRAJECTORY else len(content.position)
    return Joints(topic.name, topic.types[0], names, size)


def _choose_state(joints: list[Joints]) -> Joints:
    """The topic of the joints' positions: /joint_states by its name, else a JointState that is no command."""
    states = [one for one in joints if one.type == JOINT_STATE]
    if not states:
        raise Fault(
            f"no topic of {JOINT_STATE} with positions is in every recording; write the configuration by hand, see "
            "`field` in train/dataset/README.md"
        )
    return min(states, key=lambda one: (not one.topic.endswith("joint_states"), _is_command(one.topic), -one.size))


def _is_command(topic: str) -> bool:
    return COMMANDS.search(topic.lower()) is not None


def _is_camera(topic: Topic) -> bool:
    kinds = list(topic.pictures.kinds) if topic.pictures else []
    return topic.types[0] in IMAGES and bool(kinds) and not any(depth in kind for depth in DEPTH for kind in kinds)


def _rate(cameras: list[Topic], state: Topic) -> str:
    slowest = min(cameras or [state], key=lambda topic: topic.rate_hz or 0.0)
    rate = slowest.rate_hz or 30.0
    usual = [fps for fps in USUAL_FPS if fps <= (rate if cameras else min(rate, 30.0)) * 1.1]
    fps = usual[-1] if usual else max(1.0, round(rate, 1))
    return f"  fps: {fps:g}  # {slowest.name} has {rate:.4g} Hz; the robot must run the policy at this rate"


def _size(cameras: list[Topic]) -> list[str]:
    if not cameras or not cameras[0].pictures:
        return []
    kinds = cameras[0].pictures.kinds
    width, height = map(int, max(kinds, key=lambda kind: kinds[kind]).split()[0].split("x"))
    scale = max(1.0, height / HEIGHT)
    size = [max(32, round(pixels / scale / 8) * 8 if scale > 1 else pixels) for pixels in (height, width)]
    return [f"  image_size: {size}  # height, width: the aspect ratio of {cameras[0].name}, {height}x{width}"]


def _cameras(cameras: list[Topic], shared: dict[str, Topic]) -> list[str]:
    """One topic of each camera; of a raw and a compressed one the compressed, which is smaller."""
    by_camera: dict[str, list[Topic]] = {}
    for topic in cameras:
        by_camera.setdefault(topic.name.removesuffix("/compressed"), []).append(topic)
    lines = ["  cameras:" if by_camera else "  cameras: {}  # no color pictures: a policy on the state alone"]
    for (base, topics), name in zip(by_camera.items(), _short_names(list(by_camera)), strict=True):
        topic = max(topics, key=lambda topic: topic.name)
        kinds = ", ".join(topic.pictures.kinds) if topic.pictures else ""
        lines.append(f"    {name}: {_flow(topic.name)}  # {kinds}{f'; same as {base}' if len(topics) > 1 else ''}")
    depth = [name for name, topic in shared.items() if topic.types[0] in IMAGES and not _is_camera(topic)]
    return lines + ([f"    # not usable, depth: {', '.join(depth)}"] if depth else [])


def _short_names(topics: list[str]) -> list[str]:
    """A short name for each camera topic: the word that distinguishes it."""
    names: list[str] = []
    for topic in topics:
        words = [re.sub(r"\W", "_", word) for word in topic.split("/") if word not in COMMON_WORDS] or ["color"]
        unique = [word for word in words if sum(word in other.split("/") for other in topics) == 1]
        name = (unique or words)[0]
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def _state(state: Joints, joints: list[Joints], shared: dict[str, Topic]) -> list[str]:
    order = "as published; use the order of your robot node"
    if not state.names:
        order = "messages have no names: is this their order in every message?"
    elif _from_base(state.names) != state.names:
        order = "a UR from base to tool; the driver publishes another order"
    lines = ["  state:", f"    - {state.signal()}", f"      # {order}"]
    lines += [
        f"    # - {one.signal()}  # more joints: measured, or commanded?"
        for one in joints
        if one.type == JOINT_STATE and not set(one.names) & set(state.names) and not _is_command(one.topic)
        if one is not state
    ]
    return lines + [
        f"    # - {{topic: {_flow(name)}}}  # {topic.types[0].split('/')[-1]}: perhaps a gripper"
        for name, topic in shared.items()
        if ARRAYS.fullmatch(topic.types[0]) and not _is_command(name)
    ]


def _action(state: Joints, joints: list[Joints]) -> list[str]:
    lines = ["  action:", "    from: next_state  # the state one tick later; needs no commands"]
    for one in joints:
        same = set(one.names) == set(state.names)
        if one is not state and (same or (_is_command(one.topic) and one.size == state.size)):
            like = one._replace(names=state.names) if same else one
            lines += ["    # or the commands, if they were sent to the robot:", f"    # from: [{like.signal()}]"]
    return [*lines, "    as: absolute  # or delta; what your robot node expects"]


def _from_base(names: tuple[str, ...]) -> tuple[str, ...]:
    """The joints of a UR from base to tool, whatever their prefix; others as published."""
    matches = [[name for name in names if name.endswith(joint)] for joint in UR10E_JOINTS]
    if any(len(match) != 1 for match in matches):
        return names
    arm = [match[0] for match in matches]
    return (*arm, *(name for name in names if name not in arm))


def _flow(value: str | tuple[str, ...]) -> str:
    """A text, or a list of texts, as YAML reads it inside braces."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_flow, value))}]"
    is_plain = re.fullmatch(r"[A-Za-z_/][\w/.-]*", value) and yaml.safe_load(value) == value
    return value if is_plain else json.dumps(value)
