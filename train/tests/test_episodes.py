"""Recordings as they come from real robots: who answers whom, shared topics, clocks, trajectories, topics without a rate."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_dataset import configured
from writing import CAMERA, MS, START, STATE, Timed, joint_state, jpeg, make, picture, write

from faults import Fault
from recordings.bags import find_bags
from recordings.episodes import Recording, read_recording
from recordings.images import to_rgb
from recordings.plausibility import period_ns

JOINT_STATE, TRAJECTORY, BOOL = "sensor_msgs/msg/JointState", "trajectory_msgs/msg/JointTrajectory", "std_msgs/msg/Bool"
SET = "/arm/set"
BY_COMMAND = f"data.action.from=[{{topic: {SET}, joints: [a, b, c]}}]"
NO_CAMERA = "data.cameras={}"


def joints(topic: str, hz: float, seconds: float, value: float = 1.0, late: int = 0, shift: float = 0.0) -> list[Timed]:
    """Joints a, b, c at value * (message number + shift), stamped and received `late` ns after their beat."""
    stamps = [START + round(i * 1e9 / hz) + late for i in range(round(seconds * hz))]
    rows = [value * (i + shift) * np.ones(3) for i in range(len(stamps))]
    return [(topic, JOINT_STATE, t, joint_state(t, row)) for t, row in zip(stamps, rows, strict=True)]


def boolean(t: int, value: bool) -> Timed:
    return "/grip", BOOL, t, make(BOOL, data=value)


def trajectory(t: int, positions: list[float], every_ms: int) -> Timed:
    """Joints a, b, c, sent at t: all at a position, each `every_ms` after the one before."""
    points = [
        make(
            "trajectory_msgs/msg/JointTrajectoryPoint",
            positions=np.full(3, position),
            velocities=np.zeros(0),
            accelerations=np.zeros(0),
            effort=np.zeros(0),
            time_from_start=make("builtin_interfaces/msg/Duration", sec=0, nanosec=i * every_ms * MS),
        )
        for i, position in enumerate(positions)
    ]
    return SET, TRAJECTORY, t, make(TRAJECTORY, stamp=0, joint_names=["a", "b", "c"], points=points)


def recording(folder: Path, messages: list[Timed], *overrides: str, kind: str = "mcap", fps: float = 30) -> Recording:
    write(folder / "bags/one", sorted(messages, key=lambda message: message[2]), kind)
    return read(folder, *overrides, f"data.fps={fps}")


def read(folder: Path, *overrides: str) -> Recording:
    (bag,), _ = find_bags(folder / "bags")
    return read_recording(bag, configured(folder, *overrides).data)


@pytest.mark.parametrize("delay_ms", [1, 5, 30])
@pytest.mark.parametrize("hz", [10, 30, 125])
def test_the_action_is_the_answer_to_the_observation(tmp_path: Path, hz: float, delay_ms: int) -> None:
    """A loop reads state k, computes k + 1 and sends it some time before the next state."""
    delay = min(delay_ms * MS, round(0.9e9 / hz))
    messages = joints(STATE, hz, 3) + joints(SET, hz, 3, late=delay, shift=1)
    (one,) = recording(tmp_path, messages, BY_COMMAND, NO_CAMERA, fps=hz).episodes
    assert len(one.state) >= 3 * hz - 3 and np.array_equal(one.action, one.state + 1)
    slower = read(tmp_path, BY_COMMAND, NO_CAMERA, f"data.fps={hz / 2.5}").episodes[0]
    assert np.array_equal(slower.action[:-1], slower.state[1:]), "as next_state, if the arm does as told"


@pytest.mark.parametrize("kind", ["mcap", "sqlite", "ros1-lz4"])
def test_publishers_of_different_joints_share_a_topic(tmp_path: Path, kind: str) -> None:
    """Each entry has its own messages, clock and gaps, whoever publishes first; the rest of the arm needs no gripper."""
    names = {"left": ["l1", "l2"], "right": ["r1", "r2"]}
    messages = []
    for i in range(200):
        for side, late in (("right", 0), ("left", 3 * MS)):
            t = START + i * 10 * MS + late
            if not (side == "right" and 100 <= i < 130):  # silent for 0.3 s
                row = [i + (side == "right"), i + 0.5]
                messages.append((STATE, JOINT_STATE, t, joint_state(t, row, names[side], kind.startswith("ros1"))))
    write(tmp_path / "bags/one", messages, kind)
    state = f"data.state=[{{topic: {STATE}, joints: [l2, l1]}}, {{topic: {STATE}, joints: [r1]}}]"
    found = read(tmp_path, state, NO_CAMERA)
    assert found.state_names == ("l2", "l1", "r1") and len(found.episodes) == 2, "split where one of them is silent"
    for one in found.episodes:
        number = (one.ticks - START) // (10 * MS)
        assert np.array_equal(one.state[:, 2], number + 1), "right, published on the beat"
        assert np.array_equal(one.state[:, 1], (one.ticks - START - 3 * MS) // (10 * MS)), "left, 3 ms later"
    assert not any("other joints" in note for note in found.notes)
    left = read(tmp_path, f"data.state=[{{topic: {STATE}, joints: [l1]}}]", NO_CAMERA)
    assert len(left.episodes) == 1 and any("skipped 170 messages of other joints" in note for note in left.notes)
    with pytest.raises(Fault, match=r"no joint l1; joints in the message: r1, r2; .* an entry of their own"):
        read(tmp_path, f"data.state=[{{topic: {STATE}, joints: [r1, l1]}}]", NO_CAMERA)


@pytest.mark.parametrize("kind", ["mcap-zstd", "sqlite", "sqlite-zstd-message", "ros1", "ros1-bz2"])
def test_a_clock_that_was_set_back_is_named(tmp_path: Path, kind: str) -> None:
    ros1 = kind.startswith("ros1")

    def write_with(name: str, header: np.ndarray, receive: np.ndarray) -> None:
        stamps = zip(header.tolist(), receive.tolist(), strict=True)
        rows = [(STATE, JOINT_STATE, r, joint_state(h, [i, i, i], ros1=ros1)) for i, (h, r) in enumerate(stamps)]
        write(tmp_path / name / "bags/one", rows, kind)

    beat = START + np.arange(300) * 10 * MS
    back = beat - (np.arange(300) >= 200) * 700 * MS
    write_with("both", back, back + MS)
    words = "receive stamps decrease at message 200 by a step of 0.700 s, and header stamps decrease at message 200"
    with pytest.raises(Fault, match=rf"{STATE}: {words}.*: the recorder's clock was set back"):
        read(tmp_path / "both", NO_CAMERA)
    write_with("no header", back * 0, back)
    with pytest.raises(Fault, match=r"step of 0.700 s, and no header stamps"):
        read(tmp_path / "no header", NO_CAMERA)
    write_with("receive", beat, back)
    (one,) = read(tmp_path / "receive", NO_CAMERA).episodes
    assert np.all(np.diff(one.state[:, 0]) == 5), "the arm has a clock of its own, which was right"
    write_with("zero", beat, beat * 0)
    zero = read(tmp_path / "zero", NO_CAMERA)
    assert len(zero.episodes) == 1 and f"{STATE} by header (all receive stamps are 0)" in zero.notes
    write_with("none", beat * 0, beat * 0)
    with pytest.raises(Fault, match="all receive stamps are 0, and no header stamps"):
        read(tmp_path / "none", NO_CAMERA)


@pytest.mark.parametrize(
    ("suffix", "text", "dtype"),
    [(".png", "png", np.uint16), (".tiff", "tiff", np.uint16), (".tiff", "jpeg", np.float32), (".png", "", np.uint16)],
)
def test_depth_is_told_by_its_bytes(suffix: str, text: str, dtype: type) -> None:
    def message(pixels: np.ndarray, text: str) -> object:
        data = np.frombuffer(cv2.imencode(suffix, pixels)[1].tobytes(), np.uint8)
        return make("sensor_msgs/msg/CompressedImage", stamp=START, format=text, data=data)

    with pytest.raises(Fault, match="depth or 16-bit picture"):
        to_rgb(message(np.arange(48 * 64).reshape(48, 64).astype(dtype), text))
    assert np.array_equal(to_rgb(message(picture(1)[..., ::-1], "16UC1; " + text)), picture(1)), (
        "8 bits, whatever it says"
    )


def test_a_trajectory_is_sampled_over_time_and_held(tmp_path: Path) -> None:
    """A plan of 1 s, replaced after 0.5 s; the last point holds to the end of the recording."""
    plans = [trajectory(START + 100 * MS, [0.0, 1.0, 2.0], 500), trajectory(START + 600 * MS, [5.0, 6.0], 200)]
    found = recording(tmp_path, joints(STATE, 100, 3) + plans, BY_COMMAND, NO_CAMERA, fps=20)
    (one,) = found.episodes
    assert one.ticks[-1] > START + 2800 * MS and found.notes[0].endswith("up to 3 points, 1.00 s, sampled a tick later")
    after = (one.ticks + 50 * MS - START) / 1e9
    expected = np.where(after < 0.6, np.interp(after, [0.1, 0.6], [0, 1]), np.interp(after, [0.6, 0.8], [5, 6]))
    off = np.abs(one.action[:, 1] - expected)
    assert np.count_nonzero(off > 1e-5) <= 1, "but for the tick at which the next observation precedes the new plan"
    limited = read(tmp_path, BY_COMMAND, NO_CAMERA, f"data.max_age_ms={{{SET}: 400}}", "data.fps=20")
    assert limited.episodes[-1].ticks[-1] < START + 1250 * MS, "held for 400 ms after the plan's end at 0.8 s"


def test_a_topic_without_a_rate_is_held_if_allowed(tmp_path: Path) -> None:
    gripper = [boolean(START + at * MS, value) for at, value in ((20, True), (900, False), (1300, True))]
    commands = f"data.action.from=[{{topic: {SET}, joints: [a]}}, {{topic: /grip}}]"
    messages = joints(STATE, 100, 3) + joints(SET, 50, 3) + gripper
    cut = recording(tmp_path, messages, commands, NO_CAMERA)
    (note,) = [note for note in cut.notes if "/grip ends early" in note]
    assert "skipped 1.7 s" in note and "data.max_age_ms: {/grip: 1700}" in note
    held = read(tmp_path, commands, NO_CAMERA, "data.max_age_ms={/grip: 1700}", "data.fps=30")
    (one,) = held.episodes
    assert one.ticks[-1] - START > 2900 * MS and not any("/grip ends" in note for note in held.notes)
    answer = one.ticks + 33 * MS
    expected = (answer < START + 900 * MS) | (answer >= START + 1300 * MS)
    assert np.count_nonzero(one.action[:, 1] != expected) <= 2, "at most in the ticks of the two switches"


def test_a_rate_is_counted_over_time(tmp_path: Path) -> None:
    """94 messages a second that arrive thirty at a time, and pictures in pairs."""
    beat = START + np.arange(600) // 30 * round(30e9 / 94) + np.arange(600) % 30 * 80_000
    assert 1e9 / period_ns(beat) == pytest.approx(94, rel=0.06)
    pairs = START + np.arange(90) // 2 * round(2e9 / 30) + np.arange(90) % 2 * 200_000
    assert 1e9 / period_ns(pairs) == pytest.approx(30, rel=0.03)
    rest = np.append(beat, beat + 30_000_000_000)
    assert 1e9 / period_ns(rest) == pytest.approx(94, rel=0.06), "a silence is no rate"
    messages = [(STATE, JOINT_STATE, int(t), joint_state(0, [i, i, i])) for i, t in enumerate(beat)]
    (warning,) = recording(tmp_path, messages, NO_CAMERA).warnings
    assert re.search(rf"{STATE}: messages arrive in bunches, about 30 every 3\d\d ms, 9\d", warning)


def test_a_joint_of_other_units_hides_no_jump(tmp_path: Path) -> None:
    messages = [
        (STATE, JOINT_STATE, t, joint_state(t, [i / 100, 500 + i, 3.0 if i == 150 else i / 200]))
        for i, t in enumerate(range(START, START + 3000 * MS, 10 * MS))
    ]
    with pytest.raises(Fault, match=r"c jumps from 0.745 to 3 .* and back"):
        recording(tmp_path, messages, NO_CAMERA)


def test_twins_are_told_apart_and_odd_joints_left_out(tmp_path: Path) -> None:
    """Two arms with the same joint names; a joint that is always NaN; joints without a name, or with one name for two."""
    messages = joints("/left/states", 100, 1) + joints("/right/states", 100, 1, value=-1.0)
    state = "data.state=[{topic: /left/states, joints: [a, b, c]}, {topic: /right/states, joints: [a]}]"
    twins = recording(tmp_path / "twins", messages, state, NO_CAMERA)
    assert twins.state_names == ("/left/states.a", "b", "c", "/right/states.a")
    stamps = range(START, START + 1000 * MS, 10 * MS)
    odd = [(STATE, JOINT_STATE, t, joint_state(t, [1, np.nan, i, i], ["a", "m", "", ""])) for i, t in enumerate(stamps)]
    rest = recording(tmp_path / "odd", odd, f"data.state=[{{topic: {STATE}, joints: [a]}}]", NO_CAMERA)
    assert rest.state_names == ("a",)
    by_index = read(tmp_path / "odd", f"data.state=[{{topic: {STATE}, index: [3, 0]}}]", NO_CAMERA)
    assert by_index.state_names == (f"{STATE}.position[3]", f"{STATE}.position[0]")
    with pytest.raises(Fault, match="m is nan"):
        read(tmp_path / "odd", f"data.state=[{{topic: {STATE}, joints: [a, m]}}]", NO_CAMERA)
    double = [(STATE, JOINT_STATE, t, joint_state(t, [1, 2], ["a", "a"])) for t in stamps]
    with pytest.raises(Fault, match="two joints are named a; take them by `index`"):
        recording(tmp_path / "double", double, f"data.state=[{{topic: {STATE}, joints: [a]}}]", NO_CAMERA)


def test_a_state_published_as_a_command_is_warned_of(tmp_path: Path) -> None:
    def arm(t: float) -> np.ndarray:
        return np.sin(t + np.arange(3))

    messages: list[Timed] = []
    for i in range(300):
        t = START + i * 10 * MS
        messages.append((STATE, JOINT_STATE, t, joint_state(t, arm(i / 100))))
        messages.append((SET, JOINT_STATE, t + 6 * MS, joint_state(t + 6 * MS, arm(i / 100))))
        messages.append(("/arm/goal", JOINT_STATE, t + 6 * MS, joint_state(t + 6 * MS, arm(i / 100 + 0.1))))
    (warning,) = recording(tmp_path, messages, BY_COMMAND, NO_CAMERA).warnings
    assert f"{SET}: the action equals the state, {STATE}, of 6 ms before" in warning
    assert not read(tmp_path, BY_COMMAND.replace(SET, "/arm/goal"), NO_CAMERA).warnings


def test_pictures_of_a_bunched_camera_keep_their_rate(tmp_path: Path) -> None:
    pairs = [START + i // 2 * round(2e9 / 30) + i % 2 * 200_000 for i in range(60)]
    camera: list[Timed] = [
        (CAMERA, "sensor_msgs/msg/CompressedImage", t, jpeg(0, picture(i))) for i, t in enumerate(pairs)
    ]
    found = recording(tmp_path, joints(STATE, 100, 2) + camera, fps=15)
    assert len(found.episodes) == 1 and any(
        f"{CAMERA}: messages arrive in bunches, about 2" in w for w in found.warnings
    )
