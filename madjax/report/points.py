"""Rows to points: what makes rows one curve, and their mean and spread over seeds."""

import math
from collections import Counter, namedtuple
from dataclasses import dataclass, fields
from itertools import groupby
from statistics import fmean, stdev

from madjax.errors import InputError

TASK = ("dataset", "victim", "queryset", "dataset_source", "queryset_source", "query_splits")
DEFENSE = ("defense", "defense_variant", "layers", "oracle", "distance")
ATTACK = ("attack", "variant")
NAMED = (*TASK, *DEFENSE, *ATTACK)
"""The fields of a row that readers know its cell by."""
SOLVER = ("surrogate", "solver", "constraints", "objective")
RULE = (*DEFENSE, *SOLVER, "defense_settings")
"""Those that say which defence it was."""
RECIPE = ("epochs", "batch_size", "learning_rate", "momentum", "weight_decay", "decay")
RECIPE += ("decay_epochs", "optimizer", "gradient", "augment", "start")
TRAINING = (*(f"victim_{field}" for field in RECIPE), "attack_architecture", "targets", *RECIPE)
DIGESTS = ("task_settings", "attack_settings", "defense_settings")
"""Of all that task, attack and defence are set to, named above or not."""
# A row's identity without strength and seeds: what makes points one curve.
Curve = namedtuple("Curve", (*NAMED, *SOLVER, *TRAINING, *DIGESTS, "budget"))
# Mean and sample standard deviation over seeds; None where undefined, as the std of one seed.
Stat = namedtuple("Stat", "mean std")


@dataclass(frozen=True)
class Summary:
    """One point of a curve over n cells; units as in the rows (accuracies in percent).

    The cells are `victims` victims (None: not recorded), each attacked with several seeds. From
    further `diverged` cells no stolen model came out: they are in no mean. budgeted: the strength
    is a budget on the answers, epsilon.
    """

    curve: Curve
    strength: float
    budgeted: bool
    victims: int | None
    n: int
    diverged: int
    defender_accuracy: Stat
    attacker_accuracy: Stat
    attacker_accuracy_best: Stat
    attacker_fidelity: Stat
    l1_mean: Stat
    fidelity: Stat
    undefended_share: Stat
    entropy_mean: Stat
    dp_epsilon: Stat
    angle_mean: Stat
    angle_std: Stat
    angle_p05: Stat
    angle_p50: Stat
    angle_p95: Stat
    angle_max: Stat
    batch_angle_mean: Stat
    update_angle_mean: Stat
    test_loss: Stat
    direction_kept: Stat

    @property
    def is_undefended(self) -> bool:
        """Whether every answer is the victim's own, at a strength of 0."""
        return _untouched(self.strength, self.undefended_share.mean)


def summarise(rows: list[dict]) -> list[Summary]:
    """Average rows over seeds: one Summary a curve point, sorted by curve, then by strength.

    Rows whose stolen model diverged are counted and left out of means. A metric that another seed
    lacks (absent, null, not finite) is None, and so is every metric where all have diverged.
    InputError for two rows of a cell and seed.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((curve_of(row), float(row["strength"])), []).append(row)
    # Names as text (null, for no oracle, has no order with strings); budget and strength by value.
    order = sorted(groups, key=lambda k: ([str(name) for name in k[0][:-1]], k[0].budget, k[1]))
    return [_summary(*key, groups[key]) for key in order]


def curve_of(row: dict) -> Curve:
    """The curve that a row is of; fields that older rows lack are empty.

    So are those of a recipe that are null, as such a row may go on with a run from before them.
    """
    said = (row.get(name, "") for name in Curve._fields)
    said = (
        "" if v is None and f in TRAINING else v for f, v in zip(Curve._fields, said, strict=True)
    )
    return Curve(*(tuple(each) if isinstance(each, list) else each for each in said))


def is_sound(row: dict) -> bool:
    """Whether the stolen model of a row did not diverge; so in rows from before that field."""
    return row.get("status", "ok") == "ok"


def is_undefended(row: dict) -> bool:
    """Whether every answer behind a row is the victim's own, at a strength of 0."""
    return _untouched(row["strength"], row.get("undefended_share"))


def _untouched(strength: float, share: float | None) -> bool:
    # Of some defences 0 is a strength as any other, such as of rounding to no decimals.
    return strength == 0 and share in (None, 1)


