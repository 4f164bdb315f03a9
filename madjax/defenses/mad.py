"""MAD as a defence: the surrogate's Gram matrix is the evidence, epsilon the strength."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax

from madjax.constraints import l1
from madjax.defenses.defense import Apply, Defense, Owner
from madjax.errors import InputError
from madjax.gram import check_layers, gram
from madjax.mad import AnySolver, LineSearch, check_solver, describe_solver, solve
from madjax.models import Classifier
from madjax.statistics import query_statistics
from madjax.steps import Distance

Array = jax.Array


@partial(jax.jit, static_argnums=0)
def _random(classifier: Classifier, key: Array) -> Any:
    """Random parameters; compiled once for all seeds."""
    return classifier.init(key)


@dataclass(frozen=True)
class MAD(Defense):
    """Maximising angular deviation (Algorithm 1); the strength is the budget epsilon.

    layers: the surrogate's parameters that G is taken over, "all" (Eq. 5, the default), "last" (the
    authors' code), or "identity" (the ablation G = I, which has no surrogate). solver: see
    `madjax.solve`; where it keeps every top label, by its oracle or by a constraint, rows call the
    defence MAD-argmax. surrogate_epochs: how long the surrogate, which has the victim's
    architecture, is trained, by the victim's recipe on the victim's data; 0, random parameters, is
    the paper's best choice (section 4). None is the victim itself, as the authors' code has it
    where it is given no surrogate: its posterior is y, so that G'y vanishes and nearly every answer
    is y (`undefended_share` in rows). query_statistics: whether the surrogate's BatchNorm layers
    take the statistics of the query alone, as in the authors' code, see `madjax.query_statistics`;
    a surrogate without any is as it is. (Their dropout, which is alive inside G, is not imitated.)
    """

    layers: str = "all"
    solver: AnySolver = LineSearch()
    surrogate_epochs: int | None = 0
    query_statistics: bool = field(default=False, metadata={"described": "changed"})

    def __post_init__(self) -> None:
        check_layers(self.layers)
        check_solver(self.solver)
        if self.surrogate_epochs is not None and self.surrogate_epochs < 0:
            raise InputError(
                f"surrogate_epochs is {self.surrogate_epochs}: give a whole number >= 0, or None "
                "for the victim itself"
            )

    @property
    def name(self) -> str:
        """MAD, or MAD-argmax."""
        return "mad_argmax" if getattr(self.solver, "keeps_label", False) else "mad"

    @property
    def usual(self) -> tuple[float, ...]:
        """Epsilons that show the whole curve in L1: no defence, and around 1, where labels flip."""
        return (0.0, 0.1, 0.3, 0.5, 0.8, 0.99, 1.1, 1.5)

    @property
    def is_budgeted(self) -> bool:
        """Yes: epsilon."""
        return True

    @property
    def distance(self) -> Distance:
        """What the budget is a bound of: L1 where the solver does not say."""
        return getattr(self.solver, "distance", l1)

    @property
    def has_surrogate(self) -> bool:
        """Yes: that is what its Jacobian is of."""
        return True

    @property
    def needs_recipe(self) -> bool:
        """Where a surrogate is trained."""
        return bool(self.surrogate_epochs)

    def prepare(self, owner: Owner, key: Array, strengths: tuple[float, ...] = ()) -> Any:
        """The surrogate's parameters, which are the same at every strength."""
        del strengths
        if self.surrogate_epochs is None:
            return owner.train_victim().params
        if not self.surrogate_epochs:
            return _random(owner.classifier, key)
        recipe = replace(owner.recipe, epochs=self.surrogate_epochs)
        return owner.train("surrogate", recipe, key)

    def evidence(self, apply: Apply, known: Any, x: Array) -> Array:
        """The Gram matrices [B, K, K] of the surrogate at the queries x [B, ...]."""
        surrogate = query_statistics(apply) if self.query_statistics else apply
        return gram(surrogate, known, x, layers=self.layers)

    def answer(self, key: Array, y: Array, evidence: Array, strength: Array | float) -> Array:
        """The posterior y~ [K] returned for one query with posterior y [K]; the key is not used."""
        del key
        return solve(y, evidence, epsilon=strength, solver=self.solver)

    def describe(self) -> dict[str, str]:
        """The fields of a row that say which defence this was."""
        epochs = self.surrogate_epochs
        trained = f"{epochs} epoch{'s' if epochs != 1 else ''}"
        surrogate = {None: "victim", 0: "random"}.get(epochs, trained)
        solver = describe_solver(self.solver)
        said = {None: "the victim as surrogate", 0: ""}.get(epochs, f"surrogate of {trained}")
        parts = [said] if said else []
        parts += ["statistics of the query"] if self.query_statistics else []
        parts += [solver["solver"]] if solver["solver"] != "line_search" else []
        parts += [solver["objective"]] if solver["objective"] not in ("none", "deviation") else []
        parts += [solver["constraints"]] if solver["constraints"] != "none" else []
        parts += [self.variant] if self.variant else []
        return (
            super().describe()
            | solver
            | {
                "layers": self.layers,
                "surrogate": "none" if self.layers == "identity" else surrogate,
                "defense_variant": ", ".join(parts),
            }
        )
