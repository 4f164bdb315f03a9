"""The grid task x defence x strength x attack x budget x seed, from a config to rows.

    task          a data set, a query set, a network for them     tasks.py    open_tasks
      |           the whole grid is tried on shapes               trial.py    tried
    victim        trained once, with a checkpoint an epoch        victim.py   keeper
      |
    posteriors    y of the test set and of the queries            stages.py   victim_posteriors
      |
    answers       y~ at all strengths of a defence, in one pass   stages.py   answers
      |
    transfer set  what an attacker has asked and been told        stages.py   begin, proceed
      |
    stolen model  trained on it, and judged                       stages.py   start, advance
      |
    row           what was measured, and of which cell            rows.py     measured

`run` (run.py) goes through this for the cells that have no row yet. What several of them share is
made once (stock.py), and kept on disk (cache.py) under a key of all that determines it
(keyring.py). Cells of one defence and attack, on tasks of equal shapes, are a group (work.py), and
go through the last stages together, in waves spread over the devices (mesh.py), of which several
may share a cell. Images that have no room there stay on the host, and a cell is sent its own in
parts of an epoch. Online attackers, who leave no transfer set, have stages and a loop of their own
(online.py, study.py), beside that of the others (steal.py). `plan` (plan.py, tally.py) counts what
`run` would do, in the time that earlier work took (rates.py), or that its operations take on a
machine that is not here; load.py has these, and how many cells fit on a device.
"""

from madjax.sweep.clock import Compiled, Stopwatch, programs
from madjax.sweep.defended import defended
from madjax.sweep.grid import Cell, cell_id, expand
from madjax.sweep.mesh import (
    Machine,
    default_mapping,
    device_name,
    make_mesh,
    map_cells,
    over_cells,
    split_cpu,
    stack,
    vmap_cells,
)
from madjax.sweep.plan import Plan, plan
from madjax.sweep.progress import Epoch
from madjax.sweep.rows import git_commit
from madjax.sweep.run import run
from madjax.sweep.stages import Api, Own, Parties, Point, Tests
from madjax.sweep.status import Status, status
from madjax.sweep.study import direction_kept

__all__ = [
    "Api",
    "Cell",
    "Compiled",
    "Epoch",
    "Machine",
    "Own",
    "Parties",
    "Plan",
    "Point",
    "Status",
    "Stopwatch",
    "Tests",
    "cell_id",
    "default_mapping",
    "defended",
    "device_name",
    "direction_kept",
    "expand",
    "git_commit",
    "make_mesh",
    "map_cells",
    "over_cells",
    "plan",
    "programs",
    "run",
    "split_cpu",
    "stack",
    "status",
    "vmap_cells",
]
