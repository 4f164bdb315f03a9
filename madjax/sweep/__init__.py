"""The grid strength x seed as one program over all devices, and the pipeline around it."""

from madjax.sweep.cells import (
    Cell,
    Lesson,
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
from madjax.sweep.defended import defended
from madjax.sweep.online import OnlineProgram, direction_kept
from madjax.sweep.pipeline import grid, run
from madjax.sweep.rows import git_commit

__all__ = [
    "Cell",
    "Lesson",
    "OnlineProgram",
    "Program",
    "Shared",
    "Training",
    "default_mapping",
    "defended",
    "device_name",
    "direction_kept",
    "git_commit",
    "grid",
    "make_mesh",
    "map_cells",
    "over_cells",
    "run",
    "split_cpu",
    "vmap_cells",
    "waves",
]
