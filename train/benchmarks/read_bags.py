"""From bags to a ready cache, against bare decode, resize and encode of the same pictures on two threads, in turn; then inspecting.

    python benchmarks/read_bags.py                 1 GB of JPEG bags: 640x480 pictures at 30 Hz, joints at 100 Hz
    python benchmarks/read_bags.py --joint-hz 500  joints as fast as a UR10e's driver can send them

Bare is cv2.imdecode, cv2.resize to the training size and cv2.imencode, of pictures that lie in memory, on two threads that share
nothing. Ours finds the bag, checks it, reads the joints, aligns, decodes, resizes, encodes and writes the cache. Each bag
is done by both, one after the other, in an order that changes from bag to bag; the rates are over all bags. Then
inspect_bags.py and train.py --dry-run run on all bags, each in a process of its own, whose greatest memory is told. It needs disk
for the bags and their cache in the temporary folder (TMPDIR), and leaves nothing there. The pictures are crops that pan over a
drawn photograph: noise of all scales, as in nature, flat shapes with edges, and a sensor's noise.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
from rosbags import rosbag2
from rosbags.rosbag2 import StoragePlugin, Writer
from tqdm import tqdm

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("", "tests"))
from writing import CAMERA, JOINTS, START, STATE, STORES, joint_state, make

from config import load
from dataset import build
from dataset.cache import load_dataset
from recordings.images import QUALITY, decode, encode, resize

TRAIN = Path(__file__).parents[1]
BAGS, SIZE, PICTURES = 8, (240, 320), 64
TYPES = {STATE: "sensor_msgs/msg/JointState", CAMERA: "sensor_msgs/msg/CompressedImage"}


def photograph(height: int = 960, width: int = 1280) -> np.ndarray:
    """A drawing (height, width, 3) float with a photograph's spectrum: amplitudes fall as 1 / frequency."""
    random, pixels = np.random.default_rng(0), np.full((height, width, 3), 110.0)
    for cells in (4, 8, 16, 32, 64, 128, 256, 512):
        noise = random.normal(0, 160 / cells, (cells * 3 // 4, cells, 3))
        pixels += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(60):
        center = int(random.integers(width)), int(random.integers(height))
        axes, color = tuple(int(x) for x in random.integers(10, 120, 2)), random.integers(0, 256, 3).tolist()
        shade = cv2.ellipse(np.zeros((height, width), np.uint8), center, axes, int(random.integers(180)), 0, 360, 1, -1)
        pixels[shade > 0] = 0.3 * pixels[shade > 0] + 0.7 * np.array(color)
    return pixels


def pictures() -> list[np.ndarray]:
    """Different JPEGs of 640x480 at quality 85."""
    scene, random, found = photograph(), np.random.default_rng(1), []
    for i in range(PICTURES):
        y, x = 480 * i // PICTURES, 640 * i // PICTURES
        pixels = (scene[y : y + 480, x : x + 640] + random.normal(0, 2, (480, 640, 3))).clip(0, 255).astype(np.uint8)
        found.append(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].ravel())
    return found


def pixel_error(jpegs: list[np.ndarray]) -> float:
    """What encoding a picture of the training size costs, the mean of all pixels, of 255."""
    decoded = (decode(jpeg.tobytes()) for jpeg in jpegs)
    resized = [resize(pixels, SIZE) for pixels in decoded if pixels is not None]
    again = [decode(encode(pixels)) for pixels in resized]
    return float(np.abs(np.array(again, np.float32) - resized).mean())


def record(folder: Path, frames: list[np.ndarray], number: int, size: float, joint_hz: int) -> None:
    """A bag of some bytes."""
    store, seconds = STORES[False], size / (30 * np.mean([frame.size for frame in frames]))
    with Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {topic: writer.add_connection(topic, kind, typestore=store) for topic, kind in TYPES.items()}
        for i in range(int(seconds * joint_hz)):
            stamp = START + i * 10**9 // joint_hz
            message = joint_state(stamp, np.sin(i / joint_hz + np.arange(3)), JOINTS)
            writer.write(connections[STATE], stamp, store.serialize_cdr(message, TYPES[STATE]))
            if i * 30 // joint_hz != (i - 1) * 30 // joint_hz:
                picture = make(TYPES[CAMERA], stamp=stamp, format="jpeg", data=frames[(i + number) % len(frames)])
                writer.write(connections[CAMERA], stamp, store.serialize_cdr(picture, TYPES[CAMERA]))


def bare(bag: Path) -> tuple[float, int]:
    """Seconds to decode, resize and encode the bag's pictures, and how many there are."""
    (file,) = bag.glob("*.mcap")
    with rosbag2.Reader(file) as reader:
        wanted = [c for c in reader.connections if c.topic == CAMERA]
        messages = (STORES[False].deserialize_cdr(raw, TYPES[CAMERA]) for _, _, raw in reader.messages(wanted))
        jpegs = [message.data.copy() for message in messages]  # type: ignore[attr-defined]  # of a CompressedImage

    def work(mine: list[np.ndarray]) -> None:
        for jpeg in mine:
            pixels = cv2.imdecode(jpeg, cv2.IMREAD_COLOR)
            assert pixels is not None
            pixels = cv2.resize(pixels, SIZE[::-1], interpolation=cv2.INTER_AREA)
            cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])

    threads = [threading.Thread(target=work, args=(jpegs[half::2],)) for half in (0, 1)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start, len(jpegs)


def settings(bags: Path, cache: Path) -> list[str]:
    """A configuration for them."""
    return [
        f"data.bag_dir={bags}",
        f"data.cache_dir={cache}",
        f"data.cameras={{color: {CAMERA}}}",
        f"data.image_size={list(SIZE)}",
        f"data.state=[{{topic: {STATE}, joints: {list(JOINTS)}}}]",
        "data.validation_fraction=0",
    ]


def ours(bag: Path, cache: Path) -> tuple[float, int, int]:
    """Seconds from the bag to its cache, how many pictures are in it, and its bytes."""
    config = load(None, settings(bag, cache))
    start = time.perf_counter()
    dataset = load_dataset(config)
    elapsed = time.perf_counter() - start
    frames = len(np.unique(dataset.train.frames["color"].span, axis=0))
    shutil.rmtree(cache)
    return elapsed, frames, dataset.cache_bytes


def together(folder: Path, cores: int) -> float:
    """Seconds from all bags to their cache, as on a machine of so many cores: a process for each."""
    cache = Path(folder, "cache")
    config = load(None, settings(folder, cache))
    with mock.patch.object(build, "usable_cores", lambda: cores):
        start = time.perf_counter()
        load_dataset(config)
        elapsed = time.perf_counter() - start
    shutil.rmtree(cache)
    return elapsed


def script(name: str, *arguments: str | Path) -> str:
    """Seconds and greatest memory of a script, in words."""
    start, most = time.perf_counter(), 0
    command = [sys.executable, str(TRAIN / name), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        most = max(most, int(found[1]) if found else 0)
        time.sleep(0.02)
    assert process.returncode == 0, command
    return f"{time.perf_counter() - start:.1f} s, {most * 1.024e-3:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--joint-hz", type=int, default=100)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)  # two threads in all, on both sides
    with tempfile.TemporaryDirectory() as folder:
        frames, bags = pictures(), [Path(folder, f"bag_{i}") for i in range(BAGS)]
        for i, bag in enumerate(tqdm(bags, desc="recording", unit="bag")):
            record(bag, frames, i, arguments.gigabytes * 1e9 / BAGS, arguments.joint_hz)
        size = sum(file.stat().st_size for bag in bags for file in bag.iterdir())
        totals = {"bare": np.zeros(2), "ours": np.zeros(3)}
        ratios = []
        for i, bag in enumerate(bags):
            turns = ("bare", "ours") if i % 2 else ("ours", "bare")
            times = {name: bare(bag) if name == "bare" else ours(bag, Path(folder, "cache")) for name in turns}
            for name in turns:
                totals[name] += times[name]
            rate = {name: count / seconds for name, (seconds, count, *_) in times.items()}
            ratios.append(rate["ours"] / rate["bare"])
            print(f"bag {i}: {rate['bare']:6.0f} pictures/s bare, {rate['ours']:6.0f} to the cache, {ratios[-1]:.0%}")
        processes = [(together(Path(folder), 1), together(Path(folder), 2)) for _ in range(2)]
        configured = settings(Path(folder), Path(folder, "cache"))
        scripts = {
            "inspected, without pictures": script("inspect_bags.py", folder, "--no-pictures"),
            "inspected by a configuration, without pictures": script("inspect_bags.py", "--no-pictures", *configured),
            "inspected, with pictures": script("inspect_bags.py", folder),
            "read for training": script("train.py", "--dry-run", *configured),
        }
    rate = {name: count / seconds for name, (seconds, count, *_) in totals.items()}
    print(
        f"{size / 1e9:.2f} GB, {totals['ours'][1]:.0f} pictures of {np.mean([f.size for f in frames]) / 1e3:.0f} kB: bare "
        f"{rate['bare']:.0f} pictures/s, to the cache {rate['ours']:.0f} ({size / totals['ours'][0] / 1e6:.0f} MB/s of bags), "
        f"{rate['ours'] / rate['bare']:.0%} of bare; by bag {min(ratios):.0%} to {max(ratios):.0%}"
    )
    print(f"cache: {totals['ours'][2] / size:.2f} of the bags; encoding costs {pixel_error(frames):.2f} of 255 a pixel")
    for alone, shared in processes:
        print(f"all at once: {alone:.1f} s by one process, {shared:.1f} s by two, {alone / shared:.2f} times as fast")
    for what, figures in scripts.items():
        print(f"{what}: {figures}")


if __name__ == "__main__":
    main()
