"""The OSMO bundle: the workflow as the server renders it, train.sh with local folders, submit.py with a stand-in."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
import standin_osmo
import yaml
from test_dataset import recorded
from test_train import tiny
from writing import episode, write

import evaluate
from config import load
from policy.runner import Policy
from training import run_folder

TRAIN = Path(__file__).parents[1]
OSMO = TRAIN / "osmo"
TOKENS = r"\{\{(workflow_id|output|input:\d+|host:[\w-]+)\}\}"  # the server's own, without blanks
DATASETS = "storage/stosmorbt3dev001/datasets"  # of the stand-in: the default container
BLOB = "data.bag_dir=https://robots.blob.core.windows.net/bags/cups"


def rendered(**chosen: Any) -> dict[str, Any]:
    """The workflow, rendered as the server does: from `workflow:` on, undefined names are errors, its own tokens stay."""
    text, defaults = (OSMO / "osmo-workflow.yaml").read_text().split("\ndefault-values:\n")
    kept = re.sub(TOKENS, r"<\1>", text[text.index("\nworkflow:") :])  # OSMO drops what stands before
    environment = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined)
    return yaml.safe_load(environment.from_string(kept).render(yaml.safe_load(defaults) | chosen))["workflow"]


def tasks(**chosen: Any) -> list[dict[str, Any]]:
    return rendered(**chosen)["groups"][0]["tasks"]


def test_every_room_that_training_uses_is_sent() -> None:
    files = {file["path"]: OSMO / file["localpath"] for file in tasks()[0]["files"]}
    elsewhere = {"demo_bags.py", "inspect_bags.py", "inspection", "tests", "benchmarks", "osmo"}
    rooms = {path.relative_to(TRAIN) for path in (*TRAIN.glob("*.py"), *TRAIN.glob("[!.]*/*.py"))}
    wanted = {f"/opt/act/{path}" for path in rooms if path.parts[0] not in elsewhere}
    assert {path for path in files if path.endswith(".py")} == wanted
    assert {"/opt/act/osmo-config.yaml", "/opt/act/train.sh"} < files.keys()
    for path in files.values():
        assert not re.search(r"\{[{%#]", path.read_text()), "the server would render it"
        assert path.stat().st_size < 2**19, "each becomes a Kubernetes Secret of 1 MiB at most"


def test_the_configuration_and_the_workflow_agree_on_the_pods_paths() -> None:
    config, (task,) = load(OSMO / "osmo-config.yaml"), tasks()
    environment, (bags, before), (checkpoint,) = task["environment"], task["inputs"], task["checkpoint"]
    assert str(config.data.bag_dir) == "/osmo/data/input/0" and bags["url"].startswith("azure://")
    assert str(config.output_dir) == environment["CHECKPOINTS"] and config.output_dir.name != "checkpoints"
    assert checkpoint["path"] == environment["UPLOADS"] and before["url"] == checkpoint["url"] + "/checkpoints"
    assert bags["regex"] == environment["BAGS_REGEX"]
    assert f'RECORDING = r"{bags["regex"]}"' in (OSMO / "submit.py").read_text()
    assert environment["BEFORE"] == "<input:1>" and environment["OUTPUT"] == "<output>"


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (8, 1), (8, 4)])
def test_one_file_from_one_gpu_to_many_nodes(gpus: int, nodes: int) -> None:
    size = {"gpu": gpus, "cpu": 8 * gpus, "memory": f"{32 * gpus}Gi", "storage": "200Gi"}
    assert rendered(gpus=gpus, nodes=nodes)["resources"]["default"] == size
    for blob in ("", BLOB):
        found = tasks(gpus=gpus, nodes=nodes, settings=blob, runs="azure://robots/runs", run="r")
        for key in ("lead", "outputs", "checkpoint"):
            assert [bool(task.get(key)) for task in found] == [True] + [False] * (nodes - 1), key
        for number, task in enumerate(found):
            environment = task["environment"]
            assert (environment["GPUS"], environment["NODES"], environment["NODE"]) == (
                f"{gpus}",
                f"{nodes}",
                f"{number}",
            )
            assert environment["LEAD"] == ("<host:node-0>" if nodes > 1 else "")
            assert "credentials" not in task, "one that is not there makes the server refuse"
            inputs = [entry["url"] for entry in task.get("inputs", ())]
            before = [] if number else ["azure://robots/runs/r/checkpoints"]
            assert inputs == ([] if blob else ["azure://stosmorbt3dev001/datasets/rosbags"]) + before
            assert environment["BEFORE"] == ("" if number else f"<input:{len(inputs) - 1}>")
            assert bool(environment["BAGS_URL"]) == bool(environment["BAGS"]) == (not blob)


def test_what_is_asked_for_is_in_the_workflow() -> None:
    settings = """training.steps=5 'data.cameras={color: /cam, b: "/x"}'"""
    asked = {"settings": settings, "platform": "dgx", "dataset": "cups", "azure_cred": "azure_cred"}
    workflow = rendered(**asked, run="a-b", runs="s3://b/runs")
    (task,) = workflow["groups"][0]["tasks"]
    assert workflow["name"] == "a-b" and workflow["resources"]["default"]["platform"] == "dgx"
    assert task["args"] == ["/opt/act/train.sh", settings] and task["inputs"][0] == {"dataset": {"name": "cups"}}
    assert task["credentials"] == {"azure_cred": {"AZURE_STORAGE_KEY": "azure_storage_key"}}
    assert task["outputs"] == [{"url": "s3://b/runs/a-b"}] and "3" in task["exitActions"]["COMPLETE"].split(",")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in `osmo` on PATH, logged in to the default server, with the default container."""
    folder = tmp_path / "osmo"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/osmo").symlink_to(standin_osmo.__file__)
    Path(standin_osmo.__file__).chmod(0o755)
    (folder / "login.yaml").write_text("url: http://192.168.1.100\ntoken_login: {refresh_token: secret}\n")
    (folder / DATASETS).mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("OSMO_STANDIN", str(folder))
    monkeypatch.setenv("OSMO_CONFIG_FILE_DIR", str(folder))
    return folder


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """The folder osmo/ of a copy of the scripts: to edit them, and to fetch into."""
    shutil.copytree(OSMO, tmp_path / "mine/train/osmo", ignore=shutil.ignore_patterns("__pycache__"))
    for script in (*TRAIN.glob("*.py"), *TRAIN.glob("[!.]*/*.py")):
        copy = tmp_path / "mine/train" / script.relative_to(TRAIN)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(script, copy)
    return tmp_path / "mine/train/osmo"


