"""What the source of a user's function or class names: an edit there is an edit of the function."""

import functools
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

INSTALLED = tuple(
    Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")
)
PLAIN = (bool, int, float, complex, str, bytes, type(None))


def named(code: Any) -> list[str]:
    """Sources of the user's functions and classes that code names, directly or not, and constants.

    A constant is a number, text, or a tuple of such: lists and the like may change as the code
    runs, so that nothing is said of them, nor of arrays, nor of code that is installed.
    """
    code = inspect.unwrap(code)
    if not is_own(code):
        return []
    seen, waiting, said = {id(code)}, [code], []

    def consider(value: Any) -> None:
        if isinstance(value, PLAIN):
            said.append(repr(value))
        elif isinstance(value, tuple):
            for item in value:
                consider(item)
        elif isinstance(value, functools.partial):
            consider((value.func, *value.args, *value.keywords.items()))
        elif callable(value) and is_own(value := inspect.unwrap(value)) and id(value) not in seen:
            seen.add(id(value))
            waiting.append(value)
            said.append(_source(value))

    while waiting:
        for value in _names_of(waiting.pop(0)):
            consider(value)
    return said


def is_own(value: Any) -> bool:
    """Whether a function, class or module is neither madjax's nor of an installed package."""
    if not (inspect.isfunction(value) or inspect.isclass(value) or inspect.ismodule(value)):
        return False
    module = value.__name__ if inspect.ismodule(value) else value.__module__
    if module.partition(".")[0] == "madjax":
        return False
    try:
        path = Path(inspect.getfile(value)).resolve()
    except (OSError, TypeError):
        return False
    return path.is_file() and not any(path.is_relative_to(place) for place in INSTALLED)


def _names_of(code: Any) -> Iterator[Any]:
    """The global values that a function names, or the bases and methods of a class."""
    functions = [code]
    if inspect.isclass(code):
        yield from code.__bases__
        functions = [inspect.unwrap(_function(member)) for member in vars(code).values()]
    for function in functions:
        if not inspect.isfunction(function):
            continue
        names = sorted(_words(function.__code__))
        for name in names:
            value = function.__globals__.get(name)
            if inspect.ismodule(value):  # module.function: both are names of the code
                inside = vars(value) if is_own(value) else {}
                yield from (inside[word] for word in names if word in inside)
            elif name in function.__globals__:
                yield value


def _source(code: Any) -> str:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):  # made as the module runs
        return code.__qualname__


def _function(member: Any) -> Any:
    """What a method, a property or a function is made of."""
    return getattr(member, "__func__", getattr(member, "fget", member))


def _words(code: CodeType) -> set[str]:
    """The global names and attributes of a function and of those inside it."""
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*map(_words, inner))
