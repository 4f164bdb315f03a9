"""One panel of a figure: utility against the attacker's accuracy, along curves of strength."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from madjax.report.pairs import grouped
from madjax.report.points import Summary

GREY, INK = "#9AA0A6", "#30343A"
MARK = {"ls": "", "mfc": "white", "zorder": 4}
CROSS = {"marker": "x", "ms": 6, "mew": 1.2, "lw": 1.7}
CIRCLE = MARK | {"marker": "o", "ms": 8, "mec": INK, "mew": 1.4, "label": "undefended (ε = 0)"}
IDEAL = MARK | {"marker": "x", "ms": 10, "mec": "#00BCD4", "mew": 3, "label": "ideal defence"}
DIAGONAL = {"color": GREY, "lw": 1.2, "label": "attacker = defender"}
PERCENT = 10.0  # noise is not to fill a panel: the least an axis of accuracies spans


@dataclass(frozen=True)
class Utility:
    """What the y axis shows: a metric of `Summary`, its label, and the least the axis spans.

    accuracy says that the metric can be held against the attacker's, on a diagonal.
    """

    metric: str
    label: str
    span: float
    accuracy: bool


ACCURACY = Utility("defender_accuracy", "defender accuracy (%)  ↑  utility", PERCENT, True)
L1 = Utility("l1_mean", "mean L1 distance  ↓  utility", 0.2, False)


@dataclass(frozen=True)
class Line:
    """A curve to draw: its label, its look (matplotlib's options), its points."""

    label: str
    look: dict
    points: list[Summary]


def draw(
    ax, lines: list[Line], starts: list[Summary], classes: set[int], utility: Utility, tags: bool
) -> None:
    """Draw curves, circles at the undefended `starts`, the ideal of so many classes, and axes.

    A point without the utility is left out. tags: say strengths beside points, where there is room.
    """
    start = _xy(starts, utility)
    corners = [(100 / k, start[:, 2].mean()) for k in classes] if len(start) else []
    ideal = np.array(corners).reshape(-1, 2)
    seen = np.concatenate(
        [ideal, start[:, [0, 2]], *(_xy(line.points, utility)[:, [0, 2]] for line in lines)]
    )
    for line in lines:
        x, dx, y, dy = _xy(line.points, utility).T
        dx, dy = np.nan_to_num([dx, dy])
        crosses = [i for i, p in enumerate(line.points) if not p.is_undefended]
        # A mark on the edge of the panel, at 100 %, is drawn whole.
        whole = {"clip_on": False, "gid": "curve", "markevery": crosses}
        ax.plot(x, y, **line.look, **CROSS, **whole, label=line.label)
        ax.errorbar(x, y, dy, dx, fmt="none", ecolor=line.look["color"], elinewidth=1, alpha=0.35)
    for mark, points in ((CIRCLE, start[:, [0, 2]]), (IDEAL, ideal)):
        if len(points):  # an empty line that is not clipped has no extent to lay out
            ax.plot(*points.T, **mark, clip_on=False)
    left, right = _limits(seen[:, 0], PERCENT, most=100)
    bottom, top = _limits(seen[:, 1], utility.span, most=100 if utility.accuracy else np.inf)
    if utility.accuracy:
        ax.axline((0, 0), slope=1, **DIAGONAL, zorder=1)
        ax.fill_between([left, right], [left, right], bottom - 100, color=GREY, alpha=0.10, lw=0)
    ax.set(xlim=(left, right), ylim=(bottom, top))
    if tags:
        low, high = np.array([(left, bottom), (right, top)])
        _tag(
            ax,
            [(line, (_xy(line.points, utility)[:, [0, 2]] - low) / (high - low)) for line in lines],
        )
    ax.set_xlabel("attacker accuracy (%)  ↓  non-replicability", color=INK)
    ax.set_ylabel(utility.label, color=INK)
    tidy(ax)


def titled(ax, large: str, small: str, *, apart: bool = False) -> None:
    """Write a panel's title at its left, and at its right what was run.

    The title stands on a line of its own where apart says so, or where both have no room on one.
    """
    inches = ax.figure.get_figwidth() / ax.get_gridspec().ncols - 0.8  # less the axis beside it
    if apart or 0.115 * len(large) + 0.058 * len(small) > inches:
        large += "\n"
    ax.set_title(large, loc="left", fontweight="bold", color=INK)
    ax.set_title(small, loc="right", fontsize=8, color=GREY)


def seeds_of(rows: list[dict]) -> str:
    """How many seeds the points have, from the fewest to the most, in words."""
    counts = {len({row["seed"] for row in own}) for own in grouped(rows).values()}
    said = " to ".join(map(str, sorted({min(counts), max(counts)})))
    return f"{said} seed" + "s" * (max(counts) > 1)


def tidy(ax) -> None:
    """A pale frame without its top and right side, and a paler grid: as all panels have."""
    ax.spines[:].set_color(GREY)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color=GREY, alpha=0.2, lw=0.6)


def _xy(points: list[Summary], utility: Utility) -> np.ndarray:
    """[n, 4]: attacker mean and std, utility mean and std (NaN where undefined)."""
    both = [(*p.attacker_accuracy, *getattr(p, utility.metric)) for p in points]
    return np.array(both, dtype=float).reshape(-1, 4)


def _limits(values: np.ndarray, least: float, most: float) -> tuple[float, float]:
    """The ends of an axis: room around the values, `least` long at least, never beyond `most`."""
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
    pad = max(0.08 * (high - low), (least - high + low) / 2)
    return low - pad, min(high + pad, most)


def _tag(ax, lines: list[tuple[Line, np.ndarray]]) -> None:
    """Write strengths beside points that have room; lines come with places, in axes fractions."""
    ends = [((0, 0), (0, 1))]
    ends += [pair for _, knots in lines for pair in pairwise([knots[0], *knots])]
    taken = np.concatenate([np.linspace(*pair, 40) for pair in ends])
    # No label close to a labelled or undefended point; the far corner keeps the list non-empty.
    done = [(9, 9), *(knots[0] for line, knots in lines if line.points[0].is_undefended)]
    sides = np.array([(-1, 1), (1, -1), (0, 1.3), (0, -1.3), (1, 1), (-1, -1)])
    for line, knots in lines:
        # Answers changed most first: the most room, and the points a reader asks about.
        for spot, point in zip(knots[::-1], line.points[::-1], strict=True):
            text = "ε = " * (point is line.points[-1] and point.budgeted) + f"{point.strength:g}"
            half = np.array([0.006 + 0.006 * len(text), 0.022])
            spots = spot + sides * (half + 0.01)
            inside = spots[np.all(spots + half < 1, axis=1)]  # above it is the title
            free = [at for at in inside if not np.any(np.all(abs(taken - at) < half, axis=1))]
            far = min(np.hypot(*(spot - other)) for other in done) > 0.02
            if free and far and not point.is_undefended:
                style = {"fontsize": 7, "ha": "center", "va": "center", "transform": ax.transAxes}
                ax.text(*free[0], text, color=line.look["color"], **style)
                done.append(spot)
                taken = np.vstack([taken, free[0] + np.linspace(-half, half, 5) * (1, 0)])
