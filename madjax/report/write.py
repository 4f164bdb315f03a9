"""A run's report: which files it has, and writing them beside the rows."""

from collections.abc import Callable
from pathlib import Path

from madjax.errors import InputError
from madjax.files import write_atomically
from madjax.report.angles import age_figure, ages, angles_figure, course_figure, is_drawn
from madjax.report.budgets import budget_lines, budgets_figure
from madjax.report.figures import ablations_figure, defenses_figure, figure, save_png
from madjax.report.labels import label_pairs, top_label_figure
from madjax.report.names import is_ablation, place
from madjax.report.page import KINDS, Section, write_page
from madjax.report.points import RULE, curves, is_sound
from madjax.report.rows import read_rows
from madjax.report.tables import table


def figures_for(rows: list[dict]) -> dict[str, Callable]:
    """The figures that a report of these rows has: file name -> the function that draws it.

    None where all stolen models have diverged.
    """
    if not any(map(is_sound, rows)):
        return {}
    known = [curve for curve in curves(rows) if curve.defense != "none"]
    found = {"tradeoff.png": figure}
    if len({place(curve, RULE) for curve in known if not is_ablation(curve)}) > 1:
        found["defenses.png"] = defenses_figure
    if any(map(is_ablation, known)):
        found["ablations.png"] = ablations_figure
    if budget_lines(rows):
        found["budgets.png"] = budgets_figure
    if label_pairs(rows):
        found["top_label.png"] = top_label_figure
    if any(map(is_drawn, rows)):
        found |= {"angles.png": angles_figure, "course.png": course_figure}
    if ages(rows):
        found["age.png"] = age_figure
    return found


def files(directory: str | Path) -> list[str]:
    """The names of the directory's rows and of what `write_report` writes beside them."""
    return ["rows.jsonl", "report.md", "report.html", *figures_for(read_rows(directory))]


def write_report(*directories: str | Path, out: str | Path | None = None) -> str:
    """Write one report of the rows in these directories; return the table's text.

    It goes to `out`, or beside the rows of a single directory: `report.md`, `report.html` and
    `tradeoff.png` always; `defenses.png` for two or more defences, `ablations.png` for ablations,
    `budgets.png` for several budgets of one attack, `top_label.png` for attackers with a twin that
    learns from the top label alone, `angles.png` and `course.png` for online attackers, `age.png`
    for surrogates of three ages or more.
    Raises InputError for several directories and no `out`, and for what `read_rows` refuses.
    """
    if out is None and len(directories) != 1:
        raise InputError(
            f"a report of {len(directories)} directories has no place of its own: give --out DIR"
        )
    rows, out = read_rows(*directories), Path(out or directories[0])
    out.mkdir(parents=True, exist_ok=True)
    text = table(rows)
    sections = []
    for name, make in figures_for(rows).items():
        save_png(make(rows), out / name)
        sections.append(Section(KINDS[name], picture=(out / name).read_bytes()))
    write_atomically(out / "report.md", lambda part: part.write_text(text, encoding="utf-8"))
    names = ", ".join(dict.fromkeys(row.get("config", "") for row in rows))
    write_page(
        out / "report.html",
        *directories,
        title=f"Model stealing before defences: {names}",
        sections=[*sections, Section("Every curve", text=text)],
    )
    return text
