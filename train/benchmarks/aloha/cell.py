"""The two-armed cell of the ACT paper's simulated tasks (arXiv:2304.13705, section V), in bare MuJoCo.

The scenes are the files of gym-aloha, which is found but not imported. Its 14 joints are two arms of six angles (rad) and
a gripper from 0, closed, to 1, open; left first. One tick is 20 ms. The reward is the paper's: 0 to 4 for the stages of a
task, of which 4 is success, even for a single tick.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("MUJOCO_GL", "egl")  # read by mujoco's import; its default wants a screen
try:
    import mujoco

    ASSETS = Path(str(importlib.util.find_spec("gym_aloha").origin)).parent / "assets"  # type: ignore[union-attr]
except (ImportError, AttributeError) as error:  # AttributeError: no libEGL, or no gym-aloha
    sys.exit(f"error: benchmarks/aloha: {error}; run make -C train .venv/aloha, and apt-get install libegl1")

Array = NDArray[np.float64]

ARMS = ("left", "right")
ANGLES = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
JOINTS = tuple(f"{arm}_{name}" for arm in ARMS for name in (*ANGLES, "gripper"))
HZ, TICKS = 50, 400
START = np.array([0, -0.96, 1.16, 0, -0.3, 0, 0.1] * 2)
CLOSED, OPEN = 0.01844, 0.058  # m, of a finger from the gripper's middle
SUBSTEPS = 10  # of 2 ms
CAMERA, HEIGHT, WIDTH = "top", 240, 320

ON_TABLE = 0.05  # m; objects drop the last centimetres


class Task(NamedTuple):
    """A task: its scene, where each object starts (x and y in m), and what the stages of its reward are."""

    scene: str
    areas: tuple[tuple[tuple[float, float], tuple[float, float]], ...]
    stages: tuple[str, str, str, str]


TASKS = {
    "cube": Task(
        "bimanual_viperx_transfer_cube.xml",
        (((0.0, 0.2), (0.4, 0.6)),),
        ("touched", "lifted", "attempted", "transferred"),
    ),
    "insertion": Task(
        "bimanual_viperx_insertion.xml",
        (((0.1, 0.2), (0.4, 0.6)), ((-0.2, -0.1), (0.4, 0.6))),  # the peg, the socket
        ("touched both", "lifted both", "in contact", "inserted"),
    ),
}


class Cell:
    """Both arms over the table, with the objects of one task."""

    def __init__(self, name: str, twice: bool = False) -> None:
        """`twice` doubles the height and width of pictures, to the paper's 480x640."""
        self.name, self.task, self.twice = name, TASKS[name], twice
        self.model = mujoco.MjModel.from_xml_path(str(ASSETS / self.task.scene))
        self.model.vis.quality.offsamples = 0  # pictures are drawn twice as large and averaged: faster
        self.data = mujoco.MjData(self.model)
        self._renderer: mujoco.Renderer | None = None
        self._geoms = [mujoco.mj_id2name(self.model, mujoco.mjtObj.mjOBJ_GEOM, i) for i in range(self.model.ngeom)]

    def reset(self, rng: np.random.Generator) -> None:
        """Arms to their start, each object to a random place on the table."""
        mujoco.mj_resetData(self.model, self.data)
        arms = self.data.qpos[:16] = _drives(START)
        self.data.ctrl[:] = arms
        for number, area in enumerate(self.task.areas):
            x, y = (rng.uniform(*side) for side in area)
            self.data.qpos[16 + 7 * number :][:7] = x, y, ON_TABLE, 1, 0, 0, 0
        mujoco.mj_forward(self.model, self.data)

    def step(self, command: Array) -> int:
        """One tick of 20 ms under a command (14,); the reward after it."""
        self.data.ctrl[:] = _drives(command)
        mujoco.mj_step2(self.model, self.data)  # dm_control's order, so that contacts belong to the state
        mujoco.mj_step(self.model, self.data, SUBSTEPS - 1)
        mujoco.mj_step1(self.model, self.data)
        return self.reward()

    def state(self) -> Array:
        """The joints (14,) as measured."""
        arms = self.data.qpos[:16].reshape(2, 8)
        grippers = (arms[:, 6:7] - CLOSED) / (OPEN - CLOSED)
        return np.hstack([arms[:, :6], grippers]).ravel()

    def objects(self) -> Array:
        """The places (objects, 3) of the task's objects, in m."""
        return self.data.qpos[16:].reshape(-1, 7)[:, :3].copy()

    def picture(self) -> NDArray[np.uint8]:
        """The camera's picture (H, W, 3), RGB."""
        if self._renderer is None:
            by = 4 if self.twice else 2
            self._renderer = mujoco.Renderer(self.model, by * HEIGHT, by * WIDTH)
            self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False  # 140 of 150 ms
        self._renderer.update_scene(self.data, CAMERA)
        return cv2.resize(self._renderer.render(), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)

    def close(self) -> None:
        """Free the renderer: its own end, at the interpreter's, complains."""
        if self._renderer is not None:
            self._renderer.close()

    def reward(self) -> int:
        """The stage, 0 to 4, that the contacts of this tick show."""
        contacts = self.data.contact
        touching = {
            frozenset((self._geoms[a], self._geoms[b])) for a, b in zip(contacts.geom1, contacts.geom2, strict=True)
        }

        def touch(things: tuple[str, ...], other: str) -> bool:
            return any(frozenset((thing, other)) in touching for thing in things)

        left, right = (f"vx300s_{arm}/10_{arm}_gripper_finger" for arm in ARMS)
        if self.name == "cube":
            cube = ("red_box",)
            raised = not touch(cube, "table")
            if touch(cube, left):
                return 4 if raised else 3
            return (2 if raised else 1) if touch(cube, right) else 0
        peg, socket = ("red_peg",), tuple(f"socket-{side}" for side in range(1, 5))
        raised = not touch(peg + socket, "table")
        if touch(peg, "pin"):
            return 4
        if raised and touch(socket, "red_peg"):
            return 3
        return (2 if raised else 1) if touch(peg, right) and touch(socket, left) else 0


def _drives(joints: Array) -> Array:
    """The simulator's 16 numbers, two fingers an arm (m), of 14 joints."""
    arms = joints.reshape(2, 7)
    fingers = CLOSED + arms[:, 6:] * (OPEN - CLOSED)
    return np.hstack([arms[:, :6], fingers, -fingers]).ravel()
