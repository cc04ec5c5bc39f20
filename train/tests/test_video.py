"""Video in bags: real H.264 and H.265 streams, in three kinds of message and three storages."""

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rosbags.typesys import get_types_from_msg
from test_dataset import configured
from writing import CAMERA, MS, START, STATE, STORES, Timed, joint_state, make, picture, write

from config import load
from dataset.cache import load_dataset
from faults import Fault
from inspection.propose import propose
from inspection.verdict import inspect
from recordings.bags import find_bags
from recordings.episodes import read_recording

av = pytest.importorskip("av")

FOXGLOVE, PACKET = "foxglove_msgs/msg/CompressedVideo", "ffmpeg_image_transport_msgs/msg/FFMPEGPacket"
IMAGE, THEORA = "sensor_msgs/msg/CompressedImage", "theora_image_transport/msg/Packet"
DEFINITIONS = {
    FOXGLOVE: "builtin_interfaces/Time timestamp\nstring frame_id\nuint8[] data\nstring format\n",
    PACKET: "std_msgs/Header header\nint32 width\nint32 height\nstring encoding\nuint64 pts\nuint8 flags\n"
    "bool is_bigendian\nuint8[] data\n",
    THEORA: "std_msgs/Header header\nuint8[] data\n",
}
for name, definition in DEFINITIONS.items():
    STORES[False].register(get_types_from_msg(definition, name))
GROUP = 12  # messages from one key frame to the next


def stream(encoder: str = "libx264", pictures: int = 60, b_frames: int = 0) -> tuple[list[bytes], list[int]]:
    """Encoded pictures 0, 1, ..., one a packet, and their numbers in the order of the packets; a key frame every GROUP."""
    codec = av.CodecContext.create(encoder, "w")
    codec.width, codec.height, codec.pix_fmt = 64, 48, "yuv420p"
    codec.time_base, codec.framerate, codec.gop_size, codec.max_b_frames = (
        Fraction(1, 30),
        Fraction(30),
        GROUP,
        b_frames,
    )
    quiet = {"libx264": {"sc_threshold": "0"}, "libx265": {"x265-params": "log-level=none:scenecut=0"}}[encoder]
    codec.options = {"preset": "veryfast", "crf": "8", **quiet, **({} if b_frames else {"tune": "zerolatency"})}
    packets = []
    for i in range(pictures):
        frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
        frame.pts = i
        packets += codec.encode(frame)
    packets += codec.encode(None)
    return [bytes(packet) for packet in packets], [packet.pts for packet in packets]


