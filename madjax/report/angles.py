"""Figures of the white-box study: Fig. 6 and 7 (A5) of the paper, and what they leave out.

They read rows alone, which hold a histogram of each trace and the means between evaluations.
"""

import math
from typing import Any

import numpy as np

from madjax.report.names import attack, labels, name
from madjax.report.panels import GREY, INK, tidy
from madjax.report.points import Curve, curve_of, is_sound, is_undefended, stat

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


def histogram_figure(rows: list[dict]):
    """Matplotlib Figure of the paper's Fig. 6: the histograms of `angles_figure`."""
    return _figure(rows, (_histogram,))


def test_loss_figure(rows: list[dict]):
    """Matplotlib Figure of the paper's Fig. 7: the test losses of `angles_figure`."""
    return _figure(rows, (_test_loss,))


def course_figure(rows: list[dict]):
    """Matplotlib Figure of the angle against the step, and of the direction kept.

    The angle is the mean since the last evaluation, in degrees; the direction kept is the cosine
    between the ways of the poisoned and the clean attacker from their common first parameters.
    """
    return _figure(rows, (_angle, _direction))


def age_figure(rows: list[dict]):
    """Matplotlib Figure from white-box to black-box: what an older surrogate costs the defence.

    The mean angle in degrees, and below it the direction kept at the end, against how often the
    defence is handed the attacker's parameters; means and sample standard deviations over seeds. A
    column for each data set, defence and attacker that differ in more than that, see `ages`.
    """
    from matplotlib.figure import Figure  # lazy: a second that tables do not need

    found = ages(rows)
    strengths = sorted({e for own in found.values() for at in own.values() for e in at})
    colours = _colours(strengths)
    panels = (("angle_mean", "mean angle (degrees)"), ("direction_kept", "direction kept (cosine)"))
    fig = Figure(figsize=(5.2 * len(found), 7), layout="constrained", facecolor="white")
    axes = fig.subplots(len(panels), len(found), squeeze=False)
    said = labels(found, ("dataset", "attack", "variant"))
    for column, (curve, own) in enumerate(found.items()):
        every = sorted(own, key=lambda refresh: refresh or math.inf)
        for ax, (field, label) in zip(axes[:, column], panels, strict=True):
            for strength in strengths:
                seeds = [own[refresh].get(strength, []) for refresh in every]
                stats = [stat([row[field] for row in cells]) for cells in seeds]
                known = {at: each for at, each in enumerate(stats) if each.mean is not None}
                means = [each.mean for each in known.values()]
                spread = [each.std or 0 for each in known.values()]
                look = {"color": colours[strength], "marker": "o", "ms": 4, "lw": 1.4}
                ax.errorbar(list(known), means, spread, **look, capsize=2, gid="curve")
            names = [f"{refresh:,}" if refresh else "black-box" for refresh in every]
            ax.set_xticks(range(len(every)), names)
            ax.set_xlabel("steps between two looks at the attacker's parameters", color=INK)
            ax.set_ylabel(label, color=INK)
            tidy(ax)
        title = f"{name(curve.dataset)}, {said[curve]}"
        axes[0, column].set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=INK)
    _legend(fig, rows, colours, len(found))
    return fig


def ages(rows: list[dict]) -> dict[Curve, dict[int, dict[float, list[dict]]]]:
    """Rows that differ in the age of the surrogate: curve -> refresh -> strength -> rows.

    Only curves of three ages or more, and only strengths above 0. The curve is without the fields
    that say the age; it is left out where attackers of one age differ in a setting of their own.
    """
    found: dict[Curve, dict[int, dict[float, list[dict]]]] = {}
    drawn = [row for row in rows if is_drawn(row) and not is_undefended(row)]
    for row in sorted(drawn, key=lambda row: row["strength"]):
        ageless = curve_of(row)._replace(variant="", attack_settings="")
        own = found.setdefault(ageless, {}).setdefault(row["refresh"], {})
        own.setdefault(row["strength"], []).append(row)

    def is_one(strengths: dict[float, list[dict]]) -> bool:
        return len({row.get("attack_settings") for own in strengths.values() for row in own}) == 1

    return {
        curve: own
        for curve, own in found.items()
        if len(own) > 2 and all(map(is_one, own.values()))
    }


def is_drawn(row: dict) -> bool:
    """Whether figures of the white-box study show a row: one of it that has not diverged."""
    return is_traced(row) and is_sound(row)


def _figure(rows: list[dict], panels: tuple):
    from matplotlib.figure import Figure  # lazy: a second that tables do not need

    rows = list(filter(is_drawn, rows))
    groups: dict[Curve, dict[float, list[dict]]] = {}
    for row in sorted(rows, key=lambda row: row["strength"]):
        curve = curve_of(row)
        groups.setdefault(curve, {}).setdefault(row["strength"], []).append(row)
    # Strengths of several defences may mean different things: each rank has a colour.
    every = sorted({strength for group in groups.values() for strength in group})
    colours = _colours(every)
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
            tidy(ax)
            if line == 0:
                title = f"{name(curve.dataset)}, {attack(curve)}\n{said[curve]}"
                ax.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=INK)
    _legend(fig, rows, colours, columns)
    return fig


def _colours(strengths: list[float]) -> dict[float, Any]:
    from matplotlib import colormaps  # lazy, as above

    shades = colormaps["viridis"](np.linspace(0, 0.93, len(strengths)))
    return dict(zip(strengths, shades, strict=True))


def _legend(fig, rows: list[dict], colours: dict[float, Any], columns: int) -> None:
    from matplotlib.lines import Line2D  # lazy, as above

    sign = "ε" if all(row.get("epsilon") is not None for row in rows) else "strength"
    handles = [Line2D([], [], color=c, lw=2, label=f"{sign} = {e:g}") for e, c in colours.items()]
    abreast = math.ceil(len(handles) / math.ceil(len(handles) / (4 * columns)))
    style = {"frameon": False, "fontsize": 8.5, "loc": "outside lower center", "ncols": abreast}
    fig.legend(handles=handles, labelcolor=INK, **style)


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
