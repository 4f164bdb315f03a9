"""Import floors: a module imports only from floors below its own."""

import ast
from pathlib import Path

import pytest

import madjax

pytestmark = pytest.mark.smoke

PACKAGE = Path(madjax.__file__).parent
FLOORS = [
    {"errors", "backend"},
    {"processes"},
    {"stopping", "checkpoints"},
    {"files", "conv", "batching", "linear", "streams", "augment", "statistics", "sharing"},
    {"layers"},
    {"taps"},
    {"structured"},
    {"gram", "constraints", "subsets", "models", "datasets"},
    {"objectives", "polytope", "steps", "weights"},
    {"label"},
    {"recipe"},
    {"mad", "train"},
    {"ablations", "ascend", "private", "serving", "white_box"},
    {"defenses"},
    {"attacks", "evaluate"},
    {"config"},
    {"store"},
    {"sweep"},
    {"report", "tensorboard"},
    {"cli", "__init__"},
    {"__main__"},
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
    [
        "mad",
        "gram",
        "constraints",
        "steps",
        "ascend",
        "subsets",
        "ablations",
        "polytope",
        "label",
        "layers",
        "taps",
    ],
)
def test_the_mathematics_needs_no_data_and_no_checkpoints(name):
    tops = {each.split(".")[0] for each in imports(PACKAGE / f"{name}.py")}
    assert not tops & {"tensorflow_datasets", "orbax", "PIL", "matplotlib"}


DEVICES = {
    "jax.Device",
    "jax.device_count",
    "jax.device_get",
    "jax.device_put",
    "jax.devices",
    "jax.distributed",
    "jax.experimental.multihost_utils",
    "jax.experimental.shard_map",
    "jax.local_device_count",
    "jax.local_devices",
    "jax.make_mesh",
    "jax.pmap",
    "jax.process_count",
    "jax.process_index",
    "jax.shard_map",
    "jax.sharding",
}


def names(source):
    """Everything that a file imports or reads as an attribute of an import: dotted names."""
    tree, known = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in known:
            yield ".".join([known[node.id], *reversed(parts)])


def devices_in(source):
    """The names of a file that belong to devices, meshes or processes."""
    return {n for n in names(source) if any(f"{n}.".startswith(f"{d}.") for d in DEVICES)}


@pytest.mark.parametrize(
    "source",
    [
        "import jax\nn = len(jax.devices())",
        "import jax as j\nj.sharding.Mesh(())",
        "from jax import shard_map as spread",
        "from jax.sharding import PartitionSpec",
        "import jax.experimental.multihost_utils",
    ],
)
def test_devices_are_found_by_import_and_attribute(source):
    assert devices_in(source)
    assert not devices_in("import jax\njax.default_backend()  # jax.devices")


def test_only_the_sweep_knows_devices():
    """But for the one function by which training says what may be shared out."""
    found = {path: devices_in(path.read_text()) for path in FILES}
    knowing = {"sweep", "sharing", "processes"}
    assert {unit(path) for path, held in found.items() if held} == knowing


def test_files_stay_readable():
    for path in FILES:
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path} has {lines} lines: make it a folder"
