"""What a user can mend, and how a script ends with it: a message and an exit code, never a traceback."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LEFT_OUT = 3  # all is done, but without some recordings that have faults
AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing to mend, the same command goes on
# a SAS signature, an account's key, the password of a URL: a fault repeats what was given, but not these
SECRETS = re.compile(r"(?i)(?<=\bsig=)[^&;\s'\"]+|(?<=\bAccountKey=)[^;\s'\"]+|(?<=://)[^/@\s]+(?=@)")


class Fault(Exception):
    """What a user can mend. Each argument is one line: where, the value found, what was expected, what to do."""

    code = 1  # with which a script ends

    def __init__(self, *lines: str) -> None:
        super().__init__(*(SECRETS.sub("***", line) for line in lines))

    def __str__(self) -> str:
        return "\n".join(str(line) for line in self.args)


class NoRoom(Fault):
    """A disk that is full: no fault of the recording that was to be read."""


class Stopped(Exception):
    """A run that was asked to stop, and has saved what it had."""


@contextmanager
def told_plainly() -> Iterator[None]:
    """The edge of a script: a Fault, a full disk or a stop ends it with a message and an exit code, not a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(AGAIN))  # so that what is half written is removed
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
    except BrokenPipeError:  # whom it was told has heard enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it ends
        sys.exit(141)  # as a shell says SIGPIPE
    except OSError as error:
        sys.exit(f"error: {error.filename or 'a file'}: {error.strerror}; is the disk full, or the folder not yours?")
