"""What every attack is: a way to spend a query budget, and the training of a stolen model.

An attack asks the defended victim in `begin` and then in a fixed number of rounds, `proceed`. Each
is a pure function with fixed shapes. They leave a transfer set, on which `steal` then
trains the stolen model. The sweep compiles the same functions for a whole grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from madjax.datasets import Family
from madjax.errors import InputError
from madjax.models import Classifier, LeNet
from madjax.recipe import Recipe
from madjax.train import State, fit

Array = jax.Array
Respond = Callable[[Array, Array], Array]
"""The defended victim: (numbers of the queries int32 [B], images [B, H, W, C]) -> y_tilde [B, K].

The number is all that a defence's randomness may depend on besides its own key. A number of -1
marks what is no query: its answer is not used. A victim that is not written in JAX is a
`madjax.attacks.RemoteVictim`.
"""


class Transfer(NamedTuple):
    """A transfer set that is being made; its arrays have their final length from the beginning."""

    x: Array
    """Indices of the attacker's own images, int32 [N], or synthetic ones, float32 [N, H, W, C]."""
    targets: Array
    """What the attacker makes of the answers, [N, K]; -inf where it has none yet."""
    asked: Array
    """Queries answered so far, int32."""
    memory: Any = ()
    """What else the attack knows between two rounds: a pytree of arrays, dropped in the end."""

    def take(self, images: Array, i: Array) -> tuple[Array, Array]:
        """The examples of indices i: (images, targets); images are the attacker's own."""
        x = self.x[i]
        return images[x] if self.x.ndim == 1 else x, self.targets[i]


@dataclass(frozen=True)
class World:
    """All that an attacker knows: a prediction API, images of its own, and how it trains.

    images uint8 [N, H, W, C] are its own, labels int32 [N] in [0, num_labels) their classes, which
    need not be the victim's. classifier is the stolen model's network, with num_classes outputs;
    family says how pixels are normalised. An attack that does well without the images is given
    their shape in their place (`jax.ShapeDtypeStruct`) in a sweep. told, where it is given, answers
    queries for own images in place of the victim: (numbers [B], indices of the images [B]) ->
    y_tilde [B, K], made before.
    """

    respond: Respond
    budget: int
    images: Array
    labels: Array
    num_labels: int
    num_classes: int
    classifier: Classifier
    family: Family
    key: Array
    told: Respond | None = None

    def ask(self, asked: Array, queries: Array, wanted: Array | None = None) -> tuple[Array, Array]:
        """Query the victim: the only way to its posteriors, and the counter of the budget.

        asked: queries answered so far, as the last call returned it (0 at first); queries: images
        [B, H, W, C], or indices int32 [B] of the attacker's own, whose answers a sweep may know
        beforehand; wanted: which of them are sent, bool [B], all by default. Returns the answers
        [B, K] and the new count. A row that is not wanted, or beyond the budget, is -inf: an attack
        that hands the count on cannot learn from what it has not paid for.
        """
        wanted = jnp.ones(len(queries), bool) if wanted is None else wanted
        number = asked + jnp.cumsum(wanted, dtype=jnp.int32) - 1
        served = wanted & (number < self.budget)
        number = jnp.where(served, number, -1)
        if queries.ndim > 1:
            told = self.respond(number, queries)
        elif self.told is None:
            told = self.respond(number, self.images[queries])
        else:
            told = self.told(number, queries)
        answers = jnp.where(served[:, None], told, -jnp.inf)
        return answers, asked + served.sum(dtype=jnp.int32)


Targets = Callable[[Array], Array]
"""What an attacker trains on, of the answers it got: [B, K] -> [B, K]."""


def posteriors(answers: Array) -> Array:
    """The answers as they are."""
    return answers


def top_label(answers: Array) -> Array:
    """The top label alone, one-hot (the paper's `argmax` attacker); the lowest of equal ones."""
    one_hot = jax.nn.one_hot(answers.argmax(-1), answers.shape[-1])
    return jnp.where(jnp.isfinite(answers), one_hot, answers)


