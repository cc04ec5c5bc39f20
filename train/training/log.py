"""metrics.jsonl: the figures of a step in one line; the same figures for TensorBoard, if it is installed."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from dataset.batches import Batch
from faults import Fault
from files import write_whole


class Log:
    """The log of a run from a step on; one process writes it."""

    def __init__(self, folder: Path, step: int, writes: bool) -> None:
        self.path = folder / "metrics.jsonl"
        self.file: TextIO | None = None
        self.board: Any = None
        self.step, self.since, self.waited = step, time.perf_counter(), 0.0
        with self._or_fault():
            if writes:
                write_whole(self.path, "".join(_lines_until(step, self.path)))
                self.file = self.path.open("a", buffering=1)
            if writes and find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                # its thread raises such an error in the loop, too
                threading.excepthook = lambda e: (
                    None if isinstance(e.exc_value, OSError) else threading.__excepthook__(e)
                )
                self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def waiting(self, source: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; counts the time that the loop waits for them."""
        while True:
            start = time.perf_counter()
            batch = next(source, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of this block out of the rates."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def rates(self, step: int) -> dict[str, float]:
        """Steps per second since the last call, and the share of that time spent waiting for data."""
        elapsed = time.perf_counter() - self.since
        rates = {"steps_per_s": (step - self.step) / elapsed, "waiting_for_data": self.waited / elapsed}
        self.step, self.since, self.waited = step, time.perf_counter(), 0.0
        return rates

    def line(self, step: int, figures: dict[str, float]) -> None:
        with self._or_fault():
            if self.file:
                self.file.write(json.dumps({"step": step, **figures}) + "\n")
            for name, value in figures.items() if self.board else ():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        with self._or_fault():
            for each in filter(None, (self.file, self.board)):
                each.close()

    @contextmanager
    def _or_fault(self) -> Iterator[None]:
        """A log that cannot be written ends the run: its next checkpoint could not be, either."""
        try:
            yield
        except OSError as error:
            place = os.fsdecode(error.filename or self.path)
            raise Fault(f"{place}: cannot write ({error.strerror}); free some space, then run it again") from None


def _lines_until(step: int, log: Path) -> Iterator[str]:
    """The lines of a log up to a step: later steps will be repeated. One that is cut or damaged is dropped, and said."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= step:
                yield line + "\n"
        except (ValueError, TypeError, KeyError, RecursionError):
            print(f"{log}: line {number} is cut or damaged; it is dropped")
