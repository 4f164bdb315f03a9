"""How rows of online attackers answer the paper's claims on angular deviations.

Each reading takes the rows of one task, and returns None where they do not answer.
"""

from statistics import fmean

from madjax.report.found import NO, YES, Found, percent, whole
from madjax.report.names import is_plain_mad
from madjax.report.pairs import pair_of
from madjax.report.points import curve_of, is_undefended, stat


def _angles(rows: list[dict], low: float, high: float) -> list[dict]:
    """MAD's rows over all parameters, of the attacker as described, in a range of epsilons."""
    own = [r for r in whole(rows) if r.get("angle_mean") is not None and r["layers"] == "all"]
    own = [r for r in own if r["defense"] == "mad" and is_plain_mad(curve_of(r))]
    return [r for r in own if low <= r["strength"] <= high and not is_undefended(r)]


def widest_angle(rows: list[dict]) -> Found | None:
    """The largest deviation that any step had."""
    own = [row for row in _angles(rows, 0, 2) if row.get("angle_max") is not None]
    if not own:
        return None
    most, n = max(row["angle_max"] for row in own), len({pair_of(row) for row in own})
    return Found(f"up to {most:.0f}", n, YES if most >= 115 else NO)


def useful_angle(rows: list[dict]) -> Found | None:
    """The mean deviation at epsilons from 0.95 to 0.99."""
    own = _angles(rows, 0.95, 0.99)
    if not own:
        return None
    strengths = sorted({row["strength"] for row in own})
    means = [fmean(r["angle_mean"] for r in own if r["strength"] == e) for e in strengths]
    said = f"{min(means):.1f}" + (f" to {max(means):.1f}" if len(means) > 1 else "")
    return Found(said, len({pair_of(row) for row in own}), YES if min(means) >= 24.9 else NO)


def flipped(rows: list[dict]) -> Found | None:
    """The mean deviation at epsilon 2."""
    own = _angles(rows, 2, 2)
    if not own:
        return None
    value = stat([row["angle_mean"] for row in own])
    return Found(percent(value), len(own), YES if value.mean > 90 else NO)


def loss_rises(rows: list[dict]) -> Found | None:
    """The test loss at epsilon 2, from the first evaluation to the last."""
    own = [r for r in _angles(rows, 2, 2) if None not in r.get("test_losses", [None])]
    if not own or len(own[0]["test_losses"]) < 2:
        return None
    begin, end = (fmean(row["test_losses"][i] for row in own) for i in (0, -1))
    steps = own[0]["steps_at"]
    said = f"{begin:.1f} nats after {steps[0]:,} steps, {end:.1f} after {steps[-1]:,}"
    return Found(said, len(own), YES if end > begin else NO)
