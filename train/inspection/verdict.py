"""Everything that can be told of one bag before anything is trained on it: measures, warnings, faults and a verdict.

`inspect` reads a bag once for all its topics, whether or not they are known, and with a configuration a second time
as training would. inspect_bags.py prints what it finds, inspect_page.py draws it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.interfaces import Connection

from config import Config
from faults import Fault
from inspection.topics import SECOND, Decode, Measure, Pictures, Spread, Topic
from recordings import plausibility
from recordings.bags import Bag, Storage, full_name, miscounted, open_storage
from recordings.episodes import Recording, cut
from recordings.integrity import check
from recordings.plausibility import Lag
from recordings.signals import Series, read_series

GOOD, USABLE, BAD = "good", "usable, read the warnings", "cannot be trained on"
SILENT_S = 1.0
LATE_MS = 100.0
AHEAD_MS = 20.0  # what clocks that are set by one server differ by, at most
FROZEN = 0.03  # of the arm's way, while its pictures stand still
NOT_IN_JSON = ("recording", "series", "stamps", "pixels", "gaps")


@dataclass
class Inspection:
    """What was found in one bag. Times `*_s` are seconds since its first message, by the recorder's clock."""

    name: str
    files: dict[str, int]  # path: bytes
    start_ns: int  # the first message's receive stamp, since 1970
    seconds: float
    topics: dict[str, Topic]
    checksums: str  # that its storage carries, in words
    # the rest needs a configuration
    overlap_s: tuple[float, float] | None = None  # begin and end of the time that all its topics share
    state_minus_image_ms: dict[str, Spread] = field(default_factory=dict)  # by camera: of the messages a tick takes
    state_minus_command_ms: dict[str, Spread] = field(default_factory=dict)  # by command topic
    lag: Lag | None = None  # of the state behind the command
    idle_s: tuple[float, float] | None = None  # before the first motion, and after the last
    recording: Recording | None = None  # its episodes, as they would be trained on
    series: dict[str, Series] | None = None  # the configured topics as they were recorded
    notes: list[str] = field(default_factory=list)  # clocks, splits and what was dropped, in words
    warnings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """GOOD, USABLE or BAD; its reasons are the faults, or else the warnings."""
        return BAD if self.faults else USABLE if self.warnings else GOOD

    def to_json(self) -> dict[str, Any]:
        """The plain tree of all that fits on paper: no arrays, no pictures; what is not known or not finite is null."""
        tree = _plain({"verdict": self.verdict, **self.__dict__})
        started = datetime.fromtimestamp(self.start_ns / SECOND, UTC) if self.topics else None
        tree["started"] = started.isoformat(timespec="milliseconds") if started else None
        tree["episodes"] = (
            [{"at_s": at, "ticks": ticks} for at, ticks in self.episodes()] if self.recording is not None else None
        )
        return dict(tree)

    def episodes(self) -> list[tuple[float, int]]:
        """(begin in seconds since the first message, ticks) of each episode."""
        episodes = self.recording.episodes if self.recording else []
        return [((int(episode.ticks[0]) - self.start_ns) / SECOND, len(episode.ticks)) for episode in episodes]


def inspect(bag: Bag, config: Config | None = None, pictures: bool = False) -> Inspection:
    """Everything that can be told of a bag; of its episodes only with a configuration.

    `pictures` decodes some of each camera: black ones are counted, the first, the middle and the last kept. Faults are
    listed, none is raised.
    """
    data = config.data if config else None
    asked = {*data.cameras.values(), *(s.topic for s in (*data.state, *data.commands))} if data else None
    cameras = set(data.cameras.values()) if data else set()
    measures = {topic: Measure(topic, declared, pictures, topic in cameras) for topic, declared in bag.declared.items()}
    faults: list[str] = []
    warnings: list[str] = []

    def complain(topic: str, lines: tuple[Any, ...] | list[str]) -> None:
        (faults if asked is None or topic in asked else warnings).extend(map(str, lines))

    read = _measure(bag, measures, pictures, cameras, faults, complain)
    receive = [measure.receive for measure in measures.values() if measure.receive]
    start_ns = min((min(stamps) for stamps in receive), default=0)
    end_ns = max((max(stamps) for stamps in receive), default=0)
    topics = {}
    for name, measure in sorted(measures.items()):
        try:
            topics[name] = measure.topic(start_ns)
        except Fault as fault:
            complain(name, fault.args)
            measure.pictures.end = None  # the last picture does not decode
            topics[name] = measure.topic(start_ns)
        if len(read) == len(bag.files) and (wrong := miscounted(bag, name, topics[name].read, topics[name].stored)):
            complain(name, [wrong])
    if not receive and not faults:
        faults.append(f"{bag.name}: holds no message; record it again or leave it out")
    files = {str(file): file.stat().st_size if file.exists() else 0 for file in bag.files}
    checked = [check(file) for file in read]
    checksums = "; ".join(dict.fromkeys(one.carries for one in checked)) or "unknown"
    found = Inspection(bag.name, files, start_ns, (end_ns - start_ns) / SECOND, topics, checksums)
    found.warnings, found.faults = warnings, faults + [fault for one in checked for fault in one.faults]
    if config:
        _as_training_would(bag, config, found)
    found.warnings += _topics(found, config)
    for lines in (found.warnings, found.faults):
        lines[:] = dict.fromkeys(line.removeprefix(f"{bag.name}: ") for line in lines)
    return found


