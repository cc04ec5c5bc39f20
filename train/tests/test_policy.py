"""The policy on a robot: chunks, ensembling, robot.json, and no action for broken input."""

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_dataset import recorded
from test_train import flip_a_bit, run, tiny, trained
from writing import CAMERA, COMMAND, Timed, episode, joint_state, jpeg, picture, write
from writing import STATE as STATE_TOPIC

import train
from config import load
from dataset.cache import load_dataset
from faults import Fault
from policy.runner import Ensembler, Policy
from recordings import images

STATE = {"a": 0.1, "b": -0.2, "c": 0.3}
SHOT = picture(5, 96, 128)  # as the camera gives it; the network sees 48x64


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three joints and a camera; chunks of 10, of which 5 are executed."""
    folder = tmp_path_factory.mktemp("policy")
    return trained(tiny(recorded(folder)))


@pytest.fixture
def folder(trained_once: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(trained_once / "pretrained_model", tmp_path / "pretrained_model"))


def observation(**changes: Any) -> dict[str, Any]:
    return {"state": STATE, "images": {"color": SHOT}} | changes


def test_n_action_steps_of_a_chunk_are_executed(trained_once: Path) -> None:
    policy = Policy.load(
        trained_once, fps=20, action_as="absolute", state_names=["a", "b", "c"], action_names=list("abc")
    )
    pixels = torch.from_numpy(images.resize(SHOT, (32, 48)))[None, None]
    chunk = policy.pretrained.predict(torch.tensor([[0.1, -0.2, 0.3]]), pixels)[0]
    other = observation(state=np.array([0.5, 0.5, 0.5]))
    actions = [policy.act(observation()), *(policy.act(other) for _ in range(5))]
    assert actions[0].dtype == np.float32 and actions[0].shape == (3,)
    assert np.array_equal(np.stack(actions[:5]), chunk[:5].numpy()), "resized and normalized as in training"
    assert not np.allclose(actions[5], chunk[5]), "the sixth is from a new observation"
    policy.reset()
    shuffled = {"state": dict(reversed(STATE.items())), "images": {"color": SHOT}}
    assert np.array_equal(policy.act(shuffled), actions[0]), "joints in any order; reset forgets the chunk"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    policy.pretrained.predict(torch.zeros(1, 3), pixels)
    assert torch.get_float32_matmul_precision() == "high", "a prediction changes nothing in the robot's program"
    torch.set_float32_matmul_precision(before)


def test_a_camera_is_needed_only_where_a_chunk_begins(trained_once: Path) -> None:
    policy = Policy.load(trained_once, n_action_steps=3)
    actions, needed = [], []
    for _ in range(4):
        needed.append(policy.needs_observation)
        actions.append(policy.act(observation() if policy.needs_observation else {"state": STATE}))
    assert needed == [True, False, False, True] and np.array_equal(actions[0], actions[3])
    policy.reset()
    with pytest.raises(Fault, match=r"images of \[\]"):
        policy.act({"state": STATE})
    assert Policy.load(trained_once, ensemble=0.01).needs_observation
    for wrong in (0, 11, 2.5):
        with pytest.raises(Fault, match="expected 1 to 10, the length of a chunk"):
            Policy.load(trained_once, n_action_steps=wrong)  # type: ignore[arg-type]


def test_training_and_robot_crop_the_same_part_of_a_picture(tmp_path: Path) -> None:
    """The part is bright; what is around it, dark in training and noise on the robot, changes nothing."""

    def framed(inner: np.ndarray, around: np.ndarray) -> np.ndarray:
        around[24:72, 32:96] = inner
        return around

    for i in range(3):
        shot = framed(picture(i, 48, 64), np.zeros((96, 128, 3), np.uint8))
        timed = [
            (topic, kind, at, jpeg(at, shot) if topic == CAMERA else message)
            for topic, kind, at, message in episode(1.0, seed=i)
        ]
        write(tmp_path / f"bags/episode_{i}", timed)
    whole = "data.crop={color: [0.25, 0.25, 0.5, 0.5]}"
    checkpoint = trained(tiny(tmp_path, whole, "data.image_size=[48, 64]"))
    policy = Policy.load(checkpoint)
    robot = policy.pretrained.robot
    assert robot and robot.parts == [(0.25, 0.25, 0.5, 0.5)] and policy.picture_sizes == {"color": [(96, 128)]}
    assert (
        "of it the part of height 0.5 and width 0.5 from top 0.25, left 0.25"
        in (checkpoint / "pretrained_model/README.md").read_text()
    )
    inner, noise = picture(7, 48, 64), np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    action = policy.act(observation(images={"color": framed(inner, noise)}))
    expected = policy.pretrained.predict(torch.tensor([[0.1, -0.2, 0.3]]), torch.from_numpy(inner)[None, None])[0, 0]
    assert np.array_equal(action, expected.numpy())
    dataset = load_dataset(load(tmp_path / "tiny.yaml"))
    seen = dataset.train.gather(np.zeros(1, int)).images
    assert seen is not None and seen.float().mean() > 60, "the bright part, not the dark frame"
    with pytest.raises(Fault, match=r"data.crop.color: .*within the picture"):
        load(None, ["data.crop={color: [0.5, 0, 0.6, 1]}"])
    with pytest.raises(Fault, match=r"data.crop.wrist: no such camera; known: color"):
        load(None, ["data.crop={wrist: [0, 0, 1, 1]}"])


def test_joints_of_two_arms_are_told_apart_by_their_topics(tmp_path: Path) -> None:
    left, right = "/left/joint_states", "/right/joint_states"
    arms: list[Timed] = [
        (topic, kind, t, joint_state(t, [side + np.sin(t / 1e9), 0, 0]))
        for topic, side in ((left, 0.0), (right, 1.0))
        for _, kind, t, _ in (message for message in episode(2.0) if message[0] == STATE_TOPIC)
    ]
    cameras = [message for message in episode(2.0) if message[0] == CAMERA]
    write(tmp_path / "bags/one", sorted([*arms, *cameras], key=lambda message: message[2]))
    signals = f"data.state=[{{topic: {left}, joints: [a]}}, {{topic: {right}, joints: [a]}}]"
    policy = Policy.load(trained(tiny(tmp_path, signals, "data.validation_fraction=0", "training.steps=5")))
    names = f"{left}.a", f"{right}.a"
    assert policy.state_names == policy.action_names == names
    there = policy.act({"state": dict(zip(names, (0.1, 1.1), strict=True)), "images": {"color": SHOT}})
    policy.reset()
    again = policy.act({"state": dict(zip(names[::-1], (1.1, 0.1), strict=True)), "images": {"color": SHOT}})
    assert there.shape == (2,) and np.array_equal(there, again) and there[1] - there[0] > 0.5


def test_ensembling_is_the_weighted_mean_of_all_predictions_for_a_tick(trained_once: Path) -> None:
    chunks = torch.randn(25, 10, 3)
    for coefficient in (0.01, 0.0, -0.3):
        ensembler = Ensembler(coefficient, 10)
        for tick in range(25):
            said = [chunks[start, tick - start] for start in range(max(0, tick - 9), tick + 1)]  # the oldest first
            weights = torch.exp(-coefficient * torch.arange(len(said)))
            expected = (torch.stack(said) * weights[:, None]).sum(0) / weights.sum()
            torch.testing.assert_close(ensembler.update(chunks[tick]), expected, atol=1e-6, rtol=1e-6)
    policy, plain = Policy.load(trained_once, ensemble=0.01), Policy.load(trained_once)
    first = policy.act(observation())
    assert np.array_equal(first, plain.act(observation())), "nothing to average in the first tick"
    second = policy.act(observation(state=[0.5, 0.5, 0.5]))
    assert not np.array_equal(second, plain.act(observation()))
    policy.reset()
    assert np.array_equal(policy.act(observation()), first)
    with pytest.raises(Fault, match="ensemble: -50"):
        Policy.load(trained_once, ensemble=-50)


def test_a_driver_may_publish_more_and_config_json_may_ask_for_ensembling(folder: Path) -> None:
    plain, states = Policy.load(folder), [{"c": 0.3, "gripper": 9.0, "a": 0.1 * i, "b": 0.2} for i in range(3)]
    by_place = [Policy.load(folder).act(observation(state=[one[name] for name in "abc"])) for one in states]
    assert np.array_equal(plain.act(observation(state=states[0])), by_place[0])
    edit(folder / "config.json", lambda c: c.update(temporal_ensemble_coeff=0.01, n_action_steps=1))
    asked, told = Policy.load(folder), Policy.load(folder, ensemble=0.01)
    for state in states:
        assert np.array_equal(asked.act(observation(state=state)), told.act(observation(state=state)))
    assert asked.ensembler is not None


def test_a_policy_refuses_another_robot(trained_once: Path, tmp_path: Path) -> None:
    policy = Policy.load(trained_once)
    assert (policy.fps, policy.action_as, policy.cameras) == (20, "absolute", ("color",))
    assert policy.state_names == policy.action_names == ("a", "b", "c")
    assert policy.picture_sizes == {"color": [(48, 64)]}
    with pytest.raises(Fault) as caught:
        Policy.load(
            trained_once, fps=30, action_names=["a", "c", "b"], action_as="relative", state_names=["a", "b", "c"]
        )
    assert [line.split(": ")[1] for line in caught.value.args] == ["fps", "action_names", "action_as"]
    assert "the robot has 'relative', the policy 'absolute'" in str(caught.value)
    commands = f"data.action.from=[{{topic: {COMMAND}, joints: [a, b, c]}}]"
    deltas = trained(tiny(recorded(tmp_path), commands, "data.action.as=delta", "training.steps=1"))
    assert Policy.load(deltas).action_as == "delta"
    for checkpoint, mine, other in ((trained_once, "absolute", "delta"), (deltas, "delta", "absolute")):
        as_trained, converting = Policy.load(checkpoint, action_as=mine), Policy.load(checkpoint, action_as=other)
        for tick in range(7):  # into the second look
            state = np.array([0.1 * tick, -0.2, 0.3], np.float32)
            ours, theirs = (policy.act(observation(state=state)) for policy in (as_trained, converting))
            target, delta = (ours, theirs) if mine == "absolute" else (theirs, ours)
            np.testing.assert_allclose(target, state + delta, atol=1e-6)
        assert converting.action_as == other
    switched = trained(tiny(recorded(tmp_path / "c"), commands.replace("[a, b, c]", "[c, b, a]"), "training.steps=1"))
    plain, converting = Policy.load(switched), Policy.load(switched, action_as="delta")
    state = np.array([1.0, 2.0, 2.5], np.float32)
    moved = plain.act(observation(state=state)) - converting.act(observation(state=state))
    np.testing.assert_allclose(moved, [2.5, 2, 1], atol=1e-6, err_msg="by name")


def test_a_joint_far_from_all_of_training_is_a_warning_once(trained_once: Path) -> None:
    policy, degrees = Policy.load(trained_once), observation(state=np.array([0.1, -40, 0.3]))
    with pytest.warns(UserWarning, match=r"state of b is -40, \d\d standard deviations from its mean in training"):
        assert np.isfinite(policy.act(degrees)).all()
    with warnings.catch_warnings(action="error"):
        policy.act(degrees)
        Policy.load(trained_once).act(observation(state=np.array([1, -1, 1])))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"state": STATE | {"b": np.nan}}, ["state of b is nan", "driver"]),
        ({"state": np.array([0, np.inf, 1e300])}, ["state of b is inf", "state of c is inf"]),
        ({"state": {"a": 0.0, "b": 0.0, "gripper": 0.0}}, ["missing ['c']; it has ['a', 'b', 'gripper']"]),
        ({"state": torch.zeros(3, device="meta")}, ["expected (3,) numbers"]),  # as one on a GPU
        ({"state": {"a": 0.0, 1: 0.0}}, ["missing ['b', 'c']; it has [1, 'a']"]),
        ({"images": {"color": SHOT, 1: SHOT}}, ["images of [1, 'color']"]),
        ({"state": np.zeros(4)}, ["(4,)", "expected (3,) numbers: a, b, c"]),
        ({"state": ["a", "b", "c"]}, ["expected (3,) numbers"]),
        ({"state": [[1.0], [1.0, 2.0], 3.0]}, ["expected (3,) numbers"]),
        ({"state": None}, ["expected (3,) numbers"]),
        ({"images": {}}, ["images of []", "['color']"]),
        ({"images": {"wrist": SHOT}, "state": np.zeros(2)}, ["['wrist']", "['color']", "(2,)"]),
        ({"images": {"color": SHOT / 255}}, ["color: (96, 128, 3) float64", "uint8 RGB"]),
        ({"images": {"color": SHOT.transpose(2, 0, 1)}}, ["color: (3, 96, 128) uint8"]),
        ({"images": {"color": None}}, ["color: () object"]),
        ({"images": SHOT}, ["images is a ndarray; expected a mapping of camera to picture"]),
        ({"images": {"color": torch.zeros(48, 64, 3, device="meta")}}, ["color: () object", "uint8 RGB"]),
        ({"images": {"color": picture(5, 90, 160)}}, ["color: 160x90", "aspect ratio of 64x48"]),
    ],
)
def test_no_action_for_a_broken_observation(trained_once: Path, wrong: dict[str, Any], words: list[str]) -> None:
    policy = Policy.load(trained_once)
    with pytest.raises(Fault) as caught:
        policy.act(observation(**wrong))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    for nothing in (None, [1]):
        with pytest.raises(Fault, match="expected a mapping with state and images"):
            policy.act(nothing)  # type: ignore[arg-type]
    policy.act(observation())
    with pytest.raises(Fault):
        policy.act(observation(**wrong))  # while a chunk is in hand
    fresh = observation(state=[0.5, 0.5, 0.5])
    after = policy.act(fresh)
    policy.reset()
    assert np.array_equal(after, policy.act(fresh)), "the earlier chunk is dropped"


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path, change: Callable[[Any], None]) -> None:
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        content = load_file(path)
        change(content)
        save_file(content, path)


STATISTICS = "policy_preprocessor_step_3_normalizer_processor.safetensors"
BREAKAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "empty": (lambda f: shutil.rmtree(f), ["missing config.json, model.safetensors"]),
    "half the weights": (lambda f: half(f / "model.safetensors"), ["damaged", "copy the checkpoint again"]),
    "half of config.json": (lambda f: half(f / "config.json"), ["damaged"]),
    "half of robot.json": (lambda f: half(f / "robot.json"), ["damaged"]),
    "no robot.json": (lambda f: (f / "robot.json").unlink(), ["damaged", "robot.json"]),
    "no statistics": (lambda f: (f / STATISTICS).unlink(), ["damaged", STATISTICS]),
    "half the statistics": (lambda f: half(f / STATISTICS), ["damaged"]),
    "no postprocessor": (lambda f: (f / "policy_postprocessor.json").unlink(), ["missing policy_postprocessor.json"]),
    "statistics of other joints": (
        lambda f: edit(f / STATISTICS, lambda t: t.update({"observation.state.mean": torch.zeros(4)})),
        ["observation.state has shape (3,)", "(4,)"],
    ),
    "statistics not finite": (
        lambda f: edit(f / STATISTICS, lambda t: t["observation.state.std"].fill_(torch.nan)),
        ["statistics of observation.state", "not finite"],
    ),
    "robot.json of other joints": (
        lambda f: edit(f / "robot.json", lambda r: r.update(state_names=["a", "b"])),
        ["robot.json", "[2, 3, ['color']]", "[3, 3, ['color']]"],
    ),
    "robot.json of a like policy": (
        lambda f: edit(f / "robot.json", lambda r: r.update(state_names=["b", "a", "c"])),
        ["robot.json were not written with it", "of one checkpoint"],
    ),
    "statistics of a like policy": (
        lambda f: edit(f / STATISTICS, lambda t: t["observation.state.mean"].add_(0.1)),
        ["its statistics or robot.json were not written", "of one checkpoint"],
    ),
    "a postprocessor of a like policy": (
        lambda f: edit(f / STATISTICS, lambda t: t["action.mean"].add_(0.1)),
        ["action has other statistics in policy_postprocessor.json"],
    ),
    "weights not finite": (
        lambda f: edit(f / "model.safetensors", lambda t: t["model.action_head.bias"].fill_(torch.inf)),
        ["NaN or Inf in model.action_head.bias"],
    ),
    "a bit of the weights": (lambda f: flip_a_bit(f / "model.safetensors"), ["not the numbers that were written"]),
    "another network": (
        lambda f: edit(f / "config.json", lambda c: c.update(chunk_size=11)),
        ["damaged", "decoder_pos_embed"],
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_no_policy_from_a_broken_checkpoint(folder: Path, breakage: str) -> None:
    broken, words = BREAKAGES[breakage]
    broken(folder)
    with pytest.raises(Fault) as caught:
        Policy.load(folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(caught.value.args) == 1, "one clear error"


def test_an_output_that_is_not_finite_is_no_action(folder: Path) -> None:
    policy = Policy.load(folder)
    with torch.no_grad():
        policy.pretrained.model.action_head.weight.fill_(3e38)  # each finite, their sum is not
    with pytest.raises(Fault, match="actions are not finite"):
        policy.act(observation())
    with pytest.raises(Fault, match="device: cannot use 'cuda:99'"):
        Policy.load(folder, device="cuda:99")


def test_a_robot_needs_no_rosbags(trained_once: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['rosbags', 'tqdm', 'torchvision', 'matplotlib', 'PIL'])); "
        f"sys.path.insert(0, {str(Path(train.__file__).parent)!r}); from policy.runner import Policy; "
        f"Policy.load({str(trained_once)!r}); print('loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "loaded\n", done.stderr


def test_training_starts_from_a_policys_weights(trained_once: Path, tmp_path: Path) -> None:
    path = tiny(
        recorded(tmp_path, 2),
        f"training.init_from={trained_once}",
        "model.pretrained_backbone=true",
        "training.steps=5",
        "data.validation_fraction=0",
    )
    out = run("--config", path, "data.fps=10").stdout  # torchvision's weights are not fetched
    assert (
        f"starting from {trained_once}: its weights, and the statistics of this data; data.fps was 20.0, now 10.0"
        in out
    )
    before = load_file(trained_once / "pretrained_model/model.safetensors")
    after = load_file(tmp_path / "run/checkpoint_000005/pretrained_model/model.safetensors")
    moved = max((before[key] - after[key]).abs().max() for key in before)
    assert 0 < moved < 1e-3, "five steps of 1e-5 away"
    card = (tmp_path / "run/checkpoint_000005/pretrained_model/README.md").read_text()
    assert f"starting from the weights of {trained_once}" in card
    again = run("--config", path, "data.fps=10", "training.steps=6", "training.init_from=/gone").stdout
    assert "resuming from" in again and "starting from" not in again


def test_training_does_not_start_from_another_network(trained_once: Path, tmp_path: Path) -> None:
    path = tiny(recorded(tmp_path, 2), f"training.init_from={trained_once}", "model.chunk_size=12", "data.cameras={}")
    done = run("--config", path, "model.dim_feedforward=48", check=False)
    for words in (
        "model.chunk_size is 10, of this run 12",
        "model.dim_feedforward is 32",
        "number of data.cameras is 1",
    ):
        assert words in done.stderr, done.stderr
    done = run("--config", path, f"training.init_from={tmp_path}/none", check=False)
    assert done.returncode == 1 and "training.init_from" in done.stderr and "missing" in done.stderr


def test_the_model_card_names_the_training_data(trained_once: Path) -> None:
    card = (trained_once / "pretrained_model/README.md").read_text()
    for words in (
        "12 steps on 2 recordings, 2 episodes, 2 s",
        "Held out: 1 recordings, 1 episodes, 1 s; mean L1 in standard deviations: ",
        "| state | a, b, c |",
        "| picture `color` | /camera, recorded at 64x48, seen at 48x32",
        "**absolute** targets",
        "from_pretrained(",
        "Policy.load(",
    ):
        assert words in card, card
