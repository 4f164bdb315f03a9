"""The grid strength x seed as one program over all devices, and the pipeline around it."""

from madjax.sweep.cells import (
    Lesson,
    Point,
    Program,
    Shared,
    Training,
    default_mapping,
    device_name,
    make_mesh,
    map_cells,
    over_cells,
    split_cpu,
    vmap_cells,
    waves,
)
from madjax.sweep.clock import Stopwatch, programs
from madjax.sweep.defended import defended
from madjax.sweep.grid import Cell, cell_id, expand
from madjax.sweep.online import OnlineProgram, direction_kept
from madjax.sweep.pipeline import run
from madjax.sweep.rows import git_commit

__all__ = [
    "Cell",
    "Lesson",
    "OnlineProgram",
    "Point",
    "Program",
    "Shared",
    "Stopwatch",
    "Training",
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
    "programs",
    "run",
    "split_cpu",
    "vmap_cells",
    "waves",
]
