"""The one exception that a user's input can cause, and how it speaks of others."""

import traceback
from pathlib import Path


class InputError(ValueError):
    """Bad input from the user: one line that names the value and the fix.

    The command line prints it and exits with status 2; nothing was computed or written before.
    """


def in_one_line(error: BaseException) -> str:
    """Another error in one line: its type, its message, and where in the user's code it arose."""
    text = (str(error).strip() or "no message").splitlines()[0][:120]
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if _is_the_users(frame.filename)]
    if isinstance(error, SyntaxError) and error.filename:
        where = f", {error.filename}:{error.lineno}"
        text = error.msg
    else:
        where = f", {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
    return f"{type(error).__name__}: {text}{where}"


def _is_the_users(filename: str) -> bool:
    """Whether this is neither madjax nor an installed package, nor part of Python."""
    path = Path(filename)
    others = {Path(__file__).parent, Path(traceback.__file__).parent}
    packages = {"site-packages", "dist-packages"}
    return path.is_file() and others.isdisjoint(path.parents) and packages.isdisjoint(path.parts)
