"""What a sweep is: frozen dataclasses, config files that return them, and `--set` overrides.

A config file is a Python file with a function `config() -> Sweep`; its docstring states the claim,
the command and the cost.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import flax.linen as nn
import numpy as np

from madjax.attacks import Attack, Knockoff
from madjax.defenses import MAD, Defense
from madjax.errors import InputError, in_one_line
from madjax.mad import Solver
from madjax.models import LeNet
from madjax.train import Recipe

Architecture = Callable[[int], nn.Module]
"""Number of classes -> a linen module; a module class whose first field is that number will do."""


@dataclass(frozen=True)
class Sweep:
    """One grid of cells, defence x attack x strength x seed, against one victim.

    dataset and queryset are names for `open_dataset`; query_splits are the parts of the query set
    that attackers may draw from. attacks are told apart by name and variant; budgets are query
    budgets besides each attack's own: the stolen model is trained anew on as many examples as each
    would have bought, the first of the one transfer set. defense is one
    defence or several, told apart by what they say of themselves in rows; epsilons are the
    strengths of every defence that has none of its own (for MAD, the budget). A surrogate has the
    victim's architecture and is drawn anew for every seed; a seed also fixes the drawn images, the
    stolen model's first parameters and the order of training.
    """

    name: str
    dataset: str
    queryset: str
    query_splits: tuple[str, ...] = ("train",)
    architecture: Architecture = LeNet
    victim: Recipe = Recipe(weight_decay=5e-4)
    victim_seed: int = 0
    defense: Defense | tuple[Defense, ...] = MAD()
    epsilons: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.8, 0.99, 1.1, 1.5)
    seeds: tuple[int, ...] = (0,)
    attacks: tuple[Attack, ...] = (Knockoff(),)
    budgets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for value in (*self.seeds, self.victim_seed):
            if not isinstance(value, int) or not 0 <= value < 2**32:
                raise InputError(f"seed is {value}: give a whole number from 0 to 2^32 - 1")
        for defense in self.defenses:
            if not isinstance(defense, Defense):
                raise InputError(
                    f"defense holds {defense!r}, which is not a madjax.Defense: give one such as "
                    "madjax.MAD(), or madjax.defenses.Custom(function=...)"
                )
        said = [tuple(defense.describe().values()) for defense in self.defenses]
        if not said or len(set(said)) != len(said):
            raise InputError(
                f"defense holds {'; '.join(d.label for d in self.defenses) or 'nothing'}: give at "
                "least one, each with settings or a variant of its own"
            )
        lists = {"seeds": self.seeds, "query_splits": self.query_splits}
        for defense in self.defenses:
            for value in self.strengths_of(defense):
                defense.check_strength(value)
            name = f"strengths of {defense.label}" if defense.strengths else "epsilons"
            lists[name] = self.strengths_of(defense)
        for name, values in lists.items():
            # Cells compute in float32: strengths that round to one number would be one cell.
            distinct = {np.float32(v) if isinstance(v, float) else v for v in values}
            if not values or len(distinct) != len(values):
                raise InputError(f"{name} is {values}: give at least one value, each once")
        for split in self.query_splits:
            if split not in ("train", "test"):
                raise InputError(f"query_splits holds {split!r}: use 'train' and 'test'")
        if not isinstance(self.attacks, tuple):
            raise InputError(f"attacks is {self.attacks!r}: give a tuple, such as (Knockoff(),)")
        for attack in self.attacks:
            if not isinstance(attack, Attack):
                raise InputError(
                    f"attacks holds {attack!r}, which is not a madjax.Attack: give one such as "
                    "madjax.Knockoff(), or madjax.attacks.Custom(collect=...)"
                )
        labels = [attack.label for attack in self.attacks]
        if not labels or len(set(labels)) != len(labels):
            raise InputError(
                f"attacks holds {', '.join(labels) or 'nothing'}: give at least one, each with a "
                "name and variant of its own"
            )
        for attack in self.attacks:
            for budget in self.budgets:
                attack.examples(budget)

    @property
    def defenses(self) -> tuple[Defense, ...]:
        """The defences, one or several."""
        return self.defense if isinstance(self.defense, tuple) else (self.defense,)

    def strengths_of(self, defense: Defense) -> tuple[float, ...]:
        """The strengths at which a defence is tried."""
        return defense.strengths or self.epsilons


def describe(value: Any) -> Any:
    """A config as JSON values: dataclasses become objects, functions their import path."""
    if _is_section(value):
        return {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [describe(item) for item in value]
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        return dict(zip(("function", "arguments", "keywords"), map(describe, parts), strict=True))
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if callable(value):
        path = _path_of(value)
        if "<" in path:
            raise InputError(
                f"{path} has no import path, by which a resumed run could tell it from another: "
                "define it at the top of a module"
            )
        return path
    return value


def _is_section(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _path_of(value: Any) -> str:
    """Where a function or class lives, or the class of any other object."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def name_of(function: Callable[..., Any]) -> str:
    """What rows and messages call a function or class; a partial has the name of what it wraps."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return getattr(function, "__name__", type(function).__name__)


def digest(description: Any) -> str:
    """Twelve hexadecimal digits that change with any value of a described config."""
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def override(config: Any, assignment: str) -> Any:
    """A copy of a config with one field replaced: "attacks.recipe.epochs=5".

    The value is a Python literal, or plain text where the field holds text. A field that holds a
    function takes the import path of another function. A section takes the import path of a class
    or function that makes one without arguments ("attacks=madjax.attacks.jbda"); a new attack keeps
    the budget, network, recipe and targets of the first of those that it replaces. Commas separate
    the values of a tuple. A field of a tuple of sections is replaced in each of them. The new value
    must be of the same kind as the old one.

    Raises:
        InputError: no such field, a value of another kind, or one the config refuses.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise InputError(f"--set {assignment}: write it as field=value, for example seeds=(0,1)")
    return _replace(config, path.strip().split("."), text.strip(), assignment)


