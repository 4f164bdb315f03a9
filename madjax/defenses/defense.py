"""What every defence is: one query's answer, as a pure function with a traced strength.

A defence answers one query from the victim's posterior y, from `evidence` about the query that
does not depend on the strength (for MAD: the Gram matrix), and from a traced strength. So the
evidence of a set of queries is computed once, and every strength of the grid is a `vmap` away.
What it needs to know before the first query (a surrogate, another victim) it makes in `prepare`.
`as_function` closes over all of it and gives the plain form (key, x, y) -> y~.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from madjax.batching import QUERIES, map_chunks, map_within
from madjax.errors import InputError
from madjax.mad import NO_SOLVER
from madjax.models import Classifier
from madjax.recipe import Recipe
from madjax.streams import stream
from madjax.train import State, check_converges, fit, found
from madjax.weights import Trained

Array = jax.Array
Apply = Callable[[Any, Array], Array]

_LABEL = ("defense", "layers", "oracle", "distance", "defense_variant")
MAX_STRENGTH = 1e6
"""Beyond any distance that a posterior can have but an infinite KL; small enough for float32."""


@dataclass(frozen=True, eq=False)
class Training:
    """What is trained, and by what recipe: called with options of `madjax.fit`, as one function."""

    classifier: Classifier
    recipe: Recipe
    key: Array
    data: tuple[Array, Array]
    test: tuple[Array, Array]

    def __call__(self, **options: Any) -> State:
        """Run `madjax.fit`, or go on from a state."""
        return fit(self.classifier, self.recipe, self.key, self.data, self.test, **options)


def untracked(name: str, train: Training) -> State:
    """Train without a trace: what `Owner.keep` is outside of a sweep.

    Raises:
        InputError: training that diverges.
    """
    state = train()
    check_converges(name, train.recipe, state)
    return state


@dataclass(frozen=True)
class Owner:
    """What the owner of a prediction API has to prepare a defence with.

    classifier is the victim's network, recipe how it was trained, with key, or the file that it is
    in; data = (images, labels) and test are its data. keep(name, train) trains, and a sweep makes
    it go on from checkpoints. Training that diverges is an error there.
    """

    classifier: Classifier
    recipe: Recipe | Trained
    key: Array
    data: tuple[Array, Array]
    test: tuple[Array, Array]
    keep: Callable[..., State] = untracked

    def train(self, name: str, recipe: Recipe, key: Array) -> Any:
        """The parameters of the victim's network, trained by a recipe on the victim's data.

        Its checkpoint is told from others by recipe, key and data.
        """
        return self.keep(name, self.training(recipe, key)).params

    def training(self, recipe: Recipe, key: Array) -> Training:
        """What `keep` is given to train."""
        return Training(self.classifier, recipe, key, self.data, self.test)

    @property
    def victim(self) -> Training:
        """The training of the undefended victim."""
        return self.training(self.recipe, self.key)

    def train_victim(self) -> State:
        """The undefended victim."""
        if isinstance(self.recipe, Trained):
            return found(self.classifier, self.recipe.variables(self.classifier), *self.test)
        return self.keep("victim", self.victim)


@dataclass(frozen=True)
class Defense:
    """The settings that all defences share; a new defence overrides `answer`, and more if need be.

    It is a frozen dataclass too, with fields that can be hashed; `describe` adds to what is there.

    variant tells settings apart, in rows and figures, where one sweep holds several of a defence.
    """

    variant: str = field(default="", kw_only=True)

    @property
    def name(self) -> str:
        """The defence in rows and figures: by default the class's, as `my_rule` for `MyRule`."""
        return re.sub(r"(?<!^)(?=[A-Z][a-z])", "_", type(self).__name__).lower()

    @property
    def label(self) -> str:
        """What tells the defences of one sweep apart, in messages."""
        said = self.describe()
        told = (said[field] for field in _LABEL)
        return ", ".join(each for each in told if each not in ("", "none")) or self.name

    @property
    def strongest(self) -> float:
        """The largest strength that there is."""
        return MAX_STRENGTH

    @property
    def usual(self) -> tuple[float, ...]:
        """The strengths at which a sweep tries it where it is given none."""
        return ()

    @property
    def neutral(self) -> float | None:
        """The strength at which every answer is y itself; None where there is none."""
        return 0.0

    @property
    def is_fresh(self) -> bool:
        """Whether a query that is sent again gets a new answer.

        By default the noise of an answer is a function of the query's content and of the
        defence's key: asking again tells an attacker nothing.
        """
        return False

    @property
    def needs_recipe(self) -> bool:
        """Whether it trains networks by the victim's recipe, which one that is given has not."""
        return False

    @property
    def is_budgeted(self) -> bool:
        """Whether the strength is a budget: a bound on the distance from posterior to answer."""
        return False

    @property
    def has_surrogate(self) -> bool:
        """Whether what it knows are parameters that stand for the attacker's.

        In white-box mode such a defence is given the attacker's own (`madjax.attacks.Online`).
        """
        return False

    def check_strength(self, strength: float) -> None:
        """Refuse a strength that the defence does not have.

        Raises:
            InputError: with the value and what to give in its place.
        """
        if not 0 <= strength <= self.strongest:
            raise InputError(
                f"strength is {strength}: the strength of {self.name} is a number from 0 to "
                f"{self.strongest:g}"
            )

    def victim_recipe(self, recipe: Recipe | Trained, strength: float) -> Recipe | Trained:
        """How the victim behind the defence is trained, where the undefended one is by `recipe`.

        The same, unless the defence is in the training (`madjax.defenses.Retrained`). A victim that
        is given comes as what it is, but not to a defence that `needs_recipe`.
        """
        del strength
        return recipe

    def prepare(self, owner: Owner, key: Array, strengths: tuple[float, ...] = ()) -> Any:
        """What the defence knows before the first query, such as the surrogate's parameters.

        strengths are those at which it will answer.
        """
        del owner, key, strengths
        return ()

    def evidence(self, apply: Apply, known: Any, x: Array) -> Any:
        """What the answers to x [B, ...] need to know of it: a pytree of arrays [B, ...].

        apply is the network's, known what `prepare` returned.
        """
        del apply, known, x
        return ()

    def answer(self, key: Array, y: Array, evidence: Any, strength: Array | float) -> Array:
        """The answer y~ [K] to one query with posterior y [K], at any strength but the neutral."""
        raise NotImplementedError(f"{type(self).__name__} has no method answer")

    def describe(self) -> dict[str, str]:
        """The fields of a row that say which defence this was."""
        return {
            "defense": self.name,
            "layers": "none",
            "surrogate": "none",
            **NO_SOLVER,
            "defense_variant": self.variant,
        }

    def facts(self, strength: float, recipe: Recipe | Trained, num_examples: int) -> dict[str, Any]:
        """Further fields of a row: what is known of a strength, given the victim's training."""
        del strength, recipe, num_examples
        return {}


