"""Everything to know about one bag before training on it: measures, warnings, faults and a verdict.

`inspect` reads a bag once for all its topics, known or not, and with a configuration once more as training would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from config import Config
from faults import Fault
from inspection.topics import SECOND, Measure, Pictures, Spread, Topic
from recordings import plausibility
from recordings.bags import Bag, Message, decoder, full_name, miscounted, opened
from recordings.episodes import Recording, cut
from recordings.plausibility import Lag
from recordings.signals import Series, Source, read_series
from recordings.storage import NO_SUM, Storage

GOOD, USABLE, BAD = "good", "usable, read the warnings", "cannot be trained on"
SILENT_S = 1.0
LATE_MS = 100.0
AHEAD_MS = 20.0  # more than two clocks set by one server differ
FROZEN = 0.03  # share of the arm's path while its pictures stand still
NOT_IN_JSON = ("recording", "series", "stamps", "pixels", "gaps")


@dataclass
class Inspection:
    """The result for one bag. Times `*_s` are seconds since its first message, on the recorder's clock."""

    name: str
    files: dict[str, int]  # path: bytes
    start_ns: int  # the first message's receive stamp, since 1970
    seconds: float
    topics: dict[str, Topic]
    checksums: str  # in its files, in words
    faults: list[str]
    warnings: list[str]
    # the rest needs a configuration
    overlap_s: tuple[float, float] | None = None  # start and end of the time that all its topics share
    state_minus_image_ms: dict[str, Spread] = field(default_factory=dict)  # camera: of the messages at a tick
    state_minus_command_ms: dict[str, Spread] = field(default_factory=dict)  # command topic
    lag: Lag | None = None  # of the state behind the command
    idle_s: tuple[float, float] | None = None  # before the first motion, and after the last
    recording: Recording | None = None  # its episodes, as training would use them
    series: dict[Source, Series] | None = None  # the configured signals and cameras, as recorded
    notes: list[str] = field(default_factory=list)  # clocks, splits and skipped data, in words

    @property
    def verdict(self) -> str:
        """GOOD, USABLE or BAD; the faults or warnings are its reasons."""
        return BAD if self.faults else USABLE if self.warnings else GOOD

    @property
    def is_empty(self) -> bool:
        """Whether no message was read."""
        return not any(topic.read for topic in self.topics.values())

    def to_json(self) -> dict[str, Any]:
        """A plain tree, without arrays and pictures; what is unknown or not finite is null."""
        tree = _plain({"verdict": self.verdict, **self.__dict__})
        started = datetime.fromtimestamp(self.start_ns / SECOND, UTC) if self.topics else None
        tree["started"] = started.isoformat(timespec="milliseconds") if started else None
        episodes = [{"at_s": at, "ticks": ticks} for at, ticks in self.episodes()]
        tree["episodes"] = episodes if self.recording else None
        return dict(tree)

    def episodes(self) -> list[tuple[float, int]]:
        """(start in seconds since the first message, ticks) of each episode."""
        episodes = self.recording.episodes if self.recording else []
        return [((int(episode.ticks[0]) - self.start_ns) / SECOND, len(episode.ticks)) for episode in episodes]


