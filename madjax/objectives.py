"""What else an answer may maximise in place of H: functions (y_tilde, y, gram) -> scalar.

Given to `madjax.solve`, `madjax.perturb` and `madjax.MAD` as `objective=`. The line search takes
its target from the oracle, whatever the objective is: `oracle=madjax.extreme_at_budget` compares
vertices by it, and `method="ascend"` maximises it over all answers.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from madjax.mad import defined

Array = jax.Array


def unnormalised(y_tilde: Array, y: Array, gram: Array) -> Array:
    """|G'(y~ - y)|^2, Eq. 4 without the two norms, as the authors' code has it by default."""
    moved = y_tilde - y
    return jnp.matmul(moved, jnp.matmul(gram, moved, precision="highest"), precision="highest")


def opposition(y_tilde: Array, y: Array, gram: Array) -> Array:
    """-<G'y~, G'y>: how far the attacker's step goes against the true one, not its angle alone."""
    return -jnp.matmul(y_tilde, jnp.matmul(gram, y, precision="highest"), precision="highest")


def towards(y_tilde: Array, y: Array, gram: Array, *, target: Sequence[float]) -> Array:
    """Cosine between the attacker's step G'y~ and G't: what it would learn from the target answer.

    target: t, [K], any direction; a one-hot t teaches that class. `functools.partial` sets it. 0
    where either gradient vanishes.
    """
    del y
    t = jnp.asarray(target, y_tilde.dtype)
    along = partial(jnp.matmul, precision="highest")
    known = defined(y_tilde, gram) & defined(t, gram)
    size = along(t, along(gram, t)) * along(y_tilde, along(gram, y_tilde))
    cosine = along(y_tilde, along(gram, t)) / jnp.sqrt(jnp.where(known, size, 1))
    return jnp.where(known, jnp.clip(cosine, -1, 1), 0)