def _replace(config: Any, path: list[str], text: str, assignment: str) -> Any:
    if isinstance(config, tuple) and any(map(_is_section, config)):
        # Of defences of several kinds, those that have the field; if none has, the first one's
        # error says which fields there are.
        having = [item for item in config if hasattr(item, path[0])] or config
        return tuple(
            _replace(item, path, text, assignment) if item in having else item for item in config
        )
    name, *rest = path
    known = [f.name for f in dataclasses.fields(config)] if _is_section(config) else []
    if name not in known:
        raise InputError(
            f"--set {assignment}: there is no field {name!r}; "
            + (f"choose one of {', '.join(known)}" if known else "the field before it has no parts")
        )
    old = getattr(config, name)
    if rest:
        new = _replace(old, rest, text, assignment)
    elif isinstance(old, tuple) or ("," in text and _may_be_several(config, name)):
        first = old[:1] if isinstance(old, tuple) else (old,)
        example = first[0] if first else _example(config, name)
        new = _parse_several(text, example, assignment)
    else:
        new = _parse(text, old, assignment)
    return dataclasses.replace(config, **{name: new})


def _example(config: Any, name: str) -> Any:
    """A value of the kind that an empty tuple of this field would hold; None for a function."""
    kind = get_args(get_type_hints(type(config))[name])[0]
    return None if get_origin(kind) is Callable else kind()


def _may_be_several(config: Any, name: str) -> bool:
    """Whether a field that holds one value may hold a tuple of them instead."""
    kinds = get_args(get_type_hints(type(config))[name])
    return any(get_origin(kind) is tuple for kind in kinds)


def _parse_several(text: str, example: Any, assignment: str) -> tuple[Any, ...]:
    """The values of text, each of the kind of `example`."""
    parts = tuple(part.strip() for part in text.split(","))
    if example is None or callable(example) or _is_section(example):
        return tuple(_parse(part, example, assignment) for part in parts)
    value = _literal(text)
    if isinstance(value, str):
        value = tuple(part.strip() for part in value.split(","))
    items = value if isinstance(value, tuple | list) else (value,)
    return tuple(_same_kind(item, example, assignment) for item in items)


def _parse(text: str, old: Any, assignment: str) -> Any:
    """The value of text, of the kind of `old`."""
    if _is_section(old):
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
    kind = next((kind for kind in (Attack, Defense, Solver) if isinstance(old, kind)), type(old))
    if not isinstance(new, kind):
        raise InputError(
            f"--set {assignment}: {path} makes {type(new).__name__}, which is no "
            f"{kind.__name__}: give what makes one, such as {_path_of(old)}"
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
        like = "my_module.my_function" if old is None else _path_of(old)
        raise InputError(
            f"--set {assignment}: {path!r} cannot be imported ({in_one_line(error)}); give an "
            f"import path such as {like}"
        ) from error


def shipped_configs() -> dict[str, Path]:
    """The config files that come with madjax, by name: beside the package, or inside a wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_configs", package.parent / "configs"):
        found = {p.stem: p for p in sorted(folder.glob("*.py")) if not p.stem.startswith("_")}
        if found:
            return found
    return {}


def load(name: str) -> Sweep:
    """The config of a file, or of a shipped config by its name ("quickstart").

    Raises:
        InputError: no such config, a file that cannot be run, or one without `config() -> Sweep`.
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
            f"config {name!r} fails with {in_one_line(error)}; it must define config() -> "
            "madjax.Sweep"
        ) from error
    if not isinstance(config, Sweep):
        raise InputError(f"config {name!r} returns {type(config).__name__}: return a madjax.Sweep")
    return config
