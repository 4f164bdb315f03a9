"""What a defence costs its honest users: accuracies and distances over a test set."""

import jax
import jax.numpy as jnp

from madjax.constraints import entropy, kl, l1, l2
from madjax.train import percent

Array = jax.Array


def utility(y: Array, y_tilde: Array, labels: Array) -> dict[str, Array]:
    """Utility of the defended answers y_tilde [N, K] to queries with posteriors y and true labels.

    Scalars: `defender_accuracy` (percent, top class of y~ = label), `fidelity` (percent, top class
    of y~ = that of y), and mean and population standard deviation over the N queries of the
    distances `l1`, `l2` and `kl` (nats; infinite as soon as one answer is), the largest `l1`, mean
    and standard deviation of the answers' `entropy` (bits, at most log2 K), and the
    `undefended_share` of queries whose answer is y itself, in [0, 1].
    """
    top = y_tilde.argmax(-1)
    result = {
        "defender_accuracy": percent(top == labels),
        "fidelity": percent(top == y.argmax(-1)),
    }
    for distance in (l1, l2, kl):
        values = jax.vmap(distance)(y_tilde, y)
        finite = jnp.all(jnp.isfinite(values))
        spread = jnp.where(finite, jnp.where(finite, values, 0).std(), jnp.inf)
        result[f"{distance.__name__}_mean"] = values.mean()
        result[f"{distance.__name__}_std"] = spread
    result["undefended_share"] = percent(jnp.all(y_tilde == y, axis=-1)) / 100
    result["l1_max"] = jax.vmap(l1)(y_tilde, y).max()
    entropies = jax.vmap(entropy)(y_tilde)
    result |= {"entropy_mean": entropies.mean(), "entropy_std": entropies.std()}
    return result
