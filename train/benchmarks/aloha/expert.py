"""The scripted expert of both tasks: waypoints of each tool, least jerk between them, inverse kinematics to joint commands.

An arm moves in the vertical plane of its waist, so that its kinematics are those of two links and never flip a wrist. Each
arm first moves to one pose over the middle of its objects' places: until then nothing in the joints tells the goal, and a
policy that learns from these demonstrations has to look at the camera.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from cell import HZ, START, TICKS, Array

BASES = {"left": (-0.469, 0.5, 1.0), "right": (0.469, 0.5, -1.0)}  # x, y (m), and where the arm looks along x
SHOULDER_Z, UPPER, ELBOW_OFFSET, FOREARM = 0.12705, 0.3, 0.05955, 0.3
TOOL = 0.069744 + 0.135  # from the wrist to between the fingertips
UPPER_LENGTH, UPPER_ANGLE = float(np.hypot(UPPER, ELBOW_OFFSET)), float(np.arctan2(UPPER, ELBOW_OFFSET))


class Waypoint(NamedTuple):
    """Where a tool is at a time: place (m), pitch downwards and roll (degrees), gripper 0 to 1."""

    second: float
    x: float
    y: float
    z: float
    pitch: float
    roll: float
    gripper: float


def inverse_kinematics(arm: str, waypoint: Array) -> Array:
    """The six angles that bring a tool to (x, y, z, pitch, roll); raises ValueError if the arm is too short."""
    base_x, base_y, look = BASES[arm]
    x, y, z, pitch, roll = waypoint
    pitch, forward, aside = np.radians(pitch), (x - base_x) * look, (y - base_y) * look
    reach = np.hypot(forward, aside) - TOOL * np.cos(pitch)
    height = z + TOOL * np.sin(pitch) - SHOULDER_Z
    distance = np.hypot(reach, height)
    cosine = (UPPER_LENGTH**2 + distance**2 - FOREARM**2) / (2 * UPPER_LENGTH * distance)
    if cosine > 1:
        raise ValueError(f"{arm} arm: ({x:.3f}, {y:.3f}, {z:.3f}) is out of reach")
    upper = np.arctan2(height, reach) + np.arccos(cosine)  # above the horizontal, elbow up
    forearm = np.arctan2(height - UPPER_LENGTH * np.sin(upper), reach - UPPER_LENGTH * np.cos(upper))
    shoulder = UPPER_ANGLE - upper
    return np.array([np.arctan2(aside, forward), shoulder, -forearm - shoulder, 0.0, pitch + forearm, np.radians(roll)])


def start(arm: str) -> Waypoint:
    """The tool of an arm in its start pose."""
    base_x, base_y, look = BASES[arm]
    _, shoulder, elbow, _, wrist, _, gripper = START[:7]
    upper, forearm, pitch = UPPER_ANGLE - shoulder, -shoulder - elbow, shoulder + elbow + wrist
    reach = UPPER_LENGTH * np.cos(upper) + FOREARM * np.cos(forearm) + TOOL * np.cos(pitch)
    z = SHOULDER_Z + UPPER_LENGTH * np.sin(upper) + FOREARM * np.sin(forearm) - TOOL * np.sin(pitch)
    return Waypoint(0, base_x + look * reach, base_y, z, np.degrees(pitch), 0, gripper)


def trajectory(arm: str, waypoints: list[Waypoint]) -> Array:
    """The commands (TICKS, 7) of an arm that passes its waypoints, at rest in each."""
    path = np.array([start(arm), *waypoints, waypoints[-1]._replace(second=TICKS / HZ + 1)])
    seconds = (1 + np.arange(TICKS)) / HZ
    leg = np.searchsorted(path[:, 0], seconds, side="right") - 1
    here, there = path[leg], path[leg + 1]
    share = ((seconds - here[:, 0]) / (there[:, 0] - here[:, 0]))[:, None]
    smooth = share**3 * (10 - 15 * share + 6 * share**2)  # least jerk: Flash and Hogan, 1985
    poses = here + smooth * (there - here)
    return np.array([[*inverse_kinematics(arm, pose[1:6]), pose[6]] for pose in poses])


def cube(objects: Array) -> tuple[list[Waypoint], list[Waypoint]]:
    """The right arm lifts the cube to the middle, where the left arm takes it."""
    x, y, _ = objects[0]
    right = [
        Waypoint(0.9, 0.1, 0.5, 0.20, 60, 0, 1),
        Waypoint(2.0, x, y, 0.10, 60, 0, 1),
        Waypoint(2.8, x, y, 0.015, 60, 0, 1),
        Waypoint(3.2, x, y, 0.015, 60, 0, 0),
        Waypoint(4.6, 0.0, 0.5, 0.25, 60, 0, 0),
        Waypoint(6.5, 0.0, 0.5, 0.25, 60, 0, 0),
        Waypoint(6.9, 0.0, 0.5, 0.25, 60, 0, 1),
        Waypoint(7.8, 0.1, 0.5, 0.29, 60, 0, 1),
    ]
    left = [
        Waypoint(0.9, -0.2, 0.46, 0.25, 0, 0, 0.5),
        Waypoint(2.8, -0.15, 0.5, 0.25, 0, 90, 1),
        Waypoint(4.6, -0.1, 0.5, 0.25, 0, 90, 1),
        Waypoint(5.7, -0.01, 0.5, 0.245, 0, 90, 1),
        Waypoint(6.2, -0.01, 0.5, 0.245, 0, 90, 0),
        Waypoint(7.0, -0.01, 0.5, 0.245, 0, 90, 0),
        Waypoint(7.8, -0.12, 0.5, 0.25, 0, 90, 0),
    ]
    return left, right


def insertion(objects: Array) -> tuple[list[Waypoint], list[Waypoint]]:
    """Each arm lifts its part to the middle; then the peg goes into the socket."""
    (peg_x, peg_y, _), (socket_x, socket_y, _) = objects
    # chosen by a search over attempts (77, 0) to (77, 15): steep, gripped 8 mm towards the arm, the peg higher by 8 mm,
    # and stopped where the centres are 97 mm apart: pushing on would slide the parts in the fingers
    steep, grip, height, raised = 68, 0.008, 0.24, 0.248
    right = [
        Waypoint(0.9, 0.15, 0.5, 0.20, 60, 0, 1),
        Waypoint(2.0, peg_x + grip, peg_y, 0.10, 60, 0, 1),
        Waypoint(2.9, peg_x + grip, peg_y, 0.01, 60, 0, 1),
        Waypoint(3.4, peg_x + grip, peg_y, 0.01, 60, 0, 0),
        Waypoint(5.0, 0.15, 0.5, raised, steep, 0, 0),
        Waypoint(7.0, 0.0565, 0.5, raised, steep, 0, 0),
    ]
    left = [
        Waypoint(0.9, -0.15, 0.5, 0.20, 60, 0, 1),
        Waypoint(2.0, socket_x - grip, socket_y, 0.10, 60, 0, 1),
        Waypoint(2.9, socket_x - grip, socket_y, 0.01, 60, 0, 1),
        Waypoint(3.4, socket_x - grip, socket_y, 0.01, 60, 0, 0),
        Waypoint(5.0, -0.15, 0.5, height, steep, 0, 0),
        Waypoint(7.0, -0.0565, 0.5, height, steep, 0, 0),
    ]
    return left, right


PLANS: dict[str, Callable[[Array], tuple[list[Waypoint], list[Waypoint]]]] = {"cube": cube, "insertion": insertion}


def commands(task: str, objects: Array) -> Array:
    """The commands (TICKS, 14) of one demonstration, given where the objects lie (objects, 3)."""
    left, right = PLANS[task](objects)
    return np.hstack([trajectory("left", left), trajectory("right", right)])
