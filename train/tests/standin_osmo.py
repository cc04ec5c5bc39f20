#!/usr/bin/env python3
"""A stand-in for the `osmo` command, because there is no server: each answer is what releases 6.3.1 and 6.4 gave.

Its world is the folder $OSMO_STANDIN: calls.jsonl (every call), storage/ACCOUNT/CONTAINER/..., workflows.json, and
answers.json: {"workflow submit": [exit code, what it prints]} in place of the answers below.
"""

import json
import os
import re
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

WORLD = Path(os.environ.get("OSMO_STANDIN", ""))
ARGUMENTS = sys.argv[1:]
VALUED = ("--regex", "-x", "-t", "--name", "--access-type", "--pool", "--priority", "--count")


def answer(text: object, code: int = 0) -> None:
    print(text if isinstance(text, str) else json.dumps(text))
    sys.exit(code)


def value(flag: str) -> str:
    return ARGUMENTS[ARGUMENTS.index(flag) + 1] if flag in ARGUMENTS else ""


def stored(url: str) -> Path:
    return WORLD / "storage" / url.removeprefix("azure://")


def fill(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def data(verb: str, url: str, *local: str) -> None:
    container = stored("/".join(url.removeprefix("azure://").split("/")[:2]))
    matching = re.compile(value("--regex") or value("-x") or ".*").match  # regex: re.match on the path below the URL
    if verb == "check":  # always exit code 0, the status tells
        found = {"status": "pass"} if container.is_dir() else {"status": "fail", "error": "ContainerNotFound"}
        answer(found)
    if verb == "upload":  # `dir` goes to URL/dir; a container that is not there: exit code 0, and words on stderr
        if not container.is_dir():
            print("Upload Failed on files:", file=sys.stderr)
            sys.exit(0)
        for source in map(Path, local):
            for file in [source] if source.is_file() else [file for file in source.rglob("*") if file.is_file()]:
                name = file.relative_to(source.parent).as_posix()
                if matching(name):
                    fill(file, stored(url) / name)
        sys.exit(0)
    if not container.is_dir():  # list and download of a container that is not there: exit code 2
        answer("Error message: The specified container does not exist.\nTraceback (most recent call last):", 2)
    files = [file for file in sorted(stored(url).rglob("*")) if file.is_file()]
    files = [file for file in files if matching(file.relative_to(stored(url)).as_posix())]
    if verb == "list":  # keys from the container on, an empty line, a count; nothing found is exit code 0
        keys = [file.relative_to(container).as_posix() for file in files]
        answer("".join(f"{key}\n" for key in keys) + f"\nTotal {len(keys)} objects found")
    for file in files:  # download: the contents of the folder; the local folder must be there
        fill(file, Path(local[0], file.relative_to(stored(url))))


def main() -> None:
    with (WORLD / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(ARGUMENTS) + "\n")
    command = " ".join(ARGUMENTS[:2])
    wanted = json.loads((WORLD / "answers.json").read_text()) if (WORLD / "answers.json").exists() else {}
    if command in wanted:
        code, text = wanted[command]
        if code == "sleep":  # a server that does not answer; the client ends with 3 at Ctrl-C
            with suppress(KeyboardInterrupt):
                time.sleep(60)
            sys.exit(3)
        answer(text, code)
    workflows = json.loads((WORLD / "workflows.json").read_text()) if (WORLD / "workflows.json").exists() else []
    match command:
        case "workflow list":  # --name: whose name contains it
            answer({"workflows": [one for one in workflows if value("--name") in one["name"]]})
        case "workflow validate":
            answer("Workflow validation succeeded.")
        case "workflow submit":  # `name` is the workflow's ID
            answer({"name": "train-rosbag-act-7", "overview": "http://192.168.1.100/workflows/train-rosbag-act-7"})
        case "workflow query":
            answer({"name": ARGUMENTS[2], "status": "COMPLETED"})
        case "workflow logs":
            answer("2026/11/23 [node-0] training: 90 recordings")
    flags = {i for i, word in enumerate(ARGUMENTS) if word.startswith("-")}
    skipped = flags | {i + 1 for i in flags if ARGUMENTS[i] in VALUED}
    data(*(word for i, word in enumerate(ARGUMENTS) if i >= 1 and i not in skipped))


if __name__ == "__main__":
    main()
