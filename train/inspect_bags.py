"""Print what each recording contains, and whether it can be trained on, before a GPU hour is spent.

    python train/inspect_bags.py                        # every recording of train/config.yaml
    python train/inspect_bags.py --config my.yaml data.fps=15
    python train/inspect_bags.py PATH...                # any recordings, without a configuration; also a URL of Azure Blob
    python train/inspect_bags.py PATH --propose > my.yaml
    python train/inspect_bags.py --html report.html     # a page;  --json: one document for other programs

Exit codes: 0 all can be trained on; 1 some cannot.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from blob_url import BlobUrl, is_url
from config import Config, Data, load
from faults import Fault, exit_with_message, printable
from files import write_whole
from inspection.propose import propose
from inspection.report import page
from inspection.topics import SECOND, Spread, Topic
from inspection.verdict import BAD, GOOD, USABLE, Inspection, inspect
from recordings.azure_blob import local_folder
from recordings.bags import Bag, find_bags

COLUMNS = 100
HEAD = (
    ("topic", "type", "messages", "Hz", "slowest", "largest", "at", "header", "minus", "receive"),
    ("", "", "", "median", "second", "gap", "s", "median", "95 %", "most, ms"),
)


def table(one: Inspection, config: Config | None) -> str:
    """A recording, at most 100 columns wide."""
    files = f"{len(one.files)} files" if len(one.files) > 1 else next(iter(one.files)).rsplit("/", 1)[-1]
    started = datetime.fromtimestamp(one.start_ns // SECOND, UTC).strftime("; %Y-%m-%d %H:%M:%S UTC") * (
        not one.is_empty
    )
    size = sum(one.files.values()) / 1e6
    lines = [one.name, f"{files}; {size:.1f} MB; {one.seconds:.1f} s{started}; checksums: {one.checksums}"]
    shown = [topic for topic in one.topics.values() if topic.read or topic.declared]
    lines += _columns([*HEAD, *map(_row, shown)]) if shown else []
    if silent := [topic.name for topic in one.topics.values() if topic not in shown]:
        lines.append(f"without messages: {', '.join(silent)}")
    lines += [line for topic in shown for line in _details(topic)]
    lines += _alignment(one, config) if config else []
    for word, texts in (("note", one.notes), ("warning", one.warnings), ("error", one.faults)):
        lines += [f"{word}: {text}" for text in texts]
    wrapped = [lines[0], *(row for line in [*lines[1:], f"verdict: {one.verdict}"] for row in _wrapped(line))]
    return "\n".join(map(printable, wrapped))


def _wrapped(line: str) -> list[str]:
    if len(line) <= COLUMNS - 2:
        return [f"  {line}"]  # with its columns
    return textwrap.wrap(line, COLUMNS, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _columns(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Rows as lines: texts left, numbers right; a name too long for its column gets a line of its own."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[1] = min(widths[1], 18)
    widths[0] = min(widths[0], COLUMNS - 2 - sum(widths[1:]) - len(widths[1:]))
    for name, kind, *numbers in rows:
        if len(name) > widths[0]:
            yield name
            name = ""
        cells = [number.rjust(width) for number, width in zip(numbers, widths[2:], strict=True)]
        yield f"{name:{widths[0]}} {kind[: widths[1]]:{widths[1]}} {' '.join(cells)}".rstrip()


def _row(topic: Topic) -> tuple[str, ...]:
    """A topic's row under HEAD."""
    gap, late = topic.largest_gap, topic.header_minus_receive_ms
    counts = dict.fromkeys([f"{topic.read}", f"{topic.read if topic.declared is None else topic.declared}"])
    return (
        topic.name,
        "+".join(name.split("/")[-1] for name in topic.types) or "-",
        "/".join(counts),
        _number(topic.rate_hz),
        _number(topic.slowest_second_hz),
        (f"{gap.seconds * 1e3:.0f} ms" if gap.seconds < 1 else f"{gap.seconds:.1f} s") if gap else "-",
        _number(gap.at_s) if gap else "-",
        *(map(_number, late) if late else "---"),
    )


def _details(topic: Topic) -> Iterator[str]:
    """What the table has no column for: distrusted stamps, pictures, joints."""
    if topic.in_order is not None and topic.clock != "header":
        yield f"{topic.name}: by {topic.clock}"
    if topic.not_understood:
        yield f"{topic.name}: counted only, the bag has no definition of its type"
    if pictures := topic.pictures:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in pictures.kinds.items())
        black = f", {pictures.black} black of {pictures.looked_at} checked" if pictures.looked_at else ""
        yield f"{topic.name}: {kinds}; {len(pictures.frozen)} frozen{black}"
    if topic.joints:
        yield f"{topic.name + ': joint':46}{'least':>12}{'greatest':>12}{'fastest, per s':>22}"
    for joint in topic.joints:
        fastest = f"{joint.fastest:.3f} at {joint.fastest_at_s:.1f} s"
        fastest = f"{joint.not_finite} not finite" if joint.not_finite else fastest
        yield f"  {joint.name:44}{joint.least:>12.4f}{joint.greatest:>12.4f}{fastest:>22}"


