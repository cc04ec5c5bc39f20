"""A configuration proposed from what is in some recordings, as YAML that says why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from blob_url import is_url
from config import UR10E_JOINTS
from faults import Fault
from inspection.topics import Topic
from inspection.verdict import inspect
from recordings.bags import Bag, Message, read_messages
from recordings.images import DEPTH
from recordings.signals import IMAGES, JOINT_STATE, TRAJECTORY

USUAL_FPS = (5, 10, 15, 20, 25, 30, 50, 60, 100)
HEIGHT = 240  # pixels, about what the network is to see
ARRAYS = re.compile(r"std_msgs/msg/(Float|U?Int|Bool|Byte)\w*")
COMMANDING = re.compile(r"command|cmd|goal|target|desired|setpoint|reference|controller|/in/")


class Joints(NamedTuple):
    """A topic of joints."""

    topic: str
    type: str
    names: tuple[str, ...]  # none where they are not named
    size: int


def propose(bags: list[Bag], place: str) -> str:
    """The configuration, for the topics that all the recordings at a place share. Raises Fault where no state is in them."""
    found = [inspect(bag, None, pictures=False) for bag in tqdm(bags, desc="inspecting", unit="bag")]
    readable = [one for one in found if any(topic.read for topic in one.topics.values())]
    if not readable:
        raise Fault(*(f"{one.name}: {fault}" for one in found for fault in one.faults))
    shared = {
        name: topic
        for name, topic in readable[0].topics.items()
        if all(name in one.topics and one.topics[name].read for one in readable) and len(topic.types) == 1
    }
    left_out = sorted({name for one in readable for name, topic in one.topics.items() if topic.read} - set(shared))
    first = next(bag for bag in bags if bag.name == readable[0].name)
    joints = [_joints(first, topic) for topic in shared.values() if topic.types[0] in (JOINT_STATE, TRAJECTORY)]
    joints = [one for one in joints if one.size]
    state = _state(joints)
    cameras = [topic for topic in shared.values() if _is_camera(topic)]
    lines = [
        f"# Proposed from {len(readable)} recordings, of which {readable[0].name} was looked into.",
        "# Look it over: `python train/train.py --config THIS_FILE --dry-run`, then the same without --dry-run.",
        "",
        "data:",
        f"  bag_dir: {_text(place if is_url(place) else str(Path(place).resolve()))}",
        *_rate(cameras, shared[state.topic]),
        *_size(cameras),
        *_cameras(cameras, shared),
        *_signals(state, [one for one in joints if one is not state], shared),
        *_action(state, joints),
    ]
    if left_out:
        lines += [f"  # not in every recording, and so left out: {', '.join(left_out)}"]
    faulty = [f"# {one.name}: {fault}" for one in found for fault in one.faults]
    return "\n".join([*lines, "", "output_dir: outputs/train-rosbag-act  # below the folder of this file", *faulty, ""])


def _first(bag: Bag, topic: str) -> Message:
    return next(read_messages(bag, [topic]))


def _joints(bag: Bag, topic: Topic) -> Joints:
    content = _first(bag, topic.name).content()
    if topic.types[0] == TRAJECTORY:
        return Joints(topic.name, TRAJECTORY, tuple(content.joint_names), len(content.joint_names))
    return Joints(topic.name, JOINT_STATE, tuple(content.name), len(content.position))


def _state(joints: list[Joints]) -> Joints:
    """The topic that tells where the joints are: /joint_states by its name, else a JointState that commands nothing."""
    states = [one for one in joints if one.type == JOINT_STATE]
    if not states:
        raise Fault(
            f"no topic of {JOINT_STATE} with positions is in every recording; write the configuration by hand: README.md, "
            "`Your own recordings`, says how other numbers become the state"
        )
    return min(states, key=lambda one: (not one.topic.endswith("joint_states"), _commands(one.topic), -one.size))


def _commands(topic: str) -> bool:
    return COMMANDING.search(topic.lower()) is not None


def _is_camera(topic: Topic) -> bool:
    kinds = list(topic.pictures.kinds) if topic.pictures else []
    return topic.types[0] in IMAGES and bool(kinds) and not any(depth in kind for depth in DEPTH for kind in kinds)


def _rate(cameras: list[Topic], state: Topic) -> list[str]:
    slowest = min(cameras or [state], key=lambda topic: topic.rate_hz or 0.0)
    rate = slowest.rate_hz or 30.0
    if not cameras:
        rate = min(rate, 30.0)
    usual = [fps for fps in USUAL_FPS if fps <= rate * 1.1]
    fps = usual[-1] if usual else max(1.0, round(rate, 1))
    return [
        f"  fps: {fps:g}  # {slowest.name} has {slowest.rate_hz or 0:.4g} Hz; the robot must run the policy at this rate"
    ]


def _size(cameras: list[Topic]) -> list[str]:
    if not cameras or not cameras[0].pictures:
        return []
    kind = max(
        cameras[0].pictures.kinds, key=lambda kind: cameras[0].pictures.kinds[kind] if cameras[0].pictures else 0
    )
    width, height = map(int, kind.split()[0].split("x"))
    scale = max(1.0, height / HEIGHT)
    size = [max(32, round(pixels / scale / 8) * 8 if scale > 1 else pixels) for pixels in (height, width)]
    return [f"  image_size: {size}  # height, width: the shape of {cameras[0].name}, which gives {height}x{width}"]


def _cameras(cameras: list[Topic], shared: dict[str, Topic]) -> list[str]:
    """One topic of each camera: the raw and the compressed one show the same, and the compressed one is smaller."""
    by_camera: dict[str, list[Topic]] = {}
    for topic in cameras:
        by_camera.setdefault(topic.name.removesuffix("/compressed"), []).append(topic)
    chosen = {name: max(topics, key=lambda topic: topic.name) for name, topics in by_camera.items()}
    lines = ["  cameras:" if chosen else "  cameras: {}  # no colour picture in them: a policy on the state alone"]
    for (base, topic), name in zip(chosen.items(), _names(list(chosen)), strict=True):
        kinds = ", ".join(topic.pictures.kinds) if topic.pictures else ""
        other = f"; the same as {base}, smaller" if len(by_camera[base]) > 1 else ""
        lines.append(f"    {name}: {_text(topic.name)}  # {kinds}{other}")
    depth = [name for name, topic in shared.items() if topic.types[0] in IMAGES and not _is_camera(topic)]
    return lines + ([f"    # of no use, depth: {', '.join(depth)}"] if depth else [])


def _names(topics: list[str]) -> list[str]:
    """A short name for each camera topic: the word of it that tells it from the others."""
    dull = {"image_raw", "image", "image_rect", "image_color", "image_rect_color", "camera", "raw", ""}
    names: list[str] = []
    for topic in topics:
        words = [re.sub(r"\W", "_", word) for word in topic.split("/") if word not in dull] or ["color"]
        unique = [word for word in words if sum(word in other.split("/") for other in topics) == 1]
        name = (unique or words)[0]
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def _signals(state: Joints, others: list[Joints], shared: dict[str, Topic]) -> list[str]:
    lines = ["  state:", f"    - {_signal(state)}", f"      # {_order(state)}"]
    more = [
        f"    # - {_signal(one)}  # further joints: is this where they are, or where they should go?"
        for one in others
        if one.type == JOINT_STATE and not set(one.names) & set(state.names) and not _commands(one.topic)
    ]
    more += [
        f"    # - {{topic: {_text(name)}}}  # {topic.types[0].split('/')[-1]}: a gripper, perhaps"
        for name, topic in shared.items()
        if ARRAYS.fullmatch(topic.types[0]) and not _commands(name)
    ]
    return lines + more


def _action(state: Joints, joints: list[Joints]) -> list[str]:
    lines = ["  action:", "    from: next_state  # the state one tick later; needs no commands"]
    commands = [
        one
        for one in joints
        if one is not state
        and (set(one.names) == set(state.names) or (_commands(one.topic) and one.size == state.size))
    ]
    if commands:
        lines += ["    # or the commands, which is better where they were meant for the robot:"]
    for one in commands:
        like = one._replace(names=state.names) if set(one.names) == set(state.names) else one
        lines += [f"    # from: [{_signal(like)}]"]
    return [*lines, "    as: absolute  # or delta; what the robot node expects"]


def _signal(joints: Joints) -> str:
    if not joints.names:
        return f"{{topic: {_text(joints.topic)}, index: {list(range(joints.size))}}}"
    return f"{{topic: {_text(joints.topic)}, joints: [{', '.join(map(_text, _kinematic(joints.names)))}]}}"


def _kinematic(names: tuple[str, ...]) -> tuple[str, ...]:
    """The joints of a UR from its base to its tool, with whatever prefix; others as they were published."""
    found = [[name for name in names if name.endswith(joint)] for joint in UR10E_JOINTS]
    if any(len(one) != 1 for one in found):
        return names
    arm = [one[0] for one in found]
    return (*arm, *(name for name in names if name not in arm))


def _order(state: Joints) -> str:
    if not state.names:
        return "they have no names there: is this their order from message to message?"
    if _kinematic(state.names) != state.names:
        return "a UR from its base to its tool; the driver publishes them otherwise"
    return "as they are published; put them in the order that your robot node uses"


def _text(value: str) -> str:
    """A text as YAML takes it inside a flow."""
    return (
        value
        if re.fullmatch(r"[A-Za-z_/][\w/.-]*", value)
        and value.lower()
        not in (
            "y",
            "n",
            "yes",
            "no",
            "on",
            "off",
            "true",
            "false",
            "null",
        )
        else json.dumps(value)
    )