@dataclass(frozen=True)
class Attack:
    """The settings that all attacks share.

    A new attack overrides `begin`, and `proceed` if it asks in rounds.
    budget: queries, all of which are spent. targets: what is learnt of an answer. source: where
    the attacker's own images come from, the sweep's "queryset" or the victim's "dataset". variant
    names the settings in rows and figures where one sweep holds several of an attack.
    """

    budget: int = 50_000
    architecture: Callable[[int], nn.Module] = LeNet
    recipe: Recipe = Recipe()
    targets: Targets = posteriors
    name: str = "attack"
    variant: str = ""
    source: str = "queryset"

    def __post_init__(self) -> None:
        if self.source not in ("queryset", "dataset"):
            raise InputError(
                f"attack {self.name} takes its images from {self.source!r}: use 'queryset' or "
                "'dataset'"
            )

    @property
    def title(self) -> str:
        """The attack in rows and figures."""
        return self.name

    @property
    def label(self) -> str:
        """Title and variant: what tells the attacks of one sweep apart."""
        variant = self.describe()["variant"]
        return f"{self.title} ({variant})" if variant else self.title

    def examples(self, budget: int) -> int:
        """How many examples, from the first, a budget buys; all of the transfer set for its own.

        Raises:
            InputError: more than the attack spends, or a budget that makes no transfer set.
        """
        if budget < 1:
            raise InputError(f"budget is {budget}: give a whole number >= 1")
        if budget > self.budget:
            raise InputError(
                f"budgets holds {budget}: {self.title} spends {self.budget}, give a number from 1 "
                "to that, or raise its budget"
            )
        return budget

    @property
    def rounds(self) -> int:
        """How often `proceed` is called after `begin`."""
        return 0

    @property
    def passes(self) -> float:
        """How often it sends an image through its own network before it trains the stolen model.

        For plans of how long it takes: all of it together, a step of training counting as three.
        """
        return 0.0

    def check(self, num_images: int, num_classes: int, image_shape: tuple[int, ...]) -> None:
        """Refuse, before any work, settings that these images and classes do not allow.

        Raises:
            InputError: with the value and what to give in its place.
        """
        del num_images, num_classes, image_shape

    def foreseen(self, key: Array, num_images: int) -> Array | None:
        """The own images of all queries in order, int32 [budget], where no answer changes them.

        A sweep then makes the answers to them once, for all strengths of a defence. It tries first
        whether these are what is asked, by index; where they are not, or with None, every cell asks
        as it goes.
        """
        del key, num_images
        return None

    def begin(self, world: World) -> Transfer:
        """The first queries: a transfer set of full length, answered as far as they go."""
        raise NotImplementedError(f"{type(self).__name__} has no method begin")

    def proceed(self, r: Array, transfer: Transfer, world: World) -> Transfer:
        """Round r of `rounds`, int32 from 0: more queries; r may be traced."""
        del r, world
        return transfer

    def describe(self) -> dict[str, Any]:
        """The fields of a row that say which attack this was."""
        return {"attack": self.title, "variant": self.variant}


@dataclass(frozen=True)
class Custom(Attack):
    """An attack that is one function: collect(world) -> Transfer, with fixed shapes, jit-able.

    It asks through `world.ask`, and returns `budget` examples.
    """

    collect: Callable[[World], Transfer] | None = None
    name: str = "custom"

    def begin(self, world: World) -> Transfer:
        """What the function collects."""
        return self.collect(world)


def check_budget(budget: int, num_images: int, repeats: int = 1) -> None:
    """Refuse a budget that the attacker's images cannot serve, each sent so many times."""
    if not repeats <= budget <= num_images * repeats:
        times = f", each sent {repeats} times" if repeats > 1 else ""
        raise InputError(
            f"budget is {budget}: the query set holds {num_images} images{times}, "
            f"give a budget from {repeats} to {num_images * repeats}"
        )


def check_transfer(attack: Attack, transfer: Transfer) -> None:
    """Refuse a finished transfer set, or several with a leading axis, that is not what it must be.

    Answers that are not numbers to images that are none pass: the network that made the images
    diverged, and so will the stolen model, whose accuracy `madjax.fit` gives as NaN.

    Raises:
        InputError: a budget that is not spent exactly, examples that are missing or unanswered, or
            a victim that answers NaN.
    """
    size = attack.examples(attack.budget)
    if transfer.targets.shape[-2] != size:
        raise InputError(
            f"the attack {attack.label} returns {transfer.targets.shape[-2]} examples: a budget of "
            f"{attack.budget} is to make {size}"
        )
    if not jnp.all(transfer.asked == attack.budget):
        raise InputError(
            f"the attack {attack.label} has asked {transfer.asked} times: spend its budget of "
            f"{attack.budget} exactly"
        )
    if jnp.isinf(transfer.targets).any():
        raise InputError(
            f"the attack {attack.label} has examples without an answer: train on none that it has "
            "not asked for"
        )
    lead = transfer.targets.shape[:-1]
    asked = jnp.isfinite(transfer.x).reshape(*lead, -1).all(-1)
    if (asked & jnp.isnan(transfer.targets).any(-1)).any():
        raise InputError(
            f"the defended victim answers NaN to the attack {attack.label}: its network or its "
            "defence gives numbers that are not finite for some of the images"
        )


def draw(key: Array, num_images: int, count: int) -> Array:
    """Which images are sent: `count` distinct indices, a function of the key; int32 [count].

    A larger count with the same key extends a smaller one.

    Raises:
        InputError: a count larger than the query set, or not positive.
    """
    check_budget(count, num_images)
    return jax.random.permutation(key, num_images)[:count]