def curves(rows: list[dict]) -> dict[Curve, list[Summary]]:
    """The points of every curve, in order of strength. Raises InputError for no rows."""
    if not rows:
        raise InputError("no rows to report; let the sweep finish at least one cell")
    return {curve: list(points) for curve, points in groupby(summarise(rows), lambda p: p.curve)}


def sound_curves(rows: list[dict]) -> dict[Curve, list[Summary]]:
    """`curves` of what can be drawn: points at which some stolen model did not diverge.

    Raises InputError where there is none.
    """
    found = {curve: [p for p in own if p.n] for curve, own in curves(rows).items()}
    found = {curve: own for curve, own in found.items() if own}
    if not found:
        raise InputError(
            f"all {len(rows)} stolen models diverged: there is nothing to draw; give the attack's "
            "recipe, or its substitute, a smaller learning_rate"
        )
    return found


def at_full_budget(points: dict[Curve, list[Summary]]) -> dict[Curve, list[Summary]]:
    """The curves at the largest budget of each attack on a victim; those at others are left out."""
    largest: dict[tuple, int] = {}
    for curve in points:
        attack = _attacked(curve._replace(budget=0))
        largest[attack] = max(curve.budget, largest.get(attack, 0))
    return {
        curve: own
        for curve, own in points.items()
        if curve.budget == largest[_attacked(curve._replace(budget=0))]
    }


def started(points: dict[Curve, list[Summary]]) -> dict[Curve, list[Summary]]:
    """The curves, from the answers that are changed least; undefended first, where measured.

    One without an undefended point gets that of `none`, or else of another defence, against the
    same attack on the same victim.
    """
    starts: dict[tuple, Summary] = {}
    for curve in sorted(points, key=lambda c: c.defense != "none"):
        for point in points[curve][:1]:
            if point.is_undefended:
                starts.setdefault(_attacked(curve), point)
    found = {}
    for curve, own in points.items():
        found[curve] = _from_weakest(own)
        if not own[0].is_undefended and _attacked(curve) in starts:
            found[curve].insert(0, starts[_attacked(curve)])
    return found


def _from_weakest(own: list[Summary]) -> list[Summary]:
    """Points in order of strength, turned round where a larger strength changes answers less."""
    first, last = own[0].l1_mean.mean, own[-1].l1_mean.mean
    return own[:: -1 if None not in (first, last) and last < first else 1]


def _attacked(curve: Curve) -> tuple:
    return tuple(getattr(curve, name) for name in Curve._fields if name not in RULE)


def stat(values: list) -> Stat:
    """Mean and sample standard deviation; None for both where a value is none."""
    if not values or any(value is None or not math.isfinite(value) for value in values):
        return Stat(None, None)
    return Stat(fmean(values), stdev(values) if len(values) > 1 else None)


def trained(rows: list[dict]) -> list[tuple[int | None, float | None]]:
    """The victims behind rows: the seed and accuracy of each.

    Those of one seed that were trained on machines which round differently are as many victims.
    The accuracy is None where no row of a seed says it.
    """
    both = dict.fromkeys((row.get("victim_seed"), row.get("victim_accuracy")) for row in rows)
    known = {seed for seed, accuracy in both if accuracy is not None}
    return [(seed, at) for seed, at in both if at is not None or seed not in known]


def _summary(curve: Curve, strength: float, rows: list[dict]) -> Summary:
    victims = trained(rows)
    seeds = Counter((row.get("victim_seed"), row["seed"]) for row in rows)
    (_, seed), times = seeds.most_common(1)[0]
    if times > 1:
        named = (getattr(curve, name) for name in (*NAMED, "budget"))
        said = " ".join(str(name) for name in named if name != "")
        cell = f"{said} strength {strength:g} seed {seed}"
        raise InputError(f"{times} rows for the cell {cell}; keep one of them in rows.jsonl")
    sound = list(filter(is_sound, rows))
    metrics = (field.name for field in fields(Summary) if field.type is Stat)
    stats = {name: stat([row.get(name) for row in sound]) for name in metrics}
    return Summary(
        curve,
        strength,
        any(row.get("epsilon") is not None for row in rows),
        None if any(seed is None for seed, _ in victims) else len(victims),
        len(sound),
        len(rows) - len(sound),
        **stats,
    )
