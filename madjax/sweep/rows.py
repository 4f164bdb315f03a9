"""What a row says: the cell, what was measured, and where the numbers come from."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from madjax.attacks import Attack
from madjax.config import Sweep, describe, digest, name_of
from madjax.datasets import Dataset, base_name
from madjax.recipe import Recipe
from madjax.sweep.grid import Cell
from madjax.sweep.mesh import device_name
from madjax.train import State
from madjax.weights import Trained

Array = jax.Array

_PACKAGES = ("madjax", "jax", "flax", "optax")


def measured(
    attack: Attack,
    num_classes: int,
    budget: int,
    utility: dict[str, float],
    asked: Array,
    accuracy: Array,
    loss: Array,
    fidelity: Array,
) -> dict[str, Any]:
    """The fields of one cell that were measured."""
    return {
        "queries": int(asked) if budget == attack.budget else budget,
        **{name: number(value) for name, value in utility.items()},
        **after(accuracy, loss, num_classes),
        "attacker_fidelity": number(fidelity),
        "attacker_losses": numbers(loss),
    }


def which(cell: Cell, checksums: Mapping[str, int]) -> dict[str, Any]:
    """The fields of one cell that say which it is; `epsilon` where the strength is a budget.

    The digests tell apart what the other fields call by one name: they change with any setting of
    the task but its seed, and with its data, by checksums; of the rule; and of the attack.
    """
    task, attack, budgeted = cell.task, cell.attack, cell.rule.is_budgeted
    asked = {"queryset": (task.queryset, task.query_splits), "dataset": (task.dataset, ("train",))}
    queryset, splits = asked[attack.source]
    return {
        "dataset": task.name,
        "dataset_source": task.dataset,
        "victim": name_of(task.architecture).lower(),
        "victim_seed": task.victim_seed,
        **{f"victim_{field}": value for field, value in _recipe(task.victim).items()},
        "queryset": base_name(queryset),
        "queryset_source": queryset,
        "query_splits": list(splits),
        **cell.rule.describe(),
        "strength": cell.strength,
        "epsilon": cell.strength if budgeted else None,
        **attack.describe(),
        "attack_architecture": name_of(attack.architecture).lower(),
        **_recipe(attack.recipe),
        "targets": name_of(attack.targets),
        "budget": cell.budget,
        "examples": attack.examples(cell.budget),
        "seed": cell.seed,
        "task_settings": digest([describe(replace(task, victim_seed=0)), dict(checksums)]),
        "defense_settings": digest(describe(cell.rule)),
        "attack_settings": digest(describe(attack)),
    }


def _recipe(recipe: Recipe | Trained) -> dict[str, Any]:
    """The fields of a recipe; functions by name, files by their path."""
    held = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    held = {name: v.path if isinstance(v, Trained) else v for name, v in held.items()}
    return {name: name_of(v) if callable(v) else v for name, v in held.items()}


OK, DIVERGED = "ok", "diverged"
"""`status` of a row: whether its stolen model came out of its training."""
BLOWN_UP = 10
"""A loss of so many times log K, which is that of a uniform answer, comes from no training."""


def after(accuracy: np.ndarray, loss: np.ndarray, num_classes: int) -> dict[str, Any]:
    """The stolen model's accuracy, percent: in the end, at best, and each time it was tested.

    accuracy and the training loss before it, in nats, both [times]. Null where training diverged:
    from the time on at which a number is not finite (`madjax.train.judge`), and where the loss is
    beyond `BLOWN_UP` log K. The best is of the other times.
    """
    sound = np.isfinite(accuracy) & (loss <= BLOWN_UP * np.log(num_classes))
    accuracy = np.where(sound, accuracy, np.nan)
    known = accuracy[sound]
    return {
        "status": OK if sound[-1] else DIVERGED,
        "attacker_accuracy": number(accuracy[-1]),
        "attacker_accuracy_best": number(known.max()) if known.size else None,
        "attacker_accuracies": numbers(accuracy),
    }


def plain(value: Any) -> Any:
    """A row, or a value of one, as JSON has it: NumPy's numbers as Python's, null for infinity."""
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not np.isfinite(value) else value


def numbers(values: Any) -> list[float | None]:
    """`number` of each."""
    return [number(value) for value in values]


def number(value: Any) -> float | None:
    """A float32 in as few digits as tell it apart; None for what JSON lacks (infinite KL)."""
    return float(str(np.float32(value))) if np.isfinite(value) else None


def run_facts(config: Sweep, description: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The fields that all rows of one run share."""
    return {
        "config": config.name,
        "device": device_name(mesh),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "git_commit": git_commit(),
        "config_hash": digest(description),
    }


def made_with(facts: dict[str, Any]) -> dict[str, Any]:
    """Those of `run_facts` that a result may depend on."""
    return {name: facts[name] for name in ("device", "versions", "git_commit")}


def task_facts(data: Dataset, victim: State) -> dict[str, Any]:
    """The fields that all rows of one task share."""
    return {
        "victim_accuracy": number(victim.accuracy[-1]),
        "num_classes": data.num_classes,
        "n_train": len(data.x_train),
        "n_test": len(data.x_test),
    }


def git_commit() -> str | None:
    """The commit of the code that runs, "+" where files differ from it; None outside a checkout."""
    here = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
