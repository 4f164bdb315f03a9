"""The command line: `madjax sweep`, `plan`, `angle`, `status`, `report`, `export` and `cache`.

What it takes is in parser.py, what each command does in commands.py.
"""

import os
import signal
import sys
import traceback
import warnings

import jax

from madjax import processes, stopping
from madjax.cli.parser import make_parser
from madjax.errors import InputError, in_one_line
from madjax.sweep import cache

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 2 for bad input, with one line.

    It is 130 for a run that SIGINT has stopped, and 143 for SIGTERM. With --traceback, bad input
    raises instead: what caused it is above it.
    """
    options = make_parser().parse_args(arguments)
    if os.getcwd() not in sys.path:  # where --set finds the user's own modules
        sys.path.append(os.getcwd())
    python, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        if not getattr(options, "distributed", False):  # JAX keeps those of the first process alone
            cache.keep_programs()
        options.command(options)
    except (InputError, OSError) as error:
        if options.traceback:
            raise
        print(f"madjax: error: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if not processes.several():
            raise
        if options.traceback:
            traceback.print_exc()
        print(
            f"madjax: error: another process has died, or this one ({in_one_line(error)}): start "
            "all of them again, with --resume",
            file=sys.stderr,
        )
        processes.leave(1)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, stopping.Stopped) else signal.SIGINT
        print(
            f"madjax: stopped by {signal.Signals(number).name}; nothing finished is lost, go on "
            "with --resume",
            file=sys.stderr,
        )
        return 128 + number
    finally:
        warnings.formatwarning = python
    return 0


def _warning(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as one line, without the place in madjax that gave it."""
    return f"madjax: warning: {message}\n"