def _measure(
    bag: Bag, measures: dict[str, Measure], pictures: bool, cameras: set[str], faults: list[str], complain: Any
) -> list[Path]:
    """Let every message of a bag go by its topic's measure; the files that could be read to their ends."""
    read: list[Path] = []
    broken: set[str] = set()
    start_ns = 0
    for file in bag.files:
        try:
            with open_storage(file) as storage:
                decoders: dict[int, Decode | None] = {}
                for connection in storage.connections:
                    topic = connection.topic
                    if topic not in measures:
                        measures[topic] = Measure(topic, 0 if bag.declared else None, pictures, topic in cameras)
                    measures[topic].stored += connection.msgcount
                    measures[topic].types.add(full_name(connection.msgtype))
                for connection, receive_ns, raw in storage.raw:
                    topic, measure = connection.topic, measures[connection.topic]
                    start_ns = start_ns or receive_ns
                    seconds = (receive_ns - start_ns) / SECOND
                    place = f"{bag.name}: {topic}: message {len(measure.receive)} at t+{seconds:.3f} s"
                    if connection.id not in decoders:
                        decoders[connection.id] = _decode(storage, connection, measure)
                    try:
                        measure.add(connection, receive_ns, raw, decoders[connection.id], place)
                    except Fault as fault:
                        if topic not in broken:
                            complain(topic, fault.args)
                        broken.add(topic)
            read.append(file)
        except Fault as fault:
            faults += fault.args
    return read


def _decode(storage: Storage, connection: Connection, measure: Measure) -> Decode | None:
    """How to decode a topic; without a usable definition it is only counted, for nobody may have asked for it."""
    try:
        return Decode(storage.decoder(connection), connection)
    except Fault as fault:
        measure.not_understood = str(fault)
        return None


def _as_training_would(bag: Bag, config: Config, found: Inspection) -> None:
    """The episodes of a bag, and how its topics lie in time."""
    data = config.data
    try:
        found.series = series = read_series(bag, {*data.state, *data.commands}, set(data.cameras.values()))
        begin = max(int(one.stamps[0]) for one in series.values())
        end = min(int(one.stamps[-1]) for one in series.values())
        found.overlap_s = ((begin - found.start_ns) / SECOND, (end - found.start_ns) / SECOND)
        found.recording = cut(bag.name, series, data)
    except Fault as fault:
        found.faults += map(str, fault.args)
        return
    found.notes = found.recording.notes
    for topic in data.cameras.values():
        pictures = found.topics[topic].pictures
        sizes = {kind.split()[0] for kind in pictures.kinds} if pictures else set()
        if len(sizes) > 1:
            found.faults.append(
                f"{topic}: pictures of {' and '.join(sorted(sizes))}; expected one size in a recording: leave it out"
            )
    at = np.concatenate([episode.ticks for episode in found.recording.episodes])
    newest = {topic: one.stamps[np.searchsorted(one.stamps, at, side="right") - 1] for topic, one in series.items()}
    state = newest[data.state[0].topic]
    found.state_minus_image_ms = {camera: Spread.of(state - newest[topic]) for camera, topic in data.cameras.items()}
    found.state_minus_command_ms = {signal.topic: Spread.of(state - newest[signal.topic]) for signal in data.commands}
    ticks = found.recording.ticks(data)
    found.lag = plausibility.lag(ticks, config)
    found.idle_s = plausibility.idle(ticks, data.fps)
    found.warnings += [*found.recording.warnings, *plausibility.warnings(ticks, config)]


