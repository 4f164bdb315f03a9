r"""The Gram matrix M = G G' of a surrogate's log-likelihood gradients, [K, K] for every query.

G = d log F_sur(x; w) / d w is [K, D] (Eq. 5). MAD needs G only through M, the empirical tangent
kernel of the K log-likelihoods at x, and M can be had without forming G. Three ways, one quantity:

- `jacrev`, the reference: per-example Jacobians by reverse-mode differentiation, then G G'. Any
  model; B K D numbers in memory.
- `structured`: one forward pass, K - 1 cotangents pulled back through the activations only, and for
  every layer a contraction of its inputs with its output cotangents (`madjax.layers`). A dense
  layer with input a and output cotangents d_k adds (d_k . d_l) |a|^2; a convolution is a dense
  layer applied at many positions. Memory does not grow with D.
- `layers="last"`, what the authors' code takes for G: the weight of the last dense layer alone.
  G_k = (e_k - p) (x) h with p the surrogate's posterior and h the input of that layer, so
  M = |h|^2 (I - 1 p')(I - 1 p')', a closed form with no backward pass.
"""

import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from madjax.batching import map_chunks
from madjax.errors import InputError
from madjax.structured import GramShare, find_head, structured_all, structured_last
from madjax.taps import Apply, Params, Survey, check_model, survey, weights

Array = jax.Array


def gram(
    apply: Apply,
    params: Params,
    x: Array,
    *,
    layers: str = "all",
    method: str = "auto",
    chunk: int | None = None,
    memory: int | None = None,
) -> Array:
    """The Gram matrix of the surrogate's log-likelihood gradients, for every query.

    M = G G' with G = d log F_sur(x; w) / d w [K, D] (Eq. 5), F_sur = softmax(apply(params, x)).

    Args:
        apply: apply(params, x [B, ...]) -> logits [B, K]; every row is a function of its own x.
            Programs are compiled once for each function: give the same one at every call, and not
            a new lambda.
        params: the surrogate's; w is `params["params"]` where there is that key, the `nnx.Param`s
            of an `nnx.State`, else all of them. What is no float is a constant.
        x: the queries [B, ...], as apply takes them.
        layers: "all" parameters (the paper); the kernel of the "last" dense layer (the authors'
            code), behind which there may be what has no weights, such as a temperature; or
            "identity", M = I, the paper's ablation without a Jacobian.
        method: "structured", for Flax linen models of Dense, DenseGeneral (so attention), Conv,
            Embed, BatchNorm with fixed statistics, LayerNorm, RMSNorm, GroupNorm and InstanceNorm,
            each parameter read by one of them once, and not inside vmap or a loop; "jacrev", any
            model; or "auto": structured for every parameter that it explains and jacrev for the
            others, with a warning where those are more than a tenth of D. `coverage` says which
            are which.
        chunk: queries at a time; by default as many as the caches or the accelerator like.
        memory: bytes of intermediate results, `MEMORY` by default. Queries, and where one query is
            too much classes, go in chunks that fit.

    Returns:
        M, float32 [B, K, K], accumulated in float32 whatever the model's dtype. It is symmetric
        and positive semi-definite up to rounding, and M p = 0 at the surrogate's posterior p.

    Edge cases:
        no query: M is [0, K, K].
        one class: M is 0; the likelihood is always 1.
        a surrogate that is certain of a class: that row of M is 0, and the others are finite.
        a parameter that no logit depends on: it adds 0.
        a query with its neighbours exchanged: its M does not change.

    Raises:
        InputError: an unknown layers or method; a model that the method cannot handle, or that
            returns no array of logits; a BatchNorm in training mode or a Dropout that drops, by
            any method; memory that is too small for one query.

    Example:
        >>> import jax, madjax
        >>> x = jax.random.normal(jax.random.key(0), (2, 3))
        >>> w = jax.random.normal(jax.random.key(1), (3, 5))
        >>> madjax.gram(lambda w, x: x @ w, w, x, method="jacrev").shape
        (2, 5, 5)
    """
    check_layers(layers)
    _check_known("method", method, _METHODS)
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk is {chunk}: give a number of queries >= 1")
    return _gram(apply, layers, method, chunk, memory, params, x)


def check_layers(layers: str) -> None:
    """Refuse a choice of layers that `gram` does not know."""
    _check_known("layers", layers, {*_LAYERS, _IDENTITY})


def coverage(apply: Apply, params: Params, x: Array) -> dict[str, str]:
    """How `gram(..., layers="all")` takes each parameter: "structured", or why it takes jacrev.

    Names are paths such as "Conv_0/kernel". Nothing is computed; x is as for `gram`.

    Raises:
        InputError: a BatchNorm in training mode.
    """
    found = survey(apply, params, x)
    return {
        name: found.unexplained.get(at, "structured")
        for at, name in enumerate(weights(params).names)
    }


