"""Attacks that make their own queries: Jacobian-based data augmentation and its variants.

From a few seed images, in rounds: train a substitute on all that has been answered, move known
images along the sign of its input gradient, and ask the victim for the new ones.

    x' = x + lambda_r sgn(dCE(F(x), c) / dx)                      jbda      (Papernot et al., 2017)
    x' = x - lambda_r sgn(dCE(F(x), c) / dx)                      jbself    (Juuti et al., 2019)
    x' = x + d, 8 steps of lambda_r / 10 sgn(dF_t(x + d) / dx)    jbtop-k   (Juuti et al., 2019)

c is the victim's top class for x, and t runs over the k classes that F thinks likeliest but c.
The signs are those of the paper's experiments (its authors' code). Papernot et al. themselves, and
the paper's Appendix C, write jbda with sgn(dF_c(x) / dx), a step towards c: what jbself does here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from madjax.attacks.attack import Attack, Transfer, World, draw
from madjax.batching import MEMORY, map_within
from madjax.datasets import Family
from madjax.errors import InputError
from madjax.recipe import Recipe, check_bare, cross_entropy, order
from madjax.streams import stream
from madjax.train import train

Array = jax.Array
Perturb = Callable[[Callable[[Array], Array], Array, Array, Array, Array], Array]
"""(logits, z [B, ...], answers [B, K], which [B], step) -> additions to z [B, ...].

z are images in normalised pixels, logits(z) [B, K] the substitute's; which counts the additions
asked for of one image, from 0; step is lambda_r, in normalised pixels, negative in some rounds.
"""

BLOCK = 250
"""New queries that are made and asked at once, at most."""

_PUBLISHED_TAU = 5


def away_from_top(
    logits: Callable[[Array], Array], z: Array, y: Array, which: Array, step: Array
) -> Array:
    """Step sgn(dCE(F(z), argmax y) / dz): one step away from the victim's top class."""
    del which
    top = jax.nn.one_hot(y.argmax(-1), y.shape[-1])
    gradient = jax.grad(lambda z: cross_entropy(logits(z), top).sum())(z)
    return step * jnp.sign(gradient)


def towards_top(
    logits: Callable[[Array], Array], z: Array, y: Array, which: Array, step: Array
) -> Array:
    """-step sgn(dCE(F(z), argmax y) / dz): one step towards the victim's top class."""
    return -away_from_top(logits, z, y, which, step)


def towards_next(
    logits: Callable[[Array], Array], z: Array, y: Array, which: Array, step: Array
) -> Array:
    """Eight steps of step / 10 that raise the logit of the substitute's class of rank `which`.

    The victim's top class is left out of the ranking; equal logits rank by class number.
    """
    top = jax.nn.one_hot(y.argmax(-1), y.shape[-1], dtype=bool)
    ranking = jnp.argsort(-jnp.where(top, -jnp.inf, logits(z)), axis=-1)
    target = jnp.take_along_axis(ranking, which[:, None], axis=-1)

    def height(delta: Array) -> Array:
        return jnp.take_along_axis(logits(z + delta), target, axis=-1).sum()

    def climb(_: int, delta: Array) -> Array:
        return delta + step / 10 * jnp.sign(jax.grad(height)(delta))

    return jax.lax.fori_loop(0, 8, climb, jnp.zeros_like(z))


_PUBLISHED = (away_from_top, towards_top, towards_next)


class _Round(NamedTuple):
    """What one round does; with leading axes, all of them."""

    known: Any
    """Examples before it."""
    new: Any
    """Queries that it makes."""
    step: Any
    """lambda_r, in normalised pixels."""
    from_all: Any
    """Whether every image so far is perturbed, or a reservoir of them."""


