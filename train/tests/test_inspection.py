"""Inspecting recordings: measures match what was recorded, and only faults are warned of."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from writing import CAMERA, COMMAND, MS, START, STATE, Timed, episode, image, joint_state, jpeg, make, picture, write

import inspect_bags
from config import Config, load
from dataset.cache import load_dataset
from inspection.propose import propose
from inspection.verdict import BAD, GOOD, USABLE, Inspection, inspect
from recordings import plausibility
from recordings.bags import find_bags
from training.run import Run

SHARED = Path(__file__).parents[3] / "shared/bags"
SCRIPT = Path(inspect_bags.__file__)
JOINT_STATE, JPEG = "sensor_msgs/msg/JointState", "sensor_msgs/msg/CompressedImage"
LAG_S = 0.1


def arm(
    seconds: float = 4.0,
    lag: float = LAG_S,
    still: tuple[int, ...] = (),
    unit: float = 1.0,
    waits: float = 0.0,
    silent: tuple[float, float] = (9e9, 9e9),
    camera_hz: int = 30,
    frozen: tuple[float, float] = (9e9, 9e9),
    black: tuple[float, float] = (9e9, 9e9),
    late: int = 4 * MS,
    turns: float = 9e9,
    back: float = 9e9,
    ahead: int = 0,
) -> list[Timed]:
    """An arm that goes where it is commanded, `lag` seconds later: joints 100 Hz, commands 50 Hz, and a camera."""

    def pose(t: float) -> np.ndarray:
        moving = np.sin(2 * max(0.0, t - waits) + np.arange(3)) - np.sin(np.arange(3))
        moving[list(still)] = 0.3
        moving[1] += 2 * np.pi * (turns < t < back)
        return moving * unit

    messages: list[Timed] = []
    for i in range(round(seconds * 100)):
        t, seconds_in = START + i * 10 * MS, i / 100
        messages.append((STATE, JOINT_STATE, t + MS, joint_state(t + ahead, pose(seconds_in - lag))))
        if i % 2 == 0 and not silent[0] < seconds_in < silent[1]:
            messages.append(
                (COMMAND, JOINT_STATE, t + 2 * MS, joint_state(t, pose(seconds_in)[[2, 0, 1]], ("c", "a", "b")))
            )
    for i in range(round(seconds * camera_hz)):
        seconds_in = i / camera_hz
        t = START + round(seconds_in * 1e9)
        shown = round(frozen[0] * camera_hz) if frozen[0] < seconds_in < frozen[1] else i
        pixels = picture(shown) * (not black[0] < seconds_in < black[1])
        messages.append((CAMERA, JPEG, t + late, jpeg(t, pixels)))
    return sorted(messages, key=lambda message: message[2])


def configured(folder: Path, *overrides: str) -> Config:
    return load(
        None,
        [
            f"data.bag_dir={folder / 'bags'}",
            f"data.cache_dir={folder / 'cache'}",
            f"data.cameras={{color: {CAMERA}}}",
            "data.image_size=[48, 64]",
            f"data.state=[{{topic: {STATE}, joints: [a, b, c]}}]",
            f"data.action.from=[{{topic: {COMMAND}, joints: [c, a, b]}}]",
            "model.chunk_size=30",
            "model.n_action_steps=30",
            *overrides,
        ],
    )


def inspected(folder: Path, messages: list[Timed], config: Config | None = None, kind: str = "mcap") -> Inspection:
    write(folder / "bags/one", messages, kind)
    (bag,), _ = find_bags(folder / "bags")
    return inspect(bag, config, pictures=True)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, cwd="/")
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_measures_match_what_was_recorded(tmp_path: Path) -> None:
    messages = [m for m in arm() if not (m[0] == STATE and 1.5 <= (m[2] - MS - START) / 1e9 < 1.9)]
    found = inspected(tmp_path, messages, configured(tmp_path))
    state, camera = found.topics[STATE], found.topics[CAMERA]
    assert (state.read, state.declared, state.types) == (360, 360, (JOINT_STATE,))
    assert state.rate_hz == pytest.approx(100) and camera.rate_hz == pytest.approx(30, rel=1e-6)
    assert state.slowest_second_hz == pytest.approx(60, abs=2), "in which 0.4 s are missing"
    assert state.largest_gap == (pytest.approx(1.49 - 0.001), pytest.approx(0.41)), "header stamps lead by 1 ms"
    assert state.header_minus_receive_ms == (pytest.approx(-1), pytest.approx(1), pytest.approx(1)) and state.in_order
    a = state.joints[0]
    assert (a.name, a.least) == ("a", pytest.approx(-1, abs=1e-3)) and a.greatest == pytest.approx(1, abs=1e-3)
    assert a.fastest == pytest.approx(2, rel=0.01), "2 cos(2t) at most"
    assert camera.pictures is not None
    assert camera.pictures.kinds == {"64x48 jpeg": 120} and not camera.pictures.frozen and not camera.pictures.black
    shown = camera.pictures.shown
    assert [round(p.at_s * 30) for p in shown] == [0, 60, 119]
    assert np.abs(shown[1].pixels.astype(int) - picture(60)).mean() < 8
    assert found.recording and [round(at, 1) for at, _ in found.episodes()] == [0.0, 1.9], "split by the gap"
    assert found.overlap_s == (pytest.approx(-0.001), pytest.approx(3.9657, abs=1e-3))
    assert abs(found.state_minus_image_ms["color"].median) < 34
    assert found.state_minus_command_ms[COMMAND].greatest == pytest.approx(10)


@pytest.mark.parametrize("lag", [0.0, 0.1, 0.25])
def test_the_lag_of_the_state_behind_the_command(tmp_path: Path, lag: float) -> None:
    found = inspected(tmp_path, arm(lag=lag), configured(tmp_path))
    assert found.lag is not None and found.lag.seconds == pytest.approx(lag, abs=0.02)
    assert found.recording is not None
    ticks = found.recording.ticks(configured(tmp_path).data)
    unrelated = ticks._replace(target=np.random.default_rng(0).normal(size=ticks.state.shape))
    assert plausibility.lag(unrelated, configured(tmp_path)) is None


NEXT = ("data.action.from=next_state",)
WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "nothing": ({}, (), ()),
    "next state": ({}, NEXT, ()),
    "deltas": ({}, (f"data.action.from=[{{topic: {COMMAND}, joints: [a, b, c]}}]", "data.action.as=delta"), ()),
    "action is state": (
        {},
        (f"data.action.from=[{{topic: {STATE}, joints: [a, b, c]}}]",),
        ("the action equals the state, /joint_states, of 0 ms before",),
    ),
    "command silent": (
        {"seconds": 8.0, "silent": (2.0, 6.0)},
        (),
        (f"{COMMAND}: silent for 4.0 s from t+2.0 s", "the episode is split there"),
    ),
    "command held": (
        {"seconds": 8.0, "silent": (2.0, 6.0)},
        (f"data.max_age_ms={{{COMMAND}: 5000}}",),
        (f"{COMMAND}: silent for 4.0 s from t+2.0 s", "holds its last message for 4.0 s of that"),
    ),
    "joint never moves": ({"still": (1,)}, (), ("b never moves (stays at 0.3)",)),
    "nothing moves": ({"still": (0, 1, 2)}, NEXT, ("nothing moves: no joint",)),
    "degrees": ({"unit": 57.3}, (), ("are these degrees?",)),
    "copies its state": (
        {},
        ("data.action.from=next_state", "model.chunk_size=1", "model.n_action_steps=1"),
        ("a policy could copy its state",),
    ),
    "lag": ({"lag": 0.4}, (), ("follows the command 39",)),
    "idle": ({"seconds": 9.0, "waits": 5.0}, (), ("begins with 5.",)),
    "short": ({"seconds": 1.0}, ("model.chunk_size=100",), ("1 of 1 episodes are shorter", "longest 28")),
    "slow camera": ({"camera_hz": 10}, (), ("camera color has 9.9", "data.fps to about 10")),
    "frozen camera": ({"frozen": (1.0, 2.0)}, (), (f"{CAMERA}: 29 of 120 pictures", "the camera hung")),
    "black pictures": ({"black": (-1.0, 1.0)}, (), (f"{CAMERA}:", "checked pictures are black")),
    "a turn": (
        {"turns": 2.0},
        NEXT,
        (f"{STATE}: b jumps from", "in 10.0 ms at message 211", "(1 such jumps)", "does the angle wrap"),
    ),
    "hovers at pi": (
        {"turns": 2.0, "back": 2.02},
        NEXT,
        (f"{STATE}: b jumps from", "(2 such jumps)", "does the angle wrap"),
    ),
    "late pictures": ({"late": 200 * MS}, (), (f"{CAMERA}: messages arrive 200 ms after their header stamp",)),
    "late joints": ({"ahead": -300 * MS}, NEXT, (f"{STATE}: messages arrive 301 ms after their header stamp",)),
    "a clock ahead": ({"ahead": 300 * MS}, NEXT, (f"{STATE}: messages are stamped 299 ms after they arrived",)),
}


@pytest.mark.parametrize("what", WRONG)
def test_only_faults_are_warned_of(tmp_path: Path, what: str) -> None:
    recorded, overrides, words = WRONG[what]
    found = inspected(tmp_path, arm(**recorded), configured(tmp_path, *overrides))
    assert not found.faults and found.verdict == (USABLE if words else GOOD)
    if what == "black pictures":  # each is the one before, too
        assert "byte for byte" in found.warnings.pop()
    assert len(found.warnings) == bool(words), found.warnings
    assert all(word in found.warnings[0] for word in words), found.warnings


def test_a_dry_run_gives_the_same_warnings(tmp_path: Path) -> None:
    recordings = {
        "good": {},
        "stuck": {"still": (1,)},
        "waiting": {"seconds": 9.0, "waits": 5.0},
        "turned": {"turns": 2.0},
    }
    for name, recorded in recordings.items():
        write(tmp_path / "bags" / name, arm(**recorded))  # type: ignore[arg-type]
    config = configured(tmp_path)
    bags, _ = find_bags(tmp_path / "bags")
    said = [f"{bag.name}: {warning}" for bag in bags for warning in inspect(bag, config).warnings]
    reported = Run(config, load_dataset(config)).report().splitlines()
    warnings = [line.removeprefix("warning: ") for line in reported if line.startswith("warning: ")]
    assert len(said) == 3 and sorted(warnings) == sorted(said)
    for i in range(4):
        write(tmp_path / f"bags/stuck_{i}", arm(still=(1,), lag=0.1 + 0.01 * i))
    reported = Run(config, load_dataset(config)).report().splitlines()
    (line,) = [line for line in reported if "never moves" in line]
    assert line.startswith("warning: 5 recordings (stuck, stuck_0, stuck_1, ...): b never moves"), line


def test_names_in_a_recording_steer_no_terminal_and_no_page(tmp_path: Path) -> None:
    evil = "a\x1b[31m\n<script>|"
    names = [evil, "b", "c"]
    timed = [
        (topic, kind, at, joint_state(at, message.position, names) if topic == STATE else message)
        for topic, kind, at, message in arm(2.0)
    ]
    for i in range(2):
        write(tmp_path / f"bags/\x1b[2J{i}", timed if i else arm(1.0, lag=0.12))
    done = run(tmp_path / "bags", "--no-pictures")
    proposed = run(tmp_path / "bags" / "\x1b[2J1", "--propose")
    assert (
        "\\x1b[31m\\n<script>" in done.stdout
        and yaml.safe_load(proposed.stdout)["data"]["state"][0]["joints"][0] == evil
    )
    config = configured(
        tmp_path, f"data.state={json.dumps([{'topic': STATE, 'joints': names}])}", "data.on_bad_bag=skip"
    )
    report = Run(config, load_dataset(config)).report()
    robot = Run(config, load_dataset(config)).robot(1, {})
    assert "no joint" in report and "&lt;script&gt;\\|, b, c" in robot.card() and "<script>" not in robot.card()
    for text in (done.stdout, done.stderr, proposed.stdout, report, robot.card()):
        assert all(c.isprintable() or c == "\n" for c in text), text


@pytest.mark.skipif(not SHARED.exists(), reason="the recordings of others are not here")
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_topics_that_other_readers_drop_are_counted(storage: str) -> None:
    bags, faults = find_bags(SHARED / "ros2-rosbag2" / storage)
    read = {bag.name: sum(t.read for t in inspect(bag).topics.values()) for bag in bags}
    assert not faults and (read["talker"], read["convert_a"], read["convert_b"]) == (20, 150, 75)


@pytest.mark.skipif(not SHARED.exists(), reason="the recordings of others are not here")
def test_messages_of_unknown_types_are_counted() -> None:
    (bag,), _ = find_bags(SHARED / "ros2-rosbag2/mcap/bag_with_topics_and_service_events")
    found = inspect(bag)
    service = found.topics["/test_service1/_service_event"]
    assert found.verdict == GOOD and service.read == 4 and service.not_understood and not service.joints
    assert "counted only" in inspect_bags.table(found, None)


@pytest.mark.skipif(not SHARED.exists(), reason="the recordings of others are not here")
def test_a_real_camera_and_real_arms() -> None:
    found = {}
    for folder in (
        "UbiquityRobotics-fiducials",
        "ipab-slmc-kuka_honeypot_demo",
        "mbrummelhuis-aerial_tactile_servoing",
    ):
        for bag in find_bags(SHARED / folder)[0]:
            found[bag.name] = inspect(bag, pictures=True)
    camera = found["aruco_images.bag"].topics["/raspicam_node/image/compressed"]
    assert camera.pictures and camera.pictures.kinds == {"1280x960 jpeg": 1} and "off by up to 1.24 s" in camera.clock
    assert camera.pictures.shown[0].pixels.shape == (240, 320, 3)
    sums = {name: one.checksums for name, one in found.items()}
    assert (
        sums["ros2bag_ats_2025-12-02_12-44-28"] == "CRC of the summary, none of the messages"
        and sums["test.bag"] == "none"
    )
    kuka = found["test.bag"].topics["/joint_states"]
    assert kuka.header_minus_receive_ms and kuka.header_minus_receive_ms.median == pytest.approx(4.4, abs=0.1)
    assert len(kuka.joints) == 7 and max(joint.fastest for joint in kuka.joints) < 2, "rad/s, of a real arm"
    servo = found["ros2bag_servo_serial_no_unexpected_q3"].topics["/servo/out/state"]
    assert [joint.name for joint in servo.joints] == [f"position[{i}]" for i in range(3)], "name[] is empty"
    for one in found.values():
        text = inspect_bags.table(one, None)
        assert max(map(len, text.splitlines())) <= 100 and one.verdict == GOOD


def test_pictures_that_no_camera_should_give(tmp_path: Path) -> None:
    """Raw pictures with other header stamps and the same pixels are frozen; a broken or changing one is named."""
    stamps = [START + i * 33 * MS for i in range(9)]
    same = [(CAMERA, "sensor_msgs/msg/Image", t, image(t, picture(i // 3))) for i, t in enumerate(stamps)]
    found = inspected(tmp_path / "frozen", same)
    pictures = found.topics[CAMERA].pictures
    assert pictures and pictures.frozen == (1, 2, 4, 5, 7, 8) and pictures.looked_at == 9
    assert "byte for byte" in found.warnings[0] and found.verdict == USABLE
    changing = [(CAMERA, JPEG, t, jpeg(t, picture(i, 48 + 16 * (i > 4)))) for i, t in enumerate(stamps)]
    (warning,) = inspected(tmp_path / "two", changing).warnings
    assert "5 of 64x48 jpeg, 4 of 64x64 jpeg" in warning
    joints = [(STATE, JOINT_STATE, t, joint_state(t, [i, i, i])) for i, t in enumerate(stamps)]
    config = configured(tmp_path / "fault", "data.action.from=next_state")
    (fault,) = inspected(tmp_path / "fault", joints + changing, config).faults
    assert "pictures of 64x48 and 64x64" in fault, "training would refuse it"
    depth = [(CAMERA, "sensor_msgs/msg/Image", t, image(t, picture(i)[..., 1:], "16UC1")) for i, t in enumerate(stamps)]
    assert inspected(tmp_path / "depth", depth).verdict == GOOD, "no camera, but not wanted either"
    config = configured(tmp_path / "asked", "data.action.from=next_state")
    assert "depth or 16-bit" in inspected(tmp_path / "asked", joints + depth, config).faults[0]
    half = [(CAMERA, JPEG, t, jpeg(t, picture(i))) for i, t in enumerate(stamps)]
    half[4][3].data = half[4][3].data[:-100]
    broken = inspected(tmp_path / "half", half)
    assert broken.topics[CAMERA].read == 9 and broken.verdict == BAD
    assert len(broken.faults) == 1 and "message 4 at t+0.132 s" in broken.faults[0]


def test_faults_of_reading_and_of_training(tmp_path: Path) -> None:
    path = write(tmp_path / "bags/one", episode())
    text = (path / "metadata.yaml").read_text()
    (path / "metadata.yaml").write_text(text.replace("message_count: 31", "message_count: 5"))
    (bag,), _ = find_bags(tmp_path / "bags")
    assert inspect(bag).faults == [
        f"{CAMERA}: 31 messages read, metadata.yaml declares 5; copy the recording again, or `ros2 bag reindex` its folder"
    ]
    state_alone = configured(tmp_path, "data.cameras={}", "data.action.from=next_state")
    found = inspect(bag, state_alone)
    assert not found.faults and "declares 5" in found.warnings[0], "an unwanted topic is no fault"
    misspelt = replace(state_alone, data=replace(state_alone.data, cameras={"color": "/elsewhere"}))
    assert [fault for fault in inspect(bag, misspelt).faults if "/elsewhere: no such topic" in fault]


def test_receive_stamps_of_zero_leave_the_header_clock(tmp_path: Path) -> None:
    found = inspected(tmp_path, [(topic, kind, 0, content) for topic, kind, _, content in arm()], configured(tmp_path))
    assert found.verdict == GOOD and found.seconds == pytest.approx(4, abs=0.05)
    assert found.topics[STATE].clock == "header (all receive stamps are 0)" and found.episodes()[0][0] < 0.1


def test_the_command(tmp_path: Path) -> None:
    write(tmp_path / "bags/good", arm())
    write(tmp_path / "bags/stuck", arm(still=(1,)))
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"data": {"cameras": {"color": CAMERA}, "image_size": [48, 64]}}))
    state = f"data.state=[{{topic: {STATE}, joints: [a, b, c]}}]"
    command = ("--config", tmp_path / "my.yaml", f"data.bag_dir={tmp_path}/bags", state, "model.chunk_size=30")
    done = run(*command, "model.n_action_steps=30")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: b never moves" in done.stdout and max(map(len, done.stdout.splitlines())) <= 100
    assert "\n2 recordings: 1 good, 1 usable, read the warnings; read the lines marked" in done.stdout
    (tmp_path / "bags/empty.mcap").write_bytes(b"")
    done = run(tmp_path / "bags", "--json", "--no-pictures")
    tree = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert done.returncode == 1 and [one["verdict"] for one in tree["recordings"]] == [BAD, GOOD, GOOD]
    good = tree["recordings"][1]
    assert good["topics"][STATE]["joints"][0]["name"] == "a" and good["topics"][CAMERA]["pictures"]["looked_at"] == 0
    assert "0 bytes" in tree["recordings"][0]["faults"][0] and "1 cannot be trained on" in tree["summary"]
    long = run(*command[:2], f"data.bag_dir={tmp_path}/bags", f"data.state=[{{topic: {STATE}, joints: [{'x' * 300}]}}]")
    assert long.returncode == 1 and "no joint xxx" in long.stdout, "a setting that is longer than a file's name may be"
    heard = subprocess.run(
        f"{sys.executable} {SCRIPT} {tmp_path}/bags | head -n 1", shell=True, capture_output=True, text=True
    )
    assert heard.stdout and not heard.stderr
    several = run(tmp_path / "bags/good", tmp_path / "bags/stuck", "--propose")
    assert several.returncode == 1 and "expected one folder with all recordings" in several.stderr
    nowhere = run(tmp_path / "nowhere")
    assert nowhere.returncode == 1 and "does not exist" in nowhere.stderr


def test_a_proposed_configuration_trains(tmp_path: Path) -> None:
    """A UR whose driver publishes the elbow first, two cameras of which one comes twice, depth, a gripper and commands."""
    joints = [
        f"left_{name}_joint" for name in ("elbow", "shoulder_lift", "shoulder_pan", "wrist_1", "wrist_2", "wrist_3")
    ]
    layout = make("std_msgs/msg/MultiArrayLayout", dim=[], data_offset=0)
    messages: list[Timed] = []
    for i in range(120):
        t = START + i * 10 * MS
        messages.append(("/joint_states", JOINT_STATE, t, joint_state(t, np.sin(i / 30 + np.arange(6)), joints)))
        messages.append(("/arm/command", JOINT_STATE, t, joint_state(t, np.sin(i / 30 + np.arange(6)), joints)))
        if i % 7 == 0:
            pixels = picture(i, 480, 640)
            for topic in ("/camera/wrist/image_raw", "/camera/front/image_raw"):
                messages.append((topic + "/compressed", JPEG, t, jpeg(t, pixels)))
            messages.append(("/camera/wrist/image_raw", "sensor_msgs/msg/Image", t, image(t, pixels)))
            depth = image(t, pixels[..., :2], "16UC1")
            messages.append(("/camera/wrist/depth", "sensor_msgs/msg/Image", t, depth))
            array = make("std_msgs/msg/Float64MultiArray", layout=layout, data=np.array([0.04]))
            messages.append(("/gripper/width", "std_msgs/msg/Float64MultiArray", t, array))
    for name in ("one", "two"):
        write(tmp_path / "bags" / name, messages)
    text = propose(find_bags(tmp_path / "bags")[0], str(tmp_path / "bags"))
    path = tmp_path / "proposed.yaml"
    path.write_text(text)
    data = load(path).data
    assert data.bag_dir == tmp_path / "bags" and data.fps == 15 and data.image_size == (240, 320)
    assert data.cameras == {
        "front": "/camera/front/image_raw/compressed",
        "wrist": "/camera/wrist/image_raw/compressed",
    }
    order = ("shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3")
    assert data.state[0].joints == tuple(f"left_{name}_joint" for name in order), "from the base to the tool"
    assert "# - {topic: /gripper/width}" in text and "left out: /camera/wrist/depth: a depth" in text
    path.write_text(re.sub(r"from: next_state.*\n.*\n    # (from: .*)", r"\1", text))
    commanded = load(path, [f"data.cache_dir={tmp_path}/cache"])
    assert commanded.data.commands[0].topic == "/arm/command", "the suggestion in the comment can be taken as it stands"
    dataset = load_dataset(commanded)
    assert len(dataset.train.names) == 1 and dataset.train.state.shape[1] == dataset.train.action.shape[1] == 6


def test_leaders_publishers_and_controllers_are_proposed(tmp_path: Path) -> None:
    """Two followers and two leaders of the same joint names; a gripper on an arm's topic; commands without names; a NaN."""
    layout = make("std_msgs/msg/MultiArrayLayout", dim=[], data_offset=0)
    messages: list[Timed] = []
    for i in range(100):
        t = START + i * 10 * MS
        arm = np.sin(i / 30 + np.arange(3))
        for side in ("right", "left"):
            messages.append((f"/follower_{side}/joint_states", JOINT_STATE, t, joint_state(t, arm)))
            messages.append((f"/leader_{side}/joint_states", JOINT_STATE, t, joint_state(t, arm + 0.1)))
        gripper = joint_state(t + MS, [0.1 * arm[0], np.nan], ["finger", "mimic"])
        messages.append(("/follower_left/joint_states", JOINT_STATE, t + MS, gripper))
        array = make("std_msgs/msg/Float64MultiArray", layout=layout, data=arm)
        messages.append(("/position_controller/commands", "std_msgs/msg/Float64MultiArray", t, array))
        raw = np.frombuffer(bytes(48 * 64 * 2), np.uint8).reshape(48, 64, 2)
        messages.append(("/camera", "sensor_msgs/msg/Image", t, image(t, raw, "nv21")))
    write(tmp_path / "bags/one", sorted(messages, key=lambda message: message[2]), "sqlite")
    path = tmp_path / "proposed.yaml"
    path.write_text(propose(find_bags(tmp_path / "bags")[0], str(tmp_path / "bags")))
    text, config = path.read_text(), load(path, [f"data.cache_dir={tmp_path}/cache"])
    state = {(signal.topic, signal.joints) for signal in config.data.state}
    left, right = "/follower_left/joint_states", "/follower_right/joint_states"
    assert state == {(left, ("a", "b", "c")), (left, ("finger",)), (right, ("a", "b", "c"))}
    leaders = [signal.topic for signal in config.data.commands]
    arms = [signal.topic for signal in config.data.state if len(signal.joints) == 3]
    assert leaders == [topic.replace("follower", "leader") for topic in arms], "in the order of the followers"
    assert "# from: [{topic: /position_controller/commands}]" in text
    assert f"left out: {left}: mimic: not finite" in text and "left out: /camera: unknown encoding 'nv21'" in text
    dataset = load_dataset(config)
    assert dataset.train.state.shape[1] == 7 and dataset.train.action.shape[1] == 6 and not dataset.skipped


