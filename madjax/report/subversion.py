"""How rows answer the paper's claims on attackers that go around a defence.

Each reading takes the rows of one task, and returns None where they do not answer.
"""

from statistics import fmean

from madjax.report.found import (
    NEAR,
    NO,
    PARTLY,
    YES,
    Found,
    Reading,
    before_mad,
    curves_of,
    first,
    interval,
    labels_alone,
    learns,
    loss,
    parts_of,
    percent,
    taken_by,
    unspoiled,
    whole,
)
from madjax.report.pairs import paired
from madjax.report.points import is_undefended

OTHERWISE = ("arch-", "opt-")
"""How variants of an attack are called that have another network, or another optimiser."""


def truncated(rows: list[dict]) -> Found | None:
    """What knockoff has more from top labels alone, without a defence."""
    answers = unspoiled(rows, "knockoff")
    own = [r for r in labels_alone(rows) if is_undefended(r) and r["attack"] == "knockoff"]
    own = [r for r in own if answers and r["budget"] == answers[0]["budget"]]
    told = paired(own, answers, "attacker_accuracy")
    if told is None:
        return None
    return Found(f"{interval(told)} points", told.n, YES if told.mean >= -NEAR else NO)


def recovered(defense: str) -> Reading:
    """The accuracy from top labels alone, over that from an undefended victim's whole answers.

    Before the defence at its largest strength.
    """

    def read(rows: list[dict]) -> Found | None:
        curves = curves_of(labels_alone(rows))
        curve, bare = first(curves, defense=defense), unspoiled(rows, "knockoff")
        if curve is None or not bare or bare[0]["budget"] != curve.budget:
            return None
        point, most = curves[curve][-1], fmean(r["attacker_accuracy"] for r in bare)
        if point.is_undefended or not most:
            return None
        share = point.attacker_accuracy.mean / most
        said = (
            f"{share:.2f} times ({percent(point.attacker_accuracy)} at strength {point.strength:g})"
        )
        return Found(said, point.n, YES if share >= 0.95 else PARTLY if share >= 0.9 else NO)

    return read


def labels_before_mad(rows: list[dict]) -> Found | None:
    """What an attacker of top labels has below the undefended attacker of top labels.

    At the largest epsilon that costs the defender less than 5 points.
    """
    parts = parts_of(labels_alone(rows), "mad")
    if not parts:
        return None
    begin, points = parts
    usable = [p for p in points if loss(begin, p) < 5]
    if not usable:
        return None
    point = usable[-1]
    lost = taken_by(begin, point)
    said = (
        f"{lost:.1f} points below ({percent(point.attacker_accuracy)} at strength "
        f"{point.strength:g})"
    )
    return Found(said, point.n, YES if lost >= 9 else NO)


def not_helped_by(kinds: tuple[str, ...]) -> Reading:
    """How much more the best of these attackers has than the plain one, before MAD.

    At the epsilon below 1 at which it gains most; whether it is little is asked of each of them at
    each epsilon.
    """

    def read(rows: list[dict]) -> Found | None:
        told = {}
        own = before_mad(rows)
        for at in sorted({r["strength"] for r in own}):
            here = [r for r in own if r["strength"] == at]
            plain = whole(here)
            names = {r.get("variant") or "" for r in here}
            for name in sorted(name for name in names if name.startswith(kinds)):
                others = [r for r in here if r.get("variant") == name]
                if each := paired(others, plain, "attacker_accuracy"):
                    told[name, at] = each
        if not told:
            return None
        name, at = max(told, key=lambda key: told[key].mean)
        gain, gains = told[name, at], told.values()
        little = all(each.high is not None and each.high <= NEAR for each in gains)
        helped = any(each.mean > NEAR and (each.low is None or each.low > 0) for each in gains)
        said = f"{name}: {interval(gain)} points at epsilon {at:g}"
        return Found(said, gain.n, YES if little else NO if helped else PARTLY)

    return read


def best_way(rows: list[dict]) -> Found | None:
    """The attacker that has most before MAD, at each epsilon, beside that of top labels alone."""
    own, label = before_mad(rows), "the top label"
    told, best, n = [], [], []
    for at in sorted({r["strength"] for r in own}):
        by_way: dict[str, list[float]] = {}
        for row in (r for r in own if r["strength"] == at):
            way = label if learns(row) == "top_label" else row.get("variant") or "as described"
            by_way.setdefault(way, []).append(row["attacker_accuracy"])
        if label not in by_way or not any(way.startswith(OTHERWISE) for way in by_way):
            return None
        means = {way: fmean(values) for way, values in by_way.items()}
        best.append(max(means, key=lambda way: means[way]))
        ways = dict.fromkeys((best[-1], label))
        told.append(", ".join(f"{way} {means[way]:.1f}" for way in ways) + f" at epsilon {at:g}")
        n += [len(by_way[way]) for way in ways]
    if not told:
        return None
    holds = YES if set(best) == {label} else PARTLY if label in best else NO
    return Found("; ".join(told), min(n), holds)