@dataclass(frozen=True)
class Custom(Defense):
    """A defence that is one function (key, x [...], y [K], strength) -> y~ [K] of one query.

    jit-able and vmap-able; the strength may be traced. neutral: the strength at which y itself is
    told and the function is not asked; None: there is none. fresh: the key is new for each query,
    not a function of its content.
    """

    function: Callable[[Array, Array, Array, Array | float], Array]
    title: str = "custom"
    neutral: float | None = 0.0
    fresh: bool = False

    @property
    def name(self) -> str:
        """The title."""
        return self.title

    @property
    def is_fresh(self) -> bool:
        """As `fresh` says."""
        return self.fresh

    def evidence(self, apply: Apply, known: Any, x: Array) -> Array:
        """The queries themselves."""
        del apply, known
        return x

    def answer(self, key: Array, y: Array, evidence: Array, strength: Array | float) -> Array:
        """What the function says."""
        return self.function(key, evidence, y, strength)


def answers(
    defense: Defense,
    key: Array,
    x: Array,
    y: Array,
    evidence: Any,
    strength: Array | float,
    numbers: Array | None = None,
) -> Array:
    """The defence's answers to queries x [B, ...]: y [B, K], evidence [B, ...] -> y_tilde [B, K].

    The key of a query is fold_in(key, number). Its number is the `fingerprints` of its content, so
    that equal queries have equal answers. Of a defence that `is_fresh` it is the query's own of
    numbers int32 [B], by default 0, 1, ...: such noise averages out over repeated queries. At the
    defence's neutral strength every answer is y itself.
    """
    if not defense.is_fresh:
        numbers = fingerprints(stream(key, "fingerprints"), x)
    elif numbers is None:
        numbers = jnp.arange(y.shape[0])

    def answer(query: tuple[Array, Array, Any]) -> Array:
        i, y, evidence = query
        told = defense.answer(jax.random.fold_in(key, i), y, evidence, strength)
        return told if defense.neutral is None else jnp.where(strength == defense.neutral, y, told)

    return map_within(jax.vmap(answer), (numbers, y, evidence))


def as_function(
    defense: Defense, apply: Apply, known: Any, strength: Array | float
) -> Callable[[Array, Array, Array], Array]:
    """The defence as a plain function (key, x[B, ...], y[B, K], numbers=None) -> y_tilde [B, K].

    apply and known are the network and what the defence has prepared: for MAD, the surrogate.
    Randomness is a function of the key and of a query's content, or of its number where the
    defence's noise is fresh. Numbers are 0, 1, ... by default: a call with the key of another
    repeats its noise, so give each a key or numbers of its own. See `answers`.
    """

    def defend(key: Array, x: Array, y: Array, numbers: Array | None = None) -> Array:
        return answers(defense, key, x, y, defense.evidence(apply, known, x), strength, numbers)

    return defend


def fingerprints(key: Array, x: Array) -> Array:
    """A number for every query [B, ...] that depends on its content alone: uint32 [B].

    Equal queries have equal numbers, whatever type of small integer or of float they are of; those
    of unequal ones differ but for one pair in about 2^32, and tell nothing of the queries to who
    does not know the key. (A sum modulo 2^32 of the query's numbers, the bits of each mixed with
    random ones of its place.)
    """
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    if flat.dtype != jnp.int32 and flat.dtype != jnp.uint32:  # which float32 does not hold
        flat = flat.astype(jnp.float32) + 0.0  # as -0.0 is 0.0
    bits = jax.lax.bitcast_convert_type(flat, jnp.uint32)
    bits ^= jax.random.bits(key, bits.shape[1:], jnp.uint32)[None]
    for odd in (0x7FEB352D, 0x846CA68B):
        bits = (bits ^ (bits >> 16)) * jnp.uint32(odd)
    return (bits ^ (bits >> 16)).sum(axis=1, dtype=jnp.uint32)


def prediction_api(
    defense: Defense,
    classifier: Classifier,
    victim: Any,
    known: Any,
    key: Array,
    strength: Array | float,
) -> Callable[[Array, Array], Array]:
    """The defended victim as attackers meet it: (numbers [B], images [B, H, W, C]) -> y_tilde.

    victim are parameters of the classifier, known is what the defence has prepared; key is the
    defence's own.
    """

    def respond(queries: tuple[Array, Array]) -> Array:
        numbers, images = queries
        y = classifier.posterior(victim, images)
        evidence = defense.evidence(classifier.apply, known, images)
        return answers(defense, key, images, y, evidence, strength, numbers)

    return lambda numbers, images: map_chunks(respond, (numbers, images), QUERIES)
