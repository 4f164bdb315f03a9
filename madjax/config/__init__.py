"""Sweeps and studies as frozen dataclasses, config files that return them, and `--set`."""

from madjax.config.describe import describe, digest, name_of
from madjax.config.files import forms, load, shipped_configs
from madjax.config.override import override
from madjax.config.values import AngleStudy, Architecture, Defended, Sweep, Task

__all__ = [
    "AngleStudy",
    "Architecture",
    "Defended",
    "Sweep",
    "Task",
    "describe",
    "digest",
    "forms",
    "load",
    "name_of",
    "override",
    "shipped_configs",
]
