"""Rows of an older madjax, said as today's: so that their run can go on, and their curves are one.

Claim: what a row measured stays as it is, with its commit, device and versions; what it says of its
cell is said as it is now, and checked against what it said before.
Command: python experiments/lift_rows.py CONFIG --from DIR... --out OUT [--data-dir DIR]
Cost: seconds.

Rows of an older madjax lack fields by which curves are told apart today, and their `id` is another,
as a field of a config that came later is part of it. A row is lifted where CONFIG has one cell of
its data set, defence, layers, oracle, distance, strength, attack, variant, budget and seed, and
where all that row and cell both say of their settings is the same, as are the images it was made
with, where its config.json has their checksums. What a row does not say, such as a learning rate of
before rows had one, is said as CONFIG has it: see to it that it was. Rows of which CONFIG has no
cell are left and counted. `madjax sweep CONFIG --out OUT --resume` then runs the cells that have no
row.
"""

import argparse
from pathlib import Path

from madjax import config, report, store, sweep
from madjax.config import describe
from madjax.errors import InputError
from madjax.sweep.rows import which
from madjax.sweep.tasks import open_tasks

KEYS = ("dataset", "defense", "layers", "oracle", "distance", "strength")
KEYS += ("attack", "variant", "budget", "seed")
DIGESTS = {"id", "task_settings", "defense_settings", "attack_settings"}
"""They change with any field that comes; the fields they are of are compared."""


def key(row):
    """By what a row of any age names its cell."""
    return tuple(row[name] for name in KEYS)


def lifted(row, cell):
    """The row with the fields of its cell; InputError where it says something else of one."""
    for name, value in cell.items():
        if name not in DIGESTS and row.get(name) not in (None, value):
            raise InputError(f"the row of {key(row)} says {name} = {row[name]!r}, not {value!r}")
    return {"status": "ok"} | row | cell


def check_images(directory, checksums, sources):
    """Refuse rows that were made with other images than those which are there."""
    said = store.read_config(directory).get("data")
    said = said[0] if isinstance(said, list) else said
    if said is None:
        return
    before = {"dataset": said["dataset"], "queryset": said.get("queryset", said.get("query"))}
    for source in {"dataset", *sources}:
        if before[source] != checksums[source]:
            raise InputError(
                f"{directory} has other images in its {source}: checksum {before[source]}, not "
                f"{checksums[source]}"
            )


def lift(chosen, directories, out, data_dir):
    """Write the run; returns how many rows it has, and how many were left."""
    opened = open_tasks(chosen.tasks, data_dir, None)
    cells = {}
    for cell in sweep.expand(chosen):
        checksums = opened[cell.task].checksums
        said = {"id": sweep.cell_id(cell, checksums)} | which(cell, checksums)
        if cells.setdefault(key(said), said) is not said:
            raise InputError(f"{chosen.name} has two cells that are called {key(said)}")
    for directory in directories:
        for each in opened.values():
            check_images(directory, each.checksums, {attack.source for attack in chosen.attacks})
    rows, found = report.read_rows(*directories), {}
    for row in rows:
        if key(row) in cells and found.setdefault(key(row), row) is not row:
            raise InputError(f"two rows are called {key(row)}: give the directories of one of them")
    description = describe(chosen) | {"data": [each.checksums for each in opened.values()]}
    names = [cell["id"] for cell in cells.values()]
    with store.open_run(out, description, names, resume=False):
        store.append_rows(out, [lifted(row, cells[at]) for at, row in found.items()])
    return len(found), len(rows) - len(found)


def main():
    """Lift, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", metavar="CONFIG")
    given = {"nargs": "+", "type": Path, "metavar": "DIR", "required": True}
    parser.add_argument("--from", dest="directories", **given)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args()
    chosen = config.load(options.config)
    chosen = chosen.sweep() if isinstance(chosen, config.AngleStudy) else chosen
    made, left = lift(chosen, options.directories, options.out, options.data_dir)
    print(f"{options.out}: {made} rows; {left} are of no cell of {options.config}")


if __name__ == "__main__":
    main()
