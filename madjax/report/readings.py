"""How rows answer the paper's claims on attacks and defences.

Each reading takes the rows of one task, and returns None where they do not answer. Points of a
curve are means over seeds; differences are taken seed by seed.
"""

import math
from collections.abc import Callable
from statistics import fmean

from madjax.report.found import (
    NEAR,
    NO,
    PARTLY,
    REASONABLE,
    TABLE_1,
    YES,
    Found,
    Reading,
    before_mad,
    behind,
    by_pair,
    curves_of,
    first,
    in_pairs,
    interval,
    loss,
    mad,
    parted,
    parts_of,
    percent,
    queries_for,
    reading,
    signed,
    taken_by,
    unspoiled,
    victims,
    whole,
)
from madjax.report.pairs import difference, pair_of, paired
from madjax.report.points import Curve, Summary, is_undefended, stat

ATTACKS = ("knockoff", "jbda", "jbself", "jbtop3")


def victim(rows: list[dict]) -> Found | None:
    """The accuracy of victims as they are, one a victim."""
    own, dataset = victims(rows), rows[0]["dataset"]
    if not own or dataset not in TABLE_1:
        return None
    value = stat(own)
    good = value.mean >= TABLE_1[dataset]["victim"] - NEAR
    return Found(percent(value), len(own), YES if good else NO)


def undefended(attack: str) -> Reading:
    """An attack's accuracy without a defence."""

    def read(rows: list[dict]) -> Found | None:
        own, paper = unspoiled(rows, attack), TABLE_1.get(rows[0]["dataset"])
        if not own or not paper:
            return None
        value = stat([r["attacker_accuracy"] for r in own])
        off = abs(paper[attack] - value.mean)
        near, within = off <= NEAR, off <= 2 * (value.std or 0)
        said = f"{percent(value)} with {own[0]['budget']:,} queries"
        return Found(said, len(own), YES if near else PARTLY if within else NO)

    return read


def strongest(rows: list[dict]) -> Found | None:
    """The accuracies of all four attacks without a defence, with equal budgets."""
    bare = [r for r in whole(rows) if is_undefended(r)]
    common = set.intersection(*({r["budget"] for r in bare if r["attack"] == a} for a in ATTACKS))
    if not common:
        return None
    own = {a: unspoiled([r for r in bare if r["budget"] == max(common)], a) for a in ATTACKS}
    means = {a: fmean(r["attacker_accuracy"] for r in each) for a, each in own.items()}
    said = ", ".join(f"{a} {mean:.1f}" for a, mean in means.items())
    said += f" with {max(common):,} queries"
    best = max(means, key=lambda a: means[a])
    return Found(said, min(map(len, own.values())), YES if best == "knockoff" else NO)


def at_little_cost(attack: str, start: float, end: float) -> Reading:
    """What MAD takes at the largest measured epsilon that costs the defender less than a point."""

    def read(rows: list[dict]) -> Found | None:
        both = _affordable(rows, attack)
        if not both:
            return None
        begin, point = both
        taken = taken_by(begin, point)
        good, half = taken >= start - end - NEAR, taken >= (start - end) / 2
        said = (
            f"{begin.attacker_accuracy.mean:.1f} to {percent(point.attacker_accuracy)} at epsilon "
            f"{point.strength:g}, for {loss(begin, point):.1f} points"
        )
        return Found(said, point.n, YES if good else PARTLY if half else NO)

    return read


def from_every_attack(rows: list[dict]) -> Found | None:
    """What MAD takes from each of the four attacks, each at its largest such epsilon."""
    found = {attack: both for attack in ATTACKS if (both := _affordable(rows, attack))}
    if len(found) < len(ATTACKS):
        return None
    taken = {attack: taken_by(*both) for attack, both in found.items()}
    points = [point for _, point in found.values()]
    said = ", ".join(f"{attack} {value:.1f}" for attack, value in taken.items())
    at = ", ".join(dict.fromkeys(f"{point.strength:g}" for point in points))
    told = [value >= 10 for value in taken.values()]
    holds = YES if all(told) else PARTLY if any(told) else NO
    return Found(f"{said} points at epsilon {at}", min(point.n for point in points), holds)


