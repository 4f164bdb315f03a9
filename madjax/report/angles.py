"""Figures of the white-box study: Fig. 6 and 7 (A5) of the paper, and what they leave out.

They read rows alone, which hold a histogram of each trace and the means between evaluations.
"""

import math

import numpy as np

from madjax.report.names import attack, labels, name
from madjax.report.panels import GREY, INK
from madjax.report.points import Curve, curve_of, is_sound

ACROSS = 6
"""Curves side by side."""
FLIPPED = {"color": GREY, "lw": 1, "ls": (0, (4, 3)), "zorder": 1}


def is_traced(row: dict) -> bool:
    """Whether a row is one of the white-box study."""
    return bool(row.get("angle_histogram"))


def angles_figure(rows: list[dict]):
    """Matplotlib Figure of the paper's Fig. A5: histogram of angles, below it the test loss.

    A column for each data set, defence and attack, a colour for each strength; the histogram of all
    seeds together as a density over degrees, losses as means over seeds.
    """
    return _figure(rows, (_histogram, _test_loss))


def course_figure(rows: list[dict]):
    """Matplotlib Figure of the angle against the step, and of the direction kept.

    The angle is the mean since the last evaluation, in degrees; the direction kept is the cosine
    between the ways of the poisoned and the clean attacker from their common first parameters.
    """
    return _figure(rows, (_angle, _direction))


def _figure(rows: list[dict], panels: tuple):
    from matplotlib import colormaps  # lazy: a second that tables do not need
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [row for row in rows if is_traced(row) and is_sound(row)]
    groups: dict[Curve, dict[float, list[dict]]] = {}
    for row in sorted(rows, key=lambda row: row["strength"]):
        curve = curve_of(row)
        groups.setdefault(curve, {}).setdefault(row["strength"], []).append(row)
    # Strengths of several defences may mean different things: each rank has a colour.
    every = sorted({strength for group in groups.values() for strength in group})
    shades = colormaps["viridis"](np.linspace(0, 0.93, len(every)))
    colours = dict(zip(every, shades, strict=True))
    columns = min(len(groups), ACROSS)
    lines = math.ceil(len(groups) / columns) * len(panels)
    size = (5.2 * columns, 3.2 * lines + 0.6)
    fig = Figure(figsize=size, layout="constrained", facecolor="white")
    said = labels(groups, ("dataset", "attack", "variant"))  # as the titles say them
    for i, (curve, group) in enumerate(groups.items()):
        for line, draw in enumerate(panels):
            at = (i // columns * len(panels) + line) * columns + i % columns
            ax = fig.add_subplot(lines, columns, at + 1)
            for strength, own in group.items():
                draw(ax, own, {"color": colours[strength], "lw": 1.4})
            ax.spines[:].set_color(GREY)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(color=GREY, alpha=0.2, lw=0.6)
            if line == 0:
                title = f"{name(curve.dataset)}, {attack(curve)}\n{said[curve]}"
                ax.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=INK)
    sign = "ε" if all(row.get("epsilon") is not None for row in rows) else "strength"
    handles = [Line2D([], [], color=colours[e], lw=2, label=f"{sign} = {e:g}") for e in every]
    abreast = math.ceil(len(handles) / math.ceil(len(handles) / (4 * columns)))
    style = {"frameon": False, "fontsize": 8.5, "loc": "outside lower center", "ncols": abreast}
    fig.legend(handles=handles, labelcolor=INK, **style)
    return fig


def _histogram(ax, rows: list[dict], look: dict) -> None:
    counts = np.sum([row["angle_histogram"] for row in rows], axis=0)
    edges = np.linspace(0, 180, len(counts) + 1)
    # One spike at 0, of the undefended, would hide all the others.
    if rows[0]["strength"]:
        ax.stairs(counts / counts.sum() / (edges[1] - edges[0]), edges, **look)
    ax.axvline(90, **FLIPPED)
    ax.set(xlabel="angle between poisoned and true gradient (degrees)", xlim=(0, 180))
    ax.set_ylabel("density", color=INK)


def _course(ax, rows: list[dict], look: dict, field: str, label: str) -> None:
    means = [[np.nan if value is None else value for value in row[field]] for row in rows]
    ax.plot(rows[0]["steps_at"], np.mean(means, axis=0), **look, gid="curve")
    ax.set_xlabel("steps", color=INK)
    ax.set_ylabel(label, color=INK)


def _test_loss(ax, rows: list[dict], look: dict) -> None:
    _course(ax, rows, look, "test_losses", "attacker's test loss (nats)")


def _angle(ax, rows: list[dict], look: dict) -> None:
    _course(ax, rows, look, "angle_means", "mean angle (degrees)")
    ax.axhline(90, **FLIPPED)


def _direction(ax, rows: list[dict], look: dict) -> None:
    _course(ax, rows, look, "directions_kept", "direction kept (cosine)")
