"""benchmarks/aloha without a picture: the expert, what it records, and a demonstration that is replayed."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

if not (find_spec("mujoco") and find_spec("gym_aloha")):
    pytest.skip("mujoco or gym-aloha is not installed: make -C train .venv/aloha", allow_module_level=True)

os.environ["MUJOCO_GL"] = "disable"  # a machine may have no libEGL
sys.path.append(str(Path(__file__).parents[1] / "benchmarks/aloha"))
import expert
from cell import TASKS, Cell
from record import CAMERA_TOPIC, demonstrate
from rollout import DEMONSTRATION, replayed, roll_out

from dataset.telling import FEW, needs_picture
from demo_bags import write_bag


@pytest.mark.parametrize("task", TASKS)
def test_recordings_whose_joints_tell_the_goal_are_named(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, cell = expert.PLANS[task], Cell(task)

    def share() -> float | None:
        paths = []
        for number in range(25):
            cell.reset(np.random.default_rng((0, number)))
            paths.append(expert.commands(task, cell.objects())[::2])
        state, action = (np.concatenate([path[part] for path in paths]) for part in (slice(None, -1), slice(1, None)))
        return needs_picture(state, action, [len(path) - 1 for path in paths], 50)

    to_one_pose = share()
    monkeypatch.setitem(expert.PLANS, task, lambda objects: tuple(path[1:] for path in plan(objects)))
    straight = share()
    assert to_one_pose is not None and straight is not None and straight < FEW < to_one_pose, (straight, to_one_pose)


@pytest.mark.parametrize("task", TASKS)
def test_the_expert_does_its_task_and_its_commands_can_be_replayed(task: str, tmp_path: Path) -> None:
    cell = Cell(task)
    done = [demonstrate(cell, 1000, attempt, None) for attempt in range(20)]
    assert sum(succeeded for succeeded, _ in done) >= 18
    write_bag(tmp_path / "a/bag", 1000, done[0][1])
    write_bag(tmp_path / "b/bag", 1000, demonstrate(cell, 1000, 0, None)[1])
    for name in ("bag.mcap", "metadata.yaml"):
        assert (tmp_path / "a/bag" / name).read_bytes() == (tmp_path / "b/bag" / name).read_bytes(), name
    assert len(done[0][1]) == 800 and CAMERA_TOPIC not in {topic for _, topic, _ in done[0][1]}
    again = roll_out(cell, *DEMONSTRATION, replayed(cell))
    assert again.best == 4, "on its own objects"
    others = [roll_out(cell, 1000, number, replayed(cell)).best for number in range(5)]
    assert np.mean([best == 4 for best in others]) < 1, "but not on others"
