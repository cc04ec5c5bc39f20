"""Submit the training to OSMO: check, upload local recordings, validate, submit once, print the next commands.

    python train/osmo/submit.py                                       # as osmo-workflow.yaml and osmo-config.yaml say
    python train/osmo/submit.py --rosbags bags/ --run cups training.steps=20000
    python train/osmo/submit.py data.bag_dir=https://ACCOUNT.blob.core.windows.net/CONTAINER/PREFIX --azure-cred azure_cred
    python train/osmo/submit.py --gpus 8 --dry-run                    # print the osmo commands, run none
    python train/osmo/submit.py --fetch cups                          # the newest checkpoint of a run, into outputs/osmo/cups

Exit codes: 0 submitted; 1 error to fix; else that of the osmo command: 1 refused, 2 not logged in or not allowed,
3 interrupted, 10 cannot reach the server, 75 too many requests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

HERE = Path(__file__).resolve().parent
TRAIN = HERE.parent
sys.path.insert(0, str(TRAIN))

from config import ROOT, load  # noqa: E402 -- from the folder above
from faults import Fault, exit_with_message  # noqa: E402
from training.run_folder import RESUME, missing  # noqa: E402

WORKFLOW, CONFIG = HERE / "osmo-workflow.yaml", HERE / "osmo-config.yaml"
RECORDING = r"(.*/)?(metadata\.yaml|.*\.(bag|db3|mcap)[^/]*)$"  # as in osmo-workflow.yaml
STORAGE = ("azure://", "s3://", "gs://", "swift://", "tos://")
STILL = ("PENDING", "RUNNING", "WAITING")  # states before the end of a workflow
ADVICE = {  # by OSMO's exit codes
    1: "fix what it names",
    2: "see `osmo profile list` and `osmo credential list` for what you may use; or log in again: osmo login {server}",
    10: "check that {server} is up and reachable",
    75: "wait a minute, then run the same command again",
}
INVALID = {  # of `osmo workflow validate`, after login and pool have been checked
    2: "fix what it names; for the image: push it, and let the server read the registry (README.md)"
}
DATA = {2: "check that it exists and that you have a DATA credential for it (osmo credential list)"}
NAME = r"[a-zA-Z]([a-zA-Z0-9_-]{0,62}[a-zA-Z0-9])?"  # of a run: OSMO's rule for workflows
TEXTS = ("image", "rosbags", "runs", "run", "settings", "platform", "dataset", "azure_cred")  # of default-values


class Refused(Fault):
    """An osmo command that failed."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def main() -> None:
    defaults = read_defaults()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://192.168.1.100", metavar="URL", help="the OSMO server [%(default)s]")
    parser.add_argument("--pool", default="gpu-pool", help="[%(default)s]")
    parser.add_argument("--priority", choices=("HIGH", "NORMAL", "LOW"), help="LOW may be pre-empted, and is run again")
    parser.add_argument("--run", help=f"the run's name; submit again to resume [{defaults['run']}]")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--rosbags", metavar="FOLDER|URL", help=f"recordings; a folder is uploaded [{defaults['rosbags']}]"
    )
    source.add_argument("--dataset", help="an OSMO dataset in place of --rosbags, on servers before 6.4")
    parser.add_argument(
        "--azure-cred", metavar="NAME", help="OSMO credential with azure_storage_key, for data.bag_dir=URL"
    )
    parser.add_argument("--image", help=f"[{defaults['image']}]")
    parser.add_argument("--gpus", type=int, help=f"on each node [{defaults['gpus']}]")
    parser.add_argument("--nodes", type=int, help=f"[{defaults['nodes']}]")
    parser.add_argument("--platform", help="of the pool [the pool's default]")
    parser.add_argument("--dry-run", action="store_true", help="print the osmo commands, run none")
    parser.add_argument(
        "--follow", action="store_true", help="stream the log until the run ends; exit code 0 if it completed"
    )
    parser.add_argument("--fetch", metavar="RUN", help="download the newest checkpoint of a run to outputs/osmo/RUN")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the training: training.steps=20000")
    arguments = parser.parse_intermixed_args()
    arguments.server = arguments.server if "//" in arguments.server else f"http://{arguments.server}"
    arguments.settings = shlex.join(arguments.settings) or None  # None: those of the workflow file
    given = {key: value for key, value in vars(arguments).items() if key in defaults and value is not None}
    ADVICE.update({code: advice.format(server=arguments.server) for code, advice in ADVICE.items()})
    if arguments.fetch is not None:
        if not re.fullmatch(NAME, arguments.fetch):
            raise Fault(f"--fetch {arguments.fetch!r}: is not a run's name")
        check_command(arguments.server)
        print(fetch(f"{defaults['runs']}/{arguments.fetch}", ROOT / "outputs/osmo" / arguments.fetch))
    else:
        submit(arguments, defaults, defaults | given)


