"""The leaderboard: a line for each defence at each strength before each attack."""

from statistics import fmean
from typing import NamedTuple

from madjax.report.angles import is_traced
from madjax.report.labels import but_targets
from madjax.report.names import attack, defence, name, remarked
from madjax.report.pairs import Difference, grouped, paired
from madjax.report.points import RULE, Curve, Stat, is_sound, is_undefended, stat

VICTIM = ("dataset", "dataset_source", "victim", *RULE)
"""What makes a defended victim, besides how it was trained; queries are the attacker's."""


class Leader(NamedTuple):
    """A defended victim and an attack on it; accuracies and fidelity in percent, L1 in [0, 2].

    kind is the network, number of classes, gradients and oracle, by which a cost may be known.
    worst is the largest mean accuracy of all attacks on this defended victim. label is the accuracy
    of the same attacker where it learns from top labels alone, and gain how much more it has then.
    passes is what the defence computes for a query besides the victim's posterior.
    """

    dataset: str
    defence: str
    strength: float
    budgeted: bool
    attack: str
    budget: int
    defender: Stat
    fidelity: Stat
    l1: Stat
    l1_max: float | None
    attacker: Stat
    best: Stat
    taken: Difference | None
    worst: float
    label: Stat | None
    gain: Difference | None
    passes: str
    kind: tuple[str, int | None, str, str]
    n: int
    configs: tuple[str, ...]

    @property
    def is_flagged(self) -> bool:
        """Whether an attacker surely does better with top labels alone than with whole answers."""
        return self.gain is not None and self.gain.is_told and self.gain.mean > 0


def leaders(rows: list[dict]) -> list[Leader]:
    """All lines, by data set, then from the least accurate attacker among those before it.

    Attackers of the top label alone are a column of the attacker as described, where there is one
    of each, and else lines of their own. Left out are online attackers, before whom the defence
    knows more, and rows whose stolen model diverged.
    """
    points = grouped(rows, lambda row: is_sound(row) and not is_traced(row))
    twins = _twins(points)
    taken_in = {id(own) for own in twins.values()}
    worst: dict[tuple, float] = {}
    starts: dict[tuple, list[dict]] = {}
    for (curve, strength), own in points.items():
        victim = _victim(curve, strength)
        worst[victim] = max(worst.get(victim, 0.0), _mean(own, "attacker_accuracy"))
        if is_undefended(own[0]):
            starts.setdefault(_attacker(curve), own)
    found = []
    for (curve, strength), own in points.items():
        if id(own) in taken_in:
            continue
        start, label = starts.get(_attacker(curve)), twins.get((curve, strength))
        defended = not is_undefended(own[0])
        if not defended and start is not own:  # those of other rules are the same
            continue
        found.append(
            Leader(
                name(curve.dataset),
                remarked(defence(curve), curve.defense_variant) if defended else "undefended",
                strength,
                own[0].get("epsilon") is not None,
                attack(curve),
                curve.budget,
                _stat(own, "defender_accuracy"),
                _stat(own, "fidelity"),
                _stat(own, "l1_mean"),
                max((row["l1_max"] for row in own if row.get("l1_max") is not None), default=None),
                _stat(own, "attacker_accuracy"),
                _stat(own, "attacker_accuracy_best"),
                paired(start, own, "attacker_accuracy") if start and defended else None,
                worst[_victim(curve, strength)],
                _stat(label, "attacker_accuracy") if label else None,
                paired(label, own, "attacker_accuracy") if label else None,
                _passes(curve, own[0].get("num_classes")) if defended else "0",
                (curve.victim, own[0].get("num_classes"), curve.layers, str(curve.oracle)),
                len(own),
                tuple(dict.fromkeys(row.get("config", "") for row in own)),
            )
        )
    return sorted(found, key=lambda line: (line.dataset, line.attacker.mean))


def _twins(points: dict[tuple[Curve, float], list[dict]]) -> dict[tuple[Curve, float], list[dict]]:
    """The attacker of top labels for each attacker as described that has one, and no other."""
    sides: dict[tuple, dict[str, list]] = {}
    for at in points:
        curve, strength = at
        if curve.targets == "top_label" or not curve.variant:
            side = sides.setdefault((but_targets(curve), strength), {})
            side.setdefault(curve.targets or "posteriors", []).append(at)
    found = {}
    for side in sides.values():
        plain, labels = side.get("posteriors", []), side.get("top_label", [])
        if len(plain) == len(labels) == 1:
            found[plain[0]] = points[labels[0]]
    return found


def _stat(rows: list[dict], field: str) -> Stat:
    return stat([row.get(field) for row in rows])


def _mean(rows: list[dict], field: str) -> float:
    return fmean(row[field] for row in rows)


def _victim(curve: Curve, strength: float) -> tuple:
    fields = (*VICTIM, *(f for f in Curve._fields if f.startswith("victim_")))
    return (*(getattr(curve, field) for field in fields), strength)


def _attacker(curve: Curve) -> tuple:
    return tuple(getattr(curve, field) for field in Curve._fields if field not in RULE)


def _passes(curve: Curve, classes: int | None) -> str:
    """Passes of one image through the surrogate, by the gradients that the defence needs."""
    if curve.oracle in ("random_vertex", "argmin"):  # which look at none
        return "0"
    if curve.layers == "last":
        return "1 forward"
    if curve.layers == "all":
        return f"1 forward, {classes - 1 if classes else 'K - 1'} backward"
    return "0"
