"""The closed loop can be trusted: an expert reaches every disc, whoever holds still none, and the figures are right."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_demo_bags import in_order, on_topic
from test_train import TINY

import evaluate
import train
from config import load
from dataset.cache import load_dataset
from demo_bags import episode_messages, record
from evaluation import closed_loop
from evaluation.closed_loop import Controller, drive, held, unseen, wilson
from evaluation.simulated_arm import (
    COMMAND_TOPIC,
    JOINT_TOPIC,
    JOINTS,
    LAG_S,
    Array,
    Image,
    follow,
    goal_point,
    inverse_kinematics,
)
from faults import Fault
from policy import pretrained
from training.run import Run

FPS, TRIALS = 30, 6
COMMANDS = f"[{{topic: {COMMAND_TOPIC}, joints: [{', '.join(JOINTS)}]}}]"


def expert(targets: Array, arm: Controller, speed: float = 3.0, chunk_size: int = 30):  # type: ignore[no-untyped-def]
    """A policy that knows its discs: chunks that bring the arm closer by `speed` of what is left in a second."""
    goals = np.array([inverse_kinematics(goal_point(target)) for target in targets])[:, None]

    def predict(q: Array, _: Image) -> Array:
        left = np.exp(-speed * np.arange(chunk_size + 1) / arm.fps)[None, :, None]
        ahead = goals + (q[:, None] - goals) * left
        action = ahead[:, :-1] - LAG_S * speed * (ahead[:, :-1] - goals) if arm.commands else ahead[:, 1:]
        return action - ahead[:, :-1] if arm.delta else action

    return predict


def nothing(_: int, q: Array) -> Image:
    return np.zeros((len(q), 1, 1, 3), np.uint8)


@pytest.mark.parametrize("commands", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_an_expert_reaches_every_disc_and_holding_still_none(commands: bool, delta: bool) -> None:
    scenes, arm = unseen(TRIALS), Controller(FPS, 15, commands, delta)
    distances = scenes.distances(drive(expert(scenes.targets, arm), nothing, scenes.starts, arm))
    assert distances.shape == (4 * FPS, TRIALS)
    assert held(distances < 0.01).all() and (distances[-1] < 0.01).all() and not (distances[:10] < 0.05).any()

    def still(q: Array, _: Image) -> Array:
        return np.repeat(np.zeros_like(q)[:, None] if delta else q[:, None], 30, axis=1)

    assert not (scenes.distances(drive(still, nothing, scenes.starts, arm)) < 0.05).any()


def test_the_lag_makes_the_recorded_states_out_of_the_recorded_commands() -> None:
    messages = episode_messages(seed=0, index=0)
    (ts, states), (tc, commands) = (
        (
            np.array([m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for m in on_topic(messages, topic)]),
            np.array([in_order(m) for m in on_topic(messages, topic)]),
        )
        for topic in (JOINT_TOPIC, COMMAND_TOPIC)
    )
    first = int(np.searchsorted(ts, tc[0]))
    q, now, worst, lag = states[first], ts[first], 0.0, 0.0
    for stamp, state in zip(ts[first + 1 :], states[first + 1 :], strict=True):
        command = commands[np.searchsorted(tc, now, side="right") - 1]
        q, lag = follow(q, command, (stamp - now) / 1e9), max(lag, float(np.abs(command - state).max()))
        now, worst = stamp, max(worst, float(np.abs(q - state).max()))
    assert lag > 0.03 and worst < 0.2 * lag, "but for the 8 ms for which a command is held"


def test_what_counts_as_reached_and_the_intervals() -> None:
    near = np.zeros((40, 4), bool)
    near[3:13, 0] = True  # ten ticks in a row
    near[3:12, 1] = near[13:22, 1] = True  # twice nine
    near[30:, 2] = True  # the last ten
    assert held(near).tolist() == [True, False, True, False]
    distances = np.where(near, 0.035, 0.2)
    figures = closed_loop.rates(distances)
    assert [figures["for 10 ticks in a row"][f"{cm} cm"]["share"] for cm in (5, 4, 3)] == [0.5, 0.5, 0]
    assert figures["at the end"]["4 cm"]["share"] == 0.25
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1), abs=5e-5)


def test_scenes_are_the_same_each_time_and_no_recording_has_them() -> None:
    scenes = unseen(40)
    assert np.array_equal(unseen(50).targets[:40], scenes.targets)
    for seed in range(3):
        for index in range(40):
            rng = np.random.default_rng((seed, index))
            assert not (np.abs(scenes.starts - closed_loop.sample_start(rng)).max(axis=1) < 1e-3).any()
            assert not (np.abs(scenes.targets - closed_loop.sample_target(rng)).max(axis=1) < 1e-4).any()


def test_a_policy_from_bags_is_simulated_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path / "bags", episodes=2, seed=0)
    places = [f"data.bag_dir={tmp_path}/bags", f"data.cache_dir={tmp_path}/cache", f"output_dir={tmp_path}/run"]
    actions = [f"data.action.from={COMMANDS}", "data.action.as=delta"]
    overrides = [*TINY, *places, *actions, "training.steps=2", "data.image_size=[36, 48]"]
    config = load(Path(closed_loop.__file__).parents[1] / "demo.yaml", overrides)
    last = train.train(Run(config, load_dataset(config)))
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(last), "--simulate", "3"])
    evaluate.main()
    out = capsys.readouterr().out
    steps = config.model.n_action_steps
    assert f"3 unseen discs, 4 s at 30 Hz, {steps} deltas to commands of each chunk executed" in out
    assert "camera on, for 10 ticks in a row" in out and "0.0% (0.0%-56.1%)" in out
    folder = tmp_path / "run/evaluation" / last.name
    assert len(json.loads((folder / "simulation.json").read_text())["reached"]) == 4
    sheet = cv2.imread(str(folder / "simulation.png"))
    assert sheet is not None and sheet.shape[1] == 9 * 96 * closed_loop.ENLARGED

    policy = pretrained.load(last)
    assert policy.robot
    state_from = [{"topic": JOINT_TOPIC, "joints": ["a", "b"]}]
    policy = policy._replace(robot=replace(policy.robot, state_from=state_from, cameras={}, fps=2.0))
    with pytest.raises(Fault, match=r"policy's state is .*\['a', 'b'\].*expected the demo's") as caught:
        closed_loop.simulate(policy, 3, tmp_path)
    assert len(caught.value.args) == 3 and "fps is 2.0; expected at least 2.5" in str(caught.value)
    with pytest.raises(Fault, match="at least 2 trials"):
        closed_loop.simulate(policy, 1, tmp_path)


def test_the_observation_is_the_recorded_one() -> None:
    """What the arm's camera shows in the simulator is bit for bit what a recording of the same scene holds."""
    messages = episode_messages(seed=0, index=0)
    rng = np.random.default_rng((0, 0))
    start, target = closed_loop.sample_start(rng), closed_loop.sample_target(rng)
    picture = closed_loop.Scenes(start[None], target[None]).pictures(start[None])[0]
    first = on_topic(messages, closed_loop.CAMERA_TOPIC)[0]
    recorded = cv2.cvtColor(np.asarray(cv2.imdecode(first.data, cv2.IMREAD_COLOR)), cv2.COLOR_BGR2RGB)
    assert torch.equal(torch.from_numpy(picture.copy()), torch.from_numpy(recorded)), (
        "the arm has not yet moved a pixel"
    )
