"""What a curve is called: readable names, and labels no longer than a panel needs."""

from collections.abc import Iterable

from madjax.report.points import Curve

NAMES = {"mad": "MAD", "mad_argmax": "MAD-argmax", "none": "undefended"}
NAMES |= {"reverse_sigmoid": "reverse sigmoid", "random_noise": "random noise"}
NAMES |= {"dp_sgd": "DP-SGD", "top1": "top-1 label"}
NAMES |= {"last": "last layer", "all": "all parameters", "identity": "G = I"}
NAMES |= {"random_vertex": "y* = random", "argmin": "y* = argmin"}
NAMES |= {"extreme_unnormalised": "un-normalised", "extreme_at_budget": "vertices at budget"}
NAMES |= {"mnist": "MNIST", "emnist": "EMNIST", "fashion_mnist": "FashionMNIST"}
NAMES |= {"cifar10": "CIFAR10", "lenet": "LeNet"}
MAD = ("mad", "mad_argmax")
# Of the defences themselves; null: not recorded; none: the solver has no oracle.
ORACLES = ("extreme", "argmax_preserving", None, "none")


def name(value) -> str:
    """The value of a row's field in a reader's words."""
    return NAMES.get(value, str(value))


def remarked(text: str, *remarks: str) -> str:
    """The text with those remarks that are not empty in brackets."""
    said = "; ".join(filter(None, remarks))
    return f"{text} ({said})" if said else text


def is_ablation(curve: Curve) -> bool:
    """Whether this is MAD without a part of it, or with another surrogate."""
    altered = curve.layers == "identity" or curve.oracle not in ORACLES or curve.defense_variant
    return curve.defense in MAD and bool(altered)


def defence(curve: Curve) -> str:
    """The defence without its variant; for MAD with its layers, and its oracle if not its own."""
    parts = [curve.layers] if curve.layers != "none" else []
    parts += [curve.oracle] if curve.defense in MAD and curve.oracle not in ORACLES else []
    return ", ".join(map(name, (curve.defense, *parts)))


def attack(curve: Curve) -> str:
    """The attack with its variant."""
    return remarked(name(curve.attack), curve.variant)


def place(curve: Curve, panel: tuple[str, ...]) -> tuple:
    """The values of the fields that tell the panels of a figure apart."""
    return tuple(getattr(curve, field) for field in panel)


def labels(curves: Iterable[Curve], panel: tuple[str, ...]) -> dict[Curve, str]:
    """A label for each curve, unique in its panel; the attack only where no panel's title has it.

    Longer names only where two curves of one panel would share one.
    """
    short = {
        curve: remarked(
            defence(curve), curve.defense_variant, "" if "attack" in panel else attack(curve)
        )
        for curve in curves
    }
    found = {}
    for curve, said in short.items():
        twins = [c for c in short if place(c, panel) == place(curve, panel) and short[c] == said]
        extra = [f for f in Curve._fields if len({getattr(c, f) for c in twins}) > 1]
        found[curve] = ", ".join([said, *(f"{f} {name(getattr(curve, f))}" for f in extra)])
    return found
