"""Training as a user runs it: from recordings to a checkpoint, killed and resumed, and its error messages."""

import contextlib
import errno
import functools
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from test_dataset import configured, recorded
from writing import COMMAND, episode, write

import train
from act_model import ACT
from config import Config, dump, load
from dataset.batches import Batch
from dataset.cache import load_dataset
from dataset.normalize import Moments, Normalizer, imagenet
from faults import Fault, Stopped, exit_with_message
from policy import pretrained
from policy.runner import Policy
from training import precision, run_folder
from training.processes import Processes, choose_device
from training.run import Run
from training.run_folder import damaged, files_of, held, missing

SCRIPT = Path(train.__file__)
SHARED = Path(__file__).parents[3] / "shared/bags"
TINY = (
    "data.image_size=[32, 48]",
    "model.dim_model=32",
    "model.n_heads=2",
    "model.dim_feedforward=32",
    "model.n_encoder_layers=1",
    "model.n_vae_encoder_layers=1",
    "model.pretrained_backbone=false",
    "training.log_every=4",
    "training.save_every=5",
    "training.evaluate_every=6",
    "training.device=cpu",
    "training.precision=fp32",
)


def tiny(folder: Path, *overrides: str) -> Path:
    """A configuration file for a network that trains in a second, dropout and VAE included."""
    path = folder / "tiny.yaml"
    path.write_text(dump(configured(folder, *TINY, *overrides)))
    return path


