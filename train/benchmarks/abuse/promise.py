"""How often a promise was tried, and what broke it."""

from __future__ import annotations

import contextlib
import io
import signal
from collections.abc import Iterator
from pathlib import Path

from faults import Fault

LIMIT_MB = 1000


class Promise:
    """A promise, how often it was tried, and how often it was broken."""

    def __init__(self, text: str) -> None:
        self.text, self.tried, self.broken = text, 0, 0

    def judge(self, what: str, wrong: str) -> None:
        """One more attempt; `wrong` is empty if the promise held."""
        self.judge_all(1, what, wrong)

    def judge_all(self, count: int, what: str, wrong: str) -> None:
        """Several attempts that have one end."""
        self.tried += count
        if wrong:
            self.broken += count
            print(f"{self.text}: {what}: {wrong}", flush=True)

    @contextlib.contextmanager
    def attempt(self, what: str, seconds: int = 10) -> Iterator[None]:
        """One attempt in this process, which may end in a Fault; another error, much time or memory breaks the promise."""
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(seconds)
        before, wrong = _peak_mb(), ""
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                yield
        except Fault:
            pass
        except Exception as error:
            wrong = f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            signal.alarm(0)
        if (grown := _peak_mb(reset=False) - before) > LIMIT_MB:
            wrong = wrong or f"took {grown:.0f} MB of memory"
        self.judge(what, wrong)


def _too_long(*_: object) -> None:
    raise TimeoutError("took too long")


def _peak_mb(reset: bool = True) -> float:
    """The most memory that this process has had since the last reset. Linux, see proc(5)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1e3
