"""How rows answer the paper's claims: each reading takes the rows of one run on one data set.

It returns None where they do not answer. Points of a curve are means over seeds; differences are
taken seed by seed.
"""

from collections.abc import Callable
from statistics import fmean

from madjax.report.found import (
    NEAR,
    NO,
    PARTLY,
    TABLE_1,
    YES,
    Found,
    Reading,
    behind,
    by_seed,
    curves_of,
    first,
    interval,
    labels_alone,
    mad,
    percent,
    whole,
)
from madjax.report.pairs import difference, paired
from madjax.report.points import Curve, is_undefended, stat


def _undefended(rows: list[dict], attack: str) -> list[dict]:
    """The undefended rows of an attack at its largest budget, one a seed."""
    own = [r for r in whole(rows) if r["attack"] == attack and is_undefended(r)]
    most = max((r["budget"] for r in own), default=0)
    return list({r["seed"]: r for r in own if r["budget"] == most}.values())


def victim(rows: list[dict]) -> Found | None:
    """The accuracy of victims as they are, one a victim."""
    paper = TABLE_1[rows[0]["dataset"]]["victim"]
    victims = {
        r.get("victim_seed", 0): r["victim_accuracy"] for r in rows if "dp_sgd" not in r["defense"]
    }
    value = stat(list(victims.values()))
    if value.mean is None:
        return None
    return Found(percent(value), len(victims), YES if value.mean >= paper - NEAR else NO)


def undefended(attack: str) -> Reading:
    """An attack's accuracy without a defence."""

    def read(rows: list[dict]) -> Found | None:
        own = _undefended(rows, attack)
        if not own:
            return None
        value, paper = stat([r["attacker_accuracy"] for r in own]), TABLE_1[rows[0]["dataset"]]
        near = value.mean >= paper[attack] - max(NEAR, 2 * (value.std or 0))
        said = f"{percent(value)} with {own[0]['budget']:,} queries"
        return Found(said, len(own), YES if near else NO)

    return read


def strongest(rows: list[dict]) -> Found | None:
    """The accuracies of all four attacks without a defence."""
    own = {a: _undefended(rows, a) for a in ("knockoff", "jbda", "jbself", "jbtop3")}
    if not all(own.values()):
        return None
    means = {a: stat([r["attacker_accuracy"] for r in each]).mean for a, each in own.items()}
    said = ", ".join(f"{a} {mean:.1f}" for a, mean in means.items())
    best = max(means, key=lambda a: means[a])
    return Found(said, len(own["knockoff"]), YES if best == "knockoff" else NO)


def at_little_cost(attack: str, paper: float, start: float) -> Reading:
    """The attacker's accuracy at the largest measured epsilon that costs less than a point."""

    def read(rows: list[dict]) -> Found | None:
        curves = curves_of(whole(rows), attack)
        curve = mad(curves)
        if curve is None or not curves[curve][0].is_undefended or len(curves[curve]) < 3:
            return None
        begin, *points = curves[curve]
        loss = {p: begin.defender_accuracy.mean - p.defender_accuracy.mean for p in points}
        kept = [p for p in points if loss[p] < 1]
        if not kept:
            return None
        point = kept[-1]
        ours, taken = (
            point.attacker_accuracy,
            begin.attacker_accuracy.mean - point.attacker_accuracy.mean,
        )
        half = taken >= (start - paper) / 2
        holds = YES if ours.mean <= paper + NEAR else PARTLY if half else NO
        said = (
            f"{begin.attacker_accuracy.mean:.1f} to {percent(ours)} at epsilon {point.strength:g}, "
            f"for {loss[point]:.1f} points"
        )
        return Found(said, point.n, holds)

    return read


def truncated(rows: list[dict]) -> Found | None:
    """What knockoff has more from top labels alone, without a defence."""
    whole_rows = _undefended(rows, "knockoff")
    own = [r for r in labels_alone(rows) if is_undefended(r) and r["attack"] == "knockoff"]
    own = [r for r in own if whole_rows and r["budget"] == whole_rows[0]["budget"]]
    told = paired(own, whole_rows, "attacker_accuracy")
    if told is None:
        return None
    return Found(f"{interval(told)} points", told.n, YES if told.mean >= -NEAR else NO)


def less_distance(rows: list[dict]) -> Found | None:
    """The L1 at which the attacker has 80 %: MAD's over reverse sigmoid's."""
    own = whole(rows)
    curves = curves_of(own)
    ours, theirs = mad(curves), first(curves, defense="reverse_sigmoid")
    if ours is None or theirs is None:
        return None
    at = [by_seed(own, c, "attacker_accuracy", 80.0, "l1_mean") for c in (ours, theirs)]
    both = [(at[0][seed], at[1][seed]) for seed in at[0] if at[1].get(seed)]
    if not both:
        return None
    ratio = stat([a / b for a, b in both])
    said = f"{percent(ratio, 2)} times (L1 {stat([a for a, _ in both]).mean:.2f})"
    return Found(said, len(both), YES if ratio.mean < 0.8 else NO)