def _alignment(one: Inspection, config: Config) -> Iterator[str]:
    """How the configured topics fit together in time."""
    if one.overlap_s:
        yield f"all topics of the configuration: t+{one.overlap_s[0]:.2f} to t+{one.overlap_s[1]:.2f} s"
    if ticks := [ticks for _, ticks in one.episodes()]:
        yield (
            f"{len(ticks)} episodes, {sum(ticks)} ticks at {config.data.fps:g} Hz, shortest {min(ticks)}, longest {max(ticks)}"
        )
    spreads = {f"picture of {camera}": spread for camera, spread in one.state_minus_image_ms.items()}
    spreads |= {f"command {topic}": spread for topic, spread in one.state_minus_command_ms.items()}
    for what, spread in spreads.items():
        yield f"state minus {what}: {_spread(spread)}"
    if one.lag:
        share = f"{one.lag.explained:.0%} of its motion"
        yield f"the state follows the command {one.lag.seconds * 1e3:.0f} ms later (explains {share})"
    if one.idle_s:
        yield f"idle: {one.idle_s[0]:.1f} s before the first motion, {one.idle_s[1]:.1f} s after the last"


def _spread(spread: Spread) -> str:
    middle, wide, all_ = map(_number, spread)
    return f"median {middle}, 95 % within {wide}, all within {all_} ms"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if abs(value) < 1e4 else f"{value:.1e}".replace("e+0", "e")


def summary(verdicts: Counter[str], faults: int, configured: bool) -> str:
    """How many recordings have each verdict, and what to do next."""
    counts = [f"{verdicts[word]} {word}" for word in (GOOD, USABLE, BAD) if verdicts[word]]
    counts += [f"{faults} unreadable"] if faults else []
    if verdicts[BAD] or faults:
        todo = "fix the lines marked `error:`, or remove those recordings"
    elif not configured:
        todo = "`--propose` prints a configuration for them"
    elif verdicts[USABLE]:
        todo = "read the lines marked `warning:`, then run `python train/train.py --dry-run`"
    else:
        todo = "run `python train/train.py --dry-run`"
    return f"{sum(verdicts.values()) + faults} recordings: {', '.join(counts)}; {todo}"


def _find(arguments: argparse.Namespace) -> tuple[Config | None, list[str], list[Bag], list[str]]:
    """The configuration, if one is wanted; the places of the recordings; these; the faults of unreadable ones."""
    # Path.exists raises for a long setting
    paths = [item for item in arguments.what if "=" not in item or is_url(item) or os.path.exists(item)]  # noqa: PTH110
    overrides = [item for item in arguments.what if item not in paths]
    config = None
    if not paths or arguments.config or overrides:
        config = load(arguments.config or Path(__file__).with_name("config.yaml"), overrides)
    bags: list[Bag] = []
    faults: list[str] = []
    data = config.data if config else Data()
    places = paths or [str(data.bag_dir)]
    for place in places:
        try:
            folder = local_folder(BlobUrl(place) if is_url(place) else Path(place), data.cache_dir)
            found, broken = find_bags(folder)
            bags, faults = bags + found, faults + broken
        except (Fault, ValueError) as fault:  # ValueError: a wrong URL
            faults += [line.removeprefix("data.bag_dir: ") if paths else line for line in fault.args]
    return config, places, bags, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="PATH | key=value", help="recordings or their folders; settings")
    parser.add_argument("--config", type=Path, metavar="FILE", help="default without PATH: train/config.yaml")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page, in one file")
    parser.add_argument("--no-pictures", action="store_true", help="decode no pictures: faster, finds no black ones")
    parser.add_argument("--propose", action="store_true", help="print a configuration that fits the recordings")
    arguments = parser.parse_intermixed_args()
    with exit_with_message():
        if arguments.html and not find_spec("matplotlib"):
            raise Fault("--html: needs matplotlib: pip install matplotlib")
        config, places, bags, faults = _find(arguments)
        if not bags or (arguments.propose and faults):
            raise Fault(*faults)
        if arguments.propose:
            if len(places) > 1:
                raise Fault(
                    f"--propose: {len(places)} places; expected one folder with all recordings, for data.bag_dir"
                )
            print(propose(bags, places[0]), end="")
            return
        inspections = []
        for bag in tqdm(bags, desc="inspecting", unit="bag", disable=not (arguments.json or arguments.html)):
            inspections.append(inspect(bag, config, not arguments.no_pictures))
            if not arguments.json:
                print(table(inspections[-1], config), end="\n\n", flush=True)
        if arguments.html:
            write_whole(arguments.html, page(inspections, config, faults))
        verdicts = Counter(one.verdict for one in inspections)
        last = summary(verdicts, len(faults), config is not None)
        if arguments.json:
            trees = [one.to_json() for one in inspections]
            print(json.dumps({"recordings": trees, "faults": faults, "summary": last}, indent=1, allow_nan=False))
        else:
            print("\n".join([*(f"error: {fault}" for fault in faults), *textwrap.wrap(last, COLUMNS)]))
        sys.exit(1 if verdicts[BAD] or faults else 0)


if __name__ == "__main__":
    main()
