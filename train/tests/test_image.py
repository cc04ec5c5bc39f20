"""The container image, built from osmo/Dockerfile as it stands and run as a pod would, on a stand-in for NGC's base."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from test_train import tiny
from writing import episode, write

from policy.runner import Policy

TESTS = Path(__file__).parent
TRAIN = TESTS.parent
CACHE = Path(os.environ.get("IMAGE_CACHE", ""))  # `make image` names it; the images of the stand-in stay there
STORAGE = ("--root", CACHE / "storage", "--runroot", CACHE / "run")
MISSING = [tool for tool in ("buildah", "podman", "runc", "mmdebstrap") if not shutil.which(tool)]
ROOM = 8e9  # bytes; 6.4 GB were seen
BASES = ("constrained", "unconstrained")  # as NGC's up to 25.09, and after

pytestmark = [
    pytest.mark.image,
    pytest.mark.skipif(not CACHE.is_absolute(), reason="IMAGE_CACHE names no folder, see `make image`"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may build images here"),
    pytest.mark.skipif(
        shutil.disk_usage(TRAIN).free < ROOM,
        reason=f"{shutil.disk_usage(TRAIN).free / 1e9:.1f} GB free, the images take {ROOM / 1e9:.0f}",
    ),
]


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    # layers, as large as the image, go through the temporary folder: the machine's own may be small
    environment = os.environ | {"TMPDIR": str(CACHE / "tmp")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@cache
def pip_sources() -> list[str]:
    """Options of `buildah bud` that let pip find packages as this machine's pip does; nothing of it stays in the image."""
    settings: dict[str, str] = {}
    for line in run(sys.executable, "-m", "pip", "config", "list").stdout.splitlines():  # the environment's come first
        name, value = line.split("=", 1)
        settings.setdefault(name.rpartition(".")[2], " ".join(ast.literal_eval(value).split()))
    names = {"index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "cert"} & settings.keys()
    configuration = CACHE / "pip.conf"
    configuration.touch(mode=0o600)  # the address of an index may hold a password
    configuration.write_text("\n".join(["[global]", *(f"{name} = {settings[name]}" for name in names)]))
    mounts = {"/etc/pip.conf": configuration}
    for name in names:
        for word in settings[name].split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                path = path.parent if name.endswith("index-url") else path  # an index's files lie beside it
                mounts[str(path)] = path
    return [f"--volume={source}:{target}:ro" for target, source in mounts.items()]


def build(
    dockerfile: Path, context: Path, tag: str, *options: str, check: bool = True
) -> subprocess.CompletedProcess[str]:
    how = ("--isolation=chroot", "--format=docker", "--pull-never", *pip_sources(), *options)
    built = run("buildah", *STORAGE, "bud", *how, f"--file={dockerfile}", f"--tag={tag}", context, check=False)
    # what buildah says of a full disk: https://github.com/containers/podman/issues/22342
    if any(words in built.stderr.lower() for words in ("no space left on device", "read/write on closed pipe")):
        pytest.skip(f"no room for the images: {built.stderr.splitlines()[-1][-160:]}")
    assert not check or built.returncode == 0, built.stdout + built.stderr
    return built


def in_pod(image: str, *command: str, volumes: tuple[str, ...] = ()) -> str:
    """What a command prints in a container with no network, 64 MB of shared memory and nothing to write to but /tmp."""
    pod = ("--network=none", "--read-only", "--tmpfs=/tmp", "--shm-size=64m", *(f"--volume={v}" for v in volumes))
    limits = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")  # podman would raise them, which not all may
    return run("podman", *STORAGE, "--runtime=runc", "run", "--rm", *limits, *pod, image, *command).stdout


@pytest.fixture(scope="module")
def bases() -> None:
    """localhost/standin with each of BASES as its tag."""
    context = CACHE / "context"
    context.mkdir(parents=True, exist_ok=True)
    (CACHE / "tmp").mkdir(exist_ok=True)
    if not (context / "rootfs.tar").exists():
        packages = "--include=python3,python3-pip,python3-yaml,python-is-python3"
        run("mmdebstrap", "--variant=minbase", packages, "bookworm", CACHE / "partial.tar")
        (CACHE / "partial.tar").rename(context / "rootfs.tar")
    shutil.copy(TESTS / "standin_torchvision.py", context)
    for base in BASES:
        build(TESTS / "standin.Dockerfile", context, f"localhost/standin:{base}", "--layers", f"--target={base}")


@pytest.fixture(scope="module", params=BASES)
def image(request: pytest.FixtureRequest, bases: None) -> Iterator[str]:
    tag = f"localhost/rosbag-act:{request.param}"
    base = f"--build-arg=BASE_IMAGE=localhost/standin:{request.param}"
    build(TRAIN / "osmo/Dockerfile", TRAIN.parent, tag, base, "--build-arg=REVISION=c0ffee")
    yield tag
    run("buildah", *STORAGE, "rmi", tag)


def installed(image: str) -> dict[str, str]:
    listed = json.loads(in_pod(image, "pip", "--disable-pip-version-check", "list", "--format=json"))
    return {package["name"]: package["version"] for package in listed}


def test_it_adds_to_its_base_and_changes_nothing_there(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = installed(image.replace("rosbag-act", "standin")), installed(image)
    assert {"torch", "torchvision", "numpy", "pillow", "PyYAML"} <= before.keys() and before["numpy"] == "1.26.4"
    assert after.items() >= before.items()
    added = {name: version for name, version in after.items() if name not in before}
    sizes = [
        json.loads(run("podman", *STORAGE, "image", "inspect", tag).stdout)[0]["Size"]
        for tag in (image, image.replace("rosbag-act", "standin"))
    ]
    with capsys.disabled():
        print(f"\n{image}: adds {(sizes[0] - sizes[1]) / 1e6:.0f} MB to its base")
    assert (
        added["rosbags"] == "0.11.9"
        and added["opencv-python-headless"] == "4.11.0.86"
        and "safetensors" in added
        and before["tensorboard"] == after["tensorboard"]
    )


def test_it_holds_the_code_and_says_what_it_is(image: str) -> None:
    (inspected,) = json.loads(run("podman", *STORAGE, "image", "inspect", image).stdout)
    settings = inspected["Config"]
    assert settings["User"] == "1000:1000" and "Entrypoint" not in settings
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in settings["Labels"].items()}
    assert labels["revision"] == "c0ffee" and labels["base.name"] == image.replace("rosbag-act", "standin")
    assert labels["title"] == "rosbag-act" and labels["description"]
    elsewhere = ("tests", "benchmarks", "osmo")
    rooms = (*TRAIN.glob("*.py"), *TRAIN.glob("[!.]*/*.py"))
    wanted = {str(path.relative_to(TRAIN)) for path in rooms if path.relative_to(TRAIN).parts[0] not in elsewhere}
    found = set(in_pod(image, "find", ".", "-type", "f", "-printf", "%P\n").split())
    assert found == wanted | {f"osmo/{name}" for name in ("base_versions.py", "requirements.txt", "base.txt")}
    assert in_pod(image).startswith("usage: train.py")


@pytest.mark.parametrize("launcher", ["python", "torchrun --standalone --nproc_per_node=2"])
def test_it_trains_in_a_pod(image: str, tmp_path: Path, launcher: str) -> None:
    for i in range(3):
        write(tmp_path / f"input/episode_{i}", episode(seed=i))
    output = tmp_path / "output"
    output.mkdir()
    os.chown(output, 1000, 1000)
    config = tiny(
        tmp_path,
        "data.bag_dir=/osmo/data/input/0",
        "data.cache_dir=/tmp/cache",
        "output_dir=/osmo/data/output/run",
        "model.pretrained_backbone=true",  # with no network: those of the image
        "training.steps=5",
    )
    volumes = (
        f"{tmp_path}/input:/osmo/data/input/0:ro",
        f"{output}:/osmo/data/output",
        f"{config}:/osmo/{config.name}:ro",
    )
    said = in_pod(image, *launcher.split(), "train.py", "--config", f"/osmo/{config.name}", volumes=volumes)
    assert "policy: /osmo/data/output/run/checkpoint_000005/pretrained_model" in said
    Policy.load(output / "run/checkpoint_000005/pretrained_model")


def test_a_requirement_that_changes_the_base_fails_the_build(bases: None, tmp_path: Path) -> None:
    shutil.copytree(TRAIN / "osmo", tmp_path / "train/osmo")
    for path in TRAIN.glob("*.py"):
        shutil.copy(path, tmp_path / "train")
    for room in TRAIN.glob("[!.]*/__init__.py"):
        shutil.copytree(room.parent, tmp_path / "train" / room.parent.name)
    with (tmp_path / "train/osmo/requirements.txt").open("a") as requirements:
        requirements.write("numpy>=2\n")
    base = "--build-arg=BASE_IMAGE=localhost/standin:unconstrained"
    failed = build(tmp_path / "train/osmo/Dockerfile", tmp_path, "localhost/failing", base, check=False)
    assert failed.returncode != 0 and "The user requested (constraint) numpy==1.26.4" in failed.stdout
