"""Say of every recording what is in it, and whether it can be trained on, before a GPU hour is spent.

    python train/inspect_bags.py                        # every recording of train/config.yaml
    python train/inspect_bags.py --config my.yaml data.fps=15
    python train/inspect_bags.py PATH...                # any recording, without a configuration; a URL of Azure Blob, too
    python train/inspect_bags.py PATH --propose > my.yaml
    python train/inspect_bags.py --html report.html     # to look at;  --json: one document for other programs

Ends with 0 when all can be trained on, 1 when one cannot.
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
from typing import Any

from tqdm import tqdm

from blob_url import BlobUrl, is_url
from config import Config, Data, load
from faults import Fault, exit_with_message
from files import write_whole
from inspection.topics import SECOND, Spread, Topic
from inspection.verdict import BAD, GOOD, USABLE, Inspection, inspect
from recordings.azure_blob import local_folder
from recordings.bags import Bag, find_bags

COLUMNS = 100
HEAD = (
    ("topic", "type", "messages", "Hz", "slowest", "largest", "when", "header", "minus", "receive"),
    ("", "", "", "median", "second", "gap", "s", "median", "95 %", "most, ms"),
)


def table(found: Inspection, config: Config | None) -> str:
    """All of a recording, 100 columns wide."""
    files = f"{len(found.files)} files" if len(found.files) > 1 else next(iter(found.files)).rsplit("/", 1)[-1]
    began = datetime.fromtimestamp(found.start_ns // SECOND, UTC).strftime("; %Y-%m-%d %H:%M:%S UTC")
    size = sum(found.files.values()) / 1e6
    lines = [
        found.name,
        *_wrapped(f"{files}; {size:.1f} MB; {found.seconds:.1f} s{began}; checksums: {found.checksums}"),
    ]
    spoken = [topic for topic in found.topics.values() if topic.read or topic.stored or topic.declared]
    if spoken:
        lines += _columns([*HEAD, *map(_row, spoken)])
    if silent := [topic.name for topic in found.topics.values() if topic not in spoken]:
        lines += _wrapped(f"without a message: {', '.join(silent)}")
    for topic in spoken:
        lines += _more_lines(topic)
    if config:
        lines += _alignment_lines(found, config)
    for word, texts in (("note", found.notes), ("warning", found.warnings), ("error", found.faults)):
        lines += [line for text in texts for line in _wrapped(f"{word}: {text}")]
    return "\n".join([*lines, f"  verdict: {found.verdict}"])


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _columns(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Rows as lines: texts to the left, figures to the right; a name too long for its column has a line of its own."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[1] = min(widths[1], 18)
    widths[0] = min(widths[0], COLUMNS - 2 - sum(widths[1:]) - len(widths[1:]))
    for name, kind, *figures in rows:
        if len(name) > widths[0]:
            yield f"  {name}"
            name = ""
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[2:], strict=True)]
        yield f"  {name:{widths[0]}} {kind[: widths[1]]:{widths[1]}} {' '.join(cells)}".rstrip()


def _row(topic: Topic) -> tuple[str, ...]:
    """A topic's line of the table, as HEAD says."""
    count = f"{topic.read}"
    if topic.read != topic.stored:
        count = f"{topic.read}/{topic.stored}"
    elif topic.declared is not None and topic.read != topic.declared:
        count = f"{topic.read}/{topic.declared}"
    gap, late = topic.largest_gap, topic.header_minus_receive_ms
    return (
        topic.name,
        "+".join(name.split("/")[-1] for name in topic.types) or "-",
        count,
        _number(topic.rate_hz),
        _number(topic.slowest_second_hz),
        _time(gap.seconds) if gap else "-",
        _number(gap.at_s) if gap else "-",
        *(map(_number, late) if late else "---"),
    )


def _more_lines(topic: Topic) -> Iterator[str]:
    """What the table has no column for: stamps that cannot be trusted, joints and pictures."""
    if topic.header_minus_receive_ms and topic.clock != "header":
        yield from _wrapped(f"{topic.name}: by {topic.clock}")
    if topic.not_understood:
        yield f"  {topic.name}: counted only, its type has no definition here that fits"
    if topic.pictures:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in topic.pictures.kinds.items())
        looked = (
            f", {topic.pictures.black} black of {topic.pictures.looked_at} looked at"
            if topic.pictures.looked_at
            else ""
        )
        yield from _wrapped(f"{topic.name}: {kinds}; {len(topic.pictures.frozen)} frozen{looked}")
    if topic.joints:
        yield f"  {topic.name + ': joint':46}{'least':>12}{'greatest':>12}{'fastest, per s':>22}"
        for joint in topic.joints:
            fastest = f"{joint.fastest:.3f} at {joint.fastest_at_s:.1f} s"
            yield f"    {joint.name:44}{joint.least:>12.4f}{joint.greatest:>12.4f}{fastest:>22}"


