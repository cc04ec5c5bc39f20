"""Errors a user can fix, and how a command ends with one: a message and an exit code, never a traceback."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SKIPPED = 3  # done, but skipped recordings with faults
AGAIN = 75  # EX_TEMPFAIL of sysexits.h: run the same command again to resume
# a SAS signature, an account's key, the password of a URL: no message repeats them
SECRETS = re.compile(r"(?i)(?<=\bsig=)[^&;\s'\"]+|(?<=\bAccountKey=)[^;\s'\"]+|(?<=://)[^/@\s]+(?=@)")
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


def printable(text: str) -> str:
    """One line with its control characters escaped: a name in a recording must not steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Fault(Exception):
    """An error the user can fix. Each argument is one line: place: what was found; what was expected; what to do."""

    code = 1  # the command's exit code

    def __init__(self, *lines: str, code: int | None = None) -> None:
        super().__init__(*(printable(SECRETS.sub("***", line)) for line in lines))
        self.code = code or self.code

    def __str__(self) -> str:
        return "\n".join(self.args)

    def at(self, place: str) -> Fault:
        """The same fault with the place in front of each line."""
        return type(self)(*(f"{place}: {line}" for line in self.args))


class NoRoom(Fault):
    """The disk or the memory is full: not a fault of the recording."""


class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


def end(number: int, *_: object) -> None:
    """End at a signal, and clean up half-written files; a second SIGTERM does not cut that off, a second Ctrl-C does."""
    signal.signal(number, signal.SIG_IGN if number == signal.SIGTERM else signal.SIG_DFL)
    raise SystemExit(AGAIN) if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def exit_with_message() -> Iterator[None]:
    """End a command on a Fault, a full disk or a stop with a message and an exit code, not a traceback."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    try:
        yield
    except Fault as fault:
        print("\n".join(f"error: {line}" for line in fault.args), file=sys.stderr)
        sys.exit(fault.code)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(AGAIN)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python prints an error at exit
        sys.exit(141)  # a shell's code for SIGPIPE
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        advice = "; disk full or permission denied?" if error.errno in UNWRITABLE else ""
        sys.exit(SECRETS.sub("***", f"error: {place}{error.strerror or error}{advice}"))