def _affordable(rows: list[dict], attack: str) -> tuple[Summary, Summary] | None:
    """The undefended point, and that of MAD at the largest epsilon that costs less than a point."""
    parts = parts_of(whole(rows), "mad", attack)
    if not parts:
        return None
    begin, points = parts
    kept = [p for p in points if loss(begin, p) < 1]
    if not kept or kept == points:  # a dearer epsilon says that none above was left out
        return None
    return begin, kept[-1]


def less_distance(rows: list[dict]) -> Found | None:
    """The L1 at which the attacker has 80 %: MAD's over reverse sigmoid's."""
    own = whole(rows)
    curves = curves_of(own)
    ours, theirs = mad(curves), first(curves, defense="reverse_sigmoid")
    if ours is None or theirs is None:
        return None
    at = [by_pair(own, c, "attacker_accuracy", 80.0, "l1_mean") for c in (ours, theirs)]
    both = [(at[0][pair], at[1][pair]) for pair in at[0] if at[1].get(pair)]
    if not both:
        return None
    ratio = stat([a / b for a, b in both])
    said = f"{percent(ratio, 2)} times (L1 {fmean(a for a, _ in both):.2f})"
    return Found(said, len(both), YES if ratio.mean < 0.8 else PARTLY if ratio.mean < 1 else NO)


def most_taken(defense: str) -> Reading:
    """The most that a defence takes from the attacker at any measured strength."""

    def read(rows: list[dict]) -> Found | None:
        parts = parts_of(whole(rows), defense)
        if not parts:
            return None
        begin, points = parts
        best = min(points, key=lambda p: p.attacker_accuracy.mean)
        taken = taken_by(begin, best)
        said = f"{taken:.1f} points at strength {best.strength:g}"
        return Found(said, best.n, YES if taken >= 20 else PARTLY if taken >= 10 else NO)

    return read


def closer(rows: list[dict]) -> Found | None:
    """What the attacker has more before MAD-argmax than before reverse sigmoid at equal L1.

    At the L1 of each of MAD-argmax's strengths that reverse sigmoid reaches.
    """
    own = whole(rows)
    curves = curves_of(own)
    ours, theirs = first(curves, defense="mad_argmax"), first(curves, defense="reverse_sigmoid")
    if ours is None or theirs is None:
        return None
    told, beside = [], in_pairs(own, theirs)
    for point in curves[ours]:
        values, far = [], []
        for row in behind(own, ours, point.strength):
            l1, points = row.get("l1_mean"), beside.get(pair_of(row), [])
            if l1 is not None and not is_undefended(row):
                at = reading(points, "l1_mean", l1, "attacker_accuracy")
                if at is not None:
                    values.append(row["attacker_accuracy"] - at)
                    far.append(l1)
        if each := difference(values):
            told.append((fmean(far), each))
    if not told:
        return None
    verdicts = {signed(each, -1) for _, each in told}
    said = "; ".join(f"{interval(each)} at L1 {far:.2f}" for far, each in told)
    holds = YES if verdicts == {YES} else NO if verdicts == {NO} else PARTLY
    return Found(said, min(each.n for _, each in told), holds)


def entropy(defense: str, paper: float) -> Reading:
    """The entropy of a defence's answers at a mean L1 distance of 1."""

    def read(rows: list[dict]) -> Found | None:
        own = whole(rows)
        curve = first(curves_of(own), defense=defense)
        at = by_pair(own, curve, "l1_mean", 1.0, "entropy_mean") if curve else {}
        if not at:
            return None
        value = stat(list(at.values()))
        near = abs(value.mean - paper) <= max(0.1, 2 * (value.std or 0))
        return Found(f"{percent(value, 2)} bits", len(at), YES if near else NO)

    return read