def _alignment_lines(found: Inspection, config: Config) -> Iterator[str]:
    if found.overlap_s:
        begin, end = found.overlap_s
        yield f"  all topics of the configuration: t+{begin:.2f} to t+{end:.2f} s"
    if found.recording is None:
        return
    lengths = [len(episode.ticks) for episode in found.recording.episodes]
    yield f"  {len(lengths)} episodes, {sum(lengths)} ticks at {config.data.fps:g} Hz, the shortest {min(lengths)}, the longest {max(lengths)}"
    for camera, spread in found.state_minus_image_ms.items():
        yield f"  state minus picture of {camera}: {_spread(spread)}"
    for topic, spread in found.state_minus_command_ms.items():
        yield f"  state minus command {topic}: {_spread(spread)}"
    if found.lag:
        yield f"  the state follows the command {found.lag.seconds * 1e3:.0f} ms later (this explains {found.lag.explained:.0%} of its motion)"
    if found.idle_s:
        yield f"  idle: {found.idle_s[0]:.1f} s before the first motion, {found.idle_s[1]:.1f} s after the last"


def _spread(spread: Spread) -> str:
    return f"median {_number(spread.median)}, 95 % within {_number(spread.percentile_95)}, all within {_number(spread.greatest)} ms"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if abs(value) < 1e4 else f"{value:.1e}".replace("e+0", "e")


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def closing(verdicts: Counter[str], faults: int, configured: bool) -> str:
    """How many recordings there are of each verdict, and what to do next."""
    counts = [f"{verdicts[word]} {word}" for word in (GOOD, USABLE, BAD) if verdicts[word]]
    counts += [f"{faults} with a fault that keeps it from being looked into"] if faults else []
    if verdicts[BAD] or faults:
        todo = "mend what stands behind `error:`, or move those recordings away"
    elif not configured:
        todo = "`--propose` prints a configuration for them"
    elif verdicts[USABLE]:
        todo = "look at what stands behind `warning:`, then `python train/train.py --dry-run`"
    else:
        todo = "`python train/train.py --dry-run` reads them for training"
    return f"{sum(verdicts.values()) + faults} recordings: {', '.join(counts)}; {todo}"


def _bags(arguments: argparse.Namespace) -> tuple[Config | None, list[str], list[Bag], list[str]]:
    """The configuration, if one is wanted; where recordings are; these; the faults of those that cannot be told."""
    # Path.exists fails on a long setting
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
            some, unread = find_bags(folder)
            bags, faults = bags + some, faults + unread
        except Fault as fault:
            faults += [line.removeprefix("data.bag_dir: ") if paths else line for line in map(str, fault.args)]
    return config, places, bags, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="PATH | key=value", help="recordings or folders of them; settings")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="by default train/config.yaml, where no PATH is given"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document in place of the tables")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page to look at, in one file")
    parser.add_argument("--no-pictures", action="store_true", help="decode none, so that black ones are not found")
    parser.add_argument("--propose", action="store_true", help="print a configuration that fits the recordings")
    arguments = parser.parse_intermixed_args()
    with exit_with_message():
        if arguments.html and not find_spec("matplotlib"):  # before what may take minutes
            raise Fault("--html: the page takes matplotlib, which is not installed: pip install matplotlib")
        config, places, bags, faults = _bags(arguments)
        if not bags or (arguments.propose and faults):
            raise Fault(*faults)
        if arguments.propose and len(places) > 1:
            raise Fault(
                f"--propose: {len(places)} places; data.bag_dir is one: give the folder that holds the recordings, no more"
            )
        if arguments.propose:
            from inspection.propose import propose  # only here

            print(propose(bags, places[0]), end="")
            return
        verdicts: Counter[str] = Counter()
        trees: list[dict[str, Any]] = []
        all_found: list[Inspection] = []
        for bag in tqdm(bags, desc="inspecting", unit="bag", disable=not (arguments.json or arguments.html)):
            found = inspect(bag, config, not arguments.no_pictures)
            verdicts[found.verdict] += 1
            if arguments.json:
                trees.append(found.to_json())
            else:
                print(table(found, config), end="\n\n", flush=True)
            if arguments.html:
                all_found.append(found)
        if arguments.html:
            from inspection.report import page  # only here

            write_whole(arguments.html, page(all_found, config, faults))
        last = closing(verdicts, len(faults), config is not None)
        if arguments.json:
            print(json.dumps({"recordings": trees, "faults": faults, "summary": last}, indent=1, allow_nan=False))
        else:
            print("\n".join([*(f"error: {fault}" for fault in faults), *textwrap.wrap(last, COLUMNS)]))
        sys.exit(1 if verdicts[BAD] or faults else 0)


if __name__ == "__main__":
    main()
