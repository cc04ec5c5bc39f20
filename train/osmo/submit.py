"""Submit the training to OSMO: check, validate, upload local recordings, submit once, print the next commands.

    python train/osmo/submit.py --rosbags bags/ --run cups --gpus 8 --set memory=64 training.steps=20000
    python train/osmo/submit.py data.bag_dir=https://ACCOUNT.blob.core.windows.net/CONTAINER/PREFIX --set azure_cred=NAME
    python train/osmo/submit.py --fetch cups                          # the newest checkpoint of a run, into outputs/osmo/cups

Exit codes: 0 submitted; 1 error to fix; 2 not logged in or not allowed; 10 server not reached; 75 too many requests; 130 Ctrl-C.
"""

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
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from config import ROOT, load  # noqa: E402 -- from the folder above
from faults import Fault, exit_with_message  # noqa: E402
from training.run_folder import RESUME, missing  # noqa: E402

WORKFLOW, CONFIG = HERE / "osmo-workflow.yaml", HERE / "osmo-config.yaml"
RECORDING = r"(.*/)?(metadata\.yaml|.*\.(bag|db3|mcap)[^/]*)$"  # as in osmo-workflow.yaml
STILL = ("PENDING", "RUNNING", "WAITING")  # states before the end of a workflow


def main() -> None:
    try:
        defaults = yaml.safe_load(WORKFLOW.read_text().partition("\ndefault-values:\n")[2])
        if wrong := [key for key in ("run", "runs", "rosbags", "settings") if not isinstance(defaults[key], str)]:
            raise ValueError(f"{', '.join(wrong)}: expected text, in quotes")
        shlex.split(defaults["settings"])  # an open quote
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise Fault(f"{WORKFLOW}: default-values: {' '.join(str(error).split())}") from None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://192.168.1.100", metavar="URL", help="the OSMO server [%(default)s]")
    parser.add_argument("--pool", default="gpu-pool", help="[%(default)s]")
    parser.add_argument("--priority", choices=("HIGH", "NORMAL", "LOW"), help="LOW may be pre-empted, and is run again")
    for key in ("run", "rosbags", "gpus"):
        parser.add_argument(f"--{key}", help=f"short for --set {key}=... [{defaults.get(key)}]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"any of {', '.join(defaults)}")
    parser.add_argument("--dry-run", action="store_true", help="print the osmo commands, run none")
    parser.add_argument("--follow", action="store_true", help="stream the log; exit code 0 if the run completed")
    parser.add_argument("--fetch", metavar="RUN", help="download the newest checkpoint of a run to outputs/osmo/RUN")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the training: training.steps=20000")
    arguments = parser.parse_intermixed_args()
    if wrong := [word for word in arguments.set if not re.match(rf"(?!settings)({'|'.join(defaults)})=", word)]:
        raise Fault(f"--set {', '.join(wrong)}: expected KEY=VALUE, a key of {', '.join(defaults)}")
    chosen = dict(word.partition("=")[::2] for word in arguments.set)
    chosen |= {key: given for key in ("run", "rosbags", "gpus") if (given := getattr(arguments, key)) is not None}
    chosen |= {"settings": shlex.join(arguments.settings)} if arguments.settings else {}
    if arguments.fetch is None:
        return submit(arguments, defaults, chosen)
    check_login(arguments.server)
    return print(fetch(f"{(defaults | chosen)['runs']}/{arguments.fetch}", ROOT / "outputs/osmo" / arguments.fetch))


def submit(arguments: argparse.Namespace, defaults: dict[str, Any], chosen: dict[str, str]) -> None:
    """Settings, login, alone, validate, upload, check, submit: what the server refuses costs no upload."""
    run, rosbags, settings = ((defaults | chosen)[key] for key in ("run", "rosbags", "settings"))
    check_settings(shlex.split(settings))
    folder = None if "://" in rosbags else Path(rosbags).resolve()
    if folder and ("data.bag_dir=http" in settings or not recordings(folder)):
        raise Fault(f"--rosbags {rosbags}: expected a URL, or a folder with recordings; not also data.bag_dir=http...")
    chosen |= {"rosbags": f"{defaults['rosbags']}/{folder.name}"} if folder else {}
    workflow = [str(WORKFLOW), "--pool", arguments.pool]
    for flag, number in (("--set", True), ("--set-string", False)):
        words = [f"{key}={value}" for key, value in chosen.items() if isinstance(defaults[key], int) == number]
        workflow += [flag, *words] if words else []
    priority = ["--priority", arguments.priority] if arguments.priority else []
    validate, send = ["workflow", "validate", *workflow], ["workflow", "submit", *workflow, "-t", "json", *priority]
    upload = [["data", "upload", defaults["rosbags"], str(folder), "--regex", RECORDING]] if folder else []
    if arguments.dry_run:
        return print("\n".join(shlex.join(["osmo", *command]) for command in (validate, *upload, send)))

    check_login(arguments.server)
    everybody = ("--name", run, "--all-users", "--count", "1000", "-t", "json", "--status", *STILL)
    for one in osmo("workflow", "list", *everybody)["workflows"]:
        if re.fullmatch(re.escape(run) + r"-\d+", name := one["name"]):  # such as one whose answer was cut off
            raise Fault(f"--run {run}: {name} writes its checkpoints; osmo workflow cancel {name}, or another --run")
    if arguments.priority != "LOW":  # validate knows no priority, and refuses what LOW may use
        osmo(*validate)
    if folder:
        osmo(*upload[0], show=True)  # ends with 0 when files failed
        here, there, url = recordings(folder), listed(chosen["rosbags"]), chosen["rosbags"]
        faults = [f"{url}/{name}: did not arrive; submit again (no linked folders)" for name in here - there]
        faults += [f"{url}/{name}: is not in {folder}; delete it (osmo data delete)" for name in there - here]
        if faults:
            raise Fault(*sorted(faults))
    try:
        name = osmo(*send)["name"]
    except (KeyboardInterrupt, Fault, KeyError, TypeError) as error:
        if re.search(r"\(4\d\d\)$", str(error)):  # a code of HTTP: the server's no
            raise
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "code", 1)
        look = f"it may have been accepted: check `osmo workflow list --name {run}` before you submit again"
        raise Fault(f"osmo workflow submit: {str(error) or 'interrupted'}; {look}", code=code) from None
    print(f"submitted   {name} to {arguments.pool} at {arguments.server}\nlog         osmo workflow logs {name}")
    print(f"checkpoint  python train/osmo/submit.py --fetch {run}", flush=True)
    status = "PENDING" if arguments.follow else "COMPLETED"
    while status in STILL:
        subprocess.run(["osmo", "workflow", "logs", name], check=False)
        status = osmo("workflow", "query", name, "-t", "json")["status"]
        print(f"{name}: {status}", flush=True)
        time.sleep(5 if status in STILL else 0)
    sys.exit(status != "COMPLETED")