def below_70(rows: list[dict]) -> Found | None:
    """What it costs the defender to bring the attacker below 70 %: MAD beside what adds noise.

    Of a defence that never does, what its lowest attacker costs is told, and not compared. Nothing
    is read where the attacker is not above 70 % without a defence.
    """
    own = whole(rows)
    curves = curves_of(own)
    rules = {
        "MAD": mad(curves),
        "DP-SGD": first(curves, defense="dp_sgd"),
        "random noise": first(curves, defense="random_noise"),
    }
    parts = {said: parted(curves[curve]) for said, curve in rules.items() if curve}
    if not parts.get("MAD") or len(parts) < 2 or not all(parts.values()):
        return None
    if parts["MAD"][0].attacker_accuracy.mean <= 70:
        return None
    told: dict[str, tuple[float, Summary]] = {}
    for said, (begin, points) in parts.items():
        below = [p for p in points if p.attacker_accuracy.mean < 70]
        lowest = min(points, key=lambda p: p.attacker_accuracy.mean)
        point = min(below, key=lambda p: loss(begin, p)) if below else lowest
        told[said] = loss(begin, point), point
    said = "; ".join(
        f"{name} {'' if point.attacker_accuracy.mean < 70 else 'not for '}{cost:.1f} points "
        f"({percent(point.attacker_accuracy)})"
        for name, (cost, point) in told.items()
    )
    n = min(point.n for _, point in told.values())
    costs = {name: cost for name, (cost, p) in told.items() if p.attacker_accuracy.mean < 70}
    cost, point = told["MAD"]
    if costs.get("MAD", math.inf) > REASONABLE or cost > min(costs.values()):
        return Found(said, n, NO)
    accuracies = [r["attacker_accuracy"] for r in behind(own, point.curve, point.strength)]
    below = difference(accuracy - 70 for accuracy in accuracies)
    return Found(said, n, YES if cost <= 1 + NEAR and signed(below, -1) == YES else PARTLY)


def ablated(wanted: Callable[[Curve], bool]) -> Reading:
    """How much more the attacker has before an ablation than before MAD, at the largest epsilon."""

    def read(rows: list[dict]) -> Found | None:
        own = whole(rows)
        curves = curves_of(own)
        ours, other = mad(curves), next((c for c in curves if wanted(c)), None)
        if ours is None or other is None:
            return None
        both = ({p.strength for p in curves[c] if not p.is_undefended} for c in (ours, other))
        at = max(set.intersection(*both), default=None)
        if at is None:
            return None
        told = paired(behind(own, other, at), behind(own, ours, at), "attacker_accuracy")
        if told is None:
            return None
        return Found(f"{interval(told)} points at epsilon {at:g}", told.n, signed(told, 1))

    return read


def efficiency(rows: list[dict]) -> Found | None:
    """How many times fewer queries steal as much of the undefended victim as all do before MAD.

    At the largest epsilon below 1, with what it costs the defender. A seed beyond the budgets that
    were measured without a defence counts as the nearest: the mean is "at least" where it has lost
    more than they tell, "at most" where it has more than all of them, "about" where both are met.
    """
    own = [r for r in whole(rows) if r["attack"] == "knockoff"]
    mads = before_mad(own)
    at = max((r["strength"] for r in mads), default=0)
    most = max((r["budget"] for r in mads), default=0)
    bare = [r for r in own if is_undefended(r)]
    times, costs, beyond = [], [], set()
    for row in (r for r in mads if r["strength"] == at and r["budget"] == most):
        clean = [r for r in bare if pair_of(r) == pair_of(row)]
        if found := queries_for(clean, row["attacker_accuracy"]):
            times.append(most / found.queries)
            costs.append(clean[0]["defender_accuracy"] - row["defender_accuracy"])
            beyond |= {found.beyond} - {0}
    if not times:
        return None
    mean = math.exp(fmean(map(math.log, times)))
    bound = {(): "", (-1,): "at least ", (1,): "at most "}.get(tuple(beyond), "about ")
    said = f"{mean:.0f} times ({min(times):.0f} to {max(times):.0f}) at epsilon {at:g}"
    cost = fmean(costs)
    said += f", for {cost:.1f} points"
    surely = mean >= 10 and 1 not in beyond
    holds = YES if surely and cost <= REASONABLE else PARTLY if mean >= 3 else NO
    return Found(bound + said, len(times), holds)
