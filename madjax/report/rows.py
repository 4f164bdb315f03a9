"""The rows of a run, as its sweep wrote them."""

import json
import math
from pathlib import Path

from madjax.errors import InputError
from madjax.report.points import is_sound

NUMBERS = ("strength", "budget", "seed", "defender_accuracy")
OF_THE_STOLEN = ("attacker_accuracy",)  # numbers where that model did not diverge
# The names that rows of any age have; what else tells curves apart, older rows may lack.
NAMES = ("dataset", "victim", "queryset", "defense", "layers", "oracle", "distance", "attack")
BUDGETED = ("mad", "mad_argmax")  # of older rows, the defences whose strength is epsilon


def read_rows(*directories: str | Path, of_each_config: bool = False) -> list[dict]:
    """Read `rows.jsonl` in each directory, one dict for each line.

    A cell that several directories hold, by its `id`, is read from the first of them; with
    of_each_config from the first of each config.
    Rows from before there was a `strength`, which had every defence's as `epsilon`, come back as
    they would be written now, as far as they say it.
    A last line that is not JSON is what a crash leaves of a half-written row: it is skipped.
    Raises InputError for no directory, file or rows, and for a broken line, one without a field
    that identifies its cell, or without a finite number where one is needed.
    """
    rows, seen = [], set()
    for directory in directories:
        named = [
            (row, (row.get("id"), row.get("config") if of_each_config else None))
            for row in _read(Path(directory))
        ]
        own = [row for row, cell in named if cell not in seen]
        seen |= {cell for row, cell in named if "id" in row}
        rows += own
    return rows


def _read(directory: Path) -> list[dict]:
    path = directory / "rows.jsonl"
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such directory; give the --out folder of a sweep")
    if not path.is_file():
        raise InputError(f"{path}: no such file; run `madjax sweep --out {path.parent}` first")
    # Bytes, not text: the crash may have cut a line inside a character.
    lines = [(i, b) for i, b in enumerate(path.read_bytes().split(b"\n"), 1) if b.strip()]
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line.decode())
        except ValueError as error:
            if number == lines[-1][0]:
                break
            raise InputError(f"{path}:{number}: not JSON ({error}); delete the line") from None
        row = _as_now(row)
        if problem := _problem(row):
            raise InputError(f"{path}:{number}: {problem}; delete the line and run its cell again")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: no rows; let the sweep finish at least one cell")
    return rows


def _as_now(row):
    """A row of any age with the fields that tell a strength from a budget."""
    if not isinstance(row, dict) or "strength" in row or "epsilon" not in row:
        return row
    budget = row["epsilon"] if row.get("defense") in BUDGETED else None
    return row | {"strength": row["epsilon"], "epsilon": budget}


def _problem(row) -> str | None:
    if not isinstance(row, dict):
        return "not a JSON object"
    numbers = NUMBERS + OF_THE_STOLEN * is_sound(row)
    if missing := [name for name in (*NAMES, *numbers) if name not in row]:
        return f"no field {missing[0]!r}"
    bad = [n for n in numbers if not (isinstance(row[n], int | float) and math.isfinite(row[n]))]
    return f"{bad[0]} is {row[bad[0]]!r}, not a finite number" if bad else None
