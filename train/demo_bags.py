"""Record a simulated UR10e reaching for a red disc as rosbag2 folders, one for each episode.

    python train/demo_bags.py outputs/demo/bags
    python train/demo_bags.py outputs/demo/bags --episodes 400 --seed 1

Only the camera shows where the disc is. The joints follow the recorded commands with a first-order lag. An episode depends
only on the seed and its number, so a larger set begins with the smaller one. Lengths are metres, angles radians; the world
is the robot's base frame: z up, the table at z = 0.
"""

import argparse
import contextlib
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from rosbags.typesys.stores import ros2_humble as ros
from tqdm import tqdm

from evaluation.simulated_arm import (
    CAMERA_TOPIC,
    COMMAND_TOPIC,
    HOLD_S,
    JOINT_TOPIC,
    JOINTS,
    LAG_S,
    MOVE_S,
    camera_jpeg,
    expert_trajectory,
    goal_point,
    inverse_kinematics,
    sample_start,
    sample_target,
)
from faults import Fault, exit_with_message

CompressedImage = ros.sensor_msgs__msg__CompressedImage
JointState = ros.sensor_msgs__msg__JointState
Message = CompressedImage | JointState

RECORDED = (2, 1, 0, 3, 4, 5)  # a UR driver publishes the elbow first
TYPES = get_typestore(Stores.ROS2_HUMBLE)
JOINT_HZ, CAMERA_HZ = 125, 30
FIRST_EPISODE_NS = 1_767_225_600 * 10**9  # 2026-01-01 00:00 UTC


def stamps(start: int, end: int, hertz: float, jitter_ns: int, rng: np.random.Generator) -> list[int]:
    """Header stamps from start to end (ns) at a rate, with a random phase and jitter."""
    regular = np.arange(rng.uniform(0, 1e9 / hertz), end - start, 1e9 / hertz).astype(np.int64)
    return (start + regular + rng.integers(0, jitter_ns, len(regular))).tolist()


def header(stamp: int, frame: str) -> ros.std_msgs__msg__Header:
    """A message's header with its stamp (ns)."""
    return ros.std_msgs__msg__Header(ros.builtin_interfaces__msg__Time(*divmod(stamp, 10**9)), frame)


def episode_messages(seed: int, index: int) -> list[tuple[int, str, Message]]:
    """All (receive stamp in ns, topic, message) of one episode, in receive order."""
    rng = np.random.default_rng((seed, index))
    start, target = sample_start(rng), sample_target(rng)
    goal = inverse_kinematics(goal_point(target))
    began = FIRST_EPISODE_NS + (index * 180 + int(rng.integers(60))) * 10**9  # meanwhile a person moves the disc
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

    rng = np.random.default_rng((seed, index, 1))  # its own, so that the other topics do not depend on commands
    for stamp in stamps(began, ended, JOINT_HZ, 100_000, rng):
        q, velocity = expert_trajectory(start, goal, (stamp - began) / 1e9)
        command = JointState(header(stamp, "base"), list(JOINTS), q + LAG_S * velocity, np.zeros(0), np.zeros(0))
        messages.append((stamp + int(rng.integers(300_000, 3_000_000)), COMMAND_TOPIC, command))
    return sorted(messages, key=lambda entry: entry[0])


def write_bag(folder: Path, seed: int | str, messages: list[tuple[int, str, Message]]) -> None:
    """Write messages as a rosbag2 folder, complete or not at all; its metadata holds the seed."""
    partial = folder.parent / ".partial" / folder.name  # the file inside gets its folder's name
    shutil.rmtree(partial, ignore_errors=True)
    with Writer(partial, version=9, storage_plugin=StoragePlugin.MCAP) as bag:
        bag.set_custom_data("demo_seed", str(seed))
        connections = {
            topic: bag.add_connection(topic, kind, typestore=TYPES)
            for topic, kind in sorted({(topic, message.__msgtype__) for _, topic, message in messages})
        }
        for received, topic, message in messages:
            bag.write(connections[topic], received, TYPES.serialize_cdr(message, message.__msgtype__))
    partial.rename(folder)


def record_episode(folder: Path, seed: int, index: int) -> None:
    """Record one episode into a folder."""
    write_bag(folder, seed, episode_messages(seed, index))


def record(root: Path, episodes: int, seed: int) -> int:
    """Record the missing episodes and return how many; raises Fault if root has anything but such bags."""
    if episodes < 1 or seed < 0:
        raise Fault(f"--episodes {episodes} --seed {seed}; expected at least 1 and 0; change them")
    if root.exists() and not root.is_dir():
        raise Fault(f"{root}: is a file; expected a folder; choose another")
    folders = [root / f"episode_{index:03d}" for index in range(episodes)]
    for entry in sorted(root.glob("*")):
        metadata = entry / "metadata.yaml"
        ours = metadata.is_file() and f"demo_seed: '{seed}'" in metadata.read_text()
        if entry.name != ".partial" and not (entry in folders and ours):  # .partial: of a killed recording
            raise Fault(
                f"{root}: has {entry.name}; expected only {episodes} demo bags of seed {seed}; use an empty folder"
            )
    missing = [index for index, folder in enumerate(folders) if not folder.exists()]
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(record_episode, folders[index], seed, index) for index in missing]
        for job in tqdm(jobs, desc="recording", unit="episode", disable=not missing):
            job.result()
    with contextlib.suppress(FileNotFoundError):
        (root / ".partial").rmdir()
    return len(missing)


def main(arguments: list[str] | None = None) -> None:
    """Record the bags that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the bags, each in its own folder")
    parser.add_argument("--episodes", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    with exit_with_message():
        recorded = record(options.folder, options.episodes, options.seed)
        kept = options.episodes - recorded
        print(f"{options.folder}: {recorded} episodes recorded, {kept} already there and left alone")


if __name__ == "__main__":
    main()