def submit(*arguments: str | Path, osmo: Path = OSMO) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(osmo / "submit.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "secret" not in done.stdout + done.stderr, done.stderr
    return done


def calls(world: Path, *command: str) -> list[list[str]]:
    log = world / "calls.jsonl"
    found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [call for call in found if tuple(call[: len(command)]) == command]


def answers(world: Path, **answer: list[Any]) -> None:
    """What the stand-in answers, by command with _ for the blank."""
    (world / "answers.json").write_text(json.dumps({key.replace("_", " "): each for key, each in answer.items()}))


def test_with_nothing_else_it_does_what_is_meant(world: Path) -> None:
    done = submit()
    assert done.returncode == 0 and "osmo workflow logs train-rosbag-act-7" in done.stdout, done.stderr
    workflow = [str(OSMO / "osmo-workflow.yaml"), "--pool", "gpu-pool"]
    assert [call[:2] for call in calls(world)] == [["workflow", verb] for verb in ("list", "validate", "submit")]
    assert "--all-users" in calls(world)[0] and calls(world)[1][2:] == workflow
    assert calls(world)[2][2:] == [*workflow, "-t", "json"]


def test_options_reach_the_workflow_and_a_dry_run_says_so(world: Path, tmp_path: Path) -> None:
    write(tmp_path / "my bags/episode_1", episode(camera=False))
    options = shlex.split(f"--run cups --gpus 8 --set memory=64 --set image=r/a=b:1 --rosbags '{tmp_path}/my bags'")
    settings = ("training.steps=20", "data.cameras={color: /cam}")
    dry = submit(*options, "--dry-run", *settings)
    assert dry.returncode == 0 and not calls(world), dry.stderr
    done = submit(*options, "--follow", *settings)
    assert done.returncode == 0 and "90 recordings" in done.stdout and "COMPLETED" in done.stdout, done.stderr
    ran = [call for call in calls(world) if call[1] in ("validate", "upload", "submit")]
    assert [["osmo", *call] for call in ran] == [shlex.split(line) for line in dry.stdout.splitlines()]
    assert [call[1] for call in ran] == ["validate", "upload", "submit"], "nothing is uploaded for what is refused"
    assert ran[-1][ran[-1].index("--set") : ran[-1].index("-t")] == [
        *("--set", "memory=64", "gpus=8", "--set-string", "image=r/a=b:1", "run=cups"),
        "rosbags=azure://stosmorbt3dev001/datasets/rosbags/my bags",
        "settings=training.steps=20 'data.cameras={color: /cam}'",
    ]
    uploaded = world / DATASETS / "rosbags/my bags"
    assert len(list(uploaded.rglob("*.mcap"))) == 1
    write(uploaded / "old", episode(camera=False))
    (tmp_path / "my bags/day_2").symlink_to(tmp_path / "my bags/episode_1")
    again = submit(*options, *settings)
    assert again.returncode == 1 and "old.mcap: is not in" in again.stderr, again.stderr
    assert "day_2/episode_1.mcap: did not arrive" in again.stderr, "OSMO follows no links to folders"
    assert len(calls(world, "workflow", "submit")) == 1


DOWN = {"message": "\nCannot connect to OSMO service, with error:\nConnection refused", "code": 1}
REFUSED = "Error message: Validation error: workflow.groups.0\n  Extra inputs are not permitted\nError code: 400"
PERHAPS = ["may have been accepted", "osmo workflow list"]


@pytest.mark.parametrize(
    ("command", "code", "text", "words", "submits"),
    [
        ("workflow_validate", 1, REFUSED, ["Extra inputs are not permitted"], 0),
        ("workflow_list", 10, DOWN, ["Connection refused"], 0),
        ("workflow_list", 2, {"message": "Jwt is expired", "code": 401}, ["Jwt is expired"], 0),
        ("workflow_list", 0, "<html>", ["<html>", "expected JSON"], 0),
        ("workflow_submit", 1, {"message": "Validation error", "code": 400}, ["Validation error"], 1),
        ("workflow_submit", 75, {"message": "local_rate_limited", "code": 429}, ["local_rate_limited"], 1),
        ("workflow_submit", 10, DOWN, ["Connection refused", *PERHAPS], 1),
        ("workflow_submit", 0, "<html>", ["<html>", *PERHAPS], 1),
    ],
)
def test_what_osmo_refuses(world: Path, command: str, code: int, text: Any, words: list[str], submits: int) -> None:
    answers(world, **{command: [code, text]})
    done = submit("--rosbags", recorded(world) / "bags")
    assert done.returncode == (code or 1) and all(word in done.stderr for word in words), done.stderr
    assert (PERHAPS[0] in done.stderr) == (PERHAPS[0] in words)
    assert len(calls(world, "workflow", "submit")) == submits and bool(calls(world, "data", "upload")) == bool(submits)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--server", "http://10.0.0.9"], 2, ["logged in to http://192.168.1.100, expected http://10.0.0.9"]),
        (["--set", "gpu=1", "--set", "gpus"], 1, ["--set gpu=1, gpus: expected KEY=VALUE", "nodes"]),
        (["--rosbags", "/nowhere"], 1, ["--rosbags /nowhere"]),
        (["--rosbags", str(TRAIN), BLOB], 1, ["not also data.bag_dir"]),
        (["training.stps=1", "data.fps=x"], 1, ["did you mean training.steps", "data.fps"]),
        (["data.cameras={a: {{b}}}"], 1, ["{{b}}"]),
        (["output_dir=/tmp/$(HOME)"], 1, ["$(HOME): the server would change"]),
        ([f"{BLOB}?sv=1&sig=secret"], 1, ["AZURE_STORAGE_SAS_TOKEN"]),
        (["--fetch", ""], 1, ["no complete checkpoint"]),
    ],
)
def test_wrong_requests_send_nothing(world: Path, options: list[str], code: int, words: list[str]) -> None:
    done = submit(*options)
    assert done.returncode == code and all(word in done.stderr for word in words), done.stderr
    assert not calls(world, "workflow")


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("train.sh", "set -euo pipefail", 'echo "${#settings[@]}"', "train.sh: the server would change its braces"),
        ("osmo-workflow.yaml", "  nodes: 1", "  nodes: [1", "osmo-workflow.yaml: default-values: "),
        ("osmo-workflow.yaml", "  run: ", "  runn: ", "osmo-workflow.yaml: default-values: "),
        ("osmo-workflow.yaml", "run: train", "run: 20 #", "osmo-workflow.yaml: default-values: "),
        ("osmo-workflow.yaml", 'settings: ""', "settings: 'a\"'", "osmo-workflow.yaml: default-values: "),
    ],
)
def test_a_bundle_that_cannot_be_used(world: Path, mine: Path, name: str, old: str, new: str, words: str) -> None:
    text = (mine / name).read_text()
    assert old in text
    (mine / name).write_text(text.replace(old, new))
    done = submit(osmo=mine)
    assert done.returncode == 1 and words in done.stderr and not calls(world), done.stderr


