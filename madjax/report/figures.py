"""Rows to figures: which curves, in which panels, and their legend."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from madjax.files import write_atomically
from madjax.report.looks import looks_of
from madjax.report.names import MAD, attack, is_ablation, is_plain_mad, labels, name, place
from madjax.report.panels import (
    ACCURACY,
    CIRCLE,
    CROSS,
    DIAGONAL,
    IDEAL,
    INK,
    L1,
    Line,
    Utility,
    draw,
    seeds_of,
    titled,
)
from madjax.report.points import Curve, at_full_budget, is_sound, sound_curves, started

DATASET, ATTACK = ("dataset",), ("dataset", "attack", "variant")
UNDER, BESIDE = (1, 0), (0, 1)  # lines and columns from one utility's panel to the next


def figure(rows: list[dict]):
    """Matplotlib Figure of the paper's Fig. 3: defender against attacker accuracy, in percent.

    One panel a data set, and in it a curve for each defence, but for ablations of MAD, and each
    attack: lines with gid "curve", from the answers changed least. Colours and dashes tell defences
    and attacks apart. The ideal defence is drawn where the rows have `num_classes`. Of several
    budgets of one attack the largest is drawn (`budgets_figure` has all). Points without a stolen
    model that did not diverge are left out, and the title counts those that did. Raises InputError
    for no rows, or none to draw.
    """
    return _figure(rows, _compared, DATASET, (ACCURACY,), UNDER, across=3)


def defenses_figure(rows: list[dict]):
    """Matplotlib Figure of the paper's Fig. 4: L1 distance, below it defender accuracy.

    Both against attacker accuracy, with a column for each data set and attack, and a curve for
    each defence that is no ablation of MAD.
    """
    return _figure(rows, _compared, ATTACK, (L1, ACCURACY), UNDER, across=4)


def ablations_figure(rows: list[dict]):
    """Matplotlib Figure of the paper's Fig. 8: L1 distance, beside it defender accuracy.

    Both against attacker accuracy, with a line of panels for each data set and attack, and a curve
    for MAD, MAD-argmax and each of their ablations.
    """
    return _figure(rows, _family, ATTACK, (L1, ACCURACY), BESIDE, across=1)


def save_png(fig, path: str | Path) -> None:
    """Write a Figure as a PNG at 160 dpi: whole or not at all, the same bytes every time."""
    # matplotlib's version in the metadata would make the bytes differ between machines.
    options = {"format": "png", "dpi": 160, "metadata": {"Software": None}}
    write_atomically(Path(path), lambda part: fig.savefig(part, **options))


def tradeoff_figure(rows: list[dict], path: str | Path) -> None:
    """Write `figure(rows)` with `save_png`."""
    save_png(figure(rows), path)


def _compared(known: list[Curve]) -> list[Curve]:
    return [curve for curve in known if not is_ablation(curve)] or known


def _family(known: list[Curve]) -> list[Curve]:
    return [curve for curve in known if curve.defense in MAD]


def _figure(
    rows: list[dict],
    choose: Callable[[list[Curve]], list[Curve]],
    panel: tuple[str, ...],
    utilities: tuple[Utility, ...],
    step: tuple[int, int],
    across: int,
):
    """The chosen curves in groups of panels: a group for each place, a panel for each utility.

    `step` leads from one panel of a group to the next, and `across` groups stand side by side.
    """
    points = started(at_full_budget(sound_curves(rows)))
    known = sorted(points, key=lambda curve: not is_plain_mad(curve))  # first, below the dashed
    said = labels(choose([curve for curve in known if curve.defense != "none"]), panel)
    looks = looks_of(said)
    kept = [curve for curve in known if curve in said or curve.defense == "none"]
    places = list(dict.fromkeys(place(curve, panel) for curve in kept))
    across = min(across, len(places))
    group = np.multiply(step, len(utilities) - 1) + 1
    lines, columns = group * (math.ceil(len(places) / across), across)
    fig = _canvas(lines, columns, looks)
    for i, at in enumerate(places):
        own = [curve for curve in kept if place(curve, panel) == at]
        drawn = [Line(said[c], looks[said[c]], points[c]) for c in own if c in said]
        zeros = [point for curve in own for point in points[curve] if point.is_undefended]
        starts = list(dict.fromkeys(zeros))  # curves may share one
        here = [row for row in rows if tuple(row.get(field, "") for field in panel) == at]
        classes = {row["num_classes"] for row in here if row.get("num_classes")}
        for u, utility in enumerate(utilities):
            line, column = group * divmod(i, across) + np.multiply(step, u)
            ax = fig.add_subplot(lines, columns, line * columns + column + 1)
            draw(ax, drawn, starts, classes, utility, tags=panel == DATASET)
            if u == 0:
                _title(ax, name(own[0].dataset), attack(own[0]) if panel == ATTACK else "", here)
    return fig


def _canvas(lines: int, columns: int, looks: dict[str, dict]):
    """A Figure with room for so many panels, and the legend below it."""
    from matplotlib.figure import Figure  # lazy: a second that tables do not need
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **look, **CROSS, label=label) for label, look in looks.items()]
    handles += [Line2D([], [], **look) for look in (CIRCLE, IDEAL, DIAGONAL)]
    width, height = (6.4, 4.6) if columns == 1 else (4.9, 3.9)
    longest = 0.4 + 0.059 * max(len(handle.get_label()) for handle in handles)  # inches
    abreast = max(1, int(width * columns / max(2.4, longest)))
    size = (width * columns, height * lines + 0.22 * math.ceil(len(handles) / abreast))
    fig = Figure(figsize=size, layout="constrained", facecolor="white")
    fig.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    style = {"frameon": False, "fontsize": 8.5, "loc": "outside lower center"}
    fig.legend(handles=handles, labelcolor=INK, ncols=abreast, **style)
    return fig


def _title(ax, dataset: str, attack: str, rows: list[dict]) -> None:
    runs = [", ".join(sorted({name(row[f]) for row in rows})) for f in ("victim", "queryset")]
    small = f"victim {runs[0]} · queries {runs[1]} · {seeds_of(rows)}"
    if lost := len(rows) - sum(map(is_sound, rows)):
        small += f" · {lost} diverged"
    titled(ax, f"{dataset}, {attack}" if attack else dataset, small, apart=bool(attack))
