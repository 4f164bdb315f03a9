"""Import floors: a module imports only from floors below its own."""

import ast
from pathlib import Path

import pytest

import madjax

PACKAGE = Path(madjax.__file__).parent
FLOORS = [
    {"errors", "files", "conv", "batching"},
    {"layers"},
    {"taps"},
    {"gram", "constraints", "subsets", "models", "datasets"},
    {"steps"},
    {"ascend"},
    {"mad", "train"},
    {"ablations", "objectives", "private", "serving"},
    {"defenses"},
    {"attacks", "evaluate"},
    {"config"},
    {"store"},
    {"sweep"},
    {"report"},
    {"cli", "__init__"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "_configs" not in p.parts)


def unit(path):
    """The floor's name of a file: its module, or the folder that it is part of."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Everything a file imports: dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_a_floor():
    assert {unit(path) for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    for name in imports(path):
        top, *rest = name.split(".")
        assert top not in ("configs", "experiments", "tests")
        if top == "madjax" and rest:
            other = rest[0]
            assert unit(path) == other or FLOOR[other] < FLOOR[unit(path)], name


@pytest.mark.parametrize(
    "name",
    ["mad", "gram", "constraints", "steps", "ascend", "subsets", "ablations", "layers", "taps"],
)
def test_the_mathematics_needs_no_data_and_no_checkpoints(name):
    tops = {each.split(".")[0] for each in imports(PACKAGE / f"{name}.py")}
    assert not tops & {"tensorflow_datasets", "orbax", "PIL", "matplotlib"}


def test_only_the_sweep_knows_devices():
    for path in FILES:
        text = path.read_text()
        for word in ("shard_map", "Mesh", "device_count"):
            assert word not in text or unit(path) == "sweep", f"{path} names {word}"


def test_files_stay_readable():
    for path in FILES:
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path} has {lines} lines: make it a folder"
