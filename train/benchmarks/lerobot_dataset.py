"""LeRobot's side of train_from_bags.py and loading.py; runs in the Python of `make .venv-lerobot-0.6.1/training`.

python lerobot_dataset.py convert BAGS DATASET HEIGHT WIDTH
    the bags as a dataset, as converters do: at each picture the newest joint state; LeRobot's own video encoder
python lerobot_dataset.py load DATASET CHUNK BATCH BATCHES
    samples/s of the DataLoader that lerobot-train builds, with two workers
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_typestore

FPS, WORKERS = 30, 2
STATE, CAMERA = "/joint_states", "/camera"


def convert(bags: str, dataset: str, height: str, width: str) -> None:
    size, store = (int(height), int(width)), get_typestore(Stores.ROS2_HUMBLE)
    names = ["a", "b", "c"]
    features = {
        "observation.state": {"dtype": "float32", "shape": (3,), "names": names},
        "action": {"dtype": "float32", "shape": (3,), "names": names},
        "observation.images.color": {"dtype": "video", "shape": (*size, 3), "names": ["height", "width", "channels"]},
    }
    made = LeRobotDataset.create("local/bags", FPS, features, root=dataset, image_writer_threads=WORKERS)
    for bag in sorted(Path(bags).iterdir()):
        states, pictures, state = [], [], None
        with Reader(bag) as reader:
            for connection, _, raw in reader.messages():
                message = store.deserialize_cdr(raw, connection.msgtype)
                if connection.topic == STATE:
                    state = message.position.astype(np.float32)  # type: ignore[attr-defined]  # of a JointState
                elif state is not None:
                    states.append(state)
                    pictures.append(message.data)  # type: ignore[attr-defined]  # of a CompressedImage
        for now, later, jpeg in zip(states, [*states[1:], states[-1]], pictures, strict=True):
            pixels = cv2.imdecode(jpeg, cv2.IMREAD_COLOR_RGB)
            assert pixels is not None
            pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA)
            frame = {"observation.state": now, "action": later, "observation.images.color": pixels}
            made.add_frame({**frame, "task": "reach"})
        made.save_episode()
    made.finalize()


def load(dataset: str, chunk: str, batch: str, batches: str) -> None:
    ahead = {"action": [i / FPS for i in range(int(chunk))]}
    samples = LeRobotDataset("local/bags", root=dataset, delta_timestamps=ahead)
    loader = torch.utils.data.DataLoader(samples, int(batch), shuffle=True, num_workers=WORKERS)
    source = iter(loader)
    next(source)  # its workers have started
    start = time.perf_counter()
    for _ in range(int(batches)):
        next(source)
    print(int(batches) * int(batch) / (time.perf_counter() - start))


if __name__ == "__main__":
    {"convert": convert, "load": load}[sys.argv[1]](*sys.argv[2:])
