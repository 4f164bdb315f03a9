"""Whether arrays are those of a network."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from madjax.errors import InputError
from madjax.models import Classifier


def check_names(
    said: str, network: str, held: Mapping[str, Any], wanted: set[str], way: str
) -> None:
    """Refuse arrays of which one is missing, or one too many; way is what else will do."""
    lacking, left = (sorted(names) for names in (wanted - held.keys(), held.keys() - wanted))
    parts = [f"it lacks {_first(lacking)}"] if lacking else []
    parts += [f"it holds {_first(left)}, for which {network} has no place"] if left else []
    if parts:
        raise InputError(
            f"{said} does not fit {network}: {'; '.join(parts)}: give the weights of the same "
            f"network, {way}"
        )


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def check_shape(
    said: str,
    name: str,
    found: tuple[int, ...],
    wanted: tuple[int, ...],
    classifier: Classifier,
    anew: str = "",
) -> None:
    """Refuse an array of another shape than the network's; anew is what else will do."""
    if found != wanted:
        raise InputError(
            f"{said}: {name} has shape {found}, where {type(classifier.module).__name__} for these "
            f"classes and images of shape {classifier.image_shape} has {wanted}: give the weights "
            f"of that network{anew}"
        )


def check_finite(said: str, name: str, found: np.ndarray) -> None:
    """Refuse an array with NaN or infinity."""
    if not np.isfinite(found).all():
        raise InputError(f"{said}: {name} holds NaN or infinity: give finite weights")
