"""The law of imports: imports point up the list of rooms, without a circle, on at most seven floors."""

import ast
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[1]
ORDER = (
    "ground",
    "act_model",
    "page",
    "recordings",
    "dataset",
    "policy",
    "training",
    "inspection",
    "evaluation",
    "commands",
)
GROUND = ("faults", "files", "cores", "blob_url", "config")
COMMANDS = ("train", "evaluate", "inspect_bags", "demo_bags")
MODULES = {
    ".".join(path.relative_to(TRAIN).with_suffix("").parts): path
    for path in (*TRAIN.glob("*.py"), *TRAIN.glob("[!.]*/*.py"))
    if path.relative_to(TRAIN).parts[0] not in ("tests", "benchmarks", "osmo")
}
FLOORS = 7


def room(module: str) -> str:
    if module in GROUND:
        return "ground"
    return "commands" if module in COMMANDS else module.partition(".")[0]


def imports(module: str) -> set[str]:
    """All modules that a module imports: early, late or only for types."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            names |= below or {node.module}
    return names


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_up(module: str) -> None:
    for imported in imports(module) & MODULES.keys():
        above = ORDER.index(room(imported)) <= ORDER.index(room(module))
        assert above, f"{module} imports {imported} from a room below it"


@pytest.mark.parametrize(
    ("room_", "package"), [("recordings", "torch"), ("inspection", "torch"), ("policy", "rosbags")]
)
def test_a_room_does_without(room_: str, package: str) -> None:
    for module in MODULES:
        if room(module) == room_:
            names = {name.partition(".")[0] for name in imports(module)}
            assert package not in names, f"{module} imports {package}"


def test_no_circle_and_few_floors() -> None:
    """A module's floor is one above the highest that it imports."""
    floors: dict[str, int] = {}

    def floor(module: str, path: tuple[str, ...] = ()) -> int:
        assert module not in path, f"a circle: {' -> '.join((*path, module))}"
        if module not in floors:
            below = [floor(one, (*path, module)) for one in imports(module) & MODULES.keys()]
            floors[module] = 1 + max(below, default=0)
        return floors[module]

    highest = {module: floor(module) for module in MODULES}
    assert max(highest.values()) <= FLOORS, {module: n for module, n in highest.items() if n > FLOORS}


def test_every_room_says_its_job() -> None:
    for folder in {path.parent for path in MODULES.values()} - {TRAIN}:
        tree = ast.parse((folder / "__init__.py").read_text())
        assert len(tree.body) == 1 and ast.get_docstring(tree), folder
