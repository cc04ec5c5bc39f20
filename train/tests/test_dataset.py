"""From recordings to samples: the grid, the actions, the cache, the split, the batches."""

import errno
import itertools
import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from writing import CAMERA, COMMAND, MS, START, STATE, Timed, episode, image, joint_state, jpeg, picture, write

from config import Config, load
from dataset import build
from dataset.batches import Dataset, Split, batches
from dataset.cache import load_dataset
from faults import Fault, NoRoom
from files import building
from recordings.bags import find_bags
from recordings.episodes import Recording, read_recording


def configured(folder: Path, *overrides: str) -> Config:
    return load(
        None,
        [
            f"data.bag_dir={folder}/bags",
            f"data.cache_dir={folder}/cache",
            f"output_dir={folder}/run",
            "data.fps=20",
            f"data.state=[{{topic: {STATE}, joints: [a, b, c]}}]",
            f"data.cameras={{color: {CAMERA}}}",
            "data.image_size=[48, 64]",
            "model.chunk_size=10",
            "model.n_action_steps=5",
            "training.batch_size=4",
            "training.steps=12",
            "data.validation_fraction=0.34",
            *overrides,
        ],
    )


def recorded(folder: Path, count: int = 3) -> Path:
    for i in range(count):
        write(folder / "bags" / f"episode_{i}", episode(1.0, seed=i))
    return folder


def only_recording(folder: Path, *overrides: str) -> Recording:
    config = configured(folder, *overrides)
    (bag,), _ = find_bags(folder / "bags")
    return read_recording(bag, config.data)


