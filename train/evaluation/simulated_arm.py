"""A simulated UR10e: its kinematics, the expert that reaches for a disc, its lag, and what its camera shows.

Lengths are metres, angles radians; the world is the robot's base frame: z up, the table at z = 0, the arm stretching
towards -x when its shoulder pan is 0.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Image = NDArray[np.uint8]

JOINT_TOPIC = "/joint_states"
COMMAND_TOPIC = "/joint_commands"
CAMERA_TOPIC = "/camera/color/image_raw/compressed"
JOINTS = ("shoulder_pan_joint", "shoulder_lift_joint", "elbow_joint", "wrist_1_joint", "wrist_2_joint", "wrist_3_joint")

# Denavit-Hartenberg parameters of the UR10e as Universal Robots publishes them.
DH_A = (0.0, -0.6127, -0.57155, 0.0, 0.0, 0.0)
DH_D = (0.1807, 0.0, 0.0, 0.17415, 0.11985, 0.11655)
DH_ALPHA = (np.pi / 2, 0.0, 0.0, np.pi / 2, -np.pi / 2, 0.0)
HOME = np.array([0.0, -1.9, 2.3, -np.pi / 2 - 0.4, -np.pi / 2, 0.0])  # drawn back and high, the gripper straight down

DISCS_FROM, DISCS_TO = (-0.9, -0.3), (-0.5, 0.3)  # corners (x, y) of where discs lie: all in reach and in view
DISC_RADIUS = 0.06
HOVER = 0.17  # flange over disc: the gripper's tips stay clear of it
GRIPPER = 0.13  # flange to tips

MOVE_S, HOLD_S = 1.62, (0.34, 0.5)  # about 49 ticks of motion and 12 of holding at 30 Hz
LAG_S = 0.08  # in which a UR's servoing makes good 63 % of a step

WIDTH, HEIGHT = 96, 72
OVERSAMPLING = 4  # drawn larger and averaged down, so that motions of less than a pixel show
CAMERA_AT, CAMERA_TO = np.array([-1.85, -0.6, 1.6]), np.array([-0.5, 0.02, 0.12])
FOCAL = 1.28 * WIDTH  # pixels
LIGHT = np.array([-0.35, 0.45, 1.0])  # towards the lamp; aslant, or the shadow would lie under the gripper unseen


def link_frames(q: Array) -> Array:
    """Poses (7, 4, 4) of the base and of the six joints' frames, the last being the flange, at joint angles q (6,)."""
    frames = [np.eye(4)]
    for angle, a, d, alpha in zip(q, DH_A, DH_D, DH_ALPHA, strict=True):
        c, s, ca, sa = np.cos(angle), np.sin(angle), np.cos(alpha), np.sin(alpha)
        step = np.array([[c, -s * ca, s * sa, a * c], [s, c * ca, -c * sa, a * s], [0, sa, ca, d], [0, 0, 0, 1]])
        frames.append(frames[-1] @ step)
    return np.stack(frames)


def forward_kinematics(q: Array) -> Array:
    """Origins (7, 3) of the base and the six joints' frames, the last being the flange, at joint angles q (6,)."""
    return link_frames(q)[:, :3, 3]


def inverse_kinematics(point: Array) -> Array:
    """Joint angles (6,) that bring the flange to point (3,), turned as at HOME.

    Newton's method always from HOME: neighbouring points get neighbouring angles and never another branch.
    """
    q = HOME.copy()
    wanted = link_frames(HOME)[6, :3, :3]
    for _ in range(100):
        frames = link_frames(q)
        position, turned = frames[6, :3, 3], frames[6, :3, :3]
        error = np.concatenate([point - position, np.cross(turned.T, wanted.T).sum(axis=0) / 2])
        if np.abs(error).max() < 1e-6:
            return q
        axes = frames[:6, :3, 2]
        jacobian = np.concatenate([np.cross(axes, position - frames[:6, :3, 3]), axes], axis=1).T
        step = np.linalg.solve(jacobian, error)
        q += step * min(1.0, 0.2 / np.abs(step).max())
    raise ValueError(f"no pose at {point}: the UR10e reaches about 1.2 m")


def sample_start(rng: np.random.Generator) -> Array:
    """Joint angles (6,) near HOME."""
    return HOME + rng.uniform(-0.05, 0.05, 6)


def sample_target(rng: np.random.Generator) -> Array:
    """Centre (3,) of a disc on the table."""
    return np.append(rng.uniform(DISCS_FROM, DISCS_TO), 0.0)


