"""What no configuration and no recording should hold, and folders with odd names: a Fault within 10 s and 1 GB, or it works."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml
from abuse.promise import Promise
from abuse.runs import SMALL, Runs
from writing import KINDS, episode, write

import config as settings
from config import load
from inspection.verdict import inspect
from policy.runner import Policy
from recordings.bags import find_bags
from training.run_folder import files_of

ODD = (
    "a b",
    " a",
    "a ",
    "ä",
    "手",
    "a'b",
    'a"b',
    "a\nb",
    "a\tb",
    "-a",
    "~a",
    "$HOME",
    "%s{0}",
    "a#b",
    "a*[b]?",
    "a:b=c",
    "a" * 250,
)
WORDS = (
    *(
        "1",
        "-1",
        "1e400",
        ".nan",
        "0x10",
        "true",
        "null",
        "[]",
        "{}",
        "[[1]]",
        "{a: [1]}",
        "x",
        "''",
        '"\\0"',
        '"\\ud800"',
    ),
    *(
        "9" * 400,
        "'" + "a" * 5000 + "'",
        "[" * 400,
        "2001-99-99",
        "1:30",
        "&a [*a]",
        "*x",
        "<<: 1",
        "'open",
        "a: b: c",
        "@",
        "\t",
    ),
    *(f"!!{tag} x" for tag in ("int", "float", "bool", "timestamp", "set", "omap", "binary", "python/name:os.system")),
    *(
        "https://",
        "~nosuch/x",
        "/dev/null/x",
        "a/../..",
        "{? [a] : b}",
        "{1: 2}",
        "{color: [0, 0, 2, 1]}",
        "[{topik: x}]",
    ),
)


def configurations(folder: Path, tries: int, rng: random.Random) -> Promise:
    """Values, mappings and texts that no configuration has."""
    promise, file = Promise("configurations that make no sense"), folder / "config.yaml"
    folder.mkdir(exist_ok=True)
    keys = [key for key, _, _ in settings.rows() if "[]" not in key]
    default = settings.dump(load(None))

    def mutated() -> str:
        text = default
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(text))
            text = (
                text[:at]
                + rng.choice((*WORDS, "\n", "  - ", chr(rng.randrange(1, 768))))
                + text[at + rng.randint(0, 5) :]
            )
        return text

    make: list[Callable[[], tuple[str, list[str]]]] = [
        lambda: ("{}", [f"{rng.choice(keys)}={rng.choice(WORDS)}" for _ in range(rng.randint(1, 3))]),
        lambda: (f"{rng.choice(keys).replace('.', ': {')}: {rng.choice(WORDS)}}}", []),
        lambda: (mutated(), []),
    ]
    for _ in range(tries):
        text, overrides = rng.choice(make)()
        file.write_text(text)
        with promise.attempt(f"{text[:60]!r} {overrides}"):
            load(file, overrides)
    return promise


def recordings(folder: Path, tries: int, rng: random.Random) -> Promise:
    """Recordings of each kind with flipped, lost, repeated and huge numbers."""
    promise, place = Promise("hostile recordings, 10 s and 1 GB"), folder / "hostile"
    sources = []
    for kind in KINDS:
        write(folder / kind, episode(0.5))
        sources += [file for file in files_of(folder) if file.stem == kind or file.parent.name == kind]
    storage = [file for file in dict.fromkeys(sources) if file.name != "metadata.yaml"]
    for number in range(tries):
        file = storage[number % len(storage)]
        content = file.read_bytes()
        for _ in range(rng.randint(1, 4)):
            near = rng.randrange(min(600, len(content)))  # the header or the end, where the structure is
            at = rng.choice((near, len(content) - 1 - near, rng.randrange(len(content))))
            new = rng.choice((b"", b"\xff" * 8, bytes(8), rng.randbytes(1), content[near : near + rng.randrange(2000)]))
            content = (
                content[:at] + new + content[at + rng.randrange(300) * (rng.random() < 0.3) + len(new) % 9 :] or b"\0"
            )
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / file.name).write_bytes(content)
        with promise.attempt(f"{file.name}, seed and number {number}"):
            for bag in find_bags(place)[0]:
                inspect(bag)
    return promise


def odd_paths(folder: Path) -> Promise:
    """A run whose recordings, cache and output lie in a folder with an odd name."""
    promise = Promise("folders with odd names")
    runs = Runs(folder / "plain", *SMALL, "training.steps=3")
    for name in ODD:
        place = folder / name
        shutil.copytree(folder / "plain/bags", place / "bags")
        tree = yaml.safe_load(runs.path.read_text())
        tree["data"] |= {"bag_dir": f"{place}/bags", "cache_dir": f"{place}/cache"}
        runs.path.write_text(yaml.safe_dump(tree | {"output_dir": f"{place}/run"}, allow_unicode=True))
        process = runs.start()
        process.join()
        if wrong := runs.unclear(process, (0,)):
            promise.judge(repr(name), wrong)
            continue
        with promise.attempt(repr(name)):
            Policy.load(place / "run/checkpoint_000003/pretrained_model").act({"state": [0.1, 0.2, 0.3]})
    return promise
