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
    over_cells,
    serially,
    split_cpu,
    together,
    waves,
)
from madjax.sweep.defended import defended
from madjax.sweep.online import OnlineProgram, direction_kept
from madjax.sweep.pipeline import grid, run

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
    "grid",
    "make_mesh",
    "over_cells",
    "run",
    "serially",
    "split_cpu",
    "together",
    "waves",
]