def read_defaults() -> dict[str, Any]:
    """The default-values of osmo-workflow.yaml. Raises Fault if one has the wrong type."""
    above, _, text = WORKFLOW.read_text().partition("\ndefault-values:\n")
    try:
        loaded = yaml.safe_load("\n" * (above.count("\n") + 2) + text)  # so that a fault has the file's line
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        raise Fault(f"{WORKFLOW}: default-values: is not valid YAML: {' '.join(str(error).split())}") from None
    found = loaded if isinstance(loaded, dict) else {}
    kinds = dict.fromkeys(TEXTS, str) | dict.fromkeys(("gpus", "nodes"), int)
    if faults := [
        f"{WORKFLOW}: default-values: {key}: found {found.get(key)!r}, expected {'text, in quotes' if kind is str else 'a number'}"
        for key, kind in kinds.items()
        if type(found.get(key)) is not kind
    ]:
        raise Fault(*faults)
    return found


def submit(arguments: argparse.Namespace, defaults: dict[str, Any], values: dict[str, Any]) -> None:
    """Check, upload, validate, submit, print the next commands."""
    folder = None if values["rosbags"].startswith(STORAGE) else Path(values["rosbags"] or "/nowhere")
    try:
        settings = shlex.split(values["settings"])
    except ValueError as error:
        raise Fault(f"{WORKFLOW}: settings: {values['settings']!r}: {error}; close the quote") from None
    blob = reads_blob(settings)
    faults = [*wrong_values(values, folder, settings), *wrong_scripts()]
    if blob and (arguments.rosbags or arguments.dataset):
        faults.append("data.bag_dir: cannot be combined with --rosbags or --dataset; give one of them")
    if arguments.rosbags and values["dataset"]:
        faults.append(
            f'{WORKFLOW}: dataset: {values["dataset"]!r} is set and would be used, not --rosbags; set it to ""'
        )
    if faults:
        raise Fault(*faults)
    if folder:
        values["rosbags"] = f"{defaults['rosbags']}/{folder.resolve().name}"
    changed = {key: value for key, value in values.items() if value != defaults[key]}
    workflow = [str(WORKFLOW), "--pool", arguments.pool]
    for flag, kind in (("--set", int), ("--set-string", str)):
        chosen = [f"{key}={value}" for key, value in changed.items() if isinstance(value, kind)]
        workflow += [flag, *chosen] if chosen else []
    upload = ["data", "upload", defaults["rosbags"], str(folder and folder.resolve()), "--regex", RECORDING]
    validation = ["workflow", "validate", *workflow]
    submission = ["workflow", "submit", *workflow, "-t", "json"]
    submission += ["--priority", arguments.priority] if arguments.priority else []
    if arguments.dry_run:
        for command in [*([upload] if folder else []), validation, submission]:
            print(shlex.join(["osmo", *command]))
        return

    check_login(arguments.server)
    if faults := [
        *wrong_version(values["dataset"]),
        *wrong_pool(arguments.pool, values["platform"]),
        *still_running(values["run"]),
    ]:
        raise Fault(*faults)
    if folder:
        osmo(*upload, show=True, advice=DATA)
        check_upload(folder, values["rosbags"])
    elif not values["dataset"] and not blob:
        check_recordings(values["rosbags"])
    try:
        osmo(*validation, advice=INVALID)
    except Refused as refused:  # validate ignores the priority, and refuses what LOW may use
        if arguments.priority != "LOW" or "LOW priority" not in str(refused):
            raise
    look = f"it may have been accepted: check `osmo workflow list --name {values['run']}` before you submit again"
    try:
        answer = osmo(*submission, advice={3: look, 10: look})
    except KeyboardInterrupt:
        raise Refused(3, f"osmo workflow submit: interrupted; {look}") from None
    try:
        name = json.loads(answer)["name"]
    except (ValueError, KeyError, TypeError):
        raise Fault(f"osmo workflow submit: answered {answer[:200]!r}, expected a name; {look}") from None
    print(f"submitted   {name} to {arguments.pool} at {arguments.server}")
    print(f"log         osmo workflow logs {name}")
    print(f"state       osmo workflow query {name}")
    print(f"checkpoint  python train/osmo/submit.py --fetch {values['run']}")
    if arguments.follow:
        status = "PENDING"
        while status in STILL:
            subprocess.run(["osmo", "workflow", "logs", name], check=False)
            still_runs = dict.fromkeys((2, 3, 10, 75), f"{name} still runs: osmo workflow logs {name}")
            status = json.loads(osmo("workflow", "query", name, "-t", "json", advice=still_runs))["status"]
            time.sleep(5 if status in STILL else 0)
        print(f"{name}: {status}")
        sys.exit(status != "COMPLETED")


