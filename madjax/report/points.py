"""Rows to points: what makes rows one curve, and their mean and spread over seeds."""

import math
from collections import Counter, namedtuple
from dataclasses import dataclass, fields
from itertools import groupby
from statistics import fmean, stdev

from madjax.errors import InputError

# A row's identity without epsilon and seed: what makes points one curve.
Curve = namedtuple(
    "Curve",
    "dataset victim queryset defense defense_variant layers oracle distance attack variant budget",
)
# Mean and sample standard deviation over seeds; None where undefined, as the std of one seed.
Stat = namedtuple("Stat", "mean std")


@dataclass(frozen=True)
class Summary:
    """One point of a curve over its n seeds; units as in the rows (accuracies in percent)."""

    curve: Curve
    epsilon: float
    n: int
    defender_accuracy: Stat
    attacker_accuracy: Stat
    attacker_accuracy_best: Stat
    l1_mean: Stat
    fidelity: Stat
    entropy_mean: Stat
    dp_epsilon: Stat
    angle_mean: Stat
    angle_std: Stat
    angle_p05: Stat
    angle_p50: Stat
    angle_p95: Stat
    angle_max: Stat
    test_loss: Stat
    direction_kept: Stat


def summarise(rows: list[dict]) -> list[Summary]:
    """Average rows over seeds: one Summary a curve point, sorted by curve, then by epsilon.

    A metric that a seed lacks (absent, null, not finite) is None. InputError for two rows of a
    cell and seed.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        curve = Curve(*(row.get(name, "") for name in Curve._fields))
        groups.setdefault((curve, float(row["epsilon"])), []).append(row)
    # Names as text (null, for no oracle, has no order with strings); budget and epsilon by value.
    order = sorted(groups, key=lambda k: ([str(name) for name in k[0][:-1]], k[0].budget, k[1]))
    return [_summary(*key, groups[key]) for key in order]


def curves(rows: list[dict]) -> dict[Curve, list[Summary]]:
    """The points of every curve, in epsilon order. Raises InputError for no rows."""
    if not rows:
        raise InputError("no rows to report; let the sweep finish at least one cell")
    return {curve: list(points) for curve, points in groupby(summarise(rows), lambda p: p.curve)}


def started(points: dict[Curve, list[Summary]]) -> dict[Curve, list[Summary]]:
    """The curves, each beginning undefended where that was measured.

    One without a point at epsilon 0 gets that of `none`, or else of another defence, against the
    same attack on the same victim.
    """
    starts: dict[tuple, Summary] = {}
    for curve in sorted(points, key=lambda c: c.defense != "none"):
        for point in points[curve][:1]:
            if point.epsilon == 0:
                starts.setdefault(_attacked(curve), point)
    return {
        curve: [starts[_attacked(curve)], *own]
        if own[0].epsilon and _attacked(curve) in starts
        else own
        for curve, own in points.items()
    }


def _attacked(curve: Curve) -> tuple:
    same = ("dataset", "victim", "queryset", "attack", "variant", "budget")
    return tuple(getattr(curve, name) for name in same)


def _stat(values: list) -> Stat:
    if any(value is None or not math.isfinite(value) for value in values):
        return Stat(None, None)
    return Stat(fmean(values), stdev(values) if len(values) > 1 else None)


def _summary(curve: Curve, epsilon: float, rows: list[dict]) -> Summary:
    seed, times = Counter(row["seed"] for row in rows).most_common(1)[0]
    if times > 1:
        said = " ".join(str(name) for name in curve if name != "")
        cell = f"{said} epsilon {epsilon:g} seed {seed}"
        raise InputError(f"{times} rows for the cell {cell}; keep one of them in rows.jsonl")
    stats = {f.name: _stat([r.get(f.name) for r in rows]) for f in fields(Summary)[3:]}
    return Summary(curve, epsilon, len(rows), **stats)
