"""What a sweep is: frozen dataclasses, config files that return them, and `--set` overrides."""

from madjax.config.describe import describe, digest, name_of
from madjax.config.files import load, shipped_configs
from madjax.config.override import override
from madjax.config.values import Architecture, Defended, Sweep, Task

__all__ = [
    "Architecture",
    "Defended",
    "Sweep",
    "Task",
    "describe",
    "digest",
    "load",
    "name_of",
    "override",
    "shipped_configs",
]
