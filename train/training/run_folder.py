"""The folder of a run: which checkpoints are in it, and which of them are whole. No torch here.

PYTHONPATH=train python -m training.run_folder outputs/train-rosbag-act     # the newest that is whole, then the best; what others lack
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

RESUME = "training_state/resume.json"  # the last that is written, with the sizes of all others


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"checkpoint_{step:06d}"


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most steps in a run's folder, of those that are whole."""
    return next(reversed(whole_checkpoints(run)), None)


def best_checkpoint(run: Path) -> tuple[Path, float] | None:
    """The whole checkpoint with the least validation figure, the later of equals, and that figure."""
    found = [(path, figure) for path in whole_checkpoints(run) if math.isfinite(figure := validation(path))]
    return min(reversed(found), key=lambda one: one[1], default=None)


def validation(checkpoint: Path) -> float:
    """What a checkpoint's validation gave, in standard deviations; NaN where nothing was held out or the run was stopped."""
    figure = json.loads((checkpoint / RESUME).read_text()).get("validation_l1")
    return math.nan if figure is None else figure


def whole_checkpoints(run: Path) -> list[Path]:
    """The checkpoints in a run's folder that lack nothing, the oldest first."""
    return [path for path in checkpoints(run) if not missing(path)]


def broken_checkpoints(run: Path) -> dict[str, str]:
    """What is missing of each checkpoint that is not whole, as where a copy from one machine to another was cut off."""
    return {path.name: lack for path in checkpoints(run) if (lack := missing(path))}


def missing(checkpoint: Path) -> str:
    """What a checkpoint lacks of all that was written, in words; nothing if it is whole."""
    try:
        sizes = json.loads((checkpoint / RESUME).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"{RESUME} is missing or cut short"
    found = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files_of(checkpoint)}
    return ", ".join(
        f"{name} has {found.get(name, 0)} of {size} bytes" for name, size in sizes.items() if found.get(name) != size
    )


def files_of(folder: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def checkpoints(run: Path) -> list[Path]:
    """All checkpoints in a run's folder, whole or not, by their steps."""
    found = [path for path in run.glob("checkpoint_*") if re.fullmatch(r"checkpoint_\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("_")[1]))


def main() -> None:
    run = Path(sys.argv[1])
    for broken, lack in broken_checkpoints(run).items():
        print(f"{run / broken}: passed over, it is not whole: {lack}", file=sys.stderr)
    newest, best = newest_checkpoint(run), best_checkpoint(run)
    for path in dict.fromkeys([newest, best[0] if best else newest]) if newest else ():
        print(path)


if __name__ == "__main__":
    main()
