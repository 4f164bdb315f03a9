"""What the benchmarks and studies share: sizes, turns between variants, where figures come from."""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from madjax import sweep

RESULTS = Path(__file__).parent / "results"
"""The committed results."""
SETS = {
    "full": ("mnist", "kassel_letters"),
    "embedded": ("embedded:mnist", "embedded:fashion_mnist"),
    "smoke": ("embedded:mnist[:200,:50]", "embedded:fashion_mnist[:50]"),
}
"""Victim and query sets of the studies: with data files, without any, and for --smoke."""
HAS_TORCH = importlib.util.find_spec("torch") is not None
"""Whether PyTorch is installed; where it is not, only madjax is measured."""


def parse(parser: argparse.ArgumentParser, **smoke: Any) -> argparse.Namespace:
    """The options; with --smoke those of a run of seconds, whose figures mean nothing."""
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes: does it run?")
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(**smoke)
    return parser.parse_args()


def use_devices(count: int | None) -> None:
    """Splits the CPU into so many devices; None and accelerators stay as they are."""
    if count and jax.config.jax_platforms in (None, "cpu"):
        jax.config.update("jax_num_cpu_devices", count)


def in_turns(
    variants: dict[str, tuple[Callable[[], Any], int]], rounds: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """First-call seconds, and items a second in every round, of variants that run in turn.

    variants: name -> (function without arguments, the items it works through). Turns, so that a
    busy machine slows all alike.
    """
    first, rates = {}, {name: [] for name in variants}
    for name, (run, _) in variants.items():
        first[name] = seconds(run)
    for _ in range(rounds):
        for name, (run, items) in variants.items():
            rates[name].append(items / seconds(run))
    return first, rates


def seconds(run: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def spread(values: Sequence[float], digits: int | None = 2) -> list[float]:
    """Median, smallest and largest, rounded; without decimals where digits is None."""
    return [round(f(values), digits) for f in (statistics.median, min, max)]


def ratios(
    values: Sequence[float], baseline: Sequence[float] | None, digits: int = 2
) -> list[float] | None:
    """`spread` of the ratios to the baseline within each round; None without a baseline."""
    if baseline is None:
        return None
    return spread([a / b for a, b in zip(values, baseline, strict=True)], digits)


def source() -> dict[str, Any]:
    """Where figures come from: commit, device and versions."""
    packages = ("jax", "torch") if HAS_TORCH else ("jax",)
    return {
        "commit": sweep.git_commit(),
        "device": sweep.device_name(sweep.make_mesh()),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *lines))


def write(path: Path, options: argparse.Namespace, facts: dict[str, Any], table: str) -> None:
    """`path`.json with the source, the options and the facts, and `path`.md with the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {name: value for name, value in vars(options).items() if name != "out"}
    facts = source() | {"options": said} | facts
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1, default=str) + "\n")
    path.with_suffix(".md").write_text(table.rstrip() + "\n")
