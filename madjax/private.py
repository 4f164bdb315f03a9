"""DP-SGD: training with differential privacy, through jax-privacy.

Each step draws every example independently, clips the gradient of each, sums, and adds noise:

    g = (1 / B) (sum_i clip(g_i, C) + N(0, (C sigma)^2 I)),    clip(g, C) = g min(1, C / |g|)

(Abadi et al. 2016, https://arxiv.org/abs/1607.00133, algorithm 1); B is the expected batch, C the
clipping norm and sigma the noise multiplier.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madjax.errors import InputError
from madjax.models import Classifier
from madjax.train import Recipe, State, cross_entropy, judge, start

Array = jax.Array

# jax-privacy is imported where it is needed: it takes seconds, and most runs do without.


def fit(
    classifier: Classifier,
    recipe: Recipe,
    key: Array,
    data: tuple[Array, Array],
    test: tuple[Array, Array],
    *,
    noise_multiplier: float,
    clip: float = 1.0,
    microbatch: int | None = None,
    state: State | None = None,
    after_epoch: Callable[[State], None] = lambda state: None,
) -> State:
    """Train by DP-SGD; the arguments of `madjax.fit`, whose State this goes on from and returns.

    data = (images uint8 [N, H, W, C], labels [N]). An epoch is ceil(N / recipe.batch_size) steps,
    each of which draws every example with probability recipe.batch_size / N (Poisson sampling, as
    the accounting supposes). noise_multiplier 0 clips only. clip: the L2 norm C, finite. The loss
    is the mean over the examples drawn in an epoch; loss and accuracy are not private,
    and who knows the key knows the draws and the noise.

    microbatch: gradients held at once, which changes rounding alone; None: 1 on a CPU, where a
    gradient that stays in the cache is clipped several times as fast as 50 beside each other, and
    50 elsewhere.

    Raises:
        InputError: a network with BatchNorm, whose statistics mix the examples of a batch, or any
            other state; labels that do not fit the images or the network; a batch larger than the
            data; noise_multiplier, clip or microbatch out of range.
    """
    from jax_privacy import batch_selection

    if microbatch is None:
        microbatch = 1 if jax.default_backend() == "cpu" else 50
    for name, value, good, needed in (
        ("noise_multiplier", noise_multiplier, 0 <= noise_multiplier < math.inf, "a number >= 0"),
        ("clip", clip, 0 < clip < math.inf, "a number above 0"),
        ("microbatch", microbatch, microbatch >= 1, "a whole number >= 1"),
    ):
        if not good:
            raise InputError(f"{name} is {value}: give {needed}")
    images, labels = map(jnp.asarray, data)
    check(classifier, recipe, len(images))
    _check_data(classifier, images, labels)
    n = len(images)
    if state is None:
        state = _start(classifier, recipe, n, key)
    x_test, labels_test = map(jnp.asarray, test)
    rate = recipe.batch_size / n
    steps = -(-n // recipe.batch_size)
    # A batch above the capacity takes twice that, and a compilation more: none is ever cut, which
    # would be another mechanism than the one that is accounted for.
    most = recipe.batch_size + 8 * math.sqrt(recipe.batch_size * (1 - rate))
    capacity = microbatch * math.ceil(most / microbatch)
    sampling = batch_selection.CyclicPoissonSampling(sampling_prob=rate, iterations=steps)
    for e in range(int(state.epoch), recipe.epochs):
        # A function of the key and the epoch alone, so that a resumed run draws as one in one go.
        rng = np.random.default_rng([*np.asarray(state.key).tolist(), e])
        epoch_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), e)
        params, opt_state, total, count = state.params, state.opt_state, 0.0, 0
        for i, drawn in enumerate(sampling.batch_iterator(n, rng=rng)):
            size = capacity * max(-(-len(drawn) // capacity), 1)
            # Ordered so that whole microbatches are padding, which are skipped.
            (padded,) = batch_selection.split_and_pad_global_batch(drawn, size, microbatch)
            params, opt_state, loss = _step(
                classifier,
                recipe,
                n,
                clip,
                microbatch,
                (params, opt_state),
                (images, labels),
                padded.astype(np.int32),
                jax.random.fold_in(epoch_key, i),
                jnp.float32(noise_multiplier),
            )
            total, count = total + loss, count + len(drawn)
        state = state._replace(
            params=params,
            opt_state=opt_state,
            epoch=state.epoch + 1,
            loss=state.loss.at[e].set(total / max(count, 1)),
        )
        state = _judge(classifier, state, x_test, labels_test)
        after_epoch(jax.block_until_ready(state))
    return state


def check(classifier: Classifier, recipe: Recipe, num_examples: int) -> None:
    """Refuse what cannot be trained privately.

    Raises:
        InputError: a network with BatchNorm or any other state; a batch larger than the data.
    """
    if set(jax.eval_shape(classifier.init, jax.random.key(0))) != {"params"}:
        raise InputError(
            f"DP-SGD cannot train {type(classifier.module).__name__}: BatchNorm, or other state, "
            "mixes the examples of a batch; choose a network without it"
        )
    if recipe.batch_size > num_examples:
        raise InputError(
            f"batch_size is {recipe.batch_size}: DP-SGD draws that many of {num_examples} "
            "examples, give at most all"
        )


def _check_data(classifier: Classifier, images: Array, labels: Array) -> None:
    """Refuse labels that fit neither the images nor the network."""
    n = len(images)
    if labels.shape != (n,):
        raise InputError(f"{n} images have labels of shape {labels.shape}: give labels [{n}]")
    key = jax.random.key(0)
    classes = jax.eval_shape(lambda: classifier.apply(classifier.init(key), images[:1])).shape[-1]
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(
            f"labels run from {labels.min()} to {labels.max()}: the network has {classes} classes, "
            "from 0"
        )


_start = jax.jit(start, static_argnums=(0, 1, 2))
_judge = jax.jit(judge, static_argnums=0)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _step(
    classifier: Classifier,
    recipe: Recipe,
    n: int,
    clip: float,
    microbatch: int,
    network: tuple[Any, Any],
    data: tuple[Array, Array],
    drawn: Array,
    key: Array,
    noise_multiplier: Array,
) -> tuple[Any, Any, Array]:
    """One step on the examples `drawn` (-1: none): parameters, optimiser and the sum of losses."""
    from jax_privacy import clipped_grad, noise_addition

    params, opt_state = network
    noise_key, learn_key = jax.random.split(key)

    def loss(params: Any, x: Array, label: Array, key: Array) -> Array:
        logits, _ = classifier.learn(params, x, key)
        return cross_entropy(logits, jax.nn.one_hot(label, logits.shape[-1])).sum()

    real = drawn >= 0
    gradients = clipped_grad(
        loss,
        l2_clip_norm=clip,
        batch_argnums=(1, 2),
        return_values=True,
        microbatch_size=microbatch,
        prng_argnum=3,
    )
    x, labels = (a[drawn] for a in data)  # -1 reads the last example: its gradient is made zero
    total, seen = gradients(params, x, labels, learn_key, is_padding_example=~real)
    noise = noise_addition.gaussian_privatizer(stddev=clip * noise_multiplier, prng_key=noise_key)
    total, _ = noise.update(total, noise.init(params))
    mean = jax.tree.map(lambda g: g / recipe.batch_size, total)
    updates, opt_state = recipe.transformation(n).update(mean, opt_state, params)
    return (
        optax.apply_updates(params, updates),
        opt_state,
        jnp.where(real, seen.values, 0).sum(),
    )


def accounted_epsilon(
    noise_multiplier: float, *, num_examples: int, batch_size: int, epochs: int, delta: float
) -> float:
    """Epsilon of the (epsilon, delta) guarantee of `fit`: PLD accounting, adding or removing one.

    For any two data sets that differ by one example, and any set S of networks,

        P(fit(data) in S) <= e^epsilon P(fit(other) in S) + delta

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
