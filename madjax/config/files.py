"""Config files: Python files with a function `config()` that returns a `Sweep` or an `AngleStudy`.

Their docstrings state the claim, the command and the cost.
"""

import importlib.util
import sys
from pathlib import Path

from madjax.config.values import AngleStudy, Sweep
from madjax.errors import InputError, in_one_line


def shipped_configs() -> dict[str, Path]:
    """The config files that come with madjax, by name: beside the package, or inside a wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_configs", package.parent / "configs"):
        found = {p.stem: p for p in sorted(folder.glob("*.py")) if not p.stem.startswith("_")}
        if found:
            return found
    return {}


def load(name: str) -> Sweep | AngleStudy:
    """The config of a file, or of a shipped config by its name ("quickstart").

    Raises:
        InputError: no such config, a file that cannot be run, or one without a `config()` that
            returns one.
    """
    shipped = shipped_configs()
    path = Path(name)
    if not path.is_file():
        # `configs/NAME.py` works from any directory, as it does in the repository.
        stem = path.stem if path.suffix == ".py" else name
        if stem not in shipped or path.parent.name not in ("", "configs"):
            raise InputError(
                f"config {name!r} does not exist: give a Python file, or one of "
                f"{', '.join(shipped)}"
            )
        path = shipped[stem]
    spec = importlib.util.spec_from_file_location(f"madjax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"config {name!r} is not a Python file: give a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses of the file look for their annotations
    try:
        spec.loader.exec_module(module)
        config = module.config()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"config {name!r} fails with {in_one_line(error)}; it must define config(), "
            "which returns a madjax.Sweep or a madjax.AngleStudy"
        ) from error
    if not isinstance(config, Sweep | AngleStudy):
        raise InputError(
            f"config {name!r} returns {type(config).__name__}: return a madjax.Sweep or a "
            "madjax.AngleStudy"
        )
    return config
