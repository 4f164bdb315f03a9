"""Differences seed by seed: of two defences before attackers that are alike, with an interval."""

import math
from collections.abc import Callable, Iterable
from statistics import fmean, stdev
from typing import NamedTuple

from madjax.report.names import is_ablation
from madjax.report.points import RULE, Curve, curve_of, is_sound, is_undefended

LEVEL = 0.95


class Difference(NamedTuple):
    """The mean of a difference in points over n pairs, and the ends of its interval at `LEVEL`.

    low and high are None for a single pair.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and self.low * self.high > 0


def difference(values: Iterable[float]) -> Difference | None:
    """Student's interval of a mean, for values that are normal; None for no value."""
    values = list(values)
    if not values:
        return None
    mean, n = fmean(values), len(values)
    if n == 1:
        return Difference(mean, None, None, n)
    from scipy.stats import t  # lazy: a second that tables do not need

    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def paired(ours: list[dict], theirs: list[dict], field: str) -> Difference | None:
    """How much larger a field is in our rows than in theirs of the same victim and seed."""
    both = [
        {pair_of(row): row[field] for row in rows if is_sound(row) and row.get(field) is not None}
        for rows in (ours, theirs)
    ]
    return difference(both[0][at] - both[1][at] for at in both[0] if at in both[1])


def pair_of(row: dict) -> tuple[int, int]:
    """By what rows of one task are paired: the victim's seed, and the attacker's."""
    return row.get("victim_seed") or 0, row["seed"]


class Pair(NamedTuple):
    """A defence beside MAD, both within one budget and before the same attack: accuracy of both."""

    curve: Curve
    reference: Curve
    strength: float
    difference: Difference


def pairs(rows: list[dict]) -> list[Pair]:
    """How much more the attacker has before a defence than before MAD, at equal epsilon.

    MAD is that of the same gradients, and of the last layer for defences without, and for MAD of
    other layers. Undefended points are left out, as are attacks that differ in any setting.
    """
    found = []
    groups = grouped(rows, lambda row: row.get("epsilon") is not None and not is_undefended(row))
    attacked: dict[tuple, list[Curve]] = {}
    for curve, _ in groups:
        own = attacked.setdefault(_attack(curve), [])
        if curve not in own:
            own.append(curve)
    for curves in attacked.values():
        plain = [c for c in curves if c.defense == "mad" and not is_ablation(c)]
        for curve in curves:
            reference = _reference(curve, plain)
            for (at, strength), own in groups.items():
                theirs = groups.get((reference, strength), [])
                if at == curve != reference and theirs:
                    told = paired(own, theirs, "attacker_accuracy")
                    found += [Pair(curve, reference, strength, told)] if told else []
    return found


def _reference(curve: Curve, plain: list[Curve]) -> Curve | None:
    """Of MAD's curves the one to stand beside."""
    same = [c for c in plain if c.layers == curve.layers]
    return (curve not in plain and next(iter(same), None)) or min(
        plain, key=lambda c: c.layers != "last", default=None
    )


def grouped(
    rows: list[dict], wanted: Callable[[dict], bool] = lambda row: True
) -> dict[tuple[Curve, float], list[dict]]:
    """The rows behind each point: (curve, strength) -> rows, in order of both."""
    found: dict[tuple[Curve, float], list[dict]] = {}
    for row in filter(wanted, rows):
        found.setdefault((curve_of(row), float(row["strength"])), []).append(row)
    order = sorted(found, key=lambda at: ([str(each) for each in at[0]], at[1]))
    return {at: found[at] for at in order}


def _attack(curve: Curve) -> tuple:
    return tuple(getattr(curve, name) for name in Curve._fields if name not in RULE)