def _check_known(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        names = ", ".join(map(repr, sorted(known)))
        raise InputError(f"{name} is {value!r}: choose one of {names}")


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _gram(
    apply: Apply,
    layers: str,
    method: str,
    chunk: int | None,
    memory: int | None,
    params: Params,
    x: Array,
) -> Array:
    with jax.default_matmul_precision("highest"):
        one = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
        k = check_model(apply, params, one)
        if layers == _IDENTITY:
            return jnp.broadcast_to(jnp.eye(k, dtype=jnp.float32), (x.shape[0], k, k))
        if not x.shape[0] or k < 2:  # the likelihood of one class is always 1
            return jnp.zeros((x.shape[0], k, k), jnp.float32)
        m = jnp.zeros((), jnp.float32)
        for share in _METHODS[method](apply, _LAYERS[layers], params, x):
            queries, classes = share.plan(chunk, memory)
            m += map_chunks(partial(share.run, classes=classes), x, queries)
    return (m + m.mT) / 2


# --- the reference --------------------------------------------------------------------------------


def _by_jacrev(apply: Apply, chosen: Sequence[int], params: Params, x: Array) -> GramShare:
    """Per-example Jacobians with respect to the chosen leaves of the weights, then G G'."""
    everything = weights(params)

    def one(example: Array) -> Array:
        def log_likelihoods(leaves: list[Array]) -> Array:
            new = dict(zip(chosen, leaves, strict=True))
            all_leaves = [new.get(at, leaf) for at, leaf in enumerate(everything.leaves)]
            logits = apply(everything.rebuild(all_leaves), example[None])[0]
            return jax.nn.log_softmax(logits.astype(jnp.float32))

        rows = jax.tree.leaves(jax.jacrev(log_likelihoods)([everything.leaves[i] for i in chosen]))
        rows = [g.reshape(g.shape[0], -1).astype(jnp.float32) for g in rows]
        return sum(g @ g.T for g in rows)

    def run(x: Array, classes: int) -> Array:
        del classes
        return jax.vmap(one)(x)

    k = jax.eval_shape(apply, params, x[:1]).shape[-1]
    size = sum(everything.leaves[at].size for at in chosen)
    return GramShare(run, k, 0, 0, 2 * size, 0)


def _every_leaf(apply: Apply, params: Params, x: Array) -> Sequence[int]:
    del apply, x
    return range(len(weights(params).leaves))


def _last_kernel(apply: Apply, params: Params, x: Array) -> Sequence[int]:
    head = find_head(apply, survey(apply, params, x), params, x)
    names = weights(params).names
    position = [at for at in head.layer_id if at is not None and names[at].endswith("kernel")]
    if len(position) != 1:
        raise InputError(
            "layers='last' with method='jacrev' needs the head's kernel among params as it is, "
            "neither cast nor inside another transformation: use method='structured'"
        )
    return position


# --- the choice -----------------------------------------------------------------------------------


class _Layers(NamedTuple):
    """A choice of parameters: how each method serves it."""

    structured: Callable[[Apply, Survey, Params, Array], GramShare]
    leaves: Callable[[Apply, Params, Array], Sequence[int]]
    needs_all: bool = False


def _structured(apply: Apply, layers: _Layers, params: Params, x: Array) -> list[GramShare]:
    found = survey(apply, params, x)
    if layers.needs_all and found.unexplained:
        raise InputError(f"{_first(found, params)}; use method='auto' or 'jacrev'")
    return [layers.structured(apply, found, params, x)]


def _jacrev(apply: Apply, layers: _Layers, params: Params, x: Array) -> list[GramShare]:
    return [_by_jacrev(apply, layers.leaves(apply, params, x), params, x)]


def _auto(apply: Apply, layers: _Layers, params: Params, x: Array) -> list[GramShare]:
    found = survey(apply, params, x)
    if not (layers.needs_all and found.unexplained):
        return [layers.structured(apply, found, params, x)]
    leaves = weights(params).leaves
    part = sum(leaves[at].size for at in found.unexplained)
    whole = sum(leaf.size for leaf in leaves)
    if 10 * part > whole:
        warnings.warn(
            f"gram: {part} of {whole} parameters go by jacrev, slower: {_first(found, params)}",
            stacklevel=2,
        )
    ways = [_by_jacrev(apply, sorted(found.unexplained), params, x)]
    return [layers.structured(apply, found, params, x), *ways] if found.taps else ways


def _first(found: Survey, params: Params) -> str:
    """The first parameter that no tap explains, and why."""
    at = min(found.unexplained)
    return f"parameter {weights(params).names[at]}: {found.unexplained[at]}"


_LAYERS = {
    "all": _Layers(structured_all, _every_leaf, needs_all=True),
    "last": _Layers(structured_last, _last_kernel),
}
_IDENTITY = "identity"
_METHODS = {"auto": _auto, "structured": _structured, "jacrev": _jacrev}