def osmo(*arguments: str, show: bool = False) -> Any:
    """What an osmo command answers; with `show` it prints to the terminal. Raises Fault with its exit code if it fails."""
    done = subprocess.run(["osmo", *arguments], stdout=None if show else subprocess.PIPE, text=True, check=False)
    if done.returncode:
        said = " ".join((done.stdout or "see above").partition("Traceback")[0].split())
        if found := re.fullmatch(r'\{"message": (".*"), "code": (\d+).*', said):
            said = f"{' '.join(json.loads(found[1]).split())} ({found[2]})"
        raise Fault(f"osmo {' '.join(arguments[:2])}: {said[:1000]}", code=done.returncode)
    try:
        return json.loads(done.stdout) if "json" in arguments else done.stdout
    except ValueError:
        raise Fault(f"osmo {' '.join(arguments[:2])}: answered {done.stdout[:200]!r}, expected JSON") from None


def check_settings(settings: list[str]) -> None:
    """Raises Fault for settings that train.py does not know, and for text that the server or Kubernetes would change."""
    load(CONFIG, settings)
    sent = [HERE.parent / name for name in re.findall(r'"([\w/]+\.py)"', WORKFLOW.read_text())]
    texts = {str(path): path.read_text() for path in (*sent, CONFIG, HERE / "train.sh") if path.exists()}
    texts |= {setting: re.sub(r"\$[$(]", "{{", setting) for setting in settings}
    if faults := [place for place, text in texts.items() if re.search(r"\{[{%#]", text)]:
        raise Fault(*(f"{place}: the server would change its braces or $; put a space between" for place in faults))


def check_login(server: str) -> None:
    """Raises Fault if the osmo command is missing or logged in to another server: it uses that of the last login."""
    if not shutil.which("osmo"):
        raise Fault(f"osmo: command not found; install it (train/osmo/README.md), then: osmo login {server}", code=2)
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "osmo")
    file = Path(os.environ.get("OSMO_CONFIG_FILE_DIR") or home, "login.yaml")
    url = (re.findall(r"^url: *(\S+)", file.read_text() if file.exists() else "", re.M) or ["nothing"])[0]
    here, there = (re.sub(r"^\w+://|(:80|:443)?/*$", "", one) for one in (url, server))
    if here != there:
        raise Fault(f"{file}: logged in to {url}, expected {server}; osmo login {server}, or --server", code=2)


def recordings(folder: Path) -> set[str]:
    """The files of recordings in a folder, as paths below it."""
    files = [Path(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names]
    return {path for file in files if re.match(RECORDING, path := file.relative_to(folder).as_posix())}


def listed(url: str, regex: str = RECORDING) -> set[str]:
    """The files below a URL, as paths below it; OSMO lists them from the container or bucket on."""
    keys = (
        osmo("data", "list", url, "--recursive", "--no-pager", "--regex", regex).rpartition("\nTotal ")[0].split("\n")
    )
    parts = url.partition("://")[2].split("/")
    bases = ["/".join(parts[i:]) + "/" for i in range(len(parts))]
    return {key.removeprefix(next((base for base in bases if key.startswith(base)), "")) for key in keys if key}


def fetch(url: str, folder: Path) -> Path:
    """Download the newest complete checkpoint of a run and its config.yaml into a folder; returns its pretrained_model."""
    there = listed(f"{url}/checkpoints", rf"checkpoint_\d+/{RESUME}$")
    for name in sorted((path.partition("/")[0] for path in there), key=lambda name: int(name[11:]), reverse=True):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as half:
            osmo("data", "download", f"{url}/checkpoints", half, "--regex", rf"{name}/|config\.yaml$", show=True)
            if lack := missing(Path(half, name)):
                print(f"{name}: skipping incomplete checkpoint: {lack}", file=sys.stderr)
                continue
            shutil.rmtree(folder / name, ignore_errors=True)  # of an earlier run of the same name
            for path in Path(half).iterdir():
                path.replace(folder / path.name)
        return folder / name / "pretrained_model"
    raise Fault(f"{url}/checkpoints: no complete checkpoint arrived; see the run's log")


if __name__ == "__main__":
    with exit_with_message():
        main()