@dataclass(frozen=True)
class JacobianAugmentation(Attack):
    """Jacobian-based data augmentation; `jbda`, `jbself` and `jbtop` make the published ones.

    seeds: images drawn from the attacker's own, by default of the victim's training set; the paper
    takes 100 for MNIST and Fashion-MNIST, 500 for CIFAR10, CUB200 and Caltech256, 1,000 for
    CIFAR100. Each round adds `copies` perturbations of every image so far, so that |D| grows by a
    factor of 1 + copies; from round sigma on, with kappa > 0, of kappa images drawn anew (the
    reservoir). The last round draws as many as the budget still allows. step: lambda, in
    normalised pixels; with tau > 0 its sign flips every tau rounds, lambda_r = lambda
    (-1)^floor(r / tau). rho > 0 is the greatest number of rounds; together with the seeds they must
    spend the budget. New images stay within pixels [0, 255]. substitute: how each round's fresh
    network is trained; recipe: the final one.

    as_published_code: what the paper's authors' code does, for comparison with its Table 1. The
    signs flip by round(r / 5), and with no reservoir a truncated round takes the first images. For
    jbda and jbself, x + d is clipped to [0, 1] in normalised pixels; with no reservoir the
    perturbed images overwrite those they were made from, so that they are in the set twice and the
    seeds are lost; and jbself asks for x - d but trains on x + d. For jbtop, the perturbation is
    the constant lambda_r in rounds where that is negative, and nothing is clipped. (With the seed
    images drawn at random here; their code's final training is the recipe's to say.)
    """

    name: str = "jacobian_augmentation"
    source: str = "dataset"
    perturb: Perturb = away_from_top
    copies: int = 1
    seeds: int = 100
    step: float = 0.1
    kappa: int = 0
    sigma: int = 3
    tau: int = 0
    rho: int = 0
    substitute: Recipe = Recipe(
        epochs=20, learning_rate=0.1, momentum=0.9, weight_decay=5e-4, decay_epochs=30
    )
    as_published_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bare(f"substitute of {self.title}", self.substitute)
        for name, least in (("copies", 1), ("seeds", 1), ("kappa", 0), ("sigma", 0), ("tau", 0)):
            if getattr(self, name) < least:
                raise InputError(
                    f"{name} of {self.title} is {getattr(self, name)}: give a whole number >= "
                    f"{least}"
                )
        self.examples(self.budget)
        spent = self.seeds + sum(r.new for r in self._plan())
        if spent < self.budget:
            raise InputError(
                f"rho is {self.rho}: so many rounds from {self.seeds} seeds spend {spent} of the "
                f"budget of {self.budget}, give budget={spent} or more rounds (0: what it takes)"
            )
        if self.as_published_code and self.perturb not in _PUBLISHED:
            raise InputError(
                f"as_published_code knows {', '.join(f.__name__ for f in _PUBLISHED)}, not "
                f"{self.perturb}: set it to False"
            )

    @property
    def title(self) -> str:
        """The attack in rows and figures: the k of top-k is the number of copies."""
        return self.name.format(k=self.copies)

    def examples(self, budget: int) -> int:
        """See `Attack.examples`."""
        if budget < self.seeds:
            raise InputError(
                f"budget is {budget}: {self.title} needs at least its {self.seeds} seeds, give a "
                "larger budget or fewer seeds"
            )
        if self.as_published_code and budget != self.budget:
            raise InputError(
                f"budgets holds {budget}: as published code, {self.title} overwrites what it asked "
                "first, so give no budget but its own"
            )
        return super().examples(budget)

    def _plan(self) -> list[_Round]:
        """The rounds, which depend on no answer."""
        rounds, count = [], self.seeds
        tau = self.tau or (_PUBLISHED_TAU if self.as_published_code else 0)
        while count < self.budget and (not self.rho or len(rounds) < self.rho):
            r = len(rounds)
            from_all = not (self.kappa and r >= self.sigma)
            base = count if from_all else min(self.kappa, count)
            new = min(base * self.copies, self.budget - count)
            flips = (round(r / tau) if self.as_published_code else r // tau) if tau else 0
            rounds.append(_Round(count, new, np.float32(self.step * (-1) ** flips), from_all))
            count += new
        return rounds

    @property
    def rounds(self) -> int:
        """Rounds of augmentation after the seeds."""
        return len(self._plan())

    @property
    def passes(self) -> float:
        """See `Attack.passes`: to train the substitutes, and to perturb images."""
        learnt = self.substitute.epochs * sum(r.known for r in self._plan())
        perturbed = sum(r.new for r in self._plan())
        return 3.0 * learnt + (17.0 if self.perturb is towards_next else 2.0) * perturbed

    def check(self, num_images: int, num_classes: int, image_shape: tuple[int, ...]) -> None:
        """See `Attack.check`: the seeds must be there, and classes for every copy."""
        del image_shape
        if self.seeds > num_images:
            raise InputError(
                f"seeds of {self.title} is {self.seeds}: there are {num_images} images to draw "
                f"from, give a number from 1 to {num_images}"
            )
        if self.perturb is towards_next and self.copies >= num_classes:
            raise InputError(
                f"{self.title} aims at {self.copies} classes besides the top one of {num_classes}: "
                f"give k from 1 to {num_classes - 1}"
            )

    def begin(self, world: World) -> Transfer:
        """The seeds, answered."""
        drawn = draw(world.key, len(world.images), self.seeds)
        answers, asked = world.ask(jnp.zeros((), jnp.int32), drawn)
        seeds = world.images[drawn].astype(jnp.float32)
        x = jnp.zeros((self.budget, *seeds.shape[1:]))
        targets = jnp.full((self.budget, world.num_classes), -jnp.inf)
        return Transfer(
            x.at[: self.seeds].set(seeds),
            targets.at[: self.seeds].set(self.targets(answers)),
            asked,
        )

    def proceed(self, r: Array, transfer: Transfer, world: World) -> Transfer:
        """Train a substitute on all that was answered, and ask for new images around it."""
        plan = self._plan()
        now = _Round(*(jnp.asarray(np.array(column))[r] for column in zip(*plan, strict=True)))
        train_key, base_key = jax.random.split(jax.random.fold_in(stream(world.key, "rounds"), r))
        known = now.known  # not `asked`: a count that all cells share keeps their loops in step
        params = train(
            world.classifier,
            self.substitute,
            train_key,
            lambda i: transfer.take(world.images, i),
            self.budget,
            known,
        )

        def logits(z: Array) -> Array:
            return world.classifier.apply(params, world.family.pixels(z))

        bases = order(base_key, 0, self.budget, known)
        if self.as_published_code:
            bases = jnp.where(now.from_all, jnp.arange(self.budget), bases)

        size = min(BLOCK, max(each.new for each in plan))  # of a block, all of which is worked out

        def block(b: Array, so_far: Transfer) -> Transfer:
            j = b * size + jnp.arange(size)
            wanted = j < now.new
            base = bases[j // self.copies % self.budget]
            z = world.family.preprocess(so_far.x[base])
            delta = map_within(
                lambda rows: self.perturb(logits, *rows, now.step),
                (z, so_far.targets[base], j % self.copies),
                MEMORY,
            )
            asking, training = self._images(z, delta, now.step, world.family)
            answers, asked = world.ask(so_far.asked, asking, wanted)
            made = training, self.targets(answers)

            def write(into: Transfer, at: Array, mask: Array) -> Transfer:
                at = jnp.where(mask, at, self.budget)  # which is dropped
                x, targets = (
                    a.at[at].set(new, mode="drop") for a, new in zip(into[:2], made, strict=True)
                )
                return Transfer(x, targets, asked)

            so_far = write(so_far, known + j, wanted)
            if self.as_published_code and self.perturb is not towards_next:
                so_far = write(so_far, base, wanted & now.from_all)
            return so_far

        return jax.lax.fori_loop(0, -(-now.new // size), block, transfer)

    def _images(self, z: Array, delta: Array, step: Array, family: Family) -> tuple[Array, Array]:
        """The new images, in pixels: as they are sent, and as they are trained on."""
        if not self.as_published_code:
            new = jnp.clip(family.pixels(z + delta), 0, 255)
            return new, new
        if self.perturb is towards_next:
            # In a round of negative step the bounds cross, and the upper one wins.
            new = family.pixels(z + jnp.clip(delta, -step, step))
            return new, new
        sense = -1 if self.perturb is towards_top else 1
        delta = jnp.clip(z + sense * delta, 0, 1) - z
        return family.pixels(z + sense * delta), family.pixels(z + delta)

    def describe(self) -> dict[str, Any]:
        """The fields of a row that say which attack this was."""
        reading = "as published code" if self.as_published_code else ""
        return {
            **super().describe(),
            "variant": ", ".join(filter(None, (reading, self.variant))),
            "seed_images": self.seeds,
            "as_published_code": self.as_published_code,
        }


def jbda(**settings: Any) -> JacobianAugmentation:
    """Steps away from the victim's top class (Papernot et al., 2017), as the paper's `jbda`."""
    return JacobianAugmentation(name="jbda", perturb=away_from_top, **settings)


def jbself(**settings: Any) -> JacobianAugmentation:
    """Steps towards the victim's top class (Juuti et al., 2019), as the paper's `jbself`."""
    return JacobianAugmentation(name="jbself", perturb=towards_top, **settings)


def jbtop(k: int = 3, **settings: Any) -> JacobianAugmentation:
    """Steps towards each of the k next classes (Juuti et al., 2019), the paper's `jbtop3`."""
    return JacobianAugmentation(name="jbtop{k}", perturb=towards_next, copies=k, **settings)
