"""What the paper claims, and what rows say of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from madjax.report import deviations, readings, subversion
from madjax.report.found import NEAR, REASONABLE, TABLE_1, Found, Reading
from madjax.report.names import name
from madjax.report.points import is_sound


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper: where, what, its number, and how rows answer it.

    paper is by data set where the paper has several. rule says when it holds.
    """

    where: str
    text: str
    paper: str | Mapping[str, str]
    rule: str
    read: Reading


class Answer(NamedTuple):
    """A claim about a data set, and what was found in the rows of a config.

    best is what is found where each attacker keeps the epoch that is best on the test set, as in
    the authors' code; None where rows do not say.
    """

    claim: Claim
    dataset: str
    paper: str
    config: str
    found: Found
    best: Found | None

    @property
    def at_best(self) -> str:
        """`best` in words: its verdict, with what was found where that is another than `found`'s.

        Empty where the same is found; "not known" where the rows do not say.
        """
        if self.best is None:
            return "not known"
        if self.best == self.found:
            return ""
        same = self.best.holds == self.found.holds
        return self.best.holds if same else f"{self.best.holds}: {self.best.ours}"


def answers(rows: list[dict]) -> list[Answer]:
    """Every claim that the rows answer, for each data set, in the paper's order.

    Rows are read task by task of each config (`read_rows(..., of_each_config=True)` leaves each
    whole). Of several that answer, that of the largest query budget counts.
    """
    rows = list(filter(is_sound, rows))
    budgets: dict[tuple, int] = {}
    for row in rows:
        budgets[_task(row)] = max(row["budget"], budgets.get(_task(row), 0))

    def run(row: dict) -> tuple:
        dataset, *others = _task(row)
        return dataset, -budgets[_task(row)], *others

    runs = [list(own) for _, own in groupby(sorted(rows, key=run), key=run)]
    both = [(own, _at_best(own)) for own in runs]
    told = []
    for claim in CLAIMS:
        seen = set()
        for own, kept in both:
            dataset, paper = own[0]["dataset"], claim.paper
            if not isinstance(paper, str):
                paper = paper.get(dataset, "")
            if dataset not in seen and paper and (found := claim.read(own)):
                seen.add(dataset)
                best = claim.read(kept) if kept else None
                told.append(Answer(claim, dataset, paper, own[0].get("config", ""), found, best))
    return told


def claims_table(rows: list[dict]) -> str:
    """`answers` in Markdown."""
    head = ["claim of the paper", "on", "paper", "ours", "n", "holds?", "best epoch", "rows of"]
    lines = [
        [
            f"{answer.claim.text} ({answer.claim.where})",
            name(answer.dataset),
            answer.paper,
            answer.found.ours,
            str(answer.found.n),
            answer.found.holds,
            answer.at_best,
            answer.config,
        ]
        for answer in answers(rows)
    ]
    rule = ["---", "---", "---", "---", "--:", "---", "---", "---"]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *lines))


def _at_best(rows: list[dict]) -> list[dict]:
    """The rows with the accuracy of each attacker's best epoch; none where one does not say."""
    best = [r.get("attacker_accuracy_best") for r in rows]
    if None in best:
        return []
    return [r | {"attacker_accuracy": each} for r, each in zip(rows, best, strict=True)]


def _table_1(column: str) -> dict[str, str]:
    return {dataset: f"{line[column]} %" for dataset, line in TABLE_1.items()}


def _task(row: dict) -> tuple[str, str, str]:
    return row["dataset"], row.get("config", ""), row.get("task_settings") or ""


KEEPING = (("mad_argmax", "MAD-argmax"), ("reverse_sigmoid", "reverse sigmoid"))
"""Defences that keep the top label."""


def _identity(curve) -> bool:
    return curve.layers == "identity"


def _random(curve) -> bool:
    return curve.oracle == "random_vertex"


def _trained(curve) -> bool:
    return curve.defense_variant.startswith("surrogate of")


