"""A constraint and a distance that madjax does not have: an extension in one file.

Claim: a new constraint is a function; nothing in madjax is edited, and the answers obey it.
Command: python experiments/new_constraint.py
Cost: under a minute; seconds with --smoke, on fewer queries.
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


data = madjax.open_dataset("embedded:mnist")
network = madjax.Classifier(madjax.LeNet(10), data.family.preprocess, data.image_shape)
x = data.x_test[: 20 if "--smoke" in sys.argv else 200]
y = jax.nn.softmax(40 * network.apply(network.init(jax.random.key(0)), x))  # a confident victim
gram = madjax.gram(network.apply, network.init(jax.random.key(1)), x)
for constraints in ((), (partial(keep_odd, most=0.1),)):
    solver = madjax.Ascend(hellinger, constraints)
    y_tilde = jax.jit(jax.vmap(partial(madjax.solve, epsilon=0.5, solver=solver)))(y, gram)
    degrees = jax.vmap(madjax.angle)(y_tilde, y, gram).mean()
    moved = jnp.abs((y_tilde - y)[:, 1::2].sum(1)).max()
    print(f"{len(constraints)} constraints: {degrees:.1f} degrees, odd digits {moved:.3f}")