@pytest.mark.skipif(not SHARED.exists(), reason="the recordings of others are not here")
@pytest.mark.parametrize(
    "path",
    ["ipab-slmc-kuka_honeypot_demo/test.bag", "mbrummelhuis-aerial_tactile_servoing/ros2bag_ats_2025-12-02_12-44-28"],
)
def test_a_configuration_proposed_for_a_real_arm(tmp_path: Path, path: str) -> None:
    proposed = tmp_path / "proposed.yaml"
    proposed.write_text(propose(find_bags(SHARED / path)[0], str(SHARED / path)))
    dataset = load_dataset(load(proposed, [f"data.cache_dir={tmp_path}/cache"]))
    assert len(dataset.train.state) > 100 and not load(proposed).data.cameras


def test_memory_does_not_grow_with_the_recording(tmp_path: Path) -> None:
    stamps = [START + i * 33 * MS for i in range(220)]
    write(
        tmp_path / "bags/one",
        [(CAMERA, "sensor_msgs/msg/Image", t, image(t, picture(i, 480, 640))) for i, t in enumerate(stamps)],
    )
    code = f"""
import re
from pathlib import Path
from inspection import verdict
from recordings.bags import find_bags
from training.run import Run
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
(bag,), _ = find_bags(Path("{tmp_path}/bags"))
before = peak()
print(verdict.inspect(bag, None, True).topics["{CAMERA}"].read, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
    read, grown = map(int, done.stdout.split())
    assert read == 220 and grown < 60, f"{grown} MB for 200 MB of pictures"