def taken_with_label_kept(defense: str) -> Reading:
    """The most that a defence takes from the attacker at any measured strength."""

    def read(rows: list[dict]) -> Found | None:
        own = whole(rows)
        curves = curves_of(own)
        curve = first(curves, defense=defense)
        if curve is None or not curves[curve][0].is_undefended:
            return None
        begin, best = curves[curve][0], min(curves[curve], key=lambda p: p.attacker_accuracy.mean)
        taken = begin.attacker_accuracy.mean - best.attacker_accuracy.mean
        said = f"{taken:.1f} points, at L1 {best.l1_mean.mean:.2f}"
        # As many points as the paper's "at least", but for the noise of the means.
        return Found(said, best.n, YES if taken >= 20 - NEAR else NO)

    return read


def closer(rows: list[dict]) -> Found | None:
    """What the attacker has more before MAD-argmax than before reverse sigmoid at equal L1.

    The L1 is that of MAD-argmax at its largest strength.
    """
    own = whole(rows)
    curves = curves_of(own)
    ours, theirs = first(curves, defense="mad_argmax"), first(curves, defense="reverse_sigmoid")
    if ours is None or theirs is None:
        return None
    strength = curves[ours][-1].strength
    values, far = [], []
    for row in behind(own, ours, strength):
        at = by_seed(own, theirs, "l1_mean", row["l1_mean"], "attacker_accuracy")
        if row["seed"] in at:
            values.append(row["attacker_accuracy"] - at[row["seed"]])
            far.append(row["l1_mean"])
    told = difference(values)
    if told is None:
        return None
    holds = YES if told.is_told and told.mean < 0 else PARTLY if told.mean < 0 else NO
    return Found(f"{interval(told)} points at L1 {fmean(far):.2f}", told.n, holds)


def below_70(defense: str, paper: float) -> Reading:
    """What it costs the defender to bring the attacker below 70 %, in points of accuracy.

    Where no strength does, what comes closest: of MAD for less than 5 points, beyond which it is of
    no use.
    """

    def read(rows: list[dict]) -> Found | None:
        curves = curves_of(whole(rows))
        ours = defense == "mad"
        curve = mad(curves) if ours else first(curves, defense=defense)
        if curve is None or not curves[curve][0].is_undefended:
            return None
        begin = curves[curve][0].defender_accuracy.mean
        loss = {p: begin - p.defender_accuracy.mean for p in curves[curve]}
        usable = [p for p in loss if not ours or loss[p] < 5]
        below = [p for p in usable if p.attacker_accuracy.mean < 70]
        if below:
            point = min(below, key=lambda p: loss[p])
            holds = loss[point] <= paper + NEAR if ours else loss[point] >= paper / 2
        else:
            point = min(usable, key=lambda p: p.attacker_accuracy.mean)
            holds = not ours
        at = f"{percent(point.attacker_accuracy)} at {point.strength:g}"
        said = f"{loss[point]:.1f} points ({at})" + ("" if below else ", never below")
        return Found(said, point.n, YES if holds else NO)

    return read


def of_labels_alone(defense: str) -> Reading:
    """What the attacker of top labels has below the undefended attacker of top labels."""

    def read(rows: list[dict]) -> Found | None:
        own = [r for r in labels_alone(rows) if r["attack"] == "knockoff"]
        curves = curves_of(own)
        curve = mad(curves) if defense == "mad" else first(curves, defense=defense)
        if curve is None or not curves[curve][0].is_undefended:
            return None
        begin, *points = curves[curve]
        # MAD's useful range; a label that is kept costs nothing at any strength.
        points = [p for p in points if begin.defender_accuracy.mean - p.defender_accuracy.mean < 5]
        if not points:
            return None
        point = points[-1]
        lost = begin.attacker_accuracy.mean - point.attacker_accuracy.mean
        holds = lost >= 9 if defense == "mad" else lost <= NEAR
        said = (
            f"{lost:.1f} points below ({percent(point.attacker_accuracy)} at {point.strength:g}, "
            f"defender {point.defender_accuracy.mean:.1f})"
        )
        return Found(said, point.n, YES if holds else NO)

    return read


def ablated(wanted: Callable[[Curve], bool]) -> Reading:
    """How much more the attacker has before an ablation than before MAD, at the largest epsilon."""

    def read(rows: list[dict]) -> Found | None:
        own = whole(rows)
        curves = curves_of(own)
        ours, other = mad(curves), next((c for c in curves if wanted(c)), None)
        if ours is None or other is None:
            return None
        strengths = {p.strength for p in curves[ours]} & {
            p.strength for p in curves[other] if not p.is_undefended
        }
        if not strengths:
            return None
        at = max(strengths)
        told = paired(behind(own, other, at), behind(own, ours, at), "attacker_accuracy")
        if told is None:
            return None
        holds = YES if told.is_told and told.mean > 0 else PARTLY if told.mean > 0 else NO
        return Found(f"{interval(told)} points at epsilon {at:g}", told.n, holds)

    return read


