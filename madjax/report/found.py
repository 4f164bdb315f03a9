"""What readings of the paper's claims are made of: words, selections of rows, levels on curves."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

from madjax.report.names import is_ablation, is_plain_mad
from madjax.report.pairs import Difference, pair_of
from madjax.report.points import (
    Curve,
    Stat,
    Summary,
    at_full_budget,
    curve_of,
    is_undefended,
    sound_curves,
    started,
    trained,
)

YES, PARTLY, NO = "yes", "partly", "no"
NEAR = 2.0
"""Points of accuracy within which two are alike."""
REASONABLE = 10.0
"""Points of the defender's accuracy that a reasonable operating point costs at most (5.2.3)."""
TABLE_1 = {
    "mnist": {"victim": 99.4, "jbda": 89.2, "jbself": 89.4, "jbtop3": 87.3, "knockoff": 99.0},
    "fashion_mnist": {
        "victim": 92.0,
        "jbda": 38.7,
        "jbself": 45.8,
        "jbtop3": 68.7,
        "knockoff": 69.2,
    },
    "cifar10": {"victim": 92.0, "jbda": 28.6, "jbself": 20.7, "jbtop3": 73.8, "knockoff": 78.7},
    "cifar100": {"victim": 72.2, "jbda": 5.3, "jbself": 2.9, "jbtop3": 39.2, "knockoff": 51.9},
    "cub200": {"victim": 80.4, "jbda": 6.8, "jbself": 3.9, "jbtop3": 21.5, "knockoff": 65.1},
    "caltech256": {"victim": 80.0, "jbda": 12.5, "jbself": 16.0, "jbtop3": 29.5, "knockoff": 74.6},
}
"""Accuracies in percent, of attackers with 50,000 queries."""


class Found(NamedTuple):
    """What rows say of a claim: in words, over how many seeds, and whether it holds."""

    ours: str
    n: int
    holds: str


Reading = Callable[[list[dict]], Found | None]


def percent(value: Stat, digits: int = 1) -> str:
    """Mean ± sample standard deviation; "-" where it is not known."""
    if value.mean is None:
        return "-"
    spread = "" if value.std is None else f" ± {value.std:.{digits}f}"
    return f"{value.mean:.{digits}f}{spread}"


def interval(value: Difference, digits: int = 1) -> str:
    """A difference and its interval."""
    if value.low is None:
        return f"{value.mean:+.{digits}f}"
    return f"{value.mean:+.{digits}f} [{value.low:+.{digits}f}, {value.high:+.{digits}f}]"


def signed(value: Difference, wanted: int) -> str:
    """Whether a difference has the wanted sign: surely, or in its mean alone."""
    if value.mean * wanted <= 0:
        return NO
    return YES if value.is_told else PARTLY


def whole(rows: list[dict]) -> list[dict]:
    """Those of attackers as described, that learn from whole answers."""
    return [r for r in rows if learns(r) == "posteriors" and not r.get("variant")]


def labels_alone(rows: list[dict]) -> list[dict]:
    """Those of attackers that learn from top labels alone."""
    return [r for r in rows if learns(r) == "top_label"]


def learns(row: dict) -> str:
    """What an attacker learns from."""
    return row.get("targets") or "posteriors"


def unspoiled(rows: list[dict], attack: str) -> list[dict]:
    """The undefended rows of an attack at its largest budget, one for each victim and seed."""
    own = [r for r in whole(rows) if r["attack"] == attack and is_undefended(r)]
    most = max((r["budget"] for r in own), default=0)
    return list({pair_of(r): r for r in own if r["budget"] == most}.values())


def before_mad(rows: list[dict]) -> list[dict]:
    """Those of knockoff attackers before MAD of the last layer, at epsilons below 1.

    Of the largest budget that each attacker has.
    """
    own = [r for r in rows if r["attack"] == "knockoff" and r["defense"] == "mad"]
    own = [r for r in own if r["layers"] == "last" and 0 < r["strength"] < 1]
    own = [r for r in own if is_plain_mad(curve_of(r))]
    most: dict[tuple, int] = {}
    for row in own:
        attacker = (row.get("variant"), learns(row))
        most[attacker] = max(row["budget"], most.get(attacker, 0))
    return [r for r in own if r["budget"] == most[r.get("variant"), learns(r)]]


