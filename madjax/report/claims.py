"""What the paper claims, and what rows say of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from madjax.report import readings
from madjax.report.found import TABLE_1, Found, Reading
from madjax.report.names import name
from madjax.report.points import is_sound


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper: where, what, its number, and how rows answer it.

    paper is by data set where the paper has several.
    """

    where: str
    text: str
    paper: str | Mapping[str, str]
    read: Reading


class Answer(NamedTuple):
    """A claim about a data set, and what was found in the rows of a config."""

    claim: Claim
    dataset: str
    paper: str
    config: str
    found: Found


def answers(rows: list[dict]) -> list[Answer]:
    """Every claim that the rows answer, for each data set, in the paper's order.

    Rows are read config by config. Of several that answer, that of the largest query budget counts.
    """
    rows = list(filter(is_sound, rows))
    budgets: dict[tuple, int] = {}
    for row in rows:
        at = row["dataset"], row.get("config", "")
        budgets[at] = max(row["budget"], budgets.get(at, 0))

    def run(row: dict) -> tuple:
        at = row["dataset"], row.get("config", "")
        return at[0], -budgets[at], at[1]

    runs = [list(own) for _, own in groupby(sorted(rows, key=run), key=run)]
    told = []
    for claim in CLAIMS:
        seen = set()
        for own in runs:
            dataset, paper = own[0]["dataset"], claim.paper
            if not isinstance(paper, str):
                paper = paper.get(dataset, "")
            if dataset not in seen and paper and (found := claim.read(own)):
                seen.add(dataset)
                told.append(Answer(claim, dataset, paper, own[0].get("config", ""), found))
    return told


def claims_table(rows: list[dict]) -> str:
    """`answers` in Markdown."""
    head = ["claim of the paper", "on", "paper", "ours", "n", "holds?"]
    lines = [
        [
            f"{answer.claim.text} ({answer.claim.where})",
            name(answer.dataset),
            answer.paper,
            answer.found.ours,
            str(answer.found.n),
            answer.found.holds,
        ]
        for answer in answers(rows)
    ]
    rule = ["---", "---", "---", "---", "--:", "---"]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *lines))


def _table_1(column: str) -> dict[str, str]:
    return {dataset: f"{line[column]} %" for dataset, line in TABLE_1.items()}


def _identity(curve) -> bool:
    return curve.layers == "identity"


def _random(curve) -> bool:
    return curve.oracle == "random_vertex"


def _trained(curve) -> bool:
    return curve.defense_variant.startswith("surrogate of")


CLAIMS = (
    Claim("Table 1", "accuracy of the victim", _table_1("victim"), readings.victim),
    *(
        Claim(
            "Table 1",
            f"accuracy of {attack} on the undefended victim",
            _table_1(attack),
            readings.undefended(attack),
        )
        for attack in ("jbda", "jbself", "jbtop3", "knockoff")
    ),
    Claim("5.1", "knockoff is the strongest attack", "it is", readings.strongest),
    Claim(
        "5.1, Fig. A2",
        "the top label alone costs an attacker next to nothing on simple data sets",
        {"cifar10": "-0.2 points", "mnist": "minimal", "fashion_mnist": "minimal"},
        readings.truncated,
    ),
    Claim(
        "5.2.1, Fig. 3",
        "MAD against knockoff, for less than a point of the defender's accuracy",
        {"mnist": "99.4 to 69.8 %"},
        readings.at_little_cost("knockoff", 69.8, 99.4),
    ),
    Claim(
        "5.2.1, Fig. 3",
        "MAD against jbtop3, for less than a point of the defender's accuracy",
        {"mnist": "99.4 to 35.7 %"},
        readings.at_little_cost("jbtop3", 35.7, 99.4),
    ),
    Claim(
        "5.2.1, Fig. A3",
        "before MAD more queries give the attacker little",
        "a flat curve",
        readings.little_by_budget,
    ),
    Claim(
        "5.2.2 (i)",
        "MAD brings the attacker to 80 % with less distance than reverse sigmoid",
        {"mnist": "0.63 times (L1 0.95)"},
        readings.less_distance,
    ),
    Claim(
        "5.2.2 (ii)",
        "MAD-argmax takes 20 points or more from the attacker",
        "20 or more",
        readings.taken_with_label_kept("mad_argmax"),
    ),
    Claim(
        "5.2.2 (ii)",
        "reverse sigmoid takes 20 points or more from the attacker",
        "20 or more",
        readings.taken_with_label_kept("reverse_sigmoid"),
    ),
    Claim(
        "5.2.2 (ii)",
        "what the attacker has more before MAD-argmax than before reverse sigmoid as far away",
        "less",
        readings.closer,
    ),
    Claim(
        "5.2.2 (ii)",
        "entropy of the answers of reverse sigmoid at L1 1",
        {"mnist": "3.02 ± 0.16"},
        readings.entropy("reverse_sigmoid", 3.02),
    ),
    Claim(
        "5.2.2 (ii)",
        "entropy of the answers of MAD-argmax at L1 1",
        {"mnist": "1.79 ± 0.11"},
        readings.entropy("mad_argmax", 1.79),
    ),
    *(
        Claim(
            "5.2.2 (iii)",
            f"what an attacker below 70 % costs the defender with {said}",
            {"mnist": f"{paper:g} point{'s' * (paper != 1)}"},
            readings.below_70(defense, paper),
        )
        for defense, said, paper in (
            ("mad", "MAD", 1.0),
            ("dp_sgd", "DP-SGD", 39.0),
            ("random_noise", "random noise", 56.4),
        )
    ),
    *(
        Claim(
            "5.2.2 (ii), Fig. 5",
            f"an attacker of top labels is back at its undefended accuracy before {said}",
            "1.0 times",
            readings.of_labels_alone(defense),
        )
        for defense, said in (("mad_argmax", "MAD-argmax"), ("reverse_sigmoid", "reverse sigmoid"))
    ),
    Claim(
        "5.2.3, Fig. 9",
        "MAD takes 9 points from an attacker of top labels",
        "9 points",
        readings.of_labels_alone("mad"),
    ),
    Claim("5.2.3, Fig. 6", "range of the deviations, degrees", "0 to 115", readings.widest_angle),
    Claim(
        "5.2.3, Fig. 6",
        "mean deviation at epsilon 0.95 to 0.99, degrees",
        "24.9 (CIFAR10)",
        readings.useful_angle,
    ),
    Claim("5.2.3, Fig. 6", "mean deviation at epsilon 2, degrees", "above 90", readings.flipped),
    Claim("5.2.3, Fig. 7", "the test loss rises at epsilon 2", "it does", readings.loss_rises),
    Claim(
        "5.2.3, Fig. 8",
        "what the attacker has more where y* is a random vertex",
        "more",
        readings.ablated(_random),
    ),
    Claim(
        "5.2.3, Fig. 8",
        "what the attacker has more where G = I",
        "more",
        readings.ablated(_identity),
    ),
    Claim(
        "4",
        "what the attacker has more where the surrogate is trained",
        "more",
        readings.ablated(_trained),
    ),
    *(
        Claim(
            "5.2.3, Fig. 9",
            f"before MAD an attacker is not helped by {said}",
            "not much",
            readings.not_helped_by(kinds),
        )
        for said, kinds in (
            ("another network", ("arch-",)),
            ("another optimiser", ("opt-",)),
            ("asking several times", ("nquery",)),
        )
    ),
)