def entropy(defense: str, paper: float) -> Reading:
    """The entropy of its answers at a mean L1 distance of 1."""

    def read(rows: list[dict]) -> Found | None:
        own = whole(rows)
        curve = first(curves_of(own), defense=defense)
        at = by_seed(own, curve, "l1_mean", 1.0, "entropy_mean") if curve else {}
        if not at:
            return None
        value = stat(list(at.values()))
        near = abs(value.mean - paper) <= max(0.1, 2 * (value.std or 0))
        return Found(f"{percent(value, 2)} bits", len(at), YES if near else NO)

    return read


def little_by_budget(rows: list[dict]) -> Found | None:
    """What the attacker has more, before MAD at the largest epsilon, with 50,000 for 10,000."""
    own = [r for r in whole(rows) if r["attack"] == "knockoff" and r["defense"] == "mad"]
    own = [r for r in own if not is_undefended(r) and r["layers"] == "last"]
    at = max((r["strength"] for r in own), default=0)
    own = [r for r in own if r["strength"] == at]
    budgets = sorted({r["budget"] for r in own})
    few = [budget for budget in budgets if budget <= budgets[-1] / 3]
    if not few:
        return None
    many, fewer = ([r for r in own if r["budget"] == b] for b in (budgets[-1], few[-1]))
    told = paired(many, fewer, "attacker_accuracy")
    if told is None:
        return None
    said = f"{interval(told)} points from {few[-1]:,} to {budgets[-1]:,} at epsilon {at:g}"
    return Found(said, told.n, YES if told.mean < 10 else NO)


def not_helped_by(kinds: tuple[str, ...]) -> Reading:
    """How much more the best of these attackers has than the plain one, before MAD."""

    def read(rows: list[dict]) -> Found | None:
        own = [r for r in rows if r["attack"] == "knockoff" and not is_undefended(r)]
        at = max((r["strength"] for r in own if r["strength"] < 1), default=0)
        own = [r for r in own if r["strength"] == at]
        plain = [r for r in own if not r["variant"]]
        names = {r["variant"] for r in own if r["variant"].startswith(kinds)}
        told = {
            name: paired([r for r in own if r["variant"] == name], plain, "attacker_accuracy")
            for name in names
        }
        known = {name: each for name, each in told.items() if each is not None}
        if not known:
            return None
        best = max(known, key=lambda name: known[name].mean)
        holds = PARTLY if known[best].mean > NEAR else YES
        if holds == PARTLY and known[best].is_told:
            holds = NO
        said = f"{best}: {interval(known[best])} points at epsilon {at:g}"
        return Found(said, known[best].n, holds)

    return read


# --- of the white-box study -----------------------------------------------------------------------


def _angles(rows: list[dict], low: float, high: float) -> list[dict]:
    """MAD's rows over all parameters, of the attacker as described, in a range of epsilons."""
    own = [r for r in whole(rows) if r.get("angle_mean") is not None and r["defense"] == "mad"]
    return [r for r in own if low <= r["strength"] <= high and not is_undefended(r)]


def widest_angle(rows: list[dict]) -> Found | None:
    """The largest deviation that any step had."""
    own = _angles(rows, 0, 2)
    if not own:
        return None
    most = max(row["angle_max"] for row in own)
    seeds = len({row["seed"] for row in own})
    return Found(f"0 to {most:.0f}", seeds, YES if most >= 115 else NO)


def useful_angle(rows: list[dict]) -> Found | None:
    """The mean deviation at epsilons from 0.95 to 0.99."""
    own = _angles(rows, 0.95, 0.99)
    if not own:
        return None
    means = [stat([r["angle_mean"] for r in own if r["strength"] == e]).mean for e in _at(own)]
    seeds = len({row["seed"] for row in own})
    said = f"{min(means):.1f}" + (f" to {max(means):.1f}" if len(means) > 1 else "")
    return Found(said, seeds, YES if min(means) >= 24.9 else NO)


def flipped(rows: list[dict]) -> Found | None:
    """The mean deviation at epsilon 2."""
    own = _angles(rows, 2, 2)
    if not own:
        return None
    value = stat([row["angle_mean"] for row in own])
    return Found(percent(value), len(own), YES if value.mean > 90 else NO)


def loss_rises(rows: list[dict]) -> Found | None:
    """The test loss at epsilon 2, from the first evaluation to the last."""
    own = _angles(rows, 2, 2)
    if not own or len(own[0]["test_losses"]) < 2:
        return None
    begin, end = (fmean(row["test_losses"][i] for row in own) for i in (0, -1))
    steps = own[0]["steps_at"]
    said = f"{begin:.1f} nats after {steps[0]:,} steps, {end:.1f} after {steps[-1]:,}"
    return Found(said, len(own), YES if end > begin else NO)


def _at(rows: list[dict]) -> list[float]:
    return sorted({row["strength"] for row in rows})
