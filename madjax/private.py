"""DP-SGD: training with differential privacy, through jax-privacy.

Each step draws every example independently, clips the gradient of each, sums, and adds noise:

    g = (1 / B) (sum_i clip(g_i, C) + N(0, (C sigma)^2 I)),    clip(g, C) = g min(1, C / |g|)

(Abadi et al. 2016, https://arxiv.org/abs/1607.00133, algorithm 1); B is the expected batch, C the
clipping norm and sigma the noise multiplier.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from madjax import backend
from madjax.errors import InputError
from madjax.models import Classifier
from madjax.recipe import Lesson, Recipe, Step, augmented, cross_entropy, trainable
from madjax.sharing import shared_out
from madjax.streams import stream

Array = jax.Array

# jax-privacy is imported where it is needed: it takes seconds, and most runs do without.


@dataclass(frozen=True)
class PrivateGradient:
    """The noised sum of clipped gradients of Poisson-sampled batches, over the expected batch.

    As the `gradient` of a `madjax.Recipe` it makes `madjax.fit` DP-SGD. An epoch is
    ceil(N / batch_size) steps, each of which draws every example with probability batch_size / N,
    as the accounting supposes (`accounted_epsilon`): a batch is as large as it comes, nothing of it
    is cut, and a step that draws no example adds noise alone. The loss of a step is over the
    expected batch too. Losses and accuracies are not private, and who knows the key knows the draws
    and the noise.

    noise_multiplier: sigma, >= 0; 0 clips only. clip: the L2 norm C, above 0 and finite. Entries of
    an example's gradient that are not finite count as 0. microbatch: gradients held at once, which
    changes rounding alone; None: 1 on a CPU, where a gradient that stays in the cache is clipped
    several times as fast as 50 beside each other, and 50 elsewhere.
    """

    noise_multiplier: float
    clip: float = 1.0
    microbatch: int | None = None

    def __post_init__(self) -> None:
        for name, good, needed in (
            ("noise_multiplier", 0 <= self.noise_multiplier < math.inf, "a number >= 0"),
            ("clip", 0 < self.clip < math.inf, "a number above 0"),
            ("microbatch", self.microbatch is None or self.microbatch >= 1, "a whole number >= 1"),
        ):
            if not good:
                raise InputError(f"{name} of DP-SGD is {getattr(self, name)}: give {needed}")

    def check(self, classifier: Classifier, recipe: Recipe, num_examples: int) -> None:
        """Refuse what cannot be trained privately.

        Raises:
            InputError: a network with BatchNorm, whose statistics mix the examples of a batch, or
                with any other state; a batch larger than the data.
        """
        if set(jax.eval_shape(classifier.init, jax.random.key(0))) != {"params"}:
            raise InputError(
                f"DP-SGD cannot train {type(classifier.module).__name__}: BatchNorm, or other "
                "state, mixes the examples of a batch; choose a network without it"
            )
        if recipe.batch_size > num_examples:
            raise InputError(
                f"batch_size is {recipe.batch_size}: DP-SGD draws that many of {num_examples} "
                "examples, give at most all"
            )

    def __call__(self, classifier: Classifier, lesson: Lesson) -> Step:
        """See `madjax.recipe.Recipe.gradient`."""
        from jax_privacy import clipped_grad, noise_addition

        n, expected = lesson.num_examples, lesson.batch_size
        size = self.microbatch or (1 if backend.platform() == "cpu" else 50)
        key = stream(jax.random.fold_in(lesson.key, lesson.epoch), "private steps")

        def loss(params: Any, x: Array, target: Array, key: Array) -> Array:
            x = augmented(lesson.augment, key[0], x)
            logits, _ = classifier.learn(params, x, key[0])
            return cross_entropy(logits, target).sum()

        clipped = clipped_grad(
            loss,
            l2_clip_norm=self.clip,
            batch_argnums=(1, 2, 3),
            return_values=True,
        )

        def step(params: Any, i: Array) -> tuple[Array, Any, Any]:
            draw_key, learn_key, noise_key = jax.random.split(jax.random.fold_in(key, i), 3)
            drawn = _bernoulli(draw_key, expected, lesson.size, n) & (jnp.arange(n) < lesson.size)
            count = drawn.sum()
            (chosen,) = jnp.nonzero(drawn, size=-(-n // size) * size, fill_value=0)

            def add(at: Array, sums: tuple[Any, Array]) -> tuple[Any, Array]:
                places = at * size + jnp.arange(size)
                x, targets = shared_out(lesson.take(chosen[places]))
                keys = jax.vmap(partial(jax.random.fold_in, learn_key))(chosen[places])
                padding = places >= count
                gradient, seen = clipped(params, x, targets, keys, is_padding_example=padding)
                losses = jnp.where(places < count, seen.values, 0).sum()
                return jax.tree.map(jnp.add, sums, (gradient, losses))

            zeros = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())
            total, losses = jax.lax.fori_loop(0, -(-count // size), add, zeros)
            noise = noise_addition.gaussian_privatizer(
                stddev=self.clip * self.noise_multiplier, prng_key=noise_key
            )
            total, _ = noise.update(total, noise.init(params))
            mean = jax.tree.map(lambda g: g / expected, trainable(total))
            return losses / expected, mean, params

        return step


def _bernoulli(key: Array, expected: int, size: Array | int, n: int) -> Array:
    """Whether each of n examples is drawn, with probability expected / size: bool [n].

    Of 32 random bits, as a uniform float32 has 23: too few for one example of a million.
    """
    rate = jnp.float32(expected) / size
    threshold = (jnp.minimum(rate, 1 - 2**-24) * 2.0**32).astype(jnp.uint32)
    return (jax.random.bits(key, (n,), jnp.uint32) < threshold) | (rate >= 1)


def accounted_epsilon(
    noise_multiplier: float, *, num_examples: int, batch_size: int, epochs: int, delta: float
) -> float:
    """Epsilon of DP-SGD's (epsilon, delta) guarantee: PLD accounting, adding or removing one.

    For any two data sets that differ by one example, and any set S of networks,

        P(network of data in S) <= e^epsilon P(network of other data in S) + delta

    (Dwork and Roth 2014, definition 2.4), for epochs * ceil(num_examples / batch_size) steps of the
    Poisson-sampled Gaussian mechanism, by their privacy loss distribution (Koskela et al. 2020,
    https://arxiv.org/abs/1906.03049), rounded up. It depends on the noise multiplier alone, not on
    the clipping norm. Infinite without noise and, as a bound, below a noise of 0.001; 0 where delta
    alone covers the loss. Privacy lost to choices made by the accuracy on the test set, or to
    publishing losses, is not in it.

    Raises:
        InputError: values out of range.
    """
    for name, value, good in (
        ("noise_multiplier", noise_multiplier, 0 <= noise_multiplier < math.inf),
        ("delta", delta, 0 < delta < 1),
        ("batch_size", batch_size, 0 < batch_size <= num_examples),
        ("epochs", epochs, epochs > 0),
    ):
        if not good:
            raise InputError(
                f"{name} is {value}: DP-SGD on {num_examples} examples takes a noise multiplier "
                ">= 0, delta between 0 and 1, a batch from 1 to all examples, and epochs >= 1"
            )
    if noise_multiplier < 0.001:
        return math.inf
    from jax_privacy import accounting

    # Losses grow as 1 / noise^2: with them the grid's step, else a small noise takes all memory.
    step = 1e-4 * max(1, 0.5 / noise_multiplier) ** 2
    accountant = accounting.DpsgdTrainingAccountant(
        accounting.PldAccountantConfig(value_discretization_interval=step)
    )
    params = accounting.DpParams(
        noise_multipliers=float(noise_multiplier),
        num_samples=num_examples,
        delta=delta,
        batch_size=batch_size,
    )
    return float(accountant.compute_epsilon(epochs * -(-num_examples // batch_size), params))
