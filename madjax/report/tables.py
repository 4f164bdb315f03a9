"""Rows to Markdown."""

from madjax.report.names import attack, defence, differences, remarked, said_by
from madjax.report.points import Curve, Summary, curves, is_sound

HEAD = ("n", "defender acc. %", "attacker acc. %", "attacker best epoch %", "L1")
# Columns of some curves only: (head, field, the field whose record brings it). Fidelity comes with
# entropy, as rows had it long before it had a column, and their reports are not to change.
UNDEFENDED = ("undefended %", "undefended_share", "undefended_share")
OPTIONAL = (
    UNDEFENDED,
    ("attacker fidelity %", "attacker_fidelity", "attacker_fidelity"),
    ("fidelity %", "fidelity", "entropy_mean"),
    ("entropy, bits", "entropy_mean", "entropy_mean"),
    ("DP epsilon", "dp_epsilon", "dp_epsilon"),
    ("angle, degrees", "angle_mean", "angle_mean"),
    ("its std", "angle_std", "angle_mean"),
    ("5 %", "angle_p05", "angle_mean"),
    ("median", "angle_p50", "angle_mean"),
    ("95 %", "angle_p95", "angle_mean"),
    ("max", "angle_max", "angle_mean"),
    ("of batches", "batch_angle_mean", "angle_mean"),
    ("of updates", "update_angle_mean", "batch_angle_mean"),
    ("test loss", "test_loss", "angle_mean"),
    ("direction kept", "direction_kept", "angle_mean"),
)
OF_STEPS = {"batch_angle_mean", "update_angle_mean"}
"""Angles of steps, which often are those of queries."""
SCALE = {"undefended_share": 100}  # to percent


def table(rows: list[dict]) -> str:
    """Markdown that is also aligned plain text: provenance, then a table for each curve.

    Accuracies in percent, mean ± sample std over seeds; "-" is undefined. Cells whose stolen model
    diverged are counted beside n, and in a line of their own; no mean has them. Columns that the
    curve's rows have: the stolen model's agreement with the victim, fidelity and entropy of the
    answers, the epsilon of differential privacy, and angles over an online attacker's steps.
    InputError for no rows.
    """
    by_curve = curves(rows)
    parts = [_provenance(rows)]
    if lost := len(rows) - sum(map(is_sound, rows)):
        parts.append(
            f"{lost} of {len(rows)} cells diverged: a loss or a parameter of the stolen model is "
            "not finite, or the loss far above that of a uniform answer. They are in no mean."
        )
    headings = {curve: _heading(curve, points) for curve, points in by_curve.items()}
    for curve, points in by_curve.items():
        twins = [each for each, heading in headings.items() if heading == headings[curve]]
        heading = ", ".join([headings[curve], *said_by(curve, differences(twins))])
        shown = [each for each in OPTIONAL if _is_shown(each, points)]
        first = "epsilon" if points[0].budgeted else "strength"
        head = (first, *HEAD, *(title for title, _, _ in shown))
        cells = [_cells(point, [field for _, field, _ in shown]) for point in points]
        widths = [max(3, *map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = [
            "| " + " | ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) + " |"
            for line in (head, ["-" * (w - 1) + ":" for w in widths], *cells)
        ]
        parts += [heading, "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _is_shown(column: tuple[str, str, str], points: list[Summary]) -> bool:
    """Whether some point has it; of answers left as they are, some of a defence.

    Angles of steps are shown where they differ from those before them.
    """
    _, field, source = column
    if column is UNDEFENDED:
        return any(not p.is_undefended and p.undefended_share.mean for p in points)
    if field in OF_STEPS:
        both = [(_text(getattr(p, field).mean), _text(getattr(p, source).mean)) for p in points]
        return any(own not in ("-", other) for own, other in both)
    return any(getattr(p, source).mean is not None for p in points)


def _heading(curve: Curve, points: list[Summary]) -> str:
    most = max((point.victims or 0 for point in points), default=0)
    victims = f", {most} victim{'s' if most > 1 else ''}" if most else ""
    route = f"{curve.dataset} ({curve.victim}{victims}) <- {curve.queryset}, {attack(curve)}"
    given = (("oracle", curve.oracle), ("distance", curve.distance))
    fine = ", ".join(f"{what} {value or '-'}" for what, value in given if value != "none")
    who = remarked(defence(curve), curve.defense_variant, fine)
    return f"### {route}, budget {curve.budget}, {who}"


def _text(value: float | None, digits: int = 2, scale: float = 1) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def _cells(p: Summary, optional: list[str]) -> list[str]:
    both = (p.defender_accuracy, p.attacker_accuracy)
    pairs = [f"{_text(mean)} ± {_text(std)}" for mean, std in both]
    rest = [_text(p.attacker_accuracy_best.mean), _text(p.l1_mean.mean, 3)]
    rest += [_text(getattr(p, field).mean, scale=SCALE.get(field, 1)) for field in optional]
    count = remarked(str(p.n), f"{p.diverged} diverged" if p.diverged else "")
    return [f"{p.strength:g}", count, *pairs, *rest]


def _distinct(rows: list[dict], name: str) -> str:
    values = dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None)
    return ", ".join(sorted(values, key=lambda v: (len(v), v))) or "not recorded"


def _provenance(rows: list[dict]) -> str:
    flat = [{**row, "jax": (row.get("versions") or {}).get("jax")} for row in rows]
    parts = ("seeds=seed", "device", "config", "config hash=config_hash", "commit=git_commit")
    parts = (*parts, "jax", "test examples=n_test")
    if any(row.get("n_judged") for row in rows):
        parts = (*parts, "test examples of the defender=n_judged")
    parts = [part.split("=") for part in parts]
    text = "; ".join(f"{part[0]}: {_distinct(flat, part[-1])}" for part in parts)
    return f"{len(rows)} rows; {text}. Mean ± sample standard deviation over seeds."
