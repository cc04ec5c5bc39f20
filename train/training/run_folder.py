"""The folder of a run: its checkpoints, and which of them are complete. No torch here.

PYTHONPATH=train python -m training.run_folder outputs/train-rosbag-act     # prints the newest complete checkpoint, then the best
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from faults import Fault
from files import LOCK, digest, locked, read_json, sha256

RESUME = "training_state/resume.json"  # written last; has the size and the SHA-256 of all other files, and of itself


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold a run's folder, which is created: two runs would mix their checkpoints. Raises Fault."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(run / LOCK, wait=False))
        except Fault as fault:
            raise fault.at("output_dir") from None
        except OSError as error:
            raise Fault(f"output_dir: cannot write to {run} ({error.strerror}); set another") from None
        try:
            yield
        finally:
            with suppress(OSError):  # a lock without an owner is free
                (run / LOCK).unlink()


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
    error = read_resume(checkpoint)["validation_l1"]
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
        files = read_resume(checkpoint)["files"]
    except (OSError, ValueError):
        return f"{RESUME} is missing or damaged"
    sizes = {name: entry[0] if isinstance(entry, list) else entry for name, entry in files.items()}
    there = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files_of(checkpoint)}
    return ", ".join(
        f"{name} has {there.get(name, 0)} of {size} bytes" for name, size in sizes.items() if there.get(name) != size
    )


def damaged(checkpoint: Path) -> str:
    """Which files of a complete checkpoint are not what was written, in words; reads all of it."""
    files = read_resume(checkpoint)["files"]
    hashes = {name: entry[1] for name, entry in files.items() if isinstance(entry, list)}  # older ones have none
    return ", ".join(f"{name} is damaged" for name, sha in hashes.items() if sha256(checkpoint / name) != sha)


def read_resume(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's resume.json. Raises OSError, or ValueError if it is not what was written."""
    tree = read_json(checkpoint / RESUME)
    kinds = {"step": int, "validation_l1": float | None, "settings": dict, "files": dict}
    if not isinstance(tree, dict) or not all(isinstance(tree.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"expected {', '.join(kinds)}")
    written = tree.pop("sha256", None)
    if written != digest(tree) and (written or any(isinstance(entry, list) for entry in tree["files"].values())):
        raise ValueError("its content is not what was written")
    return tree


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
