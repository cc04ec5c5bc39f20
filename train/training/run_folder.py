"""The folder of a run: its checkpoints, and which of them are complete. No torch here.

PYTHONPATH=train python -m training.run_folder outputs/train-rosbag-act     # prints the newest complete checkpoint, then the best
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from faults import Fault
from files import LOCK, locked

RESUME = "training_state/resume.json"  # written last; has the sizes of all other files


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold a run's folder, which is created: two runs would mix their checkpoints. Raises Fault."""
    with ExitStack() as stack:
        try:
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(run / LOCK, wait=False))
        except Fault as fault:
            raise fault.at("output_dir") from None
        except OSError as error:
            raise Fault(f"output_dir: cannot write to {run} ({error.strerror}); set another") from None
        try:
            yield
        finally:
            (run / LOCK).unlink(missing_ok=True)


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"checkpoint_{step:06d}"


def newest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the most steps in a run's folder."""
    return next(reversed(complete_checkpoints(run)), None)


def best_checkpoint(run: Path) -> tuple[Path, float] | None:
    """The complete checkpoint with the smallest validation error, and that error; of equals the newest."""
    validated = [(path, error) for path in complete_checkpoints(run) if math.isfinite(error := validation(path))]
    return min(reversed(validated), key=lambda pair: pair[1], default=None)


def validation(checkpoint: Path) -> float:
    """A checkpoint's validation error in standard deviations; NaN if it was not validated."""
    error = json.loads((checkpoint / RESUME).read_text()).get("validation_l1")
    return math.nan if error is None else error


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints in a run's folder, the oldest first."""
    return [path for path in _checkpoints(run) if not missing(path)]


def incomplete_checkpoints(run: Path) -> dict[Path, str]:
    """The incomplete checkpoints, as an interrupted copy leaves them, and what each lacks."""
    return {path: lack for path in _checkpoints(run) if (lack := missing(path))}


def missing(checkpoint: Path) -> str:
    """What a checkpoint lacks of the files that were written, in words; nothing if it is complete."""
    try:
        sizes = json.loads((checkpoint / RESUME).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"{RESUME} is missing or truncated"
    there = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files_of(checkpoint)}
    return ", ".join(
        f"{name} has {there.get(name, 0)} of {size} bytes" for name, size in sizes.items() if there.get(name) != size
    )


def files_of(folder: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _checkpoints(run: Path) -> list[Path]:
    """All checkpoints in a run's folder, by their steps."""
    paths = [path for path in run.glob("checkpoint_*") if re.fullmatch(r"checkpoint_\d{6,}", path.name)]
    return sorted(paths, key=lambda path: int(path.name.split("_")[1]))


def main() -> None:
    run = Path(sys.argv[1])
    for path, lack in incomplete_checkpoints(run).items():
        print(f"{path}: skipping incomplete checkpoint: {lack}", file=sys.stderr)
    newest, best = newest_checkpoint(run), best_checkpoint(run)
    for checkpoint in dict.fromkeys([newest, best[0] if best else newest]) if newest else ():
        print(checkpoint)


if __name__ == "__main__":
    main()
