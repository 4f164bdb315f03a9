"""What a curve is called: readable names, and labels no longer than a panel needs."""

from collections.abc import Collection, Iterable

from madjax.report.points import DIGESTS, Curve

NAMES = {"mad": "MAD", "mad_argmax": "MAD-argmax", "none": "undefended"}
NAMES |= {"reverse_sigmoid": "reverse sigmoid", "random_noise": "random noise"}
NAMES |= {"dp_sgd": "DP-SGD", "top_k": "top-k", "top_label": "top label"}
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
    if isinstance(value, tuple):
        return "+".join(map(name, value))
    return NAMES.get(value, str(value))


def remarked(text: str, *remarks: str) -> str:
    """The text with those remarks that are not empty in brackets."""
    said = "; ".join(filter(None, remarks))
    return f"{text} ({said})" if said else text


def is_ablation(curve: Curve) -> bool:
    """Whether this is MAD without a part of it, or with another surrogate."""
    altered = curve.layers == "identity" or curve.oracle not in ORACLES or curve.defense_variant
    return curve.defense in MAD and bool(altered)


def is_plain_mad(curve: Curve) -> bool:
    """Whether this is MAD or MAD-argmax with nothing altered."""
    return curve.defense in MAD and not is_ablation(curve)


def defence(curve: Curve) -> str:
    """The defence without its variant; for MAD with its layers, and its oracle if not its own."""
    parts = [curve.layers] if curve.layers != "none" else []
    parts += [curve.oracle] if curve.defense in MAD and curve.oracle not in ORACLES else []
    return ", ".join(map(name, (curve.defense, *parts)))


def attack(curve: Curve) -> str:
    """The attack with its variant."""
    return remarked(name(curve.attack), curve.variant)


def place(curve: Curve, panel: Iterable[str]) -> tuple:
    """The values of the fields that tell the panels of a figure apart."""
    return tuple(getattr(curve, field) for field in panel)


def differences(curves: Collection[Curve]) -> list[str]:
    """The fields that tell these curves apart: all that differ where every row records them.

    Fields that older rows lack, and digests, only where these do not suffice.
    """
    values = {field: {getattr(curve, field) for curve in curves} for field in Curve._fields}
    differ = [field for field in Curve._fields if len(values[field]) > 1]
    recorded = [field for field in differ if "" not in values[field]]
    for found in ([f for f in recorded if f not in DIGESTS], recorded, differ):
        if _apart(curves, found) == len(curves):
            break
    return found


def _apart(curves: Collection[Curve], fields: list[str]) -> int:
    """How many there are to someone who sees these fields alone."""
    return len({place(curve, fields) for curve in curves})


def said_by(curve: Curve, fields: Iterable[str]) -> list[str]:
    """These fields of a curve, each with its name."""
    return [f"{field} {name(getattr(curve, field)) or '-'}" for field in fields]


def labels(curves: Iterable[Curve], panel: tuple[str, ...]) -> dict[Curve, str]:
    """A label for each curve, unique in its panel; the attack only where no panel's title has it.

    Longer names only where two curves of one panel would share one, by as few fields as do.
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
        fields, fewest = differences(twins), []
        while _apart(twins, fewest) < len(twins):
            # The first of those that tell most apart.
            fewest.append(max(fields, key=lambda field: _apart(twins, [*fewest, field])))
        found[curve] = ", ".join([said, *said_by(curve, sorted(fewest, key=fields.index))])
    return found