def messages(packets: list[bytes], kind: str = FOXGLOVE, told: str = "h264", ros1: bool = False) -> list[Timed]:
    """A recording of 2 s with a message for each packet at 30 Hz."""
    ends = START + 2000 * MS
    timed: list[Timed] = [
        (STATE, "sensor_msgs/msg/JointState", t, joint_state(t, np.full(3, i / 100), ros1=ros1))
        for i, t in enumerate(range(START, ends, 10 * MS))
    ]
    for i, packet in enumerate(packets):
        t, data = START + i * 33 * MS, np.frombuffer(packet, np.uint8)
        if kind == FOXGLOVE:
            stamp = make("builtin_interfaces/msg/Time", sec=t // 10**9, nanosec=t % 10**9)
            content = make(kind, timestamp=stamp, frame_id="", data=data, format=told)
        elif kind == PACKET:
            size: dict[str, Any] = {"width": 64, "height": 48, "pts": i, "flags": 0, "is_bigendian": False}
            content = make(kind, stamp=t, encoding=told, data=data, **size)
        elif kind == THEORA:
            content = make(kind, stamp=t, data=data)
        else:
            content = make(kind, ros1, stamp=t, format=told, data=data)
        timed.append((CAMERA, kind, t + MS, content))
    return sorted(timed, key=lambda message: message[2])


def cached(folder: Path, *overrides: str) -> tuple[np.ndarray, list[str]]:
    """The red, green and blue of each cached tick's picture in the middle (N, 3), and the recording's notes."""
    data = load_dataset(configured(folder, "data.validation_fraction=0", "data.image_size=[48, 64]", *overrides))
    images = data.train.gather(np.arange(len(data.train.state))).images
    assert images is not None
    return images[:, 0, 20:28, 20:28].float().mean((1, 2)).numpy(), data.notes[
        "one" if (folder / "bags/one").exists() else "one.bag"
    ]


def shown(pixels: np.ndarray) -> np.ndarray:
    """Which picture (see `picture`) was encoded: its blue is 7 times its number."""
    assert np.abs(pixels[:, :2] - [23.5 * 3, 23.5 * 4]).max() < 8, "and its other colors are right"
    return np.rint(pixels[:, 2] / 7)


@pytest.mark.parametrize(
    ("encoder", "b_frames", "kind", "told", "storage"),
    [
        ("libx264", 0, FOXGLOVE, "h264", "mcap-zstd"),
        ("libx264", 0, PACKET, "h264;yuv420p;bgr8;bgr8", "sqlite"),
        ("libx264", 2, IMAGE, "h264", "mcap"),
        ("libx265", 0, IMAGE, "h265", "ros1-lz4"),
        ("libx265", 2, PACKET, "hevc_nvenc", "sqlite-zstd-message"),
    ],
)
def test_each_tick_shows_the_picture_of_its_message(
    tmp_path: Path, encoder: str, b_frames: int, kind: str, told: str, storage: str
) -> None:
    """Recorded from the middle of a group on: what is before the next key frame cannot be decoded, and is left out."""
    packets, numbers = stream(encoder, 36, b_frames)
    write(tmp_path / "bags/one", messages(packets[5:], kind, told, storage.startswith("ros1")), storage)
    pixels, notes = cached(tmp_path)
    assert any(note.startswith(f"{CAMERA}: skipped ") and "without a picture" in note for note in notes), notes
    (bag,), _ = find_bags(tmp_path / "bags")
    episodes = read_recording(bag, configured(tmp_path).data).episodes
    expected = np.array(numbers[5:])[np.concatenate([episode.frames["color"] for episode in episodes])]
    assert shown(pixels).tolist() == expected.tolist() and len(expected) > 10 and 12 <= expected[0] <= 15


@pytest.mark.parametrize(("encoder", "told"), [("libx264", "h264"), ("libx265", "h265")])
@pytest.mark.parametrize("lost", [20, 24])
def test_a_lost_message_is_named(tmp_path: Path, encoder: str, told: str, lost: int) -> None:
    """The pictures after it, up to the next key frame, would show what never was."""
    packets, _ = stream(encoder)
    del packets[lost]
    write(tmp_path / "bags/one", messages(packets, told=told))
    with pytest.raises(Fault, match=rf"{CAMERA}: message {lost} at t\+0\.\d+ s: .*video.* before it (is|are) lost"):
        cached(tmp_path)
    (bag,), _ = find_bags(tmp_path / "bags")
    assert any("lost" in fault for fault in inspect(bag, pictures=True).faults)


@pytest.mark.parametrize(
    ("packets", "kind", "told", "words"),
    [
        (stream()[0][1:12], FOXGLOVE, "h264", "H.264 video without a key frame; record it with some"),
        ([b"\0\0\1" + bytes(200)] * 60, IMAGE, "h264", "video without a key frame"),
        (stream()[0], FOXGLOVE, "av1", "is 'av1' video, which is not read; expected H.264 or H.265"),
        ([b"theora"] * 60, THEORA, "", "is a theora_image_transport/msg/Packet; a camera needs"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, packets: list[bytes], kind: str, told: str, words: str) -> None:
    write(tmp_path / "bags/one", messages(packets, kind, told))
    with pytest.raises(Fault, match=rf"{CAMERA}: message 0 at t\+0\.\d+ s: .*{words}"):
        cached(tmp_path)
    bags, _ = find_bags(tmp_path / "bags")
    assert f"# left out: {CAMERA}: " in propose(bags, str(tmp_path))


def test_a_video_is_inspected_and_proposed(tmp_path: Path) -> None:
    write(tmp_path / "bags/one", messages(stream()[0]))
    bags, _ = find_bags(tmp_path / "bags")
    pictures = inspect(bags[0], pictures=True).topics[CAMERA].pictures
    assert pictures is not None and pictures.kinds == {"64x48 H.264": 60} and len(pictures.shown) == 3
    proposed = tmp_path / "proposed.yaml"
    proposed.write_text(propose(bags, str(tmp_path / "bags")))
    data = load_dataset(load(proposed, [f"data.cache_dir={tmp_path}/cache"]))
    assert list(data.train.frames) == ["color"] and not data.skipped


def test_without_pyav_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "bags/one", messages(stream()[0]))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(Fault, match=r"is H\.264 video; to read it install PyAV: pip install av"):
        cached(tmp_path)
