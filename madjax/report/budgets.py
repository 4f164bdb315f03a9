"""The figure of query budgets: Fig. 1, A1, A2 and A3 of the paper."""

import math

import numpy as np

from madjax.errors import InputError
from madjax.report.looks import crossed, plain
from madjax.report.names import attack, labels, name
from madjax.report.panels import GREY, INK, seeds_of, tidy, titled
from madjax.report.points import RULE, Curve, Summary, is_sound, sound_curves

ACROSS = 3
MARK = {"marker": "o", "ms": 4, "lw": 1.6}
DEFENDER = {"lw": 1, "ls": (0, (1, 2)), "zorder": 1}


def budgets_figure(rows: list[dict]):
    """Matplotlib Figure of the paper's Fig. A3: attacker accuracy in percent against the budget.

    A panel for each data set, with the number of queries on a logarithmic axis; in it a curve, a
    line with gid "curve", for each attack on each defence at each strength that was measured at
    several budgets: means and sample standard deviations over seeds. Undefended attacks are one
    curve, whichever defence was at strength 0. Dotted lines are the accuracy of the answers, each
    in the colour of its curves. Raises InputError where nothing has several budgets.
    """
    from matplotlib.figure import Figure  # lazy: a second that tables do not need
    from matplotlib.lines import Line2D

    lines = budget_lines(rows)
    if not lines:
        raise InputError(
            "no stolen model was trained at several budgets: give the sweep budgets=(...)"
        )
    looks = _looks(lines)
    datasets = list(dict.fromkeys(curve.dataset for curve, _ in lines))
    columns = min(len(datasets), ACROSS)
    count = math.ceil(len(datasets) / columns)
    handles = {said: Line2D([], [], **look, **MARK, label=said) for said, look in looks.values()}
    abreast = max(1, int(4.9 * columns / (0.4 + 0.065 * max(map(len, handles)))))
    legend = math.ceil((len(handles) + 1) / abreast)
    size = (4.9 * columns, 3.9 * count + 0.22 * legend)
    fig = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = fig.subplots(count, columns, squeeze=False).ravel()
    for ax in axes[len(datasets) :]:
        ax.remove()
    for ax, dataset in zip(axes, datasets, strict=False):
        for line, points in lines.items():
            if line[0].dataset == dataset:
                _draw(ax, points, *looks[line])
        ax.set_xscale("log")
        ax.set_ylim(0, 102)
        ax.set_xlabel("queries", color=INK)
        ax.set_ylabel("attacker accuracy (%)", color=INK)
        tidy(ax)
        own = [row for row in rows if row["dataset"] == dataset]
        queries = ", ".join(sorted({name(row["queryset"]) for row in own}))
        titled(ax, name(dataset), f"queries {queries} · {seeds_of(own)}")
    told = Line2D([], [], color=GREY, **DEFENDER, label="accuracy of the answers")
    style = {"frameon": False, "fontsize": 8.5, "loc": "outside lower center", "ncols": abreast}
    style["handlelength"] = 3.4  # dashes are to be seen beside the mark
    fig.legend(handles=[*handles.values(), told], labelcolor=INK, **style)
    return fig


def budget_lines(rows: list[dict]) -> dict[tuple[Curve, float], list[Summary]]:
    """What was measured at several budgets: (curve without budget, strength) -> its points.

    The points are in order of the budget. Undefended ones have no defence in their curve.
    """
    if not any(map(is_sound, rows)):
        return {}
    found: dict[tuple[Curve, float], dict[int, Summary]] = {}
    for points in sound_curves(rows).values():
        for point in points:
            found.setdefault(_line(point), {}).setdefault(point.curve.budget, point)
    found = {line: own for line, own in found.items() if len(own) > 1}
    return {line: [own[budget] for budget in sorted(own)] for line, own in found.items()}


def _line(point: Summary) -> tuple[Curve, float]:
    curve = point.curve._replace(budget=0)
    if not point.is_undefended:
        return curve, point.strength
    nothing = dict.fromkeys(RULE, "") | {"defense": "none", "layers": "none", "oracle": "none"}
    return curve._replace(**nothing), 0.0


def _looks(lines: dict[tuple[Curve, float], list[Summary]]) -> dict[tuple, tuple[str, dict]]:
    """A label and options of matplotlib for each line: of colours and dashes one for the attack."""
    said = labels({curve for curve, _ in lines}, ("dataset", "attack", "variant"))
    texts, pairs = {}, {}
    for line in sorted(lines, key=lambda line: line[0].defense != "none"):
        (curve, strength), point = line, lines[line][0]
        at = f"{'ε' if point.budgeted else 'strength'} = {strength:g}"
        before = said[curve] if point.is_undefended else f"{said[curve]}, {at}"
        texts[line] = f"{attack(curve)}, {before}"
        pairs[texts[line]] = attack(curve), before
    looks = crossed(pairs) or plain(pairs)
    return {line: (text, looks[text]) for line, text in texts.items()}


def _draw(ax, points: list[Summary], label: str, look: dict) -> None:
    """A curve with its error bars, and the level of the answers that it was learnt from."""
    budgets = [point.curve.budget for point in points]
    stats = np.array([point.attacker_accuracy for point in points], dtype=float)
    means, spread = stats[:, 0], np.nan_to_num(stats[:, 1])
    ax.plot(budgets, means, **look, **MARK, gid="curve", label=label)
    ax.errorbar(budgets, means, spread, fmt="none", ecolor=look["color"], elinewidth=1, alpha=0.35)
    if (level := points[-1].defender_accuracy.mean) is not None:
        ax.axhline(level, color=look["color"], **DEFENDER)
