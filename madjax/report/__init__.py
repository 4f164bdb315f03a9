"""Rows to tables and figures: reads files only, so a finished sweep is reported anywhere."""

from madjax.report.angles import (
    age_figure,
    angles_figure,
    course_figure,
    histogram_figure,
    test_loss_figure,
)
from madjax.report.budgets import budgets_figure
from madjax.report.claims import claims_table
from madjax.report.figures import (
    ablations_figure,
    defenses_figure,
    figure,
    save_png,
    tradeoff_figure,
)
from madjax.report.labels import top_label_figure
from madjax.report.names import NAMES
from madjax.report.page import Costs, Section, page, write_page
from madjax.report.points import Curve, Stat, Summary, summarise
from madjax.report.protocol import runs_table
from madjax.report.rows import read_rows
from madjax.report.tables import table
from madjax.report.trace import read_trace, write_trace
from madjax.report.write import figures_for, files, write_report

__all__ = [
    "NAMES",
    "Costs",
    "Curve",
    "Section",
    "Stat",
    "Summary",
    "ablations_figure",
    "age_figure",
    "angles_figure",
    "budgets_figure",
    "claims_table",
    "course_figure",
    "defenses_figure",
    "figure",
    "figures_for",
    "files",
    "histogram_figure",
    "page",
    "read_rows",
    "read_trace",
    "runs_table",
    "save_png",
    "summarise",
    "table",
    "test_loss_figure",
    "top_label_figure",
    "tradeoff_figure",
    "write_page",
    "write_report",
    "write_trace",
]