SIGN = (
    "the mean has the sign, and its 95 % interval over seeds leaves out 0; partly: the mean alone"
)
CLAIMS = (
    Claim(
        "Table 1",
        "accuracy of the victim",
        _table_1("victim"),
        f"ours is at most {NEAR:g} points below",
        readings.victim,
    ),
    *(
        Claim(
            "Table 1",
            f"accuracy of {attack} on the undefended victim",
            _table_1(attack),
            f"within {NEAR:g} points; partly: within 2 standard deviations",
            readings.undefended(attack),
        )
        for attack in ("jbda", "jbself", "jbtop3", "knockoff")
    ),
    Claim(
        "5.1",
        "knockoff is the strongest attack",
        "it is",
        "its mean is the largest, at the largest budget that all have",
        readings.strongest,
    ),
    Claim(
        "5.1, Fig. A2",
        "the top label alone costs an attacker next to nothing on simple data sets",
        {"cifar10": "-0.2 points", "mnist": "minimal", "fashion_mnist": "minimal"},
        f"the mean is at most {NEAR:g} points below",
        subversion.truncated,
    ),
    Claim(
        "1, Fig. 1",
        "MAD takes 1 to 2 orders of magnitude from the efficiency of queries",
        "10 to 100 times",
        f"10 times or more, for up to {REASONABLE:g} points of the defender's accuracy "
        "(reasonable in 5.2.3); partly: 3 times or more, at any cost or as an upper bound",
        readings.efficiency,
    ),
    *(
        Claim(
            "5.2.1, Fig. 3",
            f"MAD against {attack}, for less than a point of the defender's accuracy",
            {"mnist": f"99.4 to {end:g} %"},
            f"as many points are taken as from its accuracy in Table 1 to {end:g} % (99.4 % is the "
            f"defender's), but {NEAR:g}; partly: half of them",
            readings.at_little_cost(attack, TABLE_1["mnist"][attack], end),
        )
        for attack, end in (("knockoff", 69.8), ("jbtop3", 35.7))
    ),
    Claim(
        "5.2.1, Fig. 3",
        "MAD greatly reduces every attack, for less than a point of the defender's accuracy",
        "all four",
        "10 points or more are taken from each; partly: from some",
        readings.from_every_attack,
    ),
    Claim(
        "5.2.2 (i)",
        "MAD brings the attacker to 80 % with less distance than reverse sigmoid",
        {"mnist": "0.63 times (L1 0.95)"},
        "below 0.8 times; partly: below 1",
        readings.less_distance,
    ),
    *(
        Claim(
            "5.2.2 (ii)",
            f"{said} takes 20 points or more from the attacker",
            "20 or more",
            "20 or more; partly: 10",
            readings.most_taken(defense),
        )
        for defense, said in KEEPING
    ),
    Claim(
        "5.2.2 (ii)",
        "what the attacker has more before MAD-argmax than before reverse sigmoid as far away",
        "consistently less",
        f"at every strength {SIGN}, or at some of them",
        readings.closer,
    ),
    *(
        Claim(
            "5.2.2 (ii)",
            f"entropy of the answers of {said} at L1 1",
            {"mnist": f"{paper} ± {std}"},
            "within 0.1 bits, or 2 standard deviations",
            readings.entropy(defense, paper),
        )
        for (defense, said), paper, std in zip(KEEPING, (1.79, 3.02), (0.11, 0.16), strict=True)
    ),
    Claim(
        "5.2.2 (iii)",
        "what it costs the defender to bring the attacker below 70 %",
        "MAD 1 %; DP-SGD 39 %, random noise 56.4 %",
        f"MAD costs least of those that do, and at most {1 + NEAR:g} points, with a 95 % interval "
        f"over seeds below 70 %; partly: least, at most {REASONABLE:g} points, with a mean below",
        readings.below_70,
    ),
    *(
        Claim(
            "5.2.3, Fig. 5",
            f"an attacker of top labels has the accuracy of undefended whole answers before {said}",
            "up to 1.0 times",
            "0.95 times or more, at the largest strength; partly: 0.9",
            subversion.recovered(defense),
        )
        for defense, said in KEEPING
    ),
    Claim(
        "5.2.3, Fig. 9",
        "MAD takes 9 points from an attacker of top labels",
        "9 points",
        "9 or more, at the largest epsilon that costs the defender less than 5",
        subversion.labels_before_mad,
    ),
    Claim(
        "5.2.3, Fig. 6",
        "the deviations are surprisingly large, degrees",
        "up to 115 (CIFAR10)",
        "up to as many or more",
        deviations.widest_angle,
    ),
    Claim(
        "5.2.3, Fig. 6",
        "mean deviation at epsilon 0.95 to 0.99, degrees",
        "24.9 (CIFAR10)",
        "as many or more",
        deviations.useful_angle,
    ),
    Claim(
        "5.2.3, Fig. 6",
        "mean deviation at epsilon 2, degrees",
        "above 90",
        "above 90",
        deviations.flipped,
    ),
    Claim(
        "5.2.3, Fig. 7",
        "the test loss rises at epsilon 2",
        "it does",
        "it is larger at the end",
        deviations.loss_rises,
    ),
    *(
        Claim(
            where,
            f"what the attacker has more where {said}",
            "more",
            SIGN,
            readings.ablated(wanted),
        )
        for where, said, wanted in (
            ("5.2.3, Fig. 8", "y* is a random vertex", _random),
            ("5.2.3, Fig. 8", "G = I", _identity),
            ("4", "the surrogate is trained", _trained),
        )
    ),
    *(
        Claim(
            "5.2.3, Fig. 9",
            f"before MAD an attacker is not helped by {said}",
            "not much",
            f"each gains at most {NEAR:g} points at each epsilon below 1, by the upper end of its "
            "95 % interval; partly: none gains more with an interval above 0",
            subversion.not_helped_by(kinds),
        )
        for said, kinds in (
            ("another network", ("arch-",)),
            ("another optimiser", ("opt-",)),
            ("asking several times", ("nquery",)),
        )
    ),
    Claim(
        "5.2.3, Fig. 9",
        "the best way around MAD is the top label alone",
        "it is",
        "its mean is the largest, at every epsilon below 1; partly: at some",
        subversion.best_way,
    ),
)
"""In the paper's order; the rules are ours."""
