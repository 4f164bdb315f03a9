"""`--set`: a copy of a config with one of its fields replaced."""

import ast
import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from madjax.attacks import Attack
from madjax.config.describe import describe, is_section, path_of
from madjax.config.values import Defended
from madjax.defenses import Defense
from madjax.errors import InputError, in_one_line
from madjax.mad import Solver
from madjax.recipe import Recipe
from madjax.weights import Trained


def override(config: Any, assignment: str) -> Any:
    """A copy of a config with one field replaced: "attacks.recipe.epochs=5".

    The value is a Python literal, or plain text where the field holds text. A field that holds a
    function takes the import path of another function. A section takes the import path of a class
    or function that makes one without arguments ("attacks=madjax.attacks.jbda"); a new attack keeps
    the budget, network, recipe and targets of the first of those that it replaces, and a new
    defence of a sweep is tried at the strengths that are usual for it. Commas separate the values
    of a tuple. Of several tasks, defences or attacks one is meant by its position or name
    ("defenses.1.rule.layers=last", "attacks.jbda.budget=500"), and without these all that have the
    field. The new value must be of the same kind as the old one; None where the field may be None.
    A field that may hold a `madjax.Trained` takes its path ("tasks.victim=runs/a/checkpoints/b").

    Raises:
        InputError: no such field, a value of another kind, or one the config refuses.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise InputError(f"--set {assignment}: write it as field=value, for example seeds=(0,1)")
    return _replace(config, path.strip().split("."), text.strip(), assignment)


def _replace(config: Any, path: list[str], text: str, assignment: str) -> Any:
    name, *rest = path
    if isinstance(config, tuple) and any(map(is_section, config)):
        chosen, path = _meant(config, path, assignment)

        def replaced(item: Any) -> Any:
            if path:
                return _replace(item, path, text, assignment)
            return _parse(text, item, assignment)

        return tuple(replaced(item) if i in chosen else item for i, item in enumerate(config))
    known = [f.name for f in dataclasses.fields(config) if f.init] if is_section(config) else []
    if name not in known:
        raise InputError(
            f"--set {assignment}: there is no field {name!r}; "
            + (f"choose one of {', '.join(known)}" if known else "the field before it has no parts")
        )
    old = getattr(config, name)
    if rest:
        new = _replace(old, rest, text, assignment)
    elif isinstance(old, tuple):
        new = _parse_several(text, old[0] if old else _example(config, name), assignment)
    else:
        # The hints of others' classes are read where they are needed alone.
        ours = isinstance(old, Recipe | Trained) and type(config).__module__.startswith("madjax.")
        asked = old is None or text == "None" or ours
        kinds = get_args(get_type_hints(type(config))[name]) if asked else ()
        if text == "None" and type(None) in kinds:
            new = None
        elif Trained in kinds and (old is None or Path(text).expanduser().exists()):
            new = Trained(text)
        else:
            new = _parse(text, _like(kinds) if old is None else old, assignment)
    return dataclasses.replace(config, **{name: new})


def _like(kinds: tuple[Any, ...]) -> Any:
    """A value of a field that may be None: of its first other kind; None for a function."""
    made = (k for k in kinds if isinstance(k, type) and k not in (type(None), Trained))
    return next((kind() for kind in made), None)


def _meant(items: tuple[Any, ...], path: list[str], assignment: str) -> tuple[list[int], list[str]]:
    """Which of several sections a path means, and what of the path is left within them.

    One by its position from 0, those of a name, or else those that have the field; if none has,
    the error of the one that comes nearest says which fields there are.
    """
    first, *rest = path
    every = range(len(items))
    if first.isdigit():
        if int(first) not in every:
            raise InputError(
                f"--set {assignment}: there is no number {first}: give one from 0 to "
                f"{len(items) - 1}"
            )
        return [int(first)], rest
    named = [i for i in every if first in _names(items[i])]
    if named and not any(hasattr(item, first) for item in items):
        return named, rest
    reached = [_reach(item, path) for item in items]
    if max(reached) < len(path):
        return [reached.index(max(reached))], path
    return [i for i in every if reached[i] == len(path)], path


def _names(section: Any) -> set[str]:
    """What a task, defence or attack is called in rows, and among its like."""
    return {getattr(section, name, "") for name in ("name", "title", "label")}


def _reach(config: Any, path: list[str]) -> int:
    """How many fields of a path a section has, one within the other; a tuple's parts count."""
    if not path or isinstance(config, tuple):
        return len(path)
    if not hasattr(config, path[0]):
        return 0
    return 1 + _reach(getattr(config, path[0]), path[1:])


def _example(config: Any, name: str) -> Any:
    """A value of the kind that an empty tuple of this field would hold; None for a function."""
    kind = get_args(get_type_hints(type(config))[name])[0]
    return None if get_origin(kind) is Callable else kind()


def _parse_several(text: str, example: Any, assignment: str) -> tuple[Any, ...]:
    """The values of text, each of the kind of `example`."""
    parts = tuple(part.strip() for part in text.split(","))
    if example is None or callable(example) or is_section(example):
        return tuple(_parse(part, example, assignment) for part in parts)
    value = _literal(text)
    if isinstance(value, str):
        value = tuple(part.strip() for part in value.split(","))
    items = value if isinstance(value, tuple | list) else (value,)
    return tuple(_same_kind(item, example, assignment) for item in items)


def _parse(text: str, old: Any, assignment: str) -> Any:
    """The value of text, of the kind of `old`."""
    if is_section(old):
        return _section(text, old, assignment)
    if callable(old) or old is None:
        return _import(text, old, assignment)
    value = _literal(text)
    if isinstance(old, str):
        return text if not isinstance(value, str) else value
    return _same_kind(value, old, assignment)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _section(path: str, old: Any, assignment: str) -> Any:
    """What the function or class of this import path makes, in place of the section `old`."""
    if "." not in path:
        raise InputError(
            f"--set {assignment}: the field holds a section: set one of its fields, or give the "
            "import path of a class that makes one, such as madjax.attacks.jbda"
        )
    make = _import(path, old, assignment)
    if callable(old) and callable(make) and not isinstance(make, type):
        return make  # such as a solver that is a plain function
    try:
        new = make()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"--set {assignment}: {path} cannot be called without arguments ({in_one_line(error)})"
        ) from error
    if isinstance(old, Defended) and isinstance(new, Defense):
        return Defended(new)
    kind = next((kind for kind in (Attack, Defense, Solver) if isinstance(old, kind)), type(old))
    if not isinstance(new, kind):
        like = old.rule if isinstance(old, Defended) else old
        raise InputError(
            f"--set {assignment}: {path} makes {type(new).__name__}, which is no "
            f"{kind.__name__}: give what makes one, such as {path_of(like)}"
        )
    if isinstance(old, Attack):
        kept = ("budget", "architecture", "recipe", "targets")
        new = dataclasses.replace(new, **{name: getattr(old, name) for name in kept})
    return new


def _same_kind(value: Any, old: Any, assignment: str) -> Any:
    kind = type(old)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and whole:
        return float(value)
    if type(value) is not kind:
        raise InputError(
            f"--set {assignment}: the field takes {kind.__name__}, like {describe(old)}"
        )
    return value


def _import(path: str, old: Any, assignment: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        like = "my_module.my_function" if old is None else path_of(old)
        raise InputError(
            f"--set {assignment}: {path!r} cannot be imported ({in_one_line(error)}); give an "
            f"import path such as {like}"
        ) from error