def test_runs_that_differ(world: Path) -> None:
    done = submit(BLOB, "--set", "azure_cred=azure_cred")
    assert done.returncode == 0 and not calls(world, "data"), "the pod reads the recordings itself"
    assert {f"settings={BLOB}", "azure_cred=azure_cred"} < set(calls(world, "workflow", "submit")[0])
    running = [{"name": f"train-rosbag-act-{name}", "status": "RUNNING"} for name in ("cups-3", "2")]
    (world / "workflows.json").write_text(json.dumps(running))
    done = submit()
    assert done.returncode == 1 and "osmo workflow cancel train-rosbag-act-2" in done.stderr, "one workflow of a run"
    assert submit("--run", "cup").returncode == 0
    answers(world, workflow_validate=[1, "Error message: only with LOW priority"])
    assert submit("--run", "a", "--gpus", "40").returncode == 1
    assert submit("--run", "a", "--gpus", "40", "--priority", "LOW").returncode == 0


def test_ctrl_c_while_the_server_answers(world: Path) -> None:
    answers(world, workflow_submit=["sleep", ""])
    command = [sys.executable, str(OSMO / "submit.py")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not calls(world, "workflow", "submit"):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "interrupted; it may have been accepted" in err and "submit.py" not in err, err


def test_the_readmes_sweep(world: Path) -> None:
    (loop,) = re.findall(r" +for .*\n +.*submit.py.*\n +done\n", (OSMO / "README.md").read_text())
    script = loop.replace("python train/osmo/submit.py", f"{sys.executable} {OSMO / 'submit.py'}")
    subprocess.run(["bash", "-ec", script], check=True, cwd=TRAIN.parent)
    sent = calls(world, "workflow", "submit")
    assert len(sent) == 3 and len({next(word for word in call if word.startswith("run=")) for call in sent}) == 3


def test_without_a_login_or_the_command(world: Path) -> None:
    (world / "login.yaml").unlink()
    done = submit()
    assert done.returncode == 2 and "logged in to nothing" in done.stderr and "osmo login http://192.168" in done.stderr
    (world / "bin/osmo").unlink()
    for arguments in ((), ("--fetch", "cups")):
        done = submit(*arguments)
        assert done.returncode == 2 and "osmo: command not found; install" in done.stderr


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


class Pod:
    """Local folders in place of OSMO's: the bundle as the workflow sends it, the inputs, the output, the uploads.

    Without a camera it trains in a moment; nothing of the script depends on one.
    """

    def __init__(self, folder: Path, world: Path, *overrides: str) -> None:
        self.code, self.before, self.output = folder / "code", folder / "before", folder / "output"
        self.checkpoints, self.uploads = folder / "pod/run", folder / "pod/upload/checkpoints"
        self.folder, self.stored, self.port = folder, world / DATASETS / "runs/r/checkpoints", free_port()
        for path in (self.code, self.before, self.output):
            path.mkdir()
        for file in tasks()[0]["files"]:
            copy = self.code / Path(file["path"]).relative_to("/opt/act")
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(OSMO / file["localpath"], copy)
        quick = ("data.cameras={}", "data.validation_fraction=0")
        shutil.copy(tiny(recorded(folder), *quick, *overrides), self.code / "osmo-config.yaml")
        shutil.copytree(folder / "bags", world / DATASETS / "bags")

    def start(
        self, settings: str = "", gpus: int = 1, nodes: int = 1, node: int = 0, device: str = "cpu", **others: str
    ) -> subprocess.Popen[str]:
        lead = {"BEFORE": str(self.before), "CHECKPOINTS": str(self.checkpoints)}
        environment = tasks(run="r", gpus=gpus, nodes=nodes)[node]["environment"] | {
            **(lead if node == 0 else {"CHECKPOINTS": str(self.folder / f"pod_{node}/run")}),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "UPLOADS": str(self.uploads),
            "WORKFLOW": "r-7",
            "OUTPUT": str(self.output),
            "LEAD": "127.0.0.1" if nodes > 1 else "",
            "BAGS_URL": "azure://stosmorbt3dev001/datasets/bags",
            "BAGS": str(self.folder / "bags"),
            "CPUS": "1",
            "PORT": self.port,
            "SETTLE": "0",
            "PUBLISH_EVERY": "0.5",
        }
        settings += f" training.device={device}" if device else ""
        command = ["bash", str(self.code / "train.sh"), settings]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=os.environ | environment | others, **pipes)

    def run(self, *arguments: Any, **options: Any) -> tuple[int, str]:
        """Exit code and output of a pod that ends by itself."""
        out, _ = (process := self.start(*arguments, **options)).communicate(timeout=120)
        return process.returncode, out

    def trained_to(self) -> int:
        return int(json.loads((self.output / "pretrained_model/robot.json").read_text())["step"])

    def processes(self, node: int = 0) -> Iterator[tuple[int, str]]:
        """What runs in a pod, and its command: those that torchrun put into sessions of their own too."""
        mark = f"CHECKPOINTS={self.checkpoints if node == 0 else self.folder / f'pod_{node}/run'}\0"
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_text(errors="ignore"):
                    yield int(process.name), (process / "cmdline").read_text()

    def lose(self, node: int = 0) -> None:
        for number, _ in self.processes(node):
            os.kill(number, signal.SIGKILL)

    def upload(self) -> None:
        """What OSMO does from time to time, by the workflow's regex; then the pod's folder is lost."""
        regex = re.compile(tasks()[0]["checkpoint"][0]["regex"])
        for file in self.uploads.rglob("*"):
            if file.is_file() and regex.match(file.relative_to(self.uploads.parent).as_posix()):
                for place in (self.before, self.stored):
                    standin_osmo.fill(file, place / file.relative_to(self.uploads))
        shutil.rmtree(self.checkpoints)


