"""Config values as JSON: what tells one value from another, in files, keys and messages."""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any

import jax
import numpy as np

from madjax.config.names import named
from madjax.errors import InputError


def describe(value: Any) -> Any:
    """A config value as JSON values that differ where the value does.

    Dataclasses become objects of their class and all fields, other objects of their class and
    attributes; functions and classes their import path, methods also the object that they are of.
    What is not madjax's own has a digest of its source too, null where that cannot be had, and a
    function the values in its closure. That of your own code, which is not installed, is also of
    the functions, classes and constants of your own that it names, and of what those name. Arrays
    are told apart by a digest. A field of metadata {"described": False} is left out, and one of
    {"described": "changed"} where it has its default: so those of before it was there keep their
    digest.

    Raises:
        InputError: a function without an import path; a value of a kind that cannot be told apart.
    """
    if is_section(value):
        held = {
            field.name: describe(getattr(value, field.name))
            for field in fields(value)
            if _is_described(field, getattr(value, field.name))
        }
        return {"class": _described_code(type(value))} | held
    if isinstance(value, tuple | list):
        return [describe(item) for item in value]
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        return dict(zip(("function", "arguments", "keywords"), map(describe, parts), strict=True))
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        return {"array": f"{array.dtype}{list(array.shape)}", "digest": _sha(array.tobytes())}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if inspect.ismethod(value):
        return {"method": _described_code(value), "of": describe(value.__self__)}
    if hasattr(value, "__qualname__"):
        return _described_code(value)
    if hasattr(value, "__dict__"):
        return {"class": _described_code(type(value))} | describe(vars(value))
    raise InputError(
        f"{value!r} is a {type(value).__name__}, which has nothing that tells it from another: "
        "use numbers, text, tuples, dataclasses and functions in a config"
    )


def _is_described(field: Field, value: Any) -> bool:
    how = field.metadata.get("described", True)
    return value != field.default if how == "changed" else how


def is_section(value: Any) -> bool:
    """Whether a value is a dataclass with fields of its own."""
    return is_dataclass(value) and not isinstance(value, type)


def path_of(value: Any) -> str:
    """Where a function or class lives, or the class of any other object."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def name_of(function: Callable[..., Any]) -> str:
    """What rows and messages call a function or class; a partial has the name of what it wraps."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return getattr(function, "__name__", type(function).__name__)


def digest(description: Any, digits: int = 12) -> str:
    """Hexadecimal digits that change with any value of a described config."""
    return _sha(json.dumps(description, sort_keys=True).encode(), digits)


def _described_code(code: Any) -> Any:
    """A function or class of madjax by its path, of others with a digest of its source."""
    path = path_of(code)
    if "<" in path:
        raise InputError(
            f"{path} has no import path, by which a resumed run could tell it from another: "
            "define it at the top of a module"
        )
    if path.startswith("madjax."):
        return path
    closure = [describe(cell.cell_contents) for cell in getattr(code, "__closure__", None) or ()]
    said = {"path": path, "source": _source_digest(code)}
    return said | {"closure": closure} if closure else said


@functools.cache
def _source_digest(code: Any) -> str | None:
    """Of a function's source, and of a class with its bases from the same package.

    With them goes what they name, where that is the user's own.
    """
    package = code.__module__.partition(".")[0]
    bases = [c for c in getattr(code, "__mro__", (code,)) if c.__module__.startswith(package)]
    # A decorated function's own is the decorator's; what that decorates is in the closure.
    parts = [code.__code__] if inspect.isfunction(code) else bases
    try:
        said = [*map(inspect.getsource, parts), *named(code)]
    except (OSError, TypeError):
        return None
    return _sha("\n".join(said).encode())


def _sha(data: bytes, digits: int = 12) -> str:
    return hashlib.sha256(data).hexdigest()[:digits]
