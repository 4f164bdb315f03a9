"""A constraint, a distance and an objective that madjax does not have: an extension in one file.

Command: python experiments/new_constraint.py, with --smoke on fewer queries.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp

import madjax


def keep_odd(y_tilde, y, *, most):
    """The probability of an odd digit changes by at most `most`: what our users act on."""
    return jnp.abs((y_tilde - y)[1::2].sum()) - most


def hellinger(y_tilde, y):
    """Distance between the square roots of probabilities, in [0, 1]."""
    return jnp.sqrt(jnp.square(jnp.sqrt(y_tilde) - jnp.sqrt(y)).sum() / 2 + 1e-12)


def far_and_long(y_tilde, y, gram):
    """H times |G'y~|: the attacker's step is to be wrong and long."""
    return madjax.deviation(y_tilde, y, gram) * jnp.sqrt(y_tilde @ gram @ y_tilde)


data = madjax.open_dataset("embedded:mnist")
network = madjax.Classifier(madjax.LeNet(10), data.family.preprocess, data.image_shape)
x = data.x_test[: 20 if "--smoke" in sys.argv else 200]
y = jax.nn.softmax(40 * network.apply(network.init(jax.random.key(0)), x))  # a confident victim
gram = madjax.gram(network.apply, network.init(jax.random.key(1)), x)
for options in ({}, {"objective": far_and_long}, {"constraints": (partial(keep_odd, most=0.1),)}):
    solver = madjax.Ascend(hellinger, **options)
    y_tilde, info = jax.jit(jax.vmap(partial(solver.report, epsilon=0.5)))(y, gram)
    degrees, odd = jax.vmap(madjax.angle)(y_tilde, y, gram), abs((y_tilde - y)[:, 1::2].sum(1))
    print(f"{degrees.mean():.1f} degrees, length {info.length.mean():.2f}, odd {odd.max():.3f}")