def wait_for(done: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    while not done() and process.poll() is None:
        time.sleep(0.02)


def test_a_lost_pod_resumes_in_the_next_one(tmp_path: Path, world: Path) -> None:
    pod = Pod(tmp_path, world)
    lost = pod.start("training.steps=4000")
    wait_for(lambda: len(list(pod.uploads.glob("checkpoint_*"))) >= 2, lost)
    pod.lose()
    (pod.uploads / ".checkpoint_000500.tmp").mkdir()
    (pod.uploads / ".checkpoint_000500.tmp/half").touch()
    pod.upload()
    assert not list(pod.before.rglob("*half")), "what is hidden is not uploaded"
    newest = max(path.name for path in pod.before.glob("checkpoint_*"))
    for place in (pod.before, pod.stored):
        (place / newest / "pretrained_model/model.safetensors").unlink()  # the upload was cut off
    code, out = pod.run("training.steps=30 'training.log_every=3'")
    assert code == 0, out
    assert f"{newest}: skipping incomplete checkpoint" in out and "resuming from" in out and "policy: azure://" in out
    assert pod.trained_to() == 30
    assert Policy.load(pod.output / "pretrained_model") and (pod.output / "metrics.jsonl").exists()


def test_one_workflow_of_a_run_trains(tmp_path: Path, world: Path) -> None:
    pod = Pod(tmp_path, world, "training.steps=5")
    owners, now = pod.stored / "owners", int(time.time())
    owners.mkdir(parents=True)
    (owners / "r-3").write_text(f"{now - 20} {now - 900}")
    (owners / "r-4").write_text(f"{now - 2000} {now - 9000}")
    (owners / "r-5").write_text(f"0 {now}")
    code, out = pod.run()
    assert code == 1 and "r-3 is at work on this run" in out and "osmo data delete" in out, out
    assert not list(pod.checkpoints.iterdir()), "nothing of it reaches the run"
    (owners / "r-3").write_text(f"{now + 99} {now + 99}")  # started later: it will end itself
    code, out = pod.run()
    assert code == 0 and "r-4 was at work on this run, and is taken over" in out and "r-5" not in out, out
    pod.upload()
    assert (owners / "r-7").read_text().startswith("0 "), "it has left the run to others"


def test_what_is_uploaded_is_complete_and_goes_late(tmp_path: Path, world: Path) -> None:
    pod = Pod(tmp_path, world, "training.keep_checkpoints=1", "training.steps=100000")
    process = pod.start(UPLOAD_EVERY="2s", TENSORBOARD=free_port())
    while len(found := sorted(pod.uploads.glob("checkpoint_*"))) < 3 and process.poll() is None:
        assert not [lack for lack in map(run_folder.missing, found) if lack], "none is ever half-written"
        time.sleep(0.05)
    first = found[0]
    assert not (pod.checkpoints / first.name).exists() and not run_folder.missing(first), "gone in the run, not here"
    wait_for(lambda: not first.exists(), process)
    pod.lose()
    process.communicate()
    assert not first.exists() and (pod.uploads / "metrics.jsonl").exists() and not list(pod.uploads.rglob(".*"))


def test_one_of_two_processes_is_stopped(tmp_path: Path, world: Path) -> None:
    pod = Pod(tmp_path, world, "training.steps=4000")
    process = pod.start(gpus=2)
    wait_for((pod.checkpoints / "checkpoint_000005").exists, process)
    last = max(number for number, command in pod.processes() if "\0train.py" in command and "torchrun" not in command)
    os.kill(last, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped at step" in out, out
    assert not list(pod.output.iterdir()), "no policy yet"


def test_two_nodes_and_one_of_them_is_lost(tmp_path: Path, world: Path) -> None:
    pod = Pod(tmp_path, world, "training.batch_size=2")
    lead, _ = (pod.start("training.steps=4000", nodes=2, node=node) for node in (0, 1))
    wait_for((pod.checkpoints / "checkpoint_000005").exists, lead)
    pod.lose(node=1)
    out, _ = lead.communicate(timeout=60)
    assert lead.returncode == 75 and "lost another process" in out, out
    pod.upload()
    steps = 5 + max(int(path.name.split("_")[1]) for path in pod.before.glob("checkpoint_*"))
    for process in [pod.start(f"training.steps={steps}", nodes=2, node=node) for node in (0, 1)]:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
    assert pod.trained_to() == steps


def break_script(pod: Pod) -> None:
    with (pod.code / "training/processes.py").open("a") as script:
        script.write("import nothing_of_this_name\n")


BREAK: dict[str, Callable[[Pod], None]] = {
    "nothing": lambda pod: None,
    "script": break_script,
    "container": lambda pod: shutil.rmtree(pod.stored.parents[3]),
    "recordings": lambda pod: shutil.rmtree(pod.folder / "bags/episode_0"),
}


@pytest.mark.parametrize(
    ("broken", "options", "code", "words"),
    [
        ("nothing", {"settings": "training.stps=3"}, 1, "did you mean training.steps"),
        ("nothing", {"settings": "training.stps=3", "gpus": 2}, 1, "did you mean training.steps"),
        ("nothing", {"settings": "training.steps=3 'a"}, 1, "is a quote left open"),
        ("nothing", {"device": ""}, 1, "error: training.device: cuda: process 0 needs cuda:0"),
        ("script", {"gpus": 2}, 1, "nothing_of_this_name"),
        ("container", {}, 1, r"checkpoints cannot be uploaded there .*ContainerNotFound"),
        ("recordings", {}, 75, r"only \d+ of \d+ files arrived"),
    ],
)
def test_only_what_may_go_better_is_run_again(
    tmp_path: Path, world: Path, broken: str, options: dict[str, Any], code: int, words: str
) -> None:
    pod = Pod(tmp_path, world)
    BREAK[broken](pod)
    ended, out = pod.run(**options)
    assert ended == code and re.search(words, out) and "training:" not in out, out


@pytest.mark.parametrize("gpus", [1, 2])
def test_skipped_recordings_do_not_fail_the_workflow(tmp_path: Path, world: Path, gpus: int) -> None:
    pod = Pod(tmp_path, world, "training.steps=2", "data.on_bad_bag=skip")
    next((tmp_path / "bags/episode_0").glob("*.mcap")).write_bytes(b"x")
    code, out = pod.run(gpus=gpus)
    assert code == 3 and out.count("data.on_bad_bag=skip: skipped 1") == 1 and pod.trained_to() == 2, out


def test_a_finished_run_submitted_again_uploads_its_policy(tmp_path: Path, world: Path) -> None:
    pod = Pod(tmp_path, world, "training.steps=10")
    pod.run()
    pod.upload()
    shutil.rmtree(pod.output / "pretrained_model")
    for late in ("checkpoint_000015", "checkpoint_000020", "checkpoint_000025"):  # of uploads that were cut off
        shutil.copytree(pod.before / "checkpoint_000010/training_state", pod.before / late / "training_state")
    code, out = pod.run()
    assert code == 0 and out.count("skipping incomplete checkpoint") == 3 and pod.trained_to() == 10, out


def test_fetching_the_newest_complete_checkpoint(
    tmp_path: Path, world: Path, mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pod = Pod(tmp_path, world, "training.steps=10")
    pod.run()
    stored = world / DATASETS / "runs/cups/checkpoints"
    shutil.copytree(pod.checkpoints, stored)
    (stored / "checkpoint_000010/pretrained_model/config.json").write_text("{")
    outputs = mine.parents[1] / "outputs"
    (outputs / "cups/checkpoint_000005").mkdir(parents=True)
    answers(world, data_download=[0, ""])
    done = submit("--fetch", "cups", osmo=mine)
    assert done.returncode == 1 and "resume.json is missing" in done.stderr and "no complete" in done.stderr
    (world / "answers.json").unlink()
    for _ in range(2):
        done = submit("--fetch", "cups", osmo=mine)
        assert done.returncode == 0, done.stderr
    assert "checkpoint_000010: skipping incomplete checkpoint: pretrained_model/config.json has 1 of" in done.stderr
    fetched = outputs / "osmo/cups/checkpoint_000005"
    assert Path(done.stdout.strip()) == fetched / "pretrained_model"
    assert {path.name for path in fetched.parent.iterdir()} == {fetched.name, "config.yaml"}
    assert not list((outputs / "cups/checkpoint_000005").iterdir()), "a run of this machine's own is left alone"
    for gone in (pod.folder / "bags", pod.folder / "pod"):
        shutil.rmtree(gone)
    write(tmp_path / "unseen/episode_9", episode(seed=9, camera=False))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(fetched), "--bags", str(tmp_path / "unseen")])
    evaluate.main()
    assert "1 recordings not trained on" in capsys.readouterr().out
    done = submit("--fetch", "nothing-there", osmo=mine)
    assert done.returncode == 1 and "no complete checkpoint" in done.stderr