def _topics(found: Inspection, config: Config | None) -> Iterator[str]:
    """What a topic's stamps and pictures tell, worth a warning."""
    cameras = set(config.data.cameras.values()) if config else set(found.topics)
    path = _path_of_the_arm(found, config) if config else None
    for name, topic in found.topics.items():
        if found.series and name in found.series and topic.largest_gap and topic.largest_gap.seconds > SILENT_S:
            held = min(config.data.max_age_ms.get(name, 0) / 1e3, topic.largest_gap.seconds) if config else 0
            yield (
                f"{name}: silent for {topic.largest_gap.seconds:.1f} s from t+{topic.largest_gap.at_s:.1f} s: "
                + (
                    f"data.max_age_ms holds its last message for {held:.1f} s of that"
                    if held > SILENT_S
                    else "the episode is split there; if it is an idle operator, cut the recording"
                )
            )
        late, pictures = topic.header_minus_receive_ms, topic.pictures
        if late and found.series and name in found.series and topic.clock == "header":
            if late.median < -LATE_MS:
                yield (
                    f"{name}: messages arrive {-late.median:.0f} ms after their header's stamp, and training goes by the header: "
                    "the robot's node will see them that much later than the policy was trained to, or two clocks differ"
                )
            elif late.median > AHEAD_MS:
                yield (
                    f"{name}: messages are stamped {late.median:.0f} ms after they arrived, which cannot be: the clock of their "
                    "machine is ahead of the recorder's; set both by one time server, and record again"
                )
        if not pictures or name not in cameras:
            continue
        if pictures.black:
            yield (
                f"{name}: {pictures.black} of the {pictures.looked_at} pictures looked at are black: cut the recording, or leave "
                "it out"
            )
        frozen = len(pictures.frozen)
        if path is not None and frozen:
            share = path(topic.stamps, np.array(pictures.frozen))
            if share > FROZEN:
                yield (
                    f"{name}: {frozen} of {topic.read} pictures are byte for byte the one before, and {share:.0%} of the arm's "
                    "motion happens in them: the camera hung or is slower than its topic; leave the recording out"
                )
        elif frozen > topic.read / 2:
            yield f"{name}: {frozen} of {topic.read} pictures are byte for byte the one before: does the camera run?"
        sizes = {kind.split()[0] for kind in pictures.kinds}
        if len(pictures.kinds) > 1 and (len(sizes) == 1 or not config):  # else it is a fault
            kinds = ", ".join(f"{count} of {kind}" for kind, count in pictures.kinds.items())
            yield f"{name}: pictures of more than one kind: {kinds}; expected one in a recording"
    for camera, spread in found.state_minus_image_ms.items():
        period = 1e3 / (found.topics[config.data.cameras[camera]].rate_hz or math.inf) if config else 0
        if abs(spread.median) > period + LATE_MS / 2:
            yield (
                f"camera {camera}: the picture of a tick is {spread.median:.0f} ms older than its joint states: look whether both "
                "machines have the same time"
            )


def _path_of_the_arm(found: Inspection, config: Config) -> Callable[[np.ndarray, np.ndarray], float] | None:
    """A function of a camera's stamps (M,) and some of its pictures: the share of the arm's way while those were taken."""
    if not found.series:
        return None
    signal = config.data.state[0]
    series = found.series[signal.topic]
    rows = series.values[signal]
    scale = np.maximum(np.ptp(rows, axis=0), 1e-3)

    def share(stamps: np.ndarray, frozen: np.ndarray) -> float:
        at = rows[np.clip(np.searchsorted(series.stamps, stamps, side="right") - 1, 0, None)]
        steps = np.abs(np.diff(at, axis=0) / scale).sum(axis=1)
        return float(steps[frozen - 1].sum() / steps.sum()) if steps.sum() else 0.0

    return share


def _plain(value: Any) -> Any:
    """A tree of plain values for JSON."""
    if isinstance(value, Pictures):
        value = {**value._asdict(), "frozen": len(value.frozen)}
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if key not in NOT_IN_JSON}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), 6) if math.isfinite(value) else None
    return value