def inspect(bag: Bag, config: Config | None = None, pictures: bool = False) -> Inspection:
    """Everything about a bag; about its episodes only with a configuration.

    `pictures` decodes some of each camera: black ones are counted; the first, a middle and the last are kept. Faults are
    listed, none is raised; those of topics that nobody wants are warnings.
    """
    cameras: set[str] = set()
    wanted: set[str] | None = None
    if config:
        cameras = set(config.data.cameras.values())
        wanted = {*cameras, *(signal.topic for signal in (*config.data.state, *config.data.commands))}
    faults: list[str] = []
    warnings: list[str] = []
    measures: dict[str, Measure] = {}
    sums: list[str] = []
    broken: set[str] = set()
    start_ns: int | None = None

    def measure_of(topic: str) -> Measure:
        declared = bag.declared.get(topic, 0) if bag.declared else None
        return measures.setdefault(topic, Measure(topic, declared, pictures, topic in cameras))

    def report(topic: str, lines: Iterable[str]) -> None:
        (faults if wanted is None or topic in wanted else warnings).extend(lines)

    for topic in bag.declared:
        measure_of(topic)
    for file in bag.files:
        decoders: dict[int, Callable[[bytes], Any]] = {}
        try:
            with opened(file) as storage:
                for connection, receive_ns, raw in storage.messages():
                    start_ns = receive_ns if start_ns is None else start_ns
                    topic, measure = connection.topic, measure_of(connection.topic)
                    if connection.id not in decoders:
                        try:
                            decoders[connection.id] = decoder(file, connection)
                        except Fault as fault:
                            measure.not_understood, decoders[connection.id] = str(fault), bytes
                    place = (
                        len(measure.receive),
                        full_name(connection.msgtype),
                        receive_ns,
                        (receive_ns - start_ns) / SECOND,
                    )
                    message = Message(bag.name, topic, *place, raw, decoders[connection.id])
                    try:
                        measure.add(message)
                    except Fault as fault:
                        report(topic, fault.at(message.place).args if topic not in broken else ())
                        broken.add(topic)
                for connection in storage.connections.values():  # also those without a message
                    measure_of(connection.topic).types.add(full_name(connection.msgtype))
                sums.append(_checksums(storage))
        except Fault as fault:
            faults += fault.args
    topics = {}
    for name, measure in measures.items():
        try:
            measure.check()
        except Fault as fault:
            report(name, fault.at(name).args)
    clocks = [measure.receive if start_ns else measure.stamps for measure in measures.values() if measure.receive]
    start_ns = start_ns or min((int(clock[0]) for clock in clocks), default=None)
    for name, measure in sorted(measures.items()):
        topics[name] = measure.topic(start_ns or 0)
        if len(sums) == len(bag.files) and (miscount := miscounted(bag, name, topics[name].read)):
            report(name, [miscount])
    if start_ns is None and not faults:
        faults.append("has no messages; re-record or remove it")
    end_ns = max((int(max(clock)) for clock in clocks), default=0)
    files = {str(file): file.stat().st_size if file.exists() else 0 for file in bag.files}
    seconds, checksums = (end_ns - (start_ns or 0)) / SECOND, "; ".join(dict.fromkeys(sums)) or "unknown"
    inspection = Inspection(bag.name, files, start_ns or 0, seconds, topics, checksums, faults, warnings)
    if config:
        _as_training_would(bag, config, inspection)
    warnings += _topic_warnings(inspection, config)
    for lines in (warnings, faults):
        lines[:] = dict.fromkeys(line.removeprefix(f"{bag.name}: ") for line in lines)
    return inspection


def _checksums(storage: Storage) -> str:
    """The checksums in a file, in words."""
    kinds = [kind for kind, count in storage.sums.items() if count and kind != NO_SUM]
    if kinds and storage.sums[NO_SUM]:
        of_the_file = all(kind.startswith("CRC of the ") for kind in kinds)
        kinds.append(f"{NO_SUM} of {'the messages' if of_the_file else f'{storage.sums[NO_SUM]} chunks'}")
    return ", ".join(kinds) or NO_SUM


def _as_training_would(bag: Bag, config: Config, inspection: Inspection) -> None:
    """Add the episodes of a bag, and how its topics are aligned in time."""
    data = config.data
    try:
        series = read_series(bag, {*data.state, *data.commands}, set(data.cameras.values()))
        inspection.series = series
        begin = max(int(one.stamps[0]) for one in series.values())
        end = min(int(one.stamps[-1]) for one in series.values())
        inspection.overlap_s = (begin - inspection.start_ns) / SECOND, (end - inspection.start_ns) / SECOND
        recording = inspection.recording = cut(bag.name, series, data)
    except Fault as fault:
        inspection.faults += fault.args
        return
    inspection.notes = recording.notes
    for topic in data.cameras.values():
        pictures = inspection.topics[topic].pictures
        sizes = {kind.split()[0] for kind in pictures.kinds} if pictures else set()
        if len(sizes) > 1:
            inspection.faults.append(
                f"{topic}: pictures of {' and '.join(sorted(sizes))}; expected one size in a recording; remove it"
            )
    at = np.concatenate([episode.ticks for episode in recording.episodes])
    newest = {source: one.stamps[np.searchsorted(one.stamps, at, side="right") - 1] for source, one in series.items()}
    state = newest[data.state[0]]
    inspection.state_minus_image_ms = {name: Spread.of(state - newest[topic]) for name, topic in data.cameras.items()}
    inspection.state_minus_command_ms = {s.topic: Spread.of(state - newest[s]) for s in data.commands}
    ticks = recording.ticks(data)
    inspection.lag = plausibility.lag(ticks, config)
    inspection.idle_s = plausibility.idle(ticks, data.fps)
    inspection.warnings += [*recording.warnings, *plausibility.warnings(ticks, config)]


