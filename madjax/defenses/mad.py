"""MAD as a defence: the surrogate's Gram matrix is the evidence, epsilon the strength."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from madjax.constraints import l1
from madjax.defenses.defense import Apply, Defense, Owner
from madjax.errors import InputError
from madjax.gram import check_layers, gram
from madjax.mad import (
    Objective,
    Oracle,
    argmax_preserving,
    check_method,
    deviation,
    extreme,
    solve,
)
from madjax.steps import Constraint, Distance

Array = jax.Array


@dataclass(frozen=True)
class MAD(Defense):
    """Maximising angular deviation (Algorithm 1); the strength is the budget epsilon.

    layers: the surrogate's parameters that G is taken over, "all" (Eq. 5, the default), "last" (the
    authors' code), or "identity" (the ablation G = I, which has no surrogate). oracle, distance,
    constraints, objective and method are those of `madjax.solve`; with `oracle=argmax_preserving`
    rows call it MAD-argmax. surrogate_epochs: how long the surrogate, which has the victim's
    architecture, is trained, by the victim's recipe on the victim's data; 0, random parameters, is
    the paper's best choice (section 4).
    """

    layers: str = "all"
    oracle: Oracle = extreme
    distance: Distance = l1
    surrogate_epochs: int = 0
    constraints: tuple[Constraint, ...] = ()
    objective: Objective = deviation
    method: str = "line_search"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.layers)
        check_method(self.method)
        if callable(self.constraints):
            raise InputError(
                f"constraints of MAD is {_called(self.constraints)}: give a tuple of functions"
            )
        object.__setattr__(self, "constraints", tuple(self.constraints))  # hashable, as it must be
        if self.surrogate_epochs < 0:
            raise InputError(
                f"surrogate_epochs is {self.surrogate_epochs}: give a whole number >= 0"
            )

    @property
    def name(self) -> str:
        """MAD, or MAD-argmax."""
        return "mad_argmax" if self.oracle is argmax_preserving else "mad"

    @property
    def has_surrogate(self) -> bool:
        """Yes: that is what its Jacobian is of."""
        return True

    def prepare(self, owner: Owner, key: Array) -> Any:
        """The surrogate's parameters."""
        if not self.surrogate_epochs:
            return jax.jit(owner.classifier.init)(key)
        recipe = replace(owner.recipe, epochs=self.surrogate_epochs)
        return owner.train("surrogate", recipe, key)

    def evidence(self, apply: Apply, known: Any, x: Array) -> Array:
        """The Gram matrices [B, K, K] of the surrogate at the queries x [B, ...]."""
        return gram(apply, known, x, layers=self.layers)

    def answer(self, key: Array, y: Array, evidence: Array, strength: Array | float) -> Array:
        """The posterior y~ [K] returned for one query with posterior y [K]; the key is not used."""
        del key
        return solve(
            y,
            evidence,
            epsilon=strength,
            oracle=self.oracle,
            distance=self.distance,
            constraints=self.constraints,
            objective=self.objective,
            method=self.method,
        )

    def describe(self) -> dict[str, str]:
        """The fields of a row that say which defence this was."""
        epochs = self.surrogate_epochs
        parts = [f"surrogate of {epochs} epoch{'s' if epochs > 1 else ''}"] if epochs else []
        parts += [self.method] if self.method != "line_search" else []
        parts += [_called(self.objective)] if self.objective is not deviation else []
        parts += [*map(_called, self.constraints), self.variant]
        return super().describe() | {
            "layers": self.layers,
            "oracle": self.oracle.__name__,
            "distance": self.distance.__name__,
            "defense_variant": ", ".join(filter(None, parts)),
        }


def _called(function: Any) -> str:
    """A function by its name, a partial with the parameters that it sets."""
    if isinstance(function, partial):
        given = (f"{name}={value}" for name, value in function.keywords.items())
        return f"{_called(function.func)}({', '.join(given)})"
    return getattr(function, "__name__", type(function).__name__)
