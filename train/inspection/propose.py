"""Propose a configuration from some recordings, as YAML with reasons. What it proposes was read as training would.

States are what robots measure, commands what leaders, teleoperation and controllers are told. What is left out is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import yaml
from tqdm import tqdm

from blob_url import is_url
from config import UR10E_JOINTS, Action, Data, Signal
from faults import Fault, printable
from inspection.topics import Topic
from inspection.verdict import inspect
from recordings.bags import Bag, read_messages
from recordings.episodes import read_recording
from recordings.signals import IMAGES, JOINT_STATE, TRAJECTORY

USUAL_FPS = (5, 10, 15, 20, 25, 30, 50, 60, 100)
HEIGHT = 240  # pixels, about the network's input
LEAST_MESSAGES = 10  # of a topic with a rate
ARRAYS = re.compile(r"std_msgs/msg/(Float|U?Int|Bool|Byte)\w*")
COMMANDS = re.compile(r"command|cmd|goal|target|desired|setpoint|reference|controller|/in/|master|leader|teleop")
LEADERS = re.compile(r"master|leader|teleop")
MEASURED, COMMANDED = ("actual", "feedback"), ("desired", "reference")  # fields of control_msgs' controller states
COMMON_WORDS = {"image_raw", "image", "image_rect", "image_color", "image_rect_color", "camera", "raw", ""}


class Entry(NamedTuple):
    """A possible entry of data.state or data.action.from."""

    signal: Signal
    type: str
    size: int
    is_command: bool

    def __str__(self) -> str:
        topic, joints, index, field = self.signal.topic, self.signal.joints, self.signal.index, self.signal.field
        picked = [f"joints: {_flow(joints)}"] if joints else [f"index: {list(index)}"] if index else []
        picked += [f"field: {field}"] if field else []
        return "{" + ", ".join([f"topic: {_flow(topic)}", *picked]) + "}"


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
    others = {name for one in readable for name, topic in one.topics.items() if topic.read} - set(shared)
    left_out = dict.fromkeys(sorted(others), "not in every recording, or of two types")
    names = {one.name for one in readable}
    readable_bags = [bag for bag in bags if bag.name in names]
    entries = list(_entries(readable_bags[0], shared, left_out))
    cameras = list(_cameras(shared, left_out))
    states = _states(entries)
    chosen = [states, *_commands(states, entries)]
    rate, fps = _rate(cameras or [shared[states[0].signal.topic]], bool(cameras))
    data = Data(fps=fps, cameras={str(i): topic.name for i, topic in enumerate(cameras)}, state=())
    faults: list[str] = []
    usable: list[list[Entry]] = []
    for i, group in enumerate(chosen):
        wrong = list(_refused(readable_bags, data, states, group if i else []))
        if not wrong:
            usable.append(group)
        elif i == 0:
            faults = wrong
        left_out |= {entry.signal.topic: wrong[0] for entry in group if i and wrong}
    bag_dir = place if is_url(place) else str(Path(place).resolve())
    lines = [
        f"# Proposed from {len(readable)} recordings; message contents are those of {readable[0].name}.",
        "# Check it, then run: python train/train.py --config THIS_FILE --dry-run",
        "",
        "data:",
        f"  bag_dir: {_flow(bag_dir)}",
        rate,
        *_size(cameras),
        *_camera_lines(cameras, shared),
        *_state_lines(states, entries),
        *_action_lines([group for group in usable if group is not states]),
    ]
    mentioned = "\n".join(lines)
    left_out |= {
        name: f"a {t.types[0]}" for name, t in shared.items() if name not in mentioned and name not in left_out
    }
    lines += [f"  # left out: {name}: {reason}" for name, reason in sorted(left_out.items())]
    lines += ["", "output_dir: outputs/train-rosbag-act  # below the folder of this file"]
    faults += [f"{one.name}: {fault}" for one in inspections for fault in one.faults]
    lines += [f"# error: {fault}" for fault in dict.fromkeys(faults)]
    return "".join(printable(line) + "\n" for line in lines)


def _refused(bags: list[Bag], data: Data, states: list[Entry], commands: list[Entry]) -> Iterator[str]:
    """Why training would refuse these entries, by its own reader."""
    action = Action(tuple(entry.signal for entry in commands)) if commands else Action()
    tried = replace(data, state=tuple(entry.signal for entry in states), action=action)
    if commands:
        tried = replace(tried, cameras={})
    for bag in bags:
        try:
            read_recording(bag, tried)
        except Fault as fault:
            yield from fault.args


def _entries(bag: Bag, shared: dict[str, Topic], left_out: dict[str, str]) -> Iterator[Entry]:
    """All entries that the topics allow."""
    for name, topic in shared.items():
        kind, is_command = topic.types[0], COMMANDS.search(name.lower()) is not None
        if kind == JOINT_STATE:
            broken = [joint.name for joint in topic.joints if joint.not_finite]
            if broken or not topic.publishers:
                left_out[name] = f"{', '.join(broken)}: not finite" if broken else "no positions"
            for names in topic.publishers:
                finite = tuple(joint for joint in names if joint not in broken)
                index = tuple(i for i, joint in enumerate(names) if joint not in broken)
                by_index = any(joint == f"position[{i}]" for i, joint in enumerate(names))
                signal = Signal(name, index=index) if by_index else Signal(name, _from_base(finite))
                if finite:
                    yield Entry(signal, kind, len(finite), is_command)
        elif kind == TRAJECTORY or kind.startswith("control_msgs/") or ARRAYS.fullmatch(kind):
            try:
                content = next(read_messages(bag, [name])).content()
            except Fault as fault:
                left_out[name] = str(fault)
                continue
            joints = _from_base(tuple(getattr(content, "joint_names", ())))
            if kind == TRAJECTORY:
                yield Entry(Signal(name, joints), kind, len(joints), True)
            elif ARRAYS.fullmatch(kind):
                yield Entry(
                    Signal(name), kind, len(content.data) if hasattr(content.data, "__len__") else 1, is_command
                )
            for field in (*MEASURED, *COMMANDED) if joints and kind != TRAJECTORY else ():
                if len(getattr(getattr(content, field, None), "positions", ())) == len(joints):
                    yield Entry(Signal(name, joints, field=f"{field}.positions"), kind, len(joints), field in COMMANDED)


def _states(entries: list[Entry]) -> list[Entry]:
    """The entries of the joints' positions: all of /joint_states, or of each arm's; else measured by a controller."""
    measured = [e for e in entries if not e.is_command and not ARRAYS.fullmatch(e.type)]
    if not measured:
        raise Fault(
            f"no topic of {JOINT_STATE} with positions is in every recording; write the configuration by hand, see "
            "`field` in train/dataset/README.md"
        )

    def unlikely(entry: Entry) -> tuple[bool, bool, bool, int]:
        topic = entry.signal.topic
        return topic != "/joint_states", entry.type != JOINT_STATE, not topic.endswith("joint_states"), -entry.size

    main = min(measured, key=unlikely)
    last_word = main.signal.topic.rsplit("/", 1)[1]
    alike = [e for e in measured if e.type == main.type and e.signal.topic.rsplit("/", 1)[1] == last_word]
    if main.signal.topic == "/joint_states" or main.type != JOINT_STATE:
        alike = [e for e in alike if e.signal.topic == main.signal.topic and e.signal.field == main.signal.field]
    return alike


def _commands(states: list[Entry], entries: list[Entry]) -> Iterator[list[Entry]]:
    """Lists of commands for the same joints, an entry for each state; arrays, and joints of other names, alone."""
    commands = [e for e in entries if e not in states and (e.is_command or e.type == JOINT_STATE)]
    for kind in dict.fromkeys(e.type for e in commands if not ARRAYS.fullmatch(e.type)):
        group = []
        for state in states:
            words = set(re.split(r"[/_]", state.signal.topic))
            same = [
                e
                for e in commands
                if e.type == kind and e not in group and set(e.signal.joints) == set(state.signal.joints)
                if e.size == state.size
            ]
            if same:
                best = max(same, key=lambda e: (e.is_command, len(words & set(re.split(r"[/_]", e.signal.topic)))))
                ordered = replace(best.signal, joints=state.signal.joints)
                group.append(best._replace(signal=ordered))
                commands.remove(best)
        if group:
            yield group
    yield from ([e] for e in commands if e.is_command)


def _cameras(shared: dict[str, Topic], left_out: dict[str, str]) -> Iterator[Topic]:
    """One topic of each usable camera; of a raw and a compressed one the compressed, which is smaller."""
    by_camera: dict[str, list[Topic]] = {}
    for name, topic in shared.items():
        if topic.types[0] in IMAGES:
            reason = topic.pictures.unusable if topic.pictures else topic.not_understood or "no pictures"
            if not reason and topic.read < LEAST_MESSAGES:
                reason = f"{topic.read} pictures are no camera"
            if reason:
                left_out[name] = reason
            else:
                by_camera.setdefault(name.removesuffix("/compressed"), []).append(topic)
    for topics in by_camera.values():
        best = max(topics, key=lambda topic: topic.name)
        left_out |= {topic.name: f"same as {best.name}" for topic in topics if topic is not best}
        yield best


def _rate(topics: list[Topic], is_camera: bool) -> tuple[str, float]:
    """The line of data.fps, and its value."""
    slowest = min(topics, key=lambda topic: topic.rate_hz or 0.0)
    rate = slowest.rate_hz or 30.0
    usual = [fps for fps in USUAL_FPS if fps <= (rate if is_camera else min(rate, 30.0)) * 1.1]
    fps = usual[-1] if usual else max(1.0, round(rate, 1))
    return f"  fps: {fps:g}  # {slowest.name} has {rate:.4g} Hz; the robot must run the policy at this rate", fps


def _size(cameras: list[Topic]) -> list[str]:
    if not cameras or not cameras[0].pictures:
        return []
    kinds = cameras[0].pictures.kinds
    width, height = map(int, max(kinds, key=lambda kind: kinds[kind]).split()[0].split("x"))
    scale = max(1.0, height / HEIGHT)
    size = [max(32, round(pixels / scale / 8) * 8 if scale > 1 else pixels) for pixels in (height, width)]
    return [f"  image_size: {size}  # height, width: the aspect ratio of {cameras[0].name}, {height}x{width}"]


def _camera_lines(cameras: list[Topic], shared: dict[str, Topic]) -> Iterator[str]:
    yield "  cameras:" if cameras else "  cameras: {}  # no color pictures: a policy on the state alone"
    bases = [topic.name.removesuffix("/compressed") for topic in cameras]
    for topic, base, name in zip(cameras, bases, _short_names(bases), strict=True):
        kinds = ", ".join(topic.pictures.kinds) if topic.pictures else ""
        same = f"; same as {base}" if base != topic.name and base in shared else ""
        yield f"    {name}: {_flow(topic.name)}  # {kinds}{same}"


def _short_names(topics: list[str]) -> list[str]:
    """A short name for each camera topic: the word that distinguishes it."""
    names: list[str] = []
    for topic in topics:
        words = [re.sub(r"\W", "_", word) for word in topic.split("/") if word not in COMMON_WORDS] or ["color"]
        unique = [word for word in words if sum(word in other.split("/") for other in topics) == 1]
        name = (unique or words)[0]
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def _state_lines(states: list[Entry], entries: list[Entry]) -> Iterator[str]:
    yield "  state:"
    for entry in states:
        order = "as published; use the order of your robot node"
        if not entry.signal.joints:
            order = "joints without a name of their own: is this their order in every message?"
        elif set(UR10E_JOINTS) <= {joint[-len(ur) :] for joint in entry.signal.joints for ur in UR10E_JOINTS}:
            order = "a UR from base to tool; the driver publishes another order"
        yield from (f"    - {entry}", f"      # {order}")
    used = {joint for entry in states for joint in entry.signal.joints}
    for entry in entries:
        if not entry.is_command and entry not in states:
            if ARRAYS.fullmatch(entry.type):
                yield f"    # - {entry}  # {entry.type.split('/')[-1]}: perhaps a gripper"
            elif entry.type == JOINT_STATE and not used & set(entry.signal.joints):
                yield f"    # - {entry}  # more joints: measured, or commanded?"


def _action_lines(groups: list[list[Entry]]) -> Iterator[str]:
    yield "  action:"
    leaders = [group for group in groups if all(LEADERS.search(entry.signal.topic.lower()) for entry in group)]
    if leaders:
        yield f"    from: [{', '.join(map(str, leaders[0]))}]  # the leader's positions, which the arm follows"
        yield "    # or the state one tick later, which needs no commands:"
        yield "    # from: next_state"
    else:
        yield "    from: next_state  # the state one tick later; needs no commands"
    for group in groups:
        if group not in leaders[:1]:
            yield "    # or the commands, if they were sent to the robot:"
            yield f"    # from: [{', '.join(map(str, group))}]"
    yield "    as: absolute  # or delta; what your robot node expects"


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
