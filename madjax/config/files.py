"""Config files: Python files with a function `config()` that returns a `Sweep` or an `AngleStudy`.

Their docstrings state the claim, the command and the cost. A file may have other such functions,
for instance `smoke()` for the same grid on less data: `NAME:smoke` is what that returns.
"""

import ast
import importlib.util
import re
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


def forms() -> list[str]:
    """The configs that come with madjax, as `load` takes them: all functions of their files."""
    return [
        path.stem if node.name == "config" else f"{path.stem}:{node.name}"
        for path in shipped_configs().values()
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not (node.name.startswith("_") or node.args.args)
    ]


def load(name: str) -> Sweep | AngleStudy:
    """The config of a file, or of a shipped config by its name ("quickstart").

    name may end in ":FUNCTION", the function of the file that returns it, by default `config`.

    Raises:
        InputError: no such config, a file that cannot be run, or one without such a function that
            returns one.
    """
    shipped = shipped_configs()
    file, function = name, "config"
    if not Path(name).is_file() and (match := re.fullmatch(r"(.+):(\w+)", name)):
        file, function = match[1], match[2]
    path = Path(file)
    if not path.is_file():
        # `configs/NAME.py` works from any directory, as it does in the repository.
        stem = path.stem if path.suffix == ".py" else file
        if stem not in shipped or path.parent.name not in ("", "configs"):
            raise InputError(
                f"config {file!r} does not exist: give a Python file, or one of "
                f"{', '.join(shipped)}"
            )
        path = shipped[stem]
    spec = importlib.util.spec_from_file_location(f"madjax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"config {file!r} is not a Python file: give a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses of the file look for their annotations
    try:
        spec.loader.exec_module(module)
        config = getattr(module, function)()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"config {name!r} fails with {in_one_line(error)}; it must define {function}(), "
            "which returns a madjax.Sweep or a madjax.AngleStudy"
        ) from error
    if not isinstance(config, Sweep | AngleStudy):
        raise InputError(
            f"config {name!r} returns {type(config).__name__}: return a madjax.Sweep or a "
            "madjax.AngleStudy"
        )
    return config
