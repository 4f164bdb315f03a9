"""A report as one page for a browser: what holds, a table to sort, figures, provenance.

The page needs nothing but itself: figures, styles and the few lines of script are inside it. Its
text is templates/page.html.j2.
"""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from madjax.files import write_atomically
from madjax.report import found, names
from madjax.report.claims import CLAIMS, answers
from madjax.report.leaders import leaders
from madjax.report.pairs import LEVEL, pairs
from madjax.report.points import is_sound
from madjax.report.protocol import DISAGREEMENTS, protocol, runs
from madjax.report.rows import read_rows

KINDS = {
    "tradeoff.png": "Defender against attacker accuracy (Fig. 3)",
    "defenses.png": "Defences by distance and by accuracy (Fig. 4)",
    "ablations.png": "Ablations of MAD (Fig. 8)",
    "budgets.png": "Accuracy by query budget (Fig. A3)",
    "top_label.png": "Attackers of the top label (Fig. 5)",
    "angles.png": "Angles and test loss (Fig. A5)",
    "course.png": "Angle and direction kept by step",
    "age.png": "From white-box to black-box",
}


class Section(NamedTuple):
    """A part of the page: a figure, as the bytes of a PNG, or a text with tables in Markdown."""

    title: str
    command: str = ""
    picture: bytes | None = None
    text: str = ""


class Costs(NamedTuple):
    """What a defence costs: milliseconds a query by network, classes, gradients and oracle.

    source says what measured them, and where.
    """

    milliseconds: Mapping[tuple[str, int, str, str], float]
    source: str


def page(
    *directories: str | Path,
    title: str,
    sections: Sequence[Section],
    costs: Costs | None = None,
) -> str:
    """The HTML of a report of the rows in these directories; see `read_rows` for its errors.

    Where costs are given, the leaderboard has a column of them.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # lazy: tables do not need it

    rows = read_rows(*directories)
    sound = list(filter(is_sound, rows))
    environment = Environment(
        loader=PackageLoader("madjax.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "interval": found.interval,
        "name": names.name,
        "data": lambda picture: base64.b64encode(picture).decode(),
        "blocks": blocks,
    }
    told = answers(read_rows(*directories, of_each_config=True))
    return environment.get_template("page.html.j2").render(
        title=title,
        rows=rows,
        diverged=len(rows) - len(sound),
        answers=told,
        silent=[c for c in CLAIMS if c not in [answer.claim for answer in told]] if told else [],
        leaders=leaders(rows) if sound else [],
        pairs=[(_said(each), each) for each in pairs(sound)],
        level=f"{LEVEL:.0%}",
        costs=costs,
        sections=sections,
        protocol=protocol(rows),
        disagreements=[(each, list(each.measured(rows))) for each in DISAGREEMENTS],
        runs=runs(*directories),
    )


def write_page(path: str | Path, *directories: str | Path, **of_page: Any) -> None:
    """Write `page(*directories, **of_page)` to a file, whole or not at all."""
    text = page(*directories, **of_page)
    write_atomically(Path(path), lambda part: part.write_text(text, encoding="utf-8"))


def _percent(value: found.Stat | None, digits: int = 1) -> str:
    return "" if value is None or value.mean is None else found.percent(value, digits)


def _said(pair) -> Mapping[str, str]:
    curve, other = pair.curve, pair.reference
    return {
        "dataset": names.name(curve.dataset),
        "attack": f"{names.attack(curve)}, {curve.budget:,} queries",
        "defence": names.remarked(names.defence(curve), curve.defense_variant),
        "reference": names.defence(other),
    }


def blocks(text: str) -> Iterable[tuple[str, list[list[str]] | str]]:
    """The parts of a report's Markdown: ("head", text), ("text", text), ("table", lines)."""
    for part in re.split(r"\n{2,}", text.strip()):
        lines = part.splitlines()
        if lines and lines[0].startswith("|"):
            cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
            yield "table", [cells[0], *cells[2:]]
        elif part.startswith("#"):
            yield "head", part.lstrip("# ")
        elif part:
            yield "text", part