def goal_point(target: Array) -> Array:
    """Where the flange (3,) should come to rest for a disc at target (3,)."""
    return target + np.array([0.0, 0.0, HOVER])


def expert_trajectory(start: Array, goal: Array, seconds: float) -> tuple[Array, Array]:
    """Angles and velocities (6,) at a time of the minimum-jerk motion between two poses (6,), then at rest."""
    t = min(seconds / MOVE_S, 1.0)
    position = start + (goal - start) * (10 * t**3 - 15 * t**4 + 6 * t**5)
    velocity = (goal - start) * (30 * t**2 - 60 * t**3 + 30 * t**4) / MOVE_S
    return position, velocity


def follow(q: Array, command: Array, seconds: float) -> Array:
    """The angles (..., 6) to which an arm at q has come when it was given one command (..., 6) for a time."""
    return command + (q - command) * np.exp(-seconds / LAG_S)


def project(points: Array) -> tuple[Array, Array]:
    """Pixels (N, 2) of the oversampled picture and depths (N,) of points (N, 3), through a pinhole."""
    forward = (CAMERA_TO - CAMERA_AT) / np.linalg.norm(CAMERA_TO - CAMERA_AT)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    seen = (points - CAMERA_AT) @ np.stack([right, np.cross(forward, right), forward], axis=1)
    pixels = FOCAL * seen[:, :2] / seen[:, 2:] + (WIDTH / 2, HEIGHT / 2)
    return pixels * OVERSAMPLING, seen[:, 2]


def draw_polygon(picture: Image, corners: Array, colour: tuple[int, int, int]) -> None:
    """Fill the polygon with corners (N, 3)."""
    cv2.fillPoly(picture, [project(corners)[0].round().astype(np.int32)], colour)


def draw_link(picture: Image, ends: Array, radius: float, colour: tuple[int, int, int]) -> None:
    """Draw a rod between ends (2, 3) with round caps."""
    pixels, depths = project(ends)
    thickness = max(1, round(2 * radius * FOCAL * OVERSAMPLING / depths.mean()))
    (u0, v0), (u1, v1) = pixels.round().astype(int).tolist()
    cv2.line(picture, (u0, v0), (u1, v1), colour, thickness)


@functools.cache
def empty_table() -> Image:
    """The picture without disc and arm; shared, so copy it before drawing."""
    picture = np.full((HEIGHT * OVERSAMPLING, WIDTH * OVERSAMPLING, 3), (96, 102, 110), np.uint8)
    corners = np.array([[-1.15, -0.7, 0], [-1.15, 0.6, 0], [0.55, 0.6, 0], [0.55, -0.7, 0]])
    draw_polygon(picture, corners, (205, 190, 165))
    return picture


def render(q: Array, target: Array) -> Image:
    """What the camera sees, (72, 96, 3) RGB, of the arm at q (6,) and the disc at target (3,)."""
    picture = empty_table().copy()
    around = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    rim = np.stack([np.cos(around), np.sin(around), np.zeros(32)], axis=1)
    draw_polygon(picture, target + DISC_RADIUS * rim, (215, 30, 35))

    frames = link_frames(q)
    tips = frames[6, :3, 3] + GRIPPER * frames[6, :3, 2]
    joints = np.vstack([frames[:, :3, 3], tips])
    radii = (0.075, 0.065, 0.055, 0.05, 0.05, 0.045, 0.025)
    greys = (175, 200, 200, 185, 185, 185, 50)

    shade = np.zeros(picture.shape[:2], np.uint8)
    fallen = joints - joints[:, 2:] / LIGHT[2] * LIGHT
    for i, radius in enumerate(radii):
        draw_link(shade, fallen[i : i + 2], radius, (255, 255, 255))
    picture[shade > 0] = picture[shade > 0] // 10 * 7
    for i, (radius, grey) in enumerate(zip(radii, greys, strict=True)):
        draw_link(picture, joints[i : i + 2], radius, (grey, grey, grey))
    for joint, radius in zip(joints[1:6], radii[1:6], strict=True):
        draw_link(picture, np.stack([joint, joint]), radius, (95, 150, 190))  # the blue lids of a UR's joints
    return cv2.resize(picture, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA).astype(np.uint8)


def camera_jpeg(q: Array, target: Array) -> Image:
    """The bytes that the camera publishes."""
    return cv2.imencode(".jpg", render(q, target)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].ravel()
