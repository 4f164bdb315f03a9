"""The figure of attackers that learn from the top label alone: Fig. 5 of the paper."""

import math

import numpy as np

from madjax.errors import InputError
from madjax.report.names import attack, defence, is_ablation, name, remarked
from madjax.report.panels import INK, tidy
from madjax.report.points import Curve, Summary, at_full_budget, is_sound, sound_curves, started

ACROSS = 4
LOOKS = {
    "posteriors": {
        "color": "#0072B2",
        "ls": "-",
        "marker": "x",
        "label": "learns from whole answers",
    },
    "top_label": {
        "color": "#D55E00",
        "ls": (0, (5, 2)),
        "marker": "s",
        "mfc": "white",
        "label": "from their top label alone",
    },
}
"""Of what an attacker learns from, as rows say it."""


def top_label_figure(rows: list[dict]):
    """Matplotlib Figure of the paper's Fig. 5: what the top label alone gives back to an attacker.

    Attacker accuracy in percent against the mean L1 distance, a panel for each data set, attack and
    defence but ablations of MAD, with a curve for the attacker that learns from whole answers and
    one for its twin that keeps the top label; means and sample standard deviations over seeds, at
    the largest budget.
    """
    from matplotlib.figure import Figure  # lazy: a second that tables do not need
    from matplotlib.lines import Line2D

    pairs = label_pairs(rows)
    if not pairs:
        raise InputError(
            "no defence was attacked twice, by learning from whole answers and from the top label "
            "alone: run both attackers, as configs/mnist_defenses.py does"
        )
    columns = min(len(pairs), ACROSS)
    lines = math.ceil(len(pairs) / columns)
    size = (3.5 * columns, 3.1 * lines + 0.4)
    fig = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = fig.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for ax in axes[len(pairs) :]:
        ax.remove()
    several = len({(curve.dataset, attack(curve)) for curve in pairs}) > 1
    for i, (ax, (curve, twins)) in enumerate(zip(axes, pairs.items(), strict=False)):
        for targets, points in twins.items():
            stats = [(*p.l1_mean, *p.attacker_accuracy) for p in points]
            x, dx, y, dy = np.array(stats, dtype=float).reshape(-1, 4).T
            dx, dy = np.nan_to_num([dx, dy])
            look = LOOKS[targets] | {"ms": 5, "lw": 1.6, "gid": "curve"}
            ax.plot(x, y, **look)
            bars = {"fmt": "none", "ecolor": look["color"], "elinewidth": 1, "alpha": 0.35}
            ax.errorbar(x, y, dy, dx, **bars)
        title = remarked(defence(curve), curve.defense_variant)
        if several:
            title = f"{name(curve.dataset)}, {attack(curve)}\n{title}"
        ax.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=INK)
        tidy(ax)
        ax.tick_params(labelbottom=True)
        if i + columns >= len(pairs):  # none is below it
            ax.set_xlabel("mean L1 distance of the answers", color=INK)
        if i % columns == 0:
            ax.set_ylabel("attacker accuracy (%)", color=INK)
    handles = [Line2D([], [], **look) for look in LOOKS.values()]
    style = {"frameon": False, "fontsize": 9, "loc": "outside lower center", "ncols": len(handles)}
    fig.legend(handles=handles, labelcolor=INK, **style)
    return fig


def label_pairs(rows: list[dict]) -> dict[Curve, dict[str, list[Summary]]]:
    """The curves that have a twin in all but what is learnt of an answer: targets -> points.

    Twins may differ in variant, and in settings of the attack that rows do not name. Ablations of
    MAD are left out, and attackers with several twins.
    """
    if not any(map(is_sound, rows)):
        return {}
    points = started(at_full_budget(sound_curves(rows)))
    twins: dict[Curve, list[Curve]] = {}
    for curve in points:
        if curve.targets in LOOKS and curve.defense != "none" and not is_ablation(curve):
            twins.setdefault(but_targets(curve), []).append(curve)
    return {
        min(own, key=lambda curve: curve.targets): {c.targets: points[c] for c in own}
        for own in twins.values()
        if sorted(curve.targets for curve in own) == sorted(LOOKS)
    }


def but_targets(curve: Curve) -> Curve:
    """A curve without the fields that say what is learnt of an answer."""
    return curve._replace(targets="", variant="", attack_settings="")