def keys(seed: Array | int) -> dict[str, Array]:
    """The keys of an attack with this seed, by what they are for.

    They depend on the seed alone: every strength of a defence meets the same images, the same
    initial network and the same order, and adding cells to a grid changes no other cell.
    """
    uses = ("draw", "surrogate", "defense", "train")
    return dict(zip(uses, jax.random.split(jax.random.key(seed), len(uses)), strict=True))


def _check_victim(respond: Respond, images: Array, num_classes: int) -> None:
    """Refuse a victim whose answers are no posteriors of the stolen model's classes."""
    said = jax.eval_shape(respond, jnp.arange(2), images[jnp.zeros(2, jnp.int32)])
    shape = getattr(said, "shape", None)
    if shape != (2, num_classes):
        what = f"answers of shape {shape}" if shape else f"a {type(said).__name__}"
        raise InputError(
            f"the victim gives {what} to 2 queries, and the stolen model has {num_classes} "
            f"classes: give posteriors [B, {num_classes}], for labels jax.nn.one_hot of them"
        )


def steal(
    attack: Attack,
    seed: int,
    respond: Respond,
    images: Array,
    labels: Array,
    classifier: Classifier,
    family: Family,
    test: tuple[Array, Array],
) -> tuple[Transfer, State]:
    """A whole attack on one defended victim: its transfer set, and the trained stolen model.

    It asks for y~_i at images x_i and minimises - sum_i y~_i' log F(x_i; w), the L of Eq. 2.

    Args:
        attack: what is asked, and how the stolen model is trained.
        seed: of everything the attacker draws.
        respond: the defended victim, (numbers [B] of the queries, images [B, H, W, C]) -> y_tilde
            [B, K]. `madjax.defenses.prediction_api` makes one, and for a victim outside of JAX
            `madjax.attacks.RemoteVictim`.
        images: the attacker's own images, uint8 [N, H, W, C].
        labels: their labels [N], for attacks that choose by them.
        classifier: the stolen model's network.
        family: the range of pixels and their normalisation, for attacks that make images.
        test: (images, labels), the victim's test set, on which the stolen model is judged.

    Returns:
        (transfer, state): the transfer set with y_tilde [examples, K], and what `madjax.fit`
        returns for the stolen model.

    Edge cases:
        a budget of one: a transfer set of one example.
        the same seed: the same stolen model, bit for bit.
        a victim that answers NaN: refused; the error names the attack.
        a victim that answers labels, or posteriors of other classes: refused, before any query.
        more queries than images: refused by attacks that send each image once.
        images in [0, 1], or of another type than uint8: refused; the error names the type.

    Raises:
        InputError: what `attack.check` and `check_transfer` refuse; what a `RemoteVictim` raises.

    Example:
        >>> import jax.numpy as jnp, madjax
        >>> own = madjax.open_dataset("embedded:mnist[:9,:9]")
        >>> to, test = own.family, (own.x_test, own.y_test)
        >>> network = madjax.Classifier(madjax.MLP(10, (3,)), to.inputs, own.image_shape)
        >>> data = own.x_train, own.y_train, network, to, test
        >>> victim = lambda numbers, x: jnp.full((len(x), 10), 0.1)
        >>> transfer, state = madjax.steal(madjax.Knockoff(budget=3), 0, victim, *data)
        >>> transfer.targets.shape, int(transfer.asked)
        ((3, 10), 3)
    """
    key = keys(seed)
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    for name, each in (("the attacker's own images", images), ("the test images", test[0])):
        if each.dtype != np.uint8:
            raise InputError(f"{name} are {each.dtype}: give pixels from 0 to 255 as uint8")
    outputs = jax.eval_shape(
        lambda k: classifier.apply(classifier.init(k), images[:1]), key["draw"]
    )
    num_classes = outputs.shape[1]
    attack.check(len(images), num_classes, images.shape[1:])
    attack.recipe.check(classifier, attack.examples(attack.budget))
    _check_victim(respond, images, num_classes)
    world = partial(World, respond, attack.budget, num_labels=int(labels.max()) + 1)
    world = partial(world, num_classes=num_classes, classifier=classifier, family=family)

    @jax.jit
    def begin(images: Array, labels: Array) -> Transfer:
        return attack.begin(world(images=images, labels=labels, key=key["draw"]))

    @jax.jit
    def advance(r: Array, transfer: Transfer, images: Array, labels: Array) -> Transfer:
        return attack.proceed(r, transfer, world(images=images, labels=labels, key=key["draw"]))

    try:
        transfer = begin(images, labels)
        for r in range(attack.rounds):
            transfer = advance(jnp.int32(r), transfer, images, labels)
        jax.block_until_ready(transfer)
    except jax.errors.JaxRuntimeError:
        if failure := getattr(respond, "failure", None):
            raise failure from None
        raise
    check_transfer(attack, transfer)
    transfer = transfer._replace(memory=())
    data = transfer.take(images, jnp.arange(attack.examples(attack.budget)))
    return transfer, fit(classifier, attack.recipe, key["train"], data, test)
