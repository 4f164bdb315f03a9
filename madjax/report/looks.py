"""Colours and dashes, by which the curves of a figure are told apart."""

from collections.abc import Collection, Hashable
from typing import TypeVar

import numpy as np

from madjax.report.names import attack, defence, is_plain_mad
from madjax.report.points import Curve

Key = TypeVar("Key", bound=Hashable)

# Okabe and Ito's colour-blind-safe set without its sky blue, which reads as the ideal's cyan.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#444444")
STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


def looks_of(said: dict[Curve, str]) -> dict[str, dict]:
    """Options of matplotlib for each label.

    Of several defences against several attacks, colours tell the more numerous apart and dashes the
    others, where defence and attack are all that labels say and there are dashes enough. Else no
    two labels share a colour, and lines are solid for MAD and dashed beside it: curves that keep
    the defender's accuracy cover one another, and dashes let both be seen.
    """
    pairs = {c: ((defence(c), c.defense_variant), attack(c)) for c in said}
    one_each = len({*pairs.values()}) == len({*said.values()})
    looks = crossed(pairs) if one_each else {}
    if looks:
        return {said[curve]: look for curve, look in looks.items()}
    mad, others = STYLES[:1], STYLES[1:]
    if not 0 < sum(map(is_plain_mad, said)) < len(said):
        mad = others = STYLES
    colours = _colours(len(set(said.values())))
    found: dict[str, dict] = {}
    for curve, label in said.items():
        styles = mad if is_plain_mad(curve) else others
        at = len(found) if len(colours) > len(COLOURS) else 0
        if label not in found:
            found[label] = {"color": colours[len(found)], "ls": styles[at % len(styles)]}
    return found


def crossed(pairs: dict[Key, tuple[Hashable, Hashable]]) -> dict[Key, dict]:
    """A look for each pair of things: a colour for the one, dashes for the other.

    Colours are of the more numerous. Empty where the others are all one, or more than there are
    dashes.
    """
    firsts, seconds = ({key: pair[i] for key, pair in pairs.items()} for i in (0, 1))
    hues, dashes = sorted((firsts, seconds), key=lambda each: -len({*each.values()}))
    if not 1 < len({*dashes.values()}) <= len(STYLES):
        return {}
    shades = dict(zip(dict.fromkeys(hues.values()), _colours(len({*hues.values()})), strict=False))
    styles = dict(zip(dict.fromkeys(dashes.values()), STYLES, strict=False))
    return {key: {"color": shades[hues[key]], "ls": styles[dashes[key]]} for key in pairs}


def plain(labels: Collection[str]) -> dict[str, dict]:
    """A colour for each label."""
    return {
        label: {"color": c, "ls": "-"}
        for label, c in zip(labels, _colours(len(labels)), strict=False)
    }


def _colours(count: int) -> list[str]:
    """`count` different colours: those of `COLOURS`, or of a rainbow where these are too few."""
    from matplotlib import colormaps  # lazy: a second that tables do not need
    from matplotlib.colors import to_hex

    if count <= len(COLOURS):
        return list(COLOURS)
    return [to_hex(each) for each in colormaps["turbo"](np.linspace(0.05, 0.95, count))]
