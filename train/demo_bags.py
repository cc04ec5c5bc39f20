"""Record a simulated UR10e reaching for a red disc as rosbag2 folders, one for each episode.

    python train/demo_bags.py outputs/demo/bags
    python train/demo_bags.py outputs/demo/bags --episodes 400 --seed 1

Only the camera shows where the disc lies; the joints tell nothing of it before the arm moves. The joints follow the
commands, which are recorded too, as a first-order lag does. An episode depends on the seed and its own number alone, so
that a larger set begins with the smaller one. Lengths are metres, angles radians; the
world is the robot's base frame: z up, the table at z = 0, the arm stretching towards -x when its shoulder pan is 0.
"""

import argparse
import functools
import shutil
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from rosbags.typesys.stores import ros2_humble as ros
from tqdm import tqdm

from faults import Fault, exit_with_message

Array = NDArray[np.float64]
Image = NDArray[np.uint8]
CompressedImage = ros.sensor_msgs__msg__CompressedImage
JointState = ros.sensor_msgs__msg__JointState
Message = CompressedImage | JointState

JOINT_TOPIC = "/joint_states"
COMMAND_TOPIC = "/joint_commands"
CAMERA_TOPIC = "/camera/color/image_raw/compressed"
JOINTS = ("shoulder_pan_joint", "shoulder_lift_joint", "elbow_joint", "wrist_1_joint", "wrist_2_joint", "wrist_3_joint")
RECORDED = (2, 1, 0, 3, 4, 5)  # a UR driver publishes the elbow first
TYPES = get_typestore(Stores.ROS2_HUMBLE)

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
JOINT_HZ, CAMERA_HZ = 125, 30
FIRST_EPISODE_NS = 1_767_225_600 * 10**9  # 2026-01-01 00:00 UTC

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


def stamps(start: int, end: int, hertz: float, jitter_ns: int, rng: np.random.Generator) -> list[int]:
    """Header stamps from start to end (ns) at a rate with a phase of its own and some jitter."""
    regular = np.arange(rng.uniform(0, 1e9 / hertz), end - start, 1e9 / hertz).astype(np.int64)
    return (start + regular + rng.integers(0, jitter_ns, len(regular))).tolist()


def header(stamp: int, frame: str) -> ros.std_msgs__msg__Header:
    """A message's header with its stamp (ns)."""
    return ros.std_msgs__msg__Header(ros.builtin_interfaces__msg__Time(*divmod(stamp, 10**9)), frame)


def episode_messages(seed: int, index: int) -> list[tuple[int, str, Message]]:
    """All (receive stamp in ns, topic, message) of one episode, in the order in which a recorder gets them."""
    rng = np.random.default_rng((seed, index))
    start, target = sample_start(rng), sample_target(rng)
    goal = inverse_kinematics(goal_point(target))
    began = FIRST_EPISODE_NS + (index * 180 + int(rng.integers(60))) * 10**9  # a person lays the disc anew meanwhile
    ended = began + int((MOVE_S + rng.uniform(*HOLD_S)) * 1e9)
    messages: list[tuple[int, str, Message]] = []

    order = list(RECORDED)
    names = [JOINTS[i] for i in order]
    for stamp in stamps(began, ended, JOINT_HZ, 100_000, rng):
        q, velocity = expert_trajectory(start, goal, (stamp - began) / 1e9)
        state = JointState(header(stamp, "base"), names, q[order], velocity[order], np.zeros(6))
        messages.append((stamp + int(rng.integers(300_000, 3_000_000)), JOINT_TOPIC, state))

    for stamp in stamps(began, ended, CAMERA_HZ, 1_000_000, rng):
        q, _ = expert_trajectory(start, goal, (stamp - began) / 1e9)
        jpeg = camera_jpeg(q, target)
        image = CompressedImage(header(stamp, "camera_color_optical_frame"), "rgb8; jpeg compressed bgr8", jpeg)
        messages.append((stamp + int(rng.integers(3_000_000, 8_000_000)), CAMERA_TOPIC, image))

    rng = np.random.default_rng((seed, index, 1))  # its own: the other topics stay as they were before commands came
    for stamp in stamps(began, ended, JOINT_HZ, 100_000, rng):
        q, velocity = expert_trajectory(start, goal, (stamp - began) / 1e9)
        command = JointState(header(stamp, "base"), list(JOINTS), q + LAG_S * velocity, np.zeros(0), np.zeros(0))
        messages.append((stamp + int(rng.integers(300_000, 3_000_000)), COMMAND_TOPIC, command))
    return sorted(messages, key=lambda entry: entry[0])


def write_bag(folder: Path, seed: int, messages: list[tuple[int, str, Message]]) -> None:
    """Write messages as a rosbag2 folder, whole or not at all; the bag keeps the seed in its metadata."""
    partial = folder.parent / ".partial" / folder.name  # the file inside is named after its folder: keep the name
    shutil.rmtree(partial.parent, ignore_errors=True)
    with Writer(partial, version=9, storage_plugin=StoragePlugin.MCAP) as bag:
        bag.set_custom_data("demo_seed", str(seed))
        connections = {
            topic: bag.add_connection(topic, kind.__msgtype__, typestore=TYPES)
            for topic, kind in (
                (JOINT_TOPIC, JointState),
                (CAMERA_TOPIC, CompressedImage),
                (COMMAND_TOPIC, JointState),
            )
        }
        for received, topic, message in messages:
            bag.write(connections[topic], received, TYPES.serialize_cdr(message, message.__msgtype__))
    partial.rename(folder)
    partial.parent.rmdir()


def record(root: Path, episodes: int, seed: int) -> int:
    """Record the episodes that root still lacks and return how many; a Fault if it holds anything but such bags."""
    if episodes < 1 or seed < 0:
        raise Fault(f"--episodes {episodes} --seed {seed}; expected at least 1 and 0; change them")
    if root.exists() and not root.is_dir():
        raise Fault(f"{root}: a file; expected a folder or nothing; choose another folder")
    folders = [root / f"episode_{index:03d}" for index in range(episodes)]
    for entry in sorted(root.glob("*")):
        metadata = entry / "metadata.yaml"
        ours = metadata.is_file() and f"demo_seed: '{seed}'" in metadata.read_text()
        if entry.name != ".partial" and not (entry in folders and ours):  # .partial: what a killed recording left
            raise Fault(
                f"{root}: holds {entry.name}; expected only {episodes} demo bags of seed {seed}; "
                "empty the folder or choose another"
            )
    missing = [index for index, folder in enumerate(folders) if not folder.exists()]
    for index in tqdm(missing, desc="recording", unit="episode", disable=not missing):
        write_bag(folders[index], seed, episode_messages(seed, index))
    return len(missing)


def main(arguments: list[str] | None = None) -> None:
    """Record the bags that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the bags go, each in a folder of its own")
    parser.add_argument("--episodes", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    with exit_with_message():
        recorded = record(options.folder, options.episodes, options.seed)
        kept = options.episodes - recorded
        print(f"{options.folder}: {recorded} episodes recorded, {kept} already there and left alone")


if __name__ == "__main__":
    main()