def _topic_warnings(inspection: Inspection, config: Config | None) -> Iterator[str]:
    """Warnings that the stamps and pictures of the topics give."""
    used = {one.topic for one in (inspection.series or {}).values()}
    for name, topic in inspection.topics.items():
        gap, late = topic.largest_gap, topic.header_minus_receive_ms
        if config and name in used and gap and gap.seconds > SILENT_S:
            held = min(config.data.max_age_ms.get(name, 0) / 1e3, gap.seconds)
            effect = "the episode is split there; cut the recording if the operator was idle"
            effect = f"data.max_age_ms holds its last message for {held:.1f} s of that" if held > SILENT_S else effect
            yield f"{name}: silent for {gap.seconds:.1f} s from t+{gap.at_s:.1f} s: {effect}"
        if late and name in used and topic.clock == "header" and late.median < -LATE_MS:
            effect = "which training uses: the robot's node will see them that much later, or two clocks differ"
            yield f"{name}: messages arrive {-late.median:.0f} ms after their header stamp, {effect}"
        if late and name in used and topic.clock == "header" and late.median > AHEAD_MS:
            effect = "the clock of their machine is ahead; synchronize the clocks and record again"
            yield f"{name}: messages are stamped {late.median:.0f} ms after they arrived: {effect}"
        if topic.pictures and (config is None or name in config.data.cameras.values()):
            yield from _picture_warnings(topic, topic.pictures, inspection, config)
    for camera, spread in inspection.state_minus_image_ms.items():
        period = 1e3 / (inspection.topics[config.data.cameras[camera]].rate_hz or math.inf) if config else 0
        if abs(spread.median) > period + LATE_MS / 2:
            advice = "check that both machines have the same time"
            yield f"camera {camera}: a tick's picture is {spread.median:.0f} ms older than its joint states: {advice}"


def _picture_warnings(topic: Topic, pictures: Pictures, inspection: Inspection, config: Config | None) -> Iterator[str]:
    if pictures.black:
        yield f"{topic.name}: {pictures.black} of {pictures.looked_at} checked pictures are black: cut the recording, or remove it"
    frozen = f"{topic.name}: {len(pictures.frozen)} of {topic.read} pictures equal the one before, byte for byte"
    if inspection.series and config and pictures.frozen:
        share = _share_of_path(inspection.series, config, topic.stamps, np.array(pictures.frozen))
        if share > FROZEN:
            yield f"{frozen}, during {share:.0%} of the arm's motion: the camera hung or is slow; remove the recording"
    elif len(pictures.frozen) > topic.read / 2:
        yield f"{frozen}: is the camera running?"
    sizes = {kind.split()[0] for kind in pictures.kinds}
    if len(pictures.kinds) > 1 and (len(sizes) == 1 or not config):  # several sizes are a fault
        kinds = ", ".join(f"{count} of {kind}" for kind, count in pictures.kinds.items())
        yield f"{topic.name}: pictures of several kinds: {kinds}; expected one in a recording"


def _share_of_path(series: dict[Source, Series], config: Config, stamps: np.ndarray, frozen: np.ndarray) -> float:
    """The share of the arm's path during the frozen pictures of a camera with stamps (M,)."""
    signal = config.data.state[0]
    states, rows = series[signal].stamps, series[signal].rows
    scale = np.maximum(np.ptp(rows, axis=0), 1e-3)
    at = rows[np.clip(np.searchsorted(states, stamps, side="right") - 1, 0, None)]
    steps = np.abs(np.diff(at, axis=0) / scale).sum(axis=1)
    return float(steps[frozen - 1].sum() / steps.sum()) if steps.sum() else 0.0


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
