"""How fast this machine was at each kind of work: noted by runs, read by plans."""

import contextlib
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from madjax import processes
from madjax.attacks import Attack
from madjax.config import name_of
from madjax.defenses import Defense
from madjax.errors import InputError
from madjax.files import write_atomically
from madjax.models import Classifier
from madjax.recipe import Recipe

FILE = "rates.jsonl"
LARGEST = 2**18
"""Bytes of the file, beyond which it is shortened."""
LATEST = 9
"""Notes of one kind of work that count, of which the median is taken."""


@dataclass(frozen=True)
class Rates:
    """Seconds of work that was done on a device, in a folder; without one, nothing is known.

    An amount of work is in units of its kind: examples times epochs, queries times strengths.
    """

    folder: Path | None
    device: str

    @processes.by_first
    def note(self, kind: str, amount: float, seconds: float) -> None:
        """Write down how long an amount of work took, without what was compiled for it."""
        if self.folder is None or not amount:
            return
        line = {"kind": kind, "device": self.device, "amount": amount, "seconds": seconds}
        path = self.folder / FILE
        with contextlib.suppress(OSError, InputError):  # of a folder that may only be read
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if path.stat().st_size > LARGEST:
                _shorten(path)

    def seconds(self, kind: str, amount: float) -> float | None:
        """How long an amount of work will take; None where none of its kind was done here before.

        What is noted after the first question is not read any more.
        """
        if not amount:
            return 0.0
        return amount * self._pace[kind] if kind in self._pace else None

    @cached_property
    def _pace(self) -> dict[str, float]:
        """Seconds for a unit of each kind of work."""
        path = self.folder and self.folder / FILE
        notes = _latest(path) if path and path.is_file() else {}
        return {
            kind: statistics.median(note["seconds"] / note["amount"] for note in each)
            for (device, kind), each in notes.items()
            if device == self.device
        }


def _latest(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The notes of a file that count, by device and kind."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # of two commands that wrote at once
            note = json.loads(line)
            found[note["device"], note["kind"]].append(note)
    return {key: notes[-LATEST:] for key, notes in found.items()}


def _shorten(path: Path) -> None:
    """Drop the notes that do not count any more, and perhaps one that is written meanwhile."""
    notes = [note for each in _latest(path).values() for note in each]
    text = "".join(json.dumps(note) + "\n" for note in notes)
    write_atomically(path, lambda draft: draft.write_text(text))


def training(network: Classifier, recipe: Recipe) -> str:
    """The kind of work that trains a network on its own."""
    return f"training of {_named(network)} by {_means(recipe)}"


def knowing(network: Classifier) -> str:
    """The kind of work that makes a victim's posteriors."""
    return f"posteriors of {_named(network)}"


def answering(rule: Defense, network: Classifier) -> str:
    """The kind of work that makes the answers of a defence."""
    return f"answers of {rule.label} with {_named(network)}"


def collecting(attack: Attack, rule: Defense, stolen: Classifier) -> str:
    """The kind of work that collects a transfer set, query by query."""
    return f"queries of {attack.label} against {rule.label} with {_named(stolen)}"


def online(attack: Attack, rule: Defense, stolen: Classifier) -> str:
    """The kind of work that trains an online attacker, step by step."""
    return f"steps of {attack.label} before {rule.label} with {_named(stolen)}"


def stealing(stolen: Classifier, recipe: Recipe) -> str:
    """The kind of work that trains stolen models, many side by side."""
    return f"stolen {_named(stolen)} by {_means(recipe)}"


def _means(recipe: Recipe) -> str:
    each = recipe.gradient, recipe.augment
    return " on ".join(name_of(function) for function in each if function is not None)


def _named(network: Classifier) -> str:
    """The network's module, its settings that are not the usual ones, and its images."""
    module = network.module
    values = {
        each.name: (getattr(module, each.name), each.default)
        for each in fields(module)
        if each.name not in ("parent", "name", "num_classes")  # flax's own, and one of the data
    }
    settings = ", ".join(
        f"{name}={name_of(value) if callable(value) else value}"
        for name, (value, usual) in values.items()
        if value != usual
    )
    shape = "x".join(map(str, network.image_shape))
    return f"{type(module).__name__}{settings and f'({settings})'} on {shape}"