class Done(NamedTuple):
    """A script that ended."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str | Path, check: bool = True) -> Done:
    """train.py with arguments, in this process: importing torch anew would take as long as the training."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handler = signal.getsignal(signal.SIGTERM)
    command = mock.patch.object(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with command, contextlib.chdir("/"), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            train.main()
        except SystemExit as ended:
            assert isinstance(ended.code, int), ended.code
            code = ended.code
        finally:
            signal.signal(signal.SIGTERM, handler)
    assert not check or code == 0, err.getvalue()
    return Done(code, out.getvalue(), err.getvalue())


def trained(path: Path, *overrides: str) -> Path:
    config = load(path, overrides)
    return train.train(Run(config, load_dataset(config)))


def kill_at(checkpoint: Path, path: Path) -> None:
    """Train by a configuration for long, and kill it when the checkpoint is there."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--config", path, "training.steps=100000"], stderr=subprocess.DEVNULL
    )
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()


def logged(run_folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("steps_per_s", "waiting_for_data")} for line in lines
    ]


def assert_bit_equal(one: Path, other: Path) -> None:
    for name in ("pretrained_model/model.safetensors", "training_state/state.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert not [key for key in a if not a[key].equal(b[key])], name
    assert logged(one.parent) == logged(other.parent)


def test_from_recordings_to_a_policy(tmp_path: Path) -> None:
    path = tiny(recorded(tmp_path), "training.steps=40", "training.lr=1e-3")
    dry = run("training.steps=70", "--dry-run", "--config", path, "data.fps=20")
    assert "2 recordings, 2 episodes" in dry.stdout and "cache" in dry.stdout and not (tmp_path / "run").exists()
    done = run("--config", path)
    assert re.match(r"device  cpu, .*; processes: 1\nnumbers fp32: as set\n", done.stdout), "the first lines"
    last = tmp_path / "run/checkpoint_000040"
    assert f"policy: {last}/pretrained_model" in done.stdout
    best = json.loads((tmp_path / "run/best.json").read_text())
    assert {p.name for p in (tmp_path / "run").glob("checkpoint_*")} == {
        *(f"checkpoint_{n:06d}" for n in (30, 35, 40)),
        best["checkpoint"],
    }, "the newest three, and the best"
    validated = [
        line["validation_l1"] for line in logged(tmp_path / "run") if line["step"] % 5 == 0 and "validation_l1" in line
    ]
    assert len(validated) == 8 and best["validation_l1"] == min(validated), "each checkpoint is validated"
    assert (tmp_path / f"run/evaluation/{best['checkpoint']}/evaluation.json").exists()
    shutil.rmtree(tmp_path / "run/evaluation")
    assert "judging" not in run("--config", path, "--no-evaluation").stdout
    assert not (tmp_path / "run/evaluation").exists(), "a policy that is trained is not judged again"
    losses = [line["loss"] for line in logged(tmp_path / "run") if "loss" in line]
    assert len(losses) == 10 and losses[-1] < 0.7 * losses[0]
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert set(line) == {"step", "loss", "l1", "kl", "grad_norm", "lr", "steps_per_s", "waiting_for_data"}
    assert load(tmp_path / "run/config.yaml") == load(path), "the configuration is in the run's folder"

    robot = json.loads((last / "pretrained_model/robot.json").read_text())
    assert (robot["format"], robot["fps"], robot["step"]) == (2, 20, 40)
    assert robot["state_names"] == robot["action_names"] == ["a", "b", "c"]
    assert (robot["action_from"], robot["action_as"]) == ("next_state", "absolute")
    assert robot["cameras"] == {
        "color": {"topic": "/camera", "height": 32, "width": 48, "recorded": [[48, 64]], "crop": [0.0, 0.0, 1.0, 1.0]}
    }
    assert len(robot["recordings"]["train"]) == 2 and len(robot["recordings"]["validation"]) == 1


def test_a_step_mixes_no_devices_and_trains_every_parameter() -> None:
    """On the meta device, where a tensor of the CPU is an error as on a GPU."""
    meta, config = torch.device("meta"), Config()
    with meta:
        model = ACT(config.model, 3, 3, 2).train()
    three = Moments(torch.zeros(3), torch.ones(3))
    normalizer = Normalizer(three, three, {"a": imagenet(), "b": imagenet()}).to(meta)
    chunk, images = torch.zeros(2, config.model.chunk_size, 3), torch.zeros(2, 2, 64, 96, 3, dtype=torch.uint8)
    noise = torch.zeros(2, config.model.latent_dim)
    batch = Batch(torch.zeros(2, 3), images, chunk, chunk[..., 0] > 0, noise, torch.tensor(5.0)).to(meta)
    loss, _, _ = train.losses(model, normalizer, batch, Run(config, cast(Any, None)))
    loss.backward()
    assert loss.device == meta and not [name for name, p in model.named_parameters() if p.grad is None]


def test_compiled_it_trains_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as torch.compile traces it, but not translated to C++, which takes minutes: benchmarks/train_step.py does."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    path = tiny(recorded(tmp_path), "model.dropout=0", "training.steps=5")
    whole = trained(path, f"output_dir={tmp_path}/whole")
    compiled = trained(path, "training.compile=true")
    weights = [load_file(last / "pretrained_model/model.safetensors") for last in (whole, compiled)]
    assert weights[0].keys() == weights[1].keys(), "the plain model's names"
    assert max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0]) < 1e-5
    assert torch._dynamo.utils.counters["frames"]["ok"] == 1, "one graph for all steps"


def test_no_room_for_the_checkpoints_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny(recorded(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: mock.Mock(free=300e6))
    for options in ((), ("--dry-run",)):
        done = run("--config", path, *options, check=False)
        assert done.returncode == 1 and "run: needs 404 MB for 3 checkpoints, 300 MB are free" in done.stderr
    assert run("--config", path, "training.save_every=9").returncode == 0


def test_the_loaded_policy_is_the_trained_one(tmp_path: Path) -> None:
    config = load(tiny(recorded(tmp_path)))
    data = load_dataset(config)
    last = train.train(Run(config, data))
    policy = pretrained.load(last)
    batch = data.validation.gather(torch.arange(4).numpy())
    assert batch.images is not None
    chunk = policy.predict(batch.state, batch.images)
    assert chunk.shape == (4, 10, 3) and chunk.isfinite().all()
    assert not torch.equal(chunk, policy.predict(batch.state, torch.zeros_like(batch.images))), "it uses its camera"
    for wrong in ((batch.state[:, :2], batch.images), (batch.state, None), (batch.state * torch.nan, batch.images)):
        with pytest.raises(Fault, match="observation: shapes"):
            policy.predict(*wrong)
    (last / "pretrained_model/model.safetensors").write_bytes(b"half")
    with pytest.raises(Fault, match="damaged"):
        Policy.load(last / "pretrained_model")


def test_a_stopped_run_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    path = tiny(recorded(tmp_path), "training.schedule=cosine", "training.warmup_steps=3")
    whole = trained(path, f"output_dir={tmp_path}/whole")
    rates = train.set_rates

    def interrupt(optimizer: torch.optim.Optimizer, run: Run, at: int) -> None:
        rates(optimizer, run, at)
        if at == 7:  # between two checkpoints and two log lines
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "set_rates", interrupt)
    with pytest.raises(Stopped, match="stopped at step 7"):
        trained(path)
    monkeypatch.undo()
    assert_bit_equal(whole, trained(path))
    torch.set_num_threads(1)


def test_a_killed_run_resumes_from_the_last_checkpoint(tmp_path: Path) -> None:
    path = tiny(recorded(tmp_path), "training.steps=25", "data.validation_fraction=0")
    whole = trained(path, f"output_dir={tmp_path}/whole")
    kill_at(tmp_path / "run/checkpoint_000010", path)
    newest = run_folder.newest_checkpoint(tmp_path / "run")
    assert newest is not None and newest.name < "checkpoint_000025"
    (tmp_path / "run/.checkpoint_000015.tmp").mkdir(exist_ok=True)  # as if it had died while writing
    with (tmp_path / "run/metrics.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')
    assert f"resuming from {newest}" in run("--config", path).stdout
    assert_bit_equal(whole, tmp_path / "run/checkpoint_000025")
    assert not list((tmp_path / "run").glob(".*"))


def test_an_incomplete_checkpoint_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny(recorded(tmp_path))
    whole = trained(path, "training.steps=15", f"output_dir={tmp_path}/whole")
    trained(path)
    (tmp_path / "run/checkpoint_000012").rename(tmp_path / "run/checkpoint_000015")  # as far as a copy had come
    weights = tmp_path / "run/checkpoint_000015/pretrained_model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert_bit_equal(whole, trained(path, "training.steps=15"))
    out = capsys.readouterr().out
    assert "checkpoint_000015: skipping incomplete checkpoint: pretrained_model/model.safetensors has" in out
    assert "resuming from" in out and "checkpoint_000010" in out


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny(recorded(tmp_path), "training.steps=15")
    last = trained(path)
    intact = Path(shutil.copytree(tmp_path / "run", tmp_path / "intact")) / last.name
    for file in files_of(last):
        content = file.read_bytes()
        flip_a_bit(file)
        assert missing(last) or damaged(last), file
        file.write_bytes(content)
    resume = last / "training_state/resume.json"
    written = resume.read_text()
    for other in (
        "[]",
        "null",
        "1",
        "{}",
        written.replace('"step": 15', '"step": 34'),
        written.replace("files", "file"),
    ):
        resume.write_text(other)
        assert "resume.json is missing or damaged" in missing(last), other
    tree = json.loads(written)
    del tree["sha256"]
    older = tree | {"files": {name: size for name, (size, _) in tree["files"].items()}}
    for whole in (json.dumps(older), written):
        resume.write_text(whole)
        assert not missing(last) and not damaged(last), "and a checkpoint from before the hashes is complete"
    flip_a_bit(last / "training_state/state.safetensors")
    (tmp_path / "run/.checkpoint_000020.tmp").mkdir()
    (tmp_path / "run/best.json").write_text("[]")
    with (tmp_path / "run/metrics.jsonl").open("ab") as log:
        log.write(b'[]\n{"loss": 1}\nnull\n\xff\xfe\n{"step": "x"}\n{"step')
    (tmp_path / "run/.best.json.tmp").touch()
    trained(path)
    said = f"{last}: skipping damaged checkpoint: training_state/state.safetensors is damaged\nresuming from "
    assert said in capsys.readouterr().out
    assert_bit_equal(last, intact)
    left, expected = ({path.name for path in run.iterdir()} for run in (last.parent, intact.parent))
    assert left == expected, "what a kill left is tidied"
    for file in files_of(intact / "pretrained_model"):
        assert file.read_bytes() == (last / "pretrained_model" / file.name).read_bytes(), "the same to the byte"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.dim_model=65536", "error: model: needs "),
        ("training.batch_size=1000000", "error: training.batch_size: needs "),
        ("output_dir=/dev/null/run", "error: output_dir: cannot write to /dev/null"),
    ],
)
def test_what_cannot_fit_is_said_before_it_is_built(tmp_path: Path, setting: str, words: str) -> None:
    path = tiny(recorded(tmp_path, 2), "data.image_size=[128, 128]")
    for options in ((), ("--dry-run",)):
        done = run("--config", path, setting, *options, check=False)
        assert done.returncode == 1 and words in done.stderr, done.stderr


def test_a_run_does_not_resume_with_other_data_or_another_network(tmp_path: Path) -> None:
    path = tiny(recorded(tmp_path))
    trained(path)
    write(tmp_path / "bags/episode_7", episode(seed=7))
    with pytest.raises(Fault) as caught:
        trained(path, "model.dim_feedforward=48", "data.fps=10")
    message = str(caught.value)
    assert all(
        words in message
        for words in (
            "model.dim_feedforward: 48 now, 32",
            "data.fps: 10.0 now, 20.0",
            "recording episode_7",
            "output_dir",
        )
    )
    with pytest.raises(Fault, match="resume: never"):
        trained(path, "training.resume=never")
    shutil.rmtree(tmp_path / "bags/episode_7")
    with pytest.raises(Fault, match="resume: must"):
        trained(path, "training.resume=must", f"output_dir={tmp_path}/new")


def test_the_state_alone_is_enough(tmp_path: Path) -> None:
    write(tmp_path / "bags/only", episode(camera=False))
    command = f"data.action.from=[{{topic: {COMMAND}, joints: [c, a]}}]"
    last = trained(tiny(tmp_path, "data.cameras={}", command, "training.steps=3"))
    robot = json.loads((last / "pretrained_model/robot.json").read_text())
    assert robot["cameras"] == {} and robot["action_names"] == ["c", "a"]
    assert "LeRobot cannot load this policy" in (last / "pretrained_model/README.md").read_text()
    assert pretrained.load(last).predict(torch.zeros(1, 3)).shape == (1, 10, 2)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = train.set_rates

    def explode(optimizer: torch.optim.Optimizer, run: Run, step: int) -> None:
        rates(optimizer, run, step)
        for group in optimizer.param_groups:
            group["lr"] *= 1e36 if step == 6 else 1

    monkeypatch.setattr(train, "set_rates", explode)
    with pytest.raises(Fault, match=r"step 7: loss .*training.lr"):
        trained(tiny(recorded(tmp_path)))
    newest = run_folder.newest_checkpoint(tmp_path / "run")
    assert newest is not None and newest.name == "checkpoint_000005"


def test_the_device_of_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device(device)))
    for wanted, processes, expected in (
        ("auto", Processes(), 0),
        ("cuda:1", Processes(), 1),
        ("cuda", Processes(3, 4, 1), 1),
    ):
        assert choose_device(wanted, processes) == torch.device("cuda", expected)
        assert chosen[-1].index == expected, "torch refuses a device without its index"
    for wanted, processes in (("cuda:0", Processes(0, 2, 0)), ("auto", Processes(2, 3, 2)), ("cuda:2", Processes())):
        with pytest.raises(Fault, match=r"training\.device"):
            choose_device(wanted, processes)


def test_too_little_gpu_memory_is_an_error_without_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has")

    monkeypatch.setattr(train, "losses", fill)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tiny(recorded(tmp_path, 2)))])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 1
    assert "training.batch_size: 4 samples do not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.bag_dir=/nowhere"], ["/nowhere does not exist", "make -C train demo"]),
        (["data.cameras={color: /cam}"], ["/cam", "no such topic", "/camera (sensor_msgs/msg/CompressedImage)"]),
        (["output_dir=/dev/null/run"], ["output_dir", "/dev/null/run", "cannot write"]),
        (["training.device=cuda:9"], ["training.device", "cuda:9"]),
        (["model.dim=3", "training.steps=0"], ["model.dim: unknown key", "training.steps: expected at least 1"]),
    ],
)
def test_a_wrong_setting_gets_one_clear_message(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    done = run("--config", tiny(recorded(tmp_path, 2)), *overrides, check=False)
    assert done.returncode == 1 and all(word in done.stderr for word in words), done.stderr


def test_exit_code_3_after_skipped_recordings(tmp_path: Path) -> None:
    path = tiny(recorded(tmp_path), "training.steps=2")
    next((tmp_path / "bags/episode_1").glob("*.mcap")).write_bytes(b"x")
    failed = run("--config", path, check=False)
    assert failed.returncode == 1 and "damaged at byte 0" in failed.stderr
    done = run("--config", path, "data.on_bad_bag=skip", check=False)
    assert done.returncode == 3 and "data.on_bad_bag=skip: skipped 1 recordings" in done.stdout
    assert "episode_1.mcap: damaged" in done.stdout and "policy: " in done.stdout


@pytest.mark.parametrize(
    ("wanted", "speed", "chosen", "words"),
    [
        ("auto", 1.3, "bf16", "bf16 is 1.3 times as fast as fp32 on this CPU"),
        ("auto", 1.29, "fp32", "bf16 is 1.3 times"),
        ("auto", 0.1, "fp32", "bf16 is 0.1 times"),
        ("bf16", 0.1, "bf16", "0.1 times as fast as fp32 on this CPU; warning: fp32 is faster"),
        ("fp32", 9.0, "fp32", "as set"),
    ],
)
def test_precision_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, speed: float, chosen: str, words: str
) -> None:
    config, cpu = configured(tmp_path, f"training.precision={wanted}"), torch.device("cpu")
    monkeypatch.setattr(precision, "bf16_speed", lambda _: speed)
    name, why = precision.choose_precision(config, cpu, Processes())
    assert name == chosen and words in why


def test_a_resumed_run_keeps_its_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny(recorded(tmp_path, 2), "data.validation_fraction=0", "training.precision=auto", "training.steps=5")
    monkeypatch.setattr(precision, "bf16_speed", lambda _: 2.0)
    assert "numbers bf16: bf16 is 2 times" in run("--config", path).stdout
    monkeypatch.setattr(precision, "bf16_speed", lambda _: 0.1)
    assert "numbers bf16: as in checkpoint_000005" in run("--config", path, "training.steps=10").stdout
    fp32 = trained(path, "training.steps=10", f"output_dir={tmp_path}/fp32")
    ours, other = (
        load_file(last / "pretrained_model/model.safetensors") for last in (tmp_path / "run/checkpoint_000010", fp32)
    )
    assert any(not other[name].equal(ours[name]) for name in ours), "and uses it"


def test_bf16_is_measured_on_this_cpu_in_a_moment() -> None:
    assert 0.02 < precision.bf16_speed(Config()) < 4


def test_a_gpu_that_only_emulates_bf16_trains_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    chosen = precision.choose_precision(configured(tmp_path), torch.device("cuda"), Processes())
    assert chosen == ("fp32", "this GPU has no bf16 units")


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    path = tiny(recorded(tmp_path, 2))
    with held(tmp_path / "run"):
        done = run("--config", path, check=False)
        assert done.returncode == 1
        owner = f"error: output_dir: {tmp_path}/run: in use by process {os.getpid()} on {socket.gethostname()} since "
        assert done.stderr.startswith(owner) and "; wait for it" in done.stderr
        assert not list((tmp_path / "run").glob("[!.]*")), "nothing is written"
    assert run("--config", path).returncode == 0, "a folder whose owner is gone is free"


def test_other_steps_under_cosine_are_told(tmp_path: Path) -> None:
    path = tiny(recorded(tmp_path, 2), "data.validation_fraction=0", "training.schedule=cosine", "training.steps=5")
    run("--config", path)
    assert "note: training.steps: 6 now, 5 before: the cosine" in run("--config", path, "training.steps=6").stdout


def test_missing_imagenet_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = tiny(recorded(tmp_path, 2), "model.pretrained_backbone=true")
    file = tmp_path / "torch/hub/checkpoints/resnet18-f37072fd.pth"
    done = run("--config", path, check=False)
    assert done.returncode == 1 and f"{file}: missing" in done.stderr, done.stderr
    file.write_bytes(b"half")
    done = run("--config", path, check=False)
    assert done.returncode == 1 and f"{file}: damaged" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            "error: /x/y: No space left on device; disk full or ",
        ),
        (OSError(errno.EISDIR, "Is a directory", "/x/y"), "error: /x/y: Is a directory"),
        (ConnectionResetError("the other side hung up"), "error: the other side hung up"),
    ],
)
def test_only_a_full_or_closed_disk_is_called_so(error: OSError, said: str) -> None:
    with pytest.raises(SystemExit) as ended, exit_with_message():
        raise error
    assert str(ended.value.code).startswith(said) and ("disk full" in said) == ("disk full" in str(ended.value.code))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize(
    ("full", "size", "words"),
    [
        ("cache", "100k", ["cannot write the cache", "free some"]),
        ("run", "30m", ["needs 404 MB for 3 checkpoints", "output_dir"]),
        (
            "run",
            "600m",
            ["checkpoint_000005", "cannot write", "run the same command"],
        ),  # filled by others while it trains
    ],
)
def test_a_full_disk(tmp_path: Path, full: str, size: str, words: list[str]) -> None:
    path = tiny(recorded(tmp_path), "training.log_every=100", "data.validation_fraction=0")
    (tmp_path / full).mkdir(exist_ok=True)
    script = f"""mount -t tmpfs -o size={size} none {tmp_path}/{full} || exit
        {sys.executable} {SCRIPT} --config {path} & until [ -e {tmp_path}/run/metrics.jsonl ]; do kill -0 $! || break; sleep 0.01; done
        if [ {size} = 600m ]; then head -c 1G /dev/zero > {tmp_path}/run/others; fi
        wait $!; code=$?; ls -A {tmp_path}/{full}; exit $code"""
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True)
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(f"no mount here: {done.stderr}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(any(word in done.stderr for word in words_.split("|")) for words_ in words), done.stderr
    assert ".tmp" not in done.stdout and ".building" not in done.stdout, "no partial file is left"


@pytest.mark.skipif(not find_spec("tensorboard"), reason="TensorBoard is not installed")
def test_a_log_that_cannot_be_written_ends_the_run_with_its_place(tmp_path: Path) -> None:
    path = tiny(recorded(tmp_path), "data.cameras={}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tensorboard").touch()
    done = run("--config", path, check=False)
    assert done.returncode == 1 and f"error: {tmp_path}/run/tensorboard: cannot write (" in done.stderr, done.stderr


@pytest.mark.skipif(not SHARED.exists(), reason="the recordings of others are not here")
@pytest.mark.parametrize(
    ("path", "state", "command", "names"),
    [
        (
            "ipab-slmc-kuka_honeypot_demo/test.bag",
            f"topic: /joint_states, joints: [{', '.join(f'lwr_arm_{i}_joint' for i in range(7))}]",
            None,
            [f"lwr_arm_{i}_joint" for i in range(7)],
        ),
        (
            "mbrummelhuis-aerial_tactile_servoing/ros2bag_ats_2025-12-02_12-44-28",
            "topic: /servo/out/state, joints: [q2, q0, q1]",
            None,
            ["q2", "q0", "q1"],
        ),
        (
            "mbrummelhuis-aerial_tactile_servoing/ros2bag_servo_serial_no_unexpected_q3",
            "topic: /servo/out/state, index: [0, 1, 2]",
            "topic: /servo/in/state, joints: [q1, q2, q3]",
            ["q1", "q2", "q3"],
        ),
    ],
)
def test_real_recordings_train(tmp_path: Path, path: str, state: str, command: str | None, names: list[str]) -> None:
    action = [f"data.action.from=[{{{command}}}]"] if command else []
    last = trained(
        tiny(tmp_path, f"data.bag_dir={SHARED / path}", f"data.state=[{{{state}}}]", "data.cameras={}", *action)
    )
    assert json.loads((last / "pretrained_model/robot.json").read_text())["action_names"] == names
    assert all(0 < line["loss"] < 1e4 for line in logged(tmp_path / "run") if "loss" in line)


@pytest.mark.skipif(not SHARED.exists(), reason="the recordings of others are not here")
def test_all_unreadable_recordings_are_named(tmp_path: Path) -> None:
    done = run(
        "--config",
        tiny(tmp_path, f"data.bag_dir={SHARED}", "data.state=[{topic: /joint_states}]", "data.cameras={}"),
        check=False,
    )
    assert done.returncode == 1
    for words in (
        "empty-file.bag: is empty",
        "no-messages.bag: /joint_states: no such topic",
        "list the joints to take",
        "talker: /joint_states",
    ):
        assert words in done.stderr, done.stderr
