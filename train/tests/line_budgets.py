"""python tests/line_budgets.py: print the lines of each room beside its budget in pyproject.toml; fail if one is over it."""

import sys
import tomllib
from pathlib import Path

TRAIN = Path(__file__).parents[1]


def lines(pattern: str) -> int:
    return sum(len(path.read_text().splitlines()) for path in TRAIN.glob(pattern))


def main() -> None:
    settings = tomllib.loads((TRAIN / "pyproject.toml").read_text())["tool"]["line-budgets"]
    spine = sum(map(lines, settings["spine"]))
    rooms = {name: lines(name if name.endswith(".py") else f"{name}/*.py") for name in settings["rooms"]}
    table = [(name, count, settings["rooms"][name]) for name, count in rooms.items()]
    table += [("spine", spine, settings["spine_budget"]), ("all", sum(rooms.values()), settings["all_budget"])]
    for name, count, budget in table:
        print(f"{name:16}{count:6} of {budget:5}{'  OVER' if count > budget else ''}")
    listed = {TRAIN / name for name in rooms}
    if unlisted := [path.name for path in TRAIN.glob("*.py") if path not in listed]:
        sys.exit(f"no budget in pyproject.toml: {', '.join(unlisted)}")
    sys.exit(any(count > budget for _, count, budget in table))


if __name__ == "__main__":
    main()