def osmo(*arguments: str, show: bool = False, advice: dict[int, str] | None = None) -> str:
    """What an osmo command prints; with `show` it prints to the terminal. Raises Refused if it fails."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        ["osmo", *arguments], stdout=None if show else pipe, stderr=pipe if show else None
    ) as process:
        said = b""
        while show and (part := os.read(process.stderr.fileno(), 2**16)):  # type: ignore[union-attr]  # a pipe
            os.write(2, part)
            said += part
        answer = "" if show else process.stdout.read().decode()  # type: ignore[union-attr]
    if b"Failed on files" in said:  # OSMO exits with 0
        again = "check your DATA credential (osmo credential list) and run the same command again"
        raise Refused(1, f"osmo {' '.join(arguments[:2])}: files failed, see above; {again}")
    if process.returncode == 0:
        return answer
    try:
        message = json.loads(answer)["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.partition("Error message:")[2].partition("Error code:")[0] or answer
    message = " ".join(message.partition("Traceback")[0].split())[:1000] or "see above"
    code = 10 if "Connection broken" in message else process.returncode  # OSMO's exit code blames the user
    next_step = (ADVICE | (advice or {})).get(code, "see above")
    command = " ".join(word for word in ("osmo", *arguments[:2]) if not word.startswith("-"))
    raise Refused(code, f"{command} ended with {process.returncode}: {message}; {next_step}")


def wrong_values(values: dict[str, Any], folder: Path | None, settings: list[str]) -> Iterator[str]:
    """Faults of the request that this machine can see."""
    try:
        wanted, sent = load(CONFIG, settings), load(CONFIG)
        paths = [(one.data.bag_dir, one.data.cache_dir, one.output_dir) for one in (wanted, sent)]
        if paths[0][reads_blob(settings) :] != paths[1][reads_blob(settings) :]:
            yield (
                "data.bag_dir, data.cache_dir, output_dir: are paths in the pod, see osmo-config.yaml; use --rosbags, "
                "data.bag_dir=https://... or --run"
            )
        if wanted.training.init_from:
            yield (
                f"training.init_from: {wanted.training.init_from}: is not in the pod, which has only recordings and the run's "
                "checkpoints; remove it, or run train.py on a machine that has it"
            )
    except Fault as fault:
        yield from fault.args
    for setting in settings:
        if any(mark in setting for mark in ("{{", "{%", "{#", "$$", "$(")):
            yield f"{setting}: the server or Kubernetes would expand this; put a space after the brace, remove the $"
    if not re.fullmatch(NAME, values["run"]):
        yield f"--run {values['run']}: expected at most 64 letters, digits, _ and -, a letter first, no _ or - last"
    if not re.fullmatch(r"[\w.:/-]+(@sha256:[0-9a-f]{64})?", values["image"]):
        yield f"--image {values['image']!r}: expected a name such as 192.168.1.100:5000/rosbag-act:latest"
    for key, least in (("gpus", 0), ("nodes", 1)):
        if values[key] < least:
            yield f"--{key} {values[key]}: expected at least {least}"
    if folder and not folder.is_dir():
        yield f"--rosbags {folder}: is not a folder here, nor a URL that begins with {', '.join(STORAGE)}"
    elif folder and not recordings(folder):
        yield f"--rosbags {folder}: no recordings (.mcap, .db3, .bag)"
    elif folder:
        linked = [
            path for path in sorted(folder.rglob("*")) if path.is_symlink() and path.is_dir() and recordings(path)
        ]
        if linked:
            yield (
                f"--rosbags {folder}: OSMO does not follow links to folders: {', '.join(map(str, linked))}; "
                f"copy them (cp -rL {shlex.quote(str(folder))} COPY) and give COPY"
            )
    if re.search(r"[^\w. /:@-]", folder.resolve().name if folder else values["rosbags"]):
        yield f"--rosbags {values['rosbags']}: becomes a URL; expected letters, digits, spaces and _ - . / only"


def wrong_scripts() -> Iterator[str]:
    """Template marks in the sent files, which the server would render."""
    sent = set(re.findall(r'"([\w/]+\.py)"', WORKFLOW.read_text()))
    for path in (*(TRAIN / name for name in sorted(sent)), CONFIG, HERE / "train.sh"):
        if not path.exists():
            yield f"{path}: missing; remove it from the files in {WORKFLOW.name}"
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if mark := re.search(r"\{[{%#]", line):
                yield f"{path}:{number}: the server would render {mark[0]}; put a space between the two"


def reads_blob(settings: list[str]) -> bool:
    """Whether the tasks read Azure Blob themselves; osmo-workflow.yaml tests the same words."""
    return any(setting.startswith("data.bag_dir=http") for setting in settings)


def check_command(server: str) -> None:
    """Raises Refused if the osmo command is missing."""
    if not shutil.which("osmo"):
        where = "install NVIDIA's OSMO client (install.sh of https://github.com/NVIDIA/OSMO)"
        raise Refused(2, f"osmo: command not found; {where}, then: osmo login {server}")


def check_login(server: str) -> None:
    """Raises Refused if the osmo command is missing, or not logged in to this server."""
    check_command(server)
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    file = Path(os.environ.get("OSMO_CONFIG_FILE_DIR") or Path(home) / "osmo") / "login.yaml"
    try:
        url = yaml.safe_load(file.read_text())["url"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise Refused(2, f"{file}: not logged in; osmo login {server}") from None
    try:
        here, there = urlsplit(url), urlsplit(server)
        elsewhere = here.hostname != there.hostname or (there.port and here.port != there.port)
    except ValueError as error:  # a wrong port, half an IPv6 address
        raise Fault(f"--server {server}, login {url}: {error}; expected one such as http://192.168.1.100") from None
    if elsewhere:
        raise Refused(2, f"{file}: logged in to {url}, not to {server}; osmo login {server}, or give --server {url}")


def wrong_version(dataset: str) -> Iterator[str]:
    """Faults of the versions of client and server."""
    versions = json.loads(osmo("version", "-t", "json"))
    client, service = (
        tuple(int(versions.get(side, {}).get(part, 0)) for part in ("major", "minor")) for side in ("client", "service")
    )
    if client < (6, 3):
        yield f"osmo: the client is {client[0]}.{client[1]}, expected 6.3 or later; install your server's version"
    if dataset and service >= (6, 4):
        yield f"--dataset {dataset}: OSMO 6.4 has no datasets; upload the recordings and give --rosbags URL"


def wrong_pool(name: str, platform: str) -> Iterator[str]:
    """Faults of the pool."""
    sets = json.loads(osmo("pool", "list", "-t", "json"))["node_sets"]
    pools = {pool["name"]: pool for one in sets for pool in one["pools"]}
    if name not in pools:
        yield f"--pool {name}: no such pool for you; pools: {', '.join(pools) or 'none'}"
    elif pools[name]["status"] != "ONLINE":
        yield f"--pool {name}: is {pools[name]['status']}, expected ONLINE; ask its administrator, or use another"
    elif platform and platform not in pools[name]["platforms"]:
        yield f"--platform {platform}: {name} has {', '.join(pools[name]['platforms'])}"


def still_running(run: str) -> Iterator[str]:
    """A running workflow that writes the checkpoints of the same run."""
    everybody = ("--name", run, "--all-users", "--count", "1000", "-t", "json")
    found = json.loads(osmo("workflow", "list", *everybody, "--status", *STILL))["workflows"]
    for workflow in found:
        if re.fullmatch(re.escape(run) + r"-\d+", workflow["name"]):
            yield (
                f"--run {run}: {workflow['name']} is {workflow['status']} and writes the same checkpoints; "
                f"cancel it (osmo workflow cancel {workflow['name']}), or use another --run"
            )


def recordings(folder: Path) -> set[str]:
    """The files of recordings in a folder, as paths below it."""
    files = (Path(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names)
    return {path for path in (file.relative_to(folder).as_posix() for file in files) if re.match(RECORDING, path)}


def listed(url: str, regex: str = RECORDING) -> set[str]:
    """The files below a URL, as paths below it; OSMO lists them from the container or bucket on."""
    answer = osmo("data", "list", url, "--recursive", "--no-pager", "--regex", regex, advice=DATA)
    keys = answer.rpartition("\nTotal ")[0].splitlines()
    parts = url.partition("://")[2].split("/")
    bases = ["/".join(parts[i:]) + "/" for i in range(len(parts))]
    return {key.removeprefix(next((base for base in bases if key.startswith(base)), "")) for key in keys if key}


def check_recordings(url: str) -> None:
    """Raises Fault if the URL has no recordings. The pod may read what cannot be listed from here."""
    try:
        found = listed(url)
    except Refused as refused:
        if "does not exist" in str(refused):  # the container or bucket
            raise
        print(f"note: {url} not checked from here: {refused}", file=sys.stderr)
        return
    if not found:
        raise Fault(f"{url}: no recordings (.mcap, .db3, .bag); upload some by --rosbags FOLDER, or give another URL")


def check_upload(folder: Path, url: str) -> None:
    """Raises Fault if the URL has not exactly the folder's recordings; OSMO's upload exits with 0 when files failed."""
    here, there = recordings(folder), listed(url)
    faults = [f"{url}/{name}: did not arrive; submit again" for name in sorted(here - there)]
    faults += [
        f"{url}/{name}: is not in {folder} and would be trained on; delete it (osmo data delete {url}/{name}), or "
        "rename your folder"
        for name in sorted(there - here)
    ]
    if faults:
        raise Fault(*faults)


def fetch(url: str, folder: Path) -> Path:
    """Download the newest complete checkpoint of a run and its config.yaml into a folder; returns its pretrained_model."""
    there = sorted(listed(f"{url}/checkpoints", ".*"))
    names = {path.partition("/")[0] for path in there if re.fullmatch(rf"checkpoint_\d+/{RESUME}", path)}
    for name in sorted(names, key=lambda name: int(name.partition("_")[2]), reverse=True):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary:
            half, wanted = Path(temporary), rf"{name}/|config\.yaml$"
            osmo("data", "download", f"{url}/checkpoints", temporary, "--regex", wanted, show=True, advice=DATA)
            if lost := [path for path in there if re.match(wanted, path) and not (half / path).exists()]:
                raise Fault(*(f"{url}/checkpoints/{path}: did not arrive; run the same command again" for path in lost))
            if lack := missing(half / name):
                print(f"{name}: skipping incomplete checkpoint: {lack}", file=sys.stderr)
                continue
            shutil.rmtree(folder / name, ignore_errors=True)  # of an earlier run of the same name
            (half / name).rename(folder / name)
            if (half / "config.yaml").exists():
                (half / "config.yaml").replace(folder / "config.yaml")
        return folder / name / "pretrained_model"
    raise Fault(f"{url}/checkpoints: no complete checkpoint yet; see the run's log")


if __name__ == "__main__":
    with exit_with_message():
        main()