def victims(rows: list[dict]) -> list[float]:
    """One accuracy for each victim; those that DP-SGD trained are left out."""
    own = [r for r in rows if r["defense"] != "dp_sgd" and r.get("victim_accuracy") is not None]
    return [accuracy for _, accuracy in trained(own)]


def curves_of(rows: list[dict], attack: str = "knockoff") -> dict[Curve, list[Summary]]:
    """The curves against one attack at its full budget, from the undefended point on."""
    own = [row for row in rows if row["attack"] == attack]
    return started(at_full_budget(sound_curves(own))) if own else {}


def behind(rows: list[dict], curve: Curve, strength: float) -> list[dict]:
    """The rows of a point."""
    return [r for r in rows if r["strength"] == strength and curve_of(r) == curve]


def first(curves: Mapping[Curve, list[Summary]], **fields: str) -> Curve | None:
    """The first unaltered curve with these fields; MAD's of the last layer before others."""
    found = [
        c
        for c in curves
        if all(getattr(c, name) == value for name, value in fields.items()) and not is_ablation(c)
    ]
    return min(found, key=lambda c: c.layers != "last", default=None)


def mad(curves: Mapping[Curve, list[Summary]]) -> Curve | None:
    """MAD without its label being kept."""
    return first(curves, defense="mad")


def parted(points: list[Summary]) -> tuple[Summary, list[Summary]] | None:
    """The undefended point of a curve and the others; None where it has none, or no others."""
    begin, *others = points
    return (begin, others) if begin.is_undefended and others else None


def parts_of(
    rows: list[dict], defense: str, attack: str = "knockoff"
) -> tuple[Summary, list[Summary]] | None:
    """`parted` of a defence's curve against one attack; None where there is none."""
    curves = curves_of(rows, attack)
    curve = first(curves, defense=defense)
    return parted(curves[curve]) if curve else None


def loss(begin: Summary, point: Summary) -> float:
    """Points of accuracy that the defender pays."""
    return begin.defender_accuracy.mean - point.defender_accuracy.mean


def taken_by(begin: Summary, point: Summary) -> float:
    """Points of accuracy that the attacker loses."""
    return begin.attacker_accuracy.mean - point.attacker_accuracy.mean


def reading(points: list[Summary], at: str, level: float, field: str) -> float | None:
    """A field where another first reaches a level on a curve, by linear interpolation.

    None where it does not.
    """
    for low, high in pairwise(points):
        a, b = (getattr(point, at).mean for point in (low, high))
        y, z = (getattr(point, field).mean for point in (low, high))
        if None not in (a, b, y, z) and min(a, b) <= level <= max(a, b):
            share = (level - a) / (b - a) if b != a else 0.0
            return y + share * (z - y)
    return None


class Queries(NamedTuple):
    """How many queries it takes; -1 or 1 where it is fewer, or more, than were measured."""

    queries: float
    beyond: int


def queries_for(rows: list[dict], accuracy: float) -> Queries | None:
    """The fewest queries that reach an accuracy, of the rows of one seed, one for each budget.

    By linear interpolation between the logarithms of measured budgets; the nearest of them where
    the accuracy is beyond all. None where fewer than two budgets were measured.
    """
    by_budget = {row["budget"]: row["attacker_accuracy"] for row in rows}
    points = sorted(by_budget.items())
    if len(points) < 2:
        return None
    if accuracy < points[0][1]:
        return Queries(points[0][0], -1)
    for (few, a), (many, b) in pairwise(points):
        if a <= accuracy <= b:
            share = (accuracy - a) / (b - a) if b > a else 0.0
            return Queries(few * (many / few) ** share, 0)
    return Queries(points[-1][0], 1)


def in_pairs(rows: list[dict], curve: Curve) -> dict[tuple[int, int], list[Summary]]:
    """The points of a curve for each victim and seed that has it, the undefended one first."""
    found = {}
    for pair in sorted({pair_of(row) for row in rows}):
        own = curves_of([row for row in rows if pair_of(row) == pair])
        if curve in own:
            found[pair] = own[curve]
    return found


def by_pair(
    rows: list[dict], curve: Curve, at: str, level: float, field: str
) -> dict[tuple[int, int], float]:
    """`reading` on the curve of each victim and seed that reaches the level."""
    told = {pair: reading(own, at, level, field) for pair, own in in_pairs(rows, curve).items()}
    return {pair: value for pair, value in told.items() if value is not None}