def test_each_tick_takes_the_newest_message_not_after_it(tmp_path: Path) -> None:
    write(tmp_path / "bags/one", episode())
    (one,) = only_recording(tmp_path).episodes
    ticks = 30 * MS + np.arange(len(one.state) + 1) * 50 * MS  # half a tick after the camera, which comes last, at 5 ms
    newest = ticks // (10 * MS)
    expected = np.sin(newest[:, None] / 50 + np.arange(3))
    assert np.allclose(one.state, expected[:-1]) and np.allclose(one.action, expected[1:]), (
        "the action is the state one tick later"
    )
    assert np.array_equal(one.frames["color"], (ticks[:-1] - 5 * MS) // (33 * MS)), "never a frame of the future"


def test_commands_and_deltas(tmp_path: Path) -> None:
    write(tmp_path / "bags/one", episode())
    command = f"data.action.from=[{{topic: {COMMAND}, joints: [a, b, c]}}]"
    (absolute,) = only_recording(tmp_path, command).episodes
    (delta,) = only_recording(tmp_path, command, "data.action.as=delta").episodes
    (steps,) = only_recording(tmp_path, "data.action.as=delta").episodes
    next_observation = (80 * MS + np.arange(len(absolute.state)) * 50 * MS) // (10 * MS) * 10 * MS
    i = next_observation // (20 * MS) * 2
    assert np.allclose(absolute.action, np.sin(i[:, None] / 50 + np.arange(3)) + 0.1)
    assert np.allclose(delta.action, absolute.action - absolute.state, atol=1e-6)
    assert np.allclose(np.cumsum(steps.action, axis=0)[:-1] + steps.state[0], steps.state[1:], atol=1e-5)
    with pytest.raises(Fault, match=r"one command for each state.* commands a, b, states a, b, c"):
        only_recording(tmp_path, f"data.action.from=[{{topic: {COMMAND}, joints: [a, b]}}]", "data.action.as=delta")
    with pytest.raises(Fault, match="list both in one order"):
        only_recording(tmp_path, f"data.action.from=[{{topic: {COMMAND}, joints: [c, b, a]}}]", "data.action.as=delta")


def test_a_gap_splits_the_episode(tmp_path: Path) -> None:
    silent = [m for m in episode(2.0) if m[0] != CAMERA or not START + 800 * MS < m[2] < START + 1300 * MS]
    write(tmp_path / "bags/one", silent)
    found = only_recording(tmp_path)
    assert len(found.episodes) == 2 and "silent for more than 82 ms 1 times" in found.notes[0]
    assert len(only_recording(tmp_path, f"data.max_age_ms={{{CAMERA}: 600}}").episodes) == 1
    lost = [m for i, m in enumerate(episode(2.0, camera=False)) if i != 40]
    write(tmp_path / "other/bags/one", lost)
    assert len(only_recording(tmp_path / "other", "data.cameras={}").episodes) == 1, "one lost message is bridged"


@pytest.mark.parametrize(
    ("change", "words"),
    [("short", ["one", "at least two ticks", "20 Hz"]), ("apart", ["share no time", CAMERA, "t+5."])],
)
def test_recordings_without_an_episode(tmp_path: Path, change: str, words: list[str]) -> None:
    messages = (
        episode(0.04)
        if change == "short"
        else episode(camera=False) + [m for m in episode(start=START + 5000 * MS) if m[0] == CAMERA]
    )
    write(tmp_path / "bags/one", messages)
    with pytest.raises(Fault) as caught:
        only_recording(tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_batches_follow_the_recordings(tmp_path: Path) -> None:
    data = load_dataset(config := configured(recorded(tmp_path)))
    assert len(data.train.names) == 2 and len(data.validation.names) == 1, "whole recordings"
    seen = []
    for batch in batches(data.train, config, 0):
        assert batch.images is not None
        for b in range(4):
            (tick,) = map(int, np.flatnonzero((data.train.state == batch.state[b].numpy()).all(1)))
            seen.append(tick)
            end = int(data.train.end[tick])
            real = min(end - tick, 10)
            assert batch.action_is_pad[b].tolist() == [False] * real + [True] * (10 - real)
            assert np.array_equal(batch.action[b, :real], data.train.action[tick : tick + real])
            assert np.array_equal(batch.action[b, real:], data.train.action[end - 1 : end].repeat(10 - real, 0)), (
                "never the next episode's"
            )
            seed = int(data.train.names[0 if tick < data.train.lengths[0] else 1][-1])
            frame = ((tick - (0 if tick < data.train.lengths[0] else data.train.lengths[0])) * 50 + 25) // 33
            assert np.abs(batch.images[b, 0].numpy().astype(int) - picture(frame + seed)).mean() < 8, (
                "the picture of that tick"
            )
    assert len(set(seen[: len(data.train.state)])) == len(data.train.state), "every sample once an epoch"
    late = next(iter(batches(data.train, config, 7)))
    assert late.state.equal(next(itertools.islice(batches(data.train, config, 0), 7, None)).state), (
        "the order needs only the step"
    )


def test_a_camera_at_the_rate_of_the_ticks_is_neither_repeated_nor_skipped(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    stamps = START + np.arange(200) * 50 * MS + random.integers(-MS, MS, 200)
    joints = [
        (STATE, "sensor_msgs/msg/JointState", int(t), joint_state(int(t), [1, 2, 3]))
        for t in START + np.arange(1001) * 10 * MS
    ]
    camera = [(CAMERA, "sensor_msgs/msg/CompressedImage", int(t), jpeg(int(t), picture(0))) for t in stamps]
    write(tmp_path / "bags/one", sorted(joints + camera, key=lambda message: message[2]))
    (one,) = only_recording(tmp_path).episodes
    assert len(one.state) > 195 and np.all(np.diff(one.frames["color"]) == 1)


def test_a_note_tells_what_is_skipped(tmp_path: Path) -> None:
    write(tmp_path / "bags/one", [m for m in episode(3.0) if m[0] != CAMERA or m[2] < START + 1000 * MS])
    assert only_recording(tmp_path).notes == [f"{CAMERA} ends early: skipped 2.0 s of other topics"]


def test_a_damaged_cache_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(recorded(tmp_path, 1))
    load_dataset(config)
    (meta,) = (tmp_path / "cache").rglob("meta.json")
    folder, whole = meta.parent, {file.name: file.read_bytes() for file in meta.parent.iterdir()}
    assert set(whole) == {"meta.json", "state.npy", "action.npy", "color.npy", "color.jpegs"}
    flipped = {name: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:] for name, content in whole.items()}
    damage = {name: [content, whole[name][: len(content) // 2], b""] for name, content in flipped.items()}
    damage["meta.json"] += [b"[]", b"null", b"{}"]
    for name, contents in damage.items():
        for content in contents:
            (folder / name).write_bytes(content)
            dataset = load_dataset(config)
            if name == "color.jpegs" and len(content) == len(whole[name]):  # found when the picture is read
                with pytest.raises(Fault, match=r"color.jpegs: is truncated or damaged; .* it is made again"):
                    dataset.train.gather(np.arange(len(dataset.train.state)))
                load_dataset(config)
            assert f"{folder}: damaged cache (" in capsys.readouterr().err, name
            assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


def test_caches_of_killed_runs_and_of_older_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(recorded(tmp_path, 2))
    load_dataset(config)
    (ours,) = (tmp_path / "cache").glob("reader-*")
    (ours / ".building-killed").mkdir()
    (ours / ".building-renamed.lock").touch()  # killed between the rename and the removal of its lock
    with building(ours) as alive:
        load_dataset(config)
        assert [path for path in ours.glob(".building-*") if path.is_dir()] == [alive]
    assert not list(ours.glob(".building-*"))
    (ours / ".lock").unlink()
    load_dataset(config)
    assert not (ours / ".lock").exists(), "a complete cache is only read: it may be on a read-only disk"
    assert build.older_caches(config.data) == []
    ours.rename(tmp_path / "cache/reader-0123456789ab")
    (tmp_path / "cache/kept by the user").mkdir()
    load_dataset(config)
    (line,) = build.older_caches(config.data)
    assert (
        line.endswith(f"; rm -r {tmp_path}/cache/reader-0123456789ab") and ": 0 MB, cache of another version" in line
    ), line
    subprocess.run(line.rpartition("; ")[2], shell=True, check=True)
    assert build.older_caches(config.data) == []


def test_statistics_come_from_the_training_recordings(tmp_path: Path) -> None:
    data = load_dataset(configured(recorded(tmp_path)))
    normalizer = data.normalizer()
    assert np.allclose(normalizer.state.mean, data.train.state.mean(0), atol=1e-6)
    assert np.allclose(normalizer.action.std, data.train.action.std(0), atol=1e-6)
    still: list[Timed] = [(t, k, r, joint_state(r, [1, 2, 3]) if t == STATE else c) for t, k, r, c in episode()]
    write(tmp_path / "still/bags/one", still)
    assert load_dataset(configured(tmp_path / "still")).normalizer().state.std.tolist() == pytest.approx([1e-2] * 3), (
        "floored"
    )


def test_a_second_run_reads_only_new_bags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_dataset(configured(recorded(tmp_path)))
    for file in (tmp_path / "bags").rglob("*.mcap"):  # the same size and time, and nothing left to read
        stat = file.stat()
        file.write_bytes(bytes(stat.st_size))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    write(tmp_path / "bags/episode_9", episode(seed=9))
    again = load_dataset(configured(tmp_path))
    states = {
        name: rows
        for data in (first, again)
        for split in (data.train, data.validation)
        for name, rows in by_recording(split).items()
    }
    assert set(states) == {f"episode_{i}" for i in (0, 1, 2, 9)}
    with pytest.raises(Fault, match="damaged at byte 0"):
        load_dataset(configured(tmp_path, "data.fps=10"))


def by_recording(split: Split) -> dict[str, np.ndarray]:
    return dict(zip(split.names, np.split(split.state, np.cumsum(split.lengths)[:-1]), strict=True))


def test_all_faults_of_all_recordings_are_reported_at_once(tmp_path: Path) -> None:
    recorded(tmp_path)
    write(tmp_path / "bags/no_camera", episode(camera=False))
    next((tmp_path / "bags/episode_1").glob("*.mcap")).write_bytes(b"x")
    wrong = [
        (t, "sensor_msgs/msg/Image" if t == CAMERA else k, r, image(r, picture(0), step=7) if t == CAMERA else c)
        for t, k, r, c in episode()
    ]
    write(tmp_path / "bags/wrong_step", wrong)
    (write(tmp_path / "bags/half", episode()) / "metadata.yaml").write_text("rosbag2_")
    with pytest.raises(Fault) as caught:
        load_dataset(configured(tmp_path))
    named = [name for name in ("no_camera", "episode_1", "wrong_step", "half") if name in str(caught.value)]
    assert len(named) == 4
    assert len(caught.value.args) == 4
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")], (
        "no partial cache is left"
    )


def test_skipped_recordings_are_listed_and_a_full_disk_is_no_fault_of_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(tmp_path, 4)
    write(tmp_path / "bags/no_camera", episode(camera=False))
    (tmp_path / "bags/episode_1/metadata.yaml").write_text("rosbag2_")
    skipping = configured(tmp_path, "data.on_bad_bag=skip")
    data = load_dataset(skipping)
    assert sorted(data.train.names + data.validation.names) == ["episode_0", "episode_2", "episode_3"]
    first, *lines = data.skipped_lines()
    assert "2 recordings with faults" in first and len(lines) == 2
    assert any("episode_1/metadata.yaml: cannot read" in line for line in lines)
    assert any("no_camera: /camera: no such topic" in line for line in lines)
    with pytest.raises(Fault) as caught:  # nothing is left to train on
        load_dataset(configured(tmp_path, "data.on_bad_bag=skip", "data.cameras={color: /elsewhere}"))
    assert len(caught.value.args) == 5
    monkeypatch.setattr(build, "_write", lambda *_: os.open("/dev/full/x", os.O_RDONLY))
    with pytest.raises(NoRoom):
        load_dataset(configured(tmp_path, "data.on_bad_bag=skip", "data.fps=10"))


def test_a_bag_that_cannot_be_read_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "read_recording", mock.Mock(side_effect=OSError(errno.EIO, "Input/output error", "/a")))
    with pytest.raises(OSError, match="Input/output error"):
        load_dataset(configured(recorded(tmp_path, 1)))


def test_a_disk_that_will_be_too_small_is_told_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(tmp_path, 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: mock.Mock(free=1000))
    with pytest.raises(NoRoom, match=r"cache: needs about 0\.0 GB more, has 0\.0 GB; free some space"):
        load_dataset(configured(tmp_path))
    assert len(list((tmp_path / "cache").rglob("meta.json"))) == 1, "after the first"


def test_a_duplicate_recording_is_refused(tmp_path: Path) -> None:
    """It could be trained on and held out, whatever its name."""
    bags = recorded(tmp_path) / "bags"
    shutil.copytree(bags / "episode_0", bags / "cup")
    with pytest.raises(Fault, match="episode_0: duplicate of cup"):
        load_dataset(configured(tmp_path))
    data = load_dataset(configured(tmp_path, "data.on_bad_bag=skip"))
    assert sorted(data.train.names + data.validation.names) == ["cup", "episode_1", "episode_2"]


def test_a_commanded_jump_is_refused(tmp_path: Path) -> None:
    messages = episode()
    at = [content for topic, _, _, content in messages if topic == COMMAND][20]
    at.position[1] = 25.0
    write(tmp_path / "bags/one", messages)
    commanded = configured(tmp_path, f"data.action.from=[{{topic: {COMMAND}, joints: [a, b, c]}}]")
    with pytest.raises(Fault, match=f"{COMMAND}: b jumps from .* to 25 in 20.0 ms at message 20"):
        load_dataset(commanded)
    itself = configured(
        tmp_path, *(f"data.{one}=[{{topic: {COMMAND}, joints: [a, b, c]}}]" for one in ("state", "action.from"))
    )
    with pytest.raises(Fault) as caught:
        load_dataset(itself)
    assert len(caught.value.args) == 1, "once, though it is the state and the action"


def test_a_picture_that_changes_its_size(tmp_path: Path) -> None:
    messages = [
        (
            t,
            "sensor_msgs/msg/Image" if t == CAMERA else k,
            r,
            image(r, picture(0, 48 if r < START + 500 * MS else 96)) if t == CAMERA else c,
        )
        for t, k, r, c in episode()
    ]
    write(tmp_path / "bags/one", messages)
    with pytest.raises(Fault, match="is 64x96, earlier pictures 64x48"):
        load_dataset(configured(tmp_path))


def test_joints_without_names_are_taken_by_index(tmp_path: Path) -> None:
    messages = [(t, k, r, joint_state(r, [1, 2, 3], []) if t == STATE else c) for t, k, r, c in episode()]
    write(tmp_path / "bags/one", messages)
    data: Dataset = load_dataset(configured(tmp_path, f"data.state=[{{topic: {STATE}, index: [2, 0]}}]"))
    assert data.train.state[0].tolist() == [3.0, 1.0]
    assert data.state_names == (f"{STATE}.position[2]", f"{STATE}.position[0]")
