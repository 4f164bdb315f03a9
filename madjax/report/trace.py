"""The traces of a run's online attackers as one flat table: NumPy or Parquet."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from madjax.errors import InputError
from madjax.files import save_npz, write_atomically


def read_trace(directory: str | Path) -> dict[str, np.ndarray]:
    """Every query of every online attacker in `traces/` of a run: column -> [rows].

    Columns: `step` from 0, `angle` (degrees), `distance_used` (`distance` names which), `loss`
    (nats), the step's `batch_angle` and `update_angle`, all as in `madjax.white_box.Trace`, and
    which cell it was: `strength`, `seed`, `dataset`, `queryset`, `victim_seed`, and the names of
    defence and attack. A column that a file lacks is empty there, or NaN. InputError where there
    are no traces.
    """
    files = sorted((Path(directory) / "traces").glob("*.npz"))
    if not files:
        raise InputError(f"{directory} holds no traces: run madjax angle --out {directory} first")
    tables = []
    for file in files:
        with np.load(file) as held:
            arrays = dict(held)
        cells, queries = arrays["angle"].shape
        # Files of older runs lack it: there every step is one query.
        table = {"step": np.tile(np.arange(queries, dtype=np.int32), cells)}
        for name, values in arrays.items():
            each = (
                values if values.ndim == 2 else np.broadcast_to(values.reshape(-1, 1), (cells, 1))
            )
            table[name] = np.broadcast_to(each, (cells, queries)).reshape(-1)
        tables.append(table)
    columns = dict.fromkeys(name for table in tables for name in table)
    return {
        name: np.concatenate([_column(table, name, tables) for table in tables]) for name in columns
    }


def _column(
    table: dict[str, np.ndarray], name: str, tables: list[dict[str, np.ndarray]]
) -> np.ndarray:
    if name in table:
        return table[name]
    kind = next(other[name].dtype.kind for other in tables if name in other)
    return np.full(len(table["step"]), "" if kind == "U" else np.nan)


def write_trace(directory: str | Path, path: str | Path) -> None:
    """Write the traces of a run to one file, by its suffix: .npz or .parquet.

    Raises:
        InputError: another suffix; no traces.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise InputError(f"{path} is neither of {', '.join(WRITERS)}: give a name that ends in one")
    columns = read_trace(directory)
    write_atomically(path, lambda draft: WRITERS[path.suffix](draft, columns))


def _parquet(path: Path, columns: dict[str, np.ndarray]) -> None:
    import pyarrow  # lazy: half a second that tables do not need
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)


WRITERS: dict[str, Callable] = {".npz": save_npz, ".parquet": _parquet}
