"""Judging a checkpoint: figures against an independent computation, other recordings, the best of a run, the page."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from browser import needs_browser, seen
from safetensors.torch import load_file, save_file
from test_dataset import recorded
from test_train import tiny, trained
from writing import COMMAND, episode, write

import evaluate
import train
from config import Config, load
from dataset.batches import Dataset
from dataset.cache import load_dataset
from evaluation import report
from evaluation.errors import warning
from evaluation.report import judge
from faults import Stopped
from files import LOCK, locked
from policy import pretrained
from training.run import Run

COMMANDS = f"[{{topic: {COMMAND}, joints: [a, b, c]}}]"


class Trained(NamedTuple):
    folder: Path  # of bags, cache and run
    checkpoint: Path
    config: Config
    data: Dataset


def trained_in(folder: Path, action: str) -> Trained:
    """A tiny policy, its checkpoints of two steps, and two recordings held out."""
    settings = (
        f"data.action.from={action}",
        "data.validation_fraction=0.5",
        "training.steps=10",
        "data.image_size=[48, 64]",
    )
    config = load(tiny(recorded(folder, 4), *settings, "model.dropout=0", "training.lr=1e-3"))
    data = load_dataset(config)
    return Trained(folder, train.train(Run(config, data)), config, data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One that no test changes."""
    return trained_in(tmp_path_factory.mktemp("run"), COMMANDS)


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """evaluate.py with arguments."""

    def call(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            evaluate.main()
        except SystemExit as ended:
            assert isinstance(ended.code, int), ended.code
            code = ended.code
        return Said(code, *capsys.readouterr())

    return call


def figures(run: Trained, name: str = "checkpoint_000010/evaluation.json") -> Any:
    return json.loads((run.folder / "run/evaluation" / name).read_text())


def predicted(run: Trained, ticks: list[int], pictures: list[int] | None) -> np.ndarray:
    """The policy's chunks at some ticks, with the pictures of others, or grey ones."""
    policy = pretrained.load(run.checkpoint, "cpu")
    batch = run.data.validation.gather(np.array(ticks))
    images = run.data.validation.gather(np.array(pictures)).images if pictures else None
    return policy.predict(
        batch.state, torch.full((len(ticks), 1, 48, 64, 3), 128).byte() if images is None else images
    ).numpy()


@pytest.mark.parametrize("action", ["next_state", COMMANDS], ids=["next_state", "commands"])
def test_the_figures_match_an_independent_computation(run: Trained, action: str, tmp_path: Path) -> None:
    if action == "next_state":
        run = trained_in(tmp_path, action)
    arguments = [sys.executable, evaluate.__file__, str(run.checkpoint)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    found = figures(run)
    split, begins = run.data.validation, [sum(run.data.validation.lengths[:e]) for e in (0, 1)]
    ends = [begins[0] + split.lengths[0], len(split.state)]
    assert len(split.lengths) == 2, "so that the other one is the other one"
    ticks = list(range(len(split.state)))
    of = [0 if tick < ends[0] else 1 for tick in ticks]
    elsewhere = [min(begins[1 - e] + tick - begins[e], ends[1 - e] - 1) for tick, e in zip(ticks, of, strict=True)]
    chunks = {
        "policy": predicted(run, ticks, ticks),
        "camera_blanked": predicted(run, ticks, None),
        "camera_of_another": predicted(run, ticks, elsewhere),
    }
    mean = run.data.train.action.astype(np.float64).mean(0)
    errors: dict[str, list[tuple[int, np.ndarray]]] = {}
    for tick, e in zip(ticks, of, strict=True):
        still = split.state[tick] if run.config.data.action.from_ == "next_state" else split.action[tick]
        last = split.action[tick - 1] if tick > begins[e] else still
        for ahead in range(min(10, ends[e] - tick)):
            guesses = {name: chunk[tick, ahead] for name, chunk in chunks.items()}
            for name, guess in (guesses | {"holding_still": still, "last_action": last, "mean_action": mean}).items():
                errors.setdefault(name, []).append((ahead, np.abs(guess - split.action[tick + ahead])))
    assert set(found["mean_absolute_error"]) == set(errors)
    for name, pairs in errors.items():
        theirs = found["mean_absolute_error"][name]
        assert theirs["by_action"] == pytest.approx(np.mean([error for _, error in pairs], axis=0), rel=1e-4), name
        for ahead in range(10):
            expected = np.mean([error for step, error in pairs if step == ahead], axis=0)
            assert theirs["by_step_ahead_and_action"][ahead] == pytest.approx(expected, rel=1e-4), (name, ahead)
            assert theirs["by_step_ahead"][ahead] == pytest.approx(expected.mean(), rel=1e-4)
        assert theirs["all"] == pytest.approx(np.mean([error for _, error in pairs]), rel=1e-4)
    all_ = {name: one["all"] for name, one in found["mean_absolute_error"].items()}
    assert found["share_of_holding_still"] == pytest.approx(all_["policy"] / all_["holding_still"])
    for name, share in found["share_of_error_explained_by_vision"].items():
        assert share == pytest.approx(1 - all_["policy"] / all_[name])
    at_starts = found["at_the_first_tick_of_episodes"]
    for name, chunk in chunks.items():
        off = [np.abs(chunk[b] - split.action[b : b + 10]).mean() for b in begins]
        assert at_starts["mean_absolute_error"][name] == pytest.approx(np.mean(off), rel=1e-4)
    firsts = at_starts["mean_absolute_error"]
    shares = {name: 1 - firsts["policy"] / firsts[name] for name in ("camera_blanked", "camera_of_another")}
    assert at_starts["share_of_error_explained_by_vision"] == pytest.approx(shares, abs=1e-4)
    assert (all_["last_action"] == all_["holding_still"]) == (run.config.data.action.from_ == "next_state")
    assert found["moments"] == len(ticks) and found["recordings"] == split.names
    assert 0 < found["latency_ms"]["median"] <= found["latency_ms"]["percentile_95"]

    assert max(map(len, done.stdout.replace(str(run.folder), "").splitlines())) <= 100, done.stdout
    (row,) = re.findall(r"^all  .*$", done.stdout, re.M)
    assert [float(word) for word in row.split()[1:]] == pytest.approx(list(all_.values()), abs=6e-5)


def test_a_policy_that_does_not_look_is_named(
    run: Trained, tmp_path: Path, command: Callable[..., Said], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.checkpoint.parent, tmp_path / "run")
    blind = tmp_path / "run" / run.checkpoint.name
    path = blind / "pretrained_model/model.safetensors"
    weights = load_file(path)
    weights["model.encoder_img_feat_input_proj.weight"].zero_()
    save_file(weights, path)
    robot = path.with_name("robot.json")
    robot.write_text(json.dumps(json.loads(robot.read_text()) | {"weights": ""}))
    done = command(blind)
    assert done.out.startswith("warning: the policy hardly looks: with another recording's picture its error is"), (
        done.out
    )
    assert "to 0%" in done.out and "data.crop" in done.out
    page = (tmp_path / "run/evaluation" / blind.name / "report.html").read_text()
    assert page.index("the policy hardly looks") < page.index("Judged by")
    report.judge_at_the_end(blind, run.config, run.data, "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"judging checkpoint_000010: about \d+ s, left out by --no-evaluation", lines[0])
    assert lines[1].startswith("warning: the policy hardly looks")
    for share, named in ((0.14, True), (0.40, False)):
        assert bool(warning({"share_of_error_explained_by_vision": {"camera_of_another": share}})) is named


def test_other_recordings_are_all_judged_unless_trained_on(
    run: Trained, tmp_path: Path, command: Callable[..., Said]
) -> None:
    for i in (7, 8):
        write(tmp_path / f"others/new_{i}", episode(0.6, seed=i))
    held_out = run.data.validation.names[0]
    shutil.copytree(run.folder / "bags" / held_out, tmp_path / "others/renamed")
    done = command(run.checkpoint, "--bags", tmp_path / "others")
    assert done.code == 0 and "3 recordings" in done.out, done.err
    assert figures(run, "checkpoint_000010-others/evaluation.json")["recordings"] == ["new_7", "new_8", "renamed"]
    shutil.copytree(run.folder / "bags" / run.data.train.names[1], tmp_path / "others/seen")
    done = command(run.checkpoint, "--bags", tmp_path / "others")
    assert done.code == 1 and done.err.count("error: ") == 1, done.err
    assert f"others/seen: the policy was trained on it, as {run.data.train.names[1]}" in done.err
    assert "does not exist" in command(run.checkpoint, "--bags", tmp_path / "nowhere").err


def test_all_compares_and_names_the_best(run: Trained, command: Callable[..., Said]) -> None:
    done = command(run.checkpoint.parent, "--all")
    assert done.code == 0 and max(len(line) for line in done.out.splitlines()[:-1]) <= 100, done.err
    compared = figures(run, "checkpoints.json")
    assert [one["checkpoint"] for one in compared] == ["checkpoint_000005", "checkpoint_000010"]
    best = min(compared, key=lambda one: one["in_standard_deviations"])["checkpoint"]
    assert f"best: {run.checkpoint.parent / best}" in done.out
    assert json.loads((run.checkpoint.parent / "best.json").read_text())["checkpoint"] == best
    for one in compared:  # fewer than 512 held-out ticks, so that training has judged by the same ones
        assert one["validation_l1"] == pytest.approx(one["in_standard_deviations"], rel=1e-3)


def test_what_cannot_be_judged_gets_one_line(run: Trained, tmp_path: Path, command: Callable[..., Said]) -> None:
    assert "is a run; give one of its checkpoints, such as" in command(run.checkpoint.parent).err
    assert "no complete checkpoint" in command(tmp_path, "--all").err
    assert "missing" in command(run.checkpoint.with_name("checkpoint_000011")).err
    shutil.copytree(run.checkpoint.parent, tmp_path / "run")
    robot = tmp_path / "run/checkpoint_000010/pretrained_model/robot.json"
    content = json.loads(robot.read_text())
    robot.write_text(json.dumps(content | {"recordings": {"train": {}, "validation": {}}}))
    weights = robot.with_name("model.safetensors")
    save_file(load_file(weights), weights)  # without the hash of robot.json
    assert "no recording was held out" in command(tmp_path / "run/checkpoint_000010").err
    (tmp_path / "run/config.yaml").write_text(
        (run.checkpoint.parent / "config.yaml").read_text().replace("fps: 20", "fps: 10")
    )
    other = command(tmp_path / "run/checkpoint_000010").err
    assert "config.yaml: data.fps is 10.0, the policy's is 20.0; expected the configuration" in other
    robot.unlink()
    assert "robot.json" in command(tmp_path / "run/checkpoint_000010").err


def test_two_judgements_of_one_checkpoint_wait_for_each_other(run: Trained, capfd: pytest.CaptureFixture[str]) -> None:
    folder, said = run.folder / "run/evaluation/two", ""
    folder.mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        with locked(folder / LOCK):
            judging = pool.submit(judge, run.checkpoint, folder, run.config, run.data, "cpu")
            while "waiting for process" not in said and not judging.done():
                time.sleep(0.01)
                said += capfd.readouterr().err
            assert not any(folder.glob("*.json"))
        assert Path(judging.result()[1].removeprefix("page: ")).exists()


def test_the_best_checkpoint_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = iter([0.9, 0.2, 0.5, 0.4, 0.3, 0.1])  # at steps 2, 4, 6, 8, 10; and at 12
    monkeypatch.setattr(train, "validate", lambda *_: next(figure))
    settings = ("training.keep_checkpoints=1", "training.save_every=2", "training.evaluate_every=2")
    path = tiny(recorded(tmp_path), *settings, "training.steps=10")

    def there() -> tuple[set[int], Any]:
        kept = {int(one.name.split("_")[1]) for one in (tmp_path / "run").glob("checkpoint_*")}
        return kept, json.loads((tmp_path / "run/best.json").read_text())

    trained(path)
    kept, best = there()
    assert kept == {4, 10} and (best["checkpoint"], best["validation_l1"]) == ("checkpoint_000004", 0.2)
    trained(path, "training.steps=12")
    kept, best = there()
    assert kept == {12} and best["checkpoint"] == "checkpoint_000012"


def test_a_failed_judgement_does_not_fail_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(*overrides: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path), *overrides])
        train.main()
        return capsys.readouterr().out

    path = tiny(recorded(tmp_path), "training.steps=6")
    monkeypatch.setattr(report, "find_spec", lambda _: None)
    assert "for the page, pip install matplotlib" in end()
    assert (tmp_path / "run/evaluation/checkpoint_000006/evaluation.json").exists()
    monkeypatch.setattr(report, "measure", lambda *_: 1 / 0)
    out = end(f"output_dir={tmp_path}/two")
    assert "policy: " in out and "not judged: checkpoint_000006: division by zero" in out
    assert "held out: none" in end(f"output_dir={tmp_path}/three", "data.validation_fraction=0")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "measure", interrupt)
    with pytest.raises(SystemExit) as ended:
        end(f"output_dir={tmp_path}/four")
    assert ended.value.code == 75 and "the policy is trained; stopped while judging" in capsys.readouterr().err
    with pytest.raises(Stopped):
        report.judge_at_the_end(tmp_path / "two/checkpoint_000006", load(path), load_dataset(load(path)), "cpu")


@pytest.mark.parametrize("width", [1280, 390])
@needs_browser
def test_the_page_in_a_browser(run: Trained, tmp_path: Path, width: int, command: Callable[..., Said]) -> None:
    written = run.folder / "run/evaluation/checkpoint_000010/report.html"
    if not written.exists():
        assert command(run.checkpoint).code == 0
    page = written.read_text()
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(captions) == page.count("<figure>") == page.count("<img ") == 2 + 2 * 3
    unlabelled = [
        said for said in captions if not re.search(r"rad\).*\(s\)|\(s\).*rad\)| px|%|, nats|deviations|a step", said)
    ]
    assert not unlabelled, "a unit in each"
    assert seen(page, tmp_path, width)["pictures"] == len(captions)
