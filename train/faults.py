"""What a user can mend, and how a script ends with it: a message and an exit code, never a traceback."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Fault(Exception):
    """What a user can mend. Each argument is one line: where, the value found, what was expected, what to do."""

    def __str__(self) -> str:
        return "\n".join(str(line) for line in self.args)


@contextmanager
def told_plainly() -> Iterator[None]:
    """The edge of a script: a Fault, a full disk or a stop ends it with a message and an exit code, not a traceback."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what is half written is removed
    try:
        yield
    except Fault as fault:
        sys.exit("\n".join(f"error: {line}" for line in fault.args))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"error: {error.filename or 'a file'}: {error.strerror}; is the disk full, or the folder not yours?")
