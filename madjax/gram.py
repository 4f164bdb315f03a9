r"""The Gram matrix M = G G' of a surrogate's log-likelihood gradients, [K, K] for every query.

G = d log F_sur(x; w) / d w is [K, D] (Eq. 5). MAD needs G only through M, the empirical tangent
kernel of the K log-likelihoods at x, and M can be had without forming G. Three ways, one quantity:

- `jacrev`, the reference: per-example Jacobians by reverse-mode differentiation, then G G'. Any
  model; B K D numbers in memory.
- `structured`: one forward pass, K cotangents pulled back through the activations only, and for
  every layer a contraction of its inputs with its output cotangents. A dense layer with input a
  and output cotangents d_k adds (d_k . d_l) |a|^2; a convolution is a dense layer applied at many
  positions. Memory does not grow with D.
- `layers="last"`, what the authors' code takes for G: the weight of the last dense layer alone.
  G_k = (e_k - p) (x) h with p the surrogate's posterior and h the input of that layer, so
  M = |h|^2 (I - 1 p')(I - 1 p')', a closed form with no backward pass.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from madjax.batching import map_chunks
from madjax.errors import InputError
from madjax.taps import Apply, Call, Params, Survey, record, split_weights, survey

Array = jax.Array


def _chunk_bytes() -> int:
    """What one chunk of queries may hold in intermediate results when no chunk size is given.

    A CPU is fastest while a chunk stays near its caches; an accelerator wants to be filled.
    """
    return 2**25 if jax.default_backend() == "cpu" else 2**30


def gram(
    apply: Apply,
    params: Params,
    x: Array,
    *,
    layers: str = "all",
    method: str = "auto",
    chunk: int | None = None,
) -> Array:
    """M = G G' with G = d log softmax(apply(params, x)) / d w (Eq. 5), for every query.

    apply(params, x[B, ...]) -> logits [B, K], every row a function of its own x alone; the result
    is float32 [B, K, K], symmetric and positive semi-definite up to rounding, with M p = 0 at the
    surrogate's posterior p. `w` is `params["params"]` where params is a mapping with that key (a
    Flax variable collection), all of params otherwise.

    layers: "all" parameters (the paper) or the kernel of the "last" dense layer (the authors'
    code). method: "structured" (Flax linen models of dense and convolution layers), "jacrev" (any
    model), or "auto": structured where it covers every parameter exactly once, otherwise jacrev
    with a warning that says why. chunk: queries handled at a time, which bounds the memory;
    chosen from the sizes of the intermediate results when None.

    Raises:
        InputError: an unknown layers or method; a model that the method cannot handle.
    """
    check_layers(layers)
    _check_known("method", method, _METHODS)
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk is {chunk}: give a number of queries >= 1")
    return _gram(apply, layers, method, chunk, params, x)


def check_layers(layers: str) -> None:
    """Refuse a choice of layers that `gram` does not know."""
    _check_known("layers", layers, _LAYERS)


def _check_known(name: str, value: str, known: dict[str, Any]) -> None:
    if value not in known:
        raise InputError(f"{name} is {value!r}: choose one of {', '.join(map(repr, known))}")


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _gram(
    apply: Apply, layers: str, method: str, chunk: int | None, params: Params, x: Array
) -> Array:
    with jax.default_matmul_precision("highest"):
        if not x.shape[0]:
            one = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
            k = jax.eval_shape(apply, params, one).shape[-1]
            return jnp.zeros((0, k, k), jnp.float32)
        one_chunk, query_numbers = _METHODS[method](apply, _LAYERS[layers], params, x)
        if chunk is None:
            chunk = max(_chunk_bytes() // (4 * query_numbers), 1)
        m = map_chunks(one_chunk, x, chunk)
    return (m + m.mT) / 2


# --- structured -----------------------------------------------------------------------------------


def _structured_all(apply: Apply, found: Survey, params: Params, x: Array) -> Array:
    """M [B, K, K] as a sum over layers, from activations and output cotangents."""
    b, k = x.shape[0], found.num_classes

    def log_likelihoods(offsets: list[Array]) -> tuple[Array, list[Array]]:
        logits, calls = record(apply, params, x, offsets)
        biased.extend("bias" in call.parameters for call in calls)
        return jax.nn.log_softmax(logits.astype(jnp.float32)), [call.rows() for call in calls]

    biased: list[bool] = []
    offsets = [jnp.zeros((b, *o.shape[1:]), o.dtype) for o in found.outputs]
    log_p, pull_back, rows = jax.vjp(log_likelihoods, offsets, has_aux=True)
    # Rows of a batch do not mix, so one cotangent serves class k of all queries at once.
    seeds = jnp.broadcast_to(jnp.eye(k, dtype=log_p.dtype)[:, None], (k, b, k))
    (cotangents,) = jax.vmap(pull_back)(seeds)
    m = jnp.zeros((b, k, k), jnp.float32)
    for a, d, bias in zip(rows, cotangents, biased, strict=True):
        d = d.reshape(k, b, -1, d.shape[-1]).astype(jnp.float32)
        m += _contract(a.astype(jnp.float32), d)
        if bias:
            total = d.sum(axis=2)
            m += jnp.einsum("kbo,lbo->bkl", total, total)
    return m


def _contract(a: Array, d: Array) -> Array:
    """M_kl = sum_pq (a_p . a_q)(d_kp . d_lq) of a kernel [F, O] applied at P positions.

    a [B, P, F] inputs, d [K, B, P, O] output cotangents -> [B, K, K]. Either materialises this
    layer's gradients [K, F, O], or contracts products of positions: whichever needs fewer
    multiplications. With one position (a dense layer) that is |a|^2 d_k . d_l.
    """
    k, _, p, o = d.shape
    f = a.shape[-1]
    materialise = k * p * f * o + k * k * f * o
    products = p * p * f + k * p * p * o + k * k * p * o
    if materialise < products:
        g = jnp.einsum("bpf,kbpo->bkfo", a, d)
        return jnp.einsum("bkfo,blfo->bkl", g, g)
    kernel = jnp.einsum("bpf,bqf->bpq", a, a)
    weighted = jnp.einsum("bpq,kbqo->bkpo", kernel, d)
    return jnp.einsum("bkpo,lbpo->bkl", weighted, d)


def _structured_last(apply: Apply, found: Survey, params: Params, x: Array) -> Array:
    """M = |h|^2 (I - 1 p')(I - 1 p')' from the input h of the last dense layer."""
    logits, calls = record(apply, params, x)
    h, p = _head(logits, calls).inputs, jax.nn.softmax(logits.astype(jnp.float32))
    centred = jnp.eye(found.num_classes)[None] - p[:, None, :]
    m = jnp.einsum("bik,bjk->bij", centred, centred)
    return jnp.square(h.astype(jnp.float32)).sum(axis=-1)[:, None, None] * m


def _head(logits: Array, calls: list[Call]) -> Call:
    """The dense layer whose output is the logits."""
    head = calls[-1] if calls else None
    if (
        head is None
        or head.output is not logits
        or not isinstance(head.module, nn.Dense)
        or head.rows() is None
    ):
        raise InputError(
            "layers='last' needs a Flax linen model that returns the output of a Dense layer as "
            "its logits: this one does not; use layers='all'"
        )
    return head


# --- the reference --------------------------------------------------------------------------------


def _jacrev(apply: Apply, layers: "_Layers", params: Params, x: Array) -> Any:
    """Per-example Jacobians with respect to the chosen leaves, then G G'."""
    leaves, rebuild = layers.leaves(apply, params, x)

    def one(example: Array) -> Array:
        def log_likelihoods(leaves: list[Array]) -> Array:
            logits = apply(rebuild(leaves), example[None])[0]
            return jax.nn.log_softmax(logits.astype(jnp.float32))

        rows = jax.tree.leaves(jax.jacrev(log_likelihoods)(leaves))
        rows = [g.reshape(g.shape[0], -1).astype(jnp.float32) for g in rows]
        return sum(g @ g.T for g in rows)

    num_classes = jax.eval_shape(apply, params, x).shape[-1]
    return jax.vmap(one), 2 * num_classes * sum(leaf.size for leaf in leaves)


def _all_leaves(apply: Apply, params: Params, x: Array) -> Any:
    del apply, x
    return split_weights(params)


def _last_kernel(apply: Apply, params: Params, x: Array) -> Any:
    everything, rebuild = split_weights(params)
    position: list[int] = []

    def find(leaves: list[Array], x: Array) -> Array:
        logits, calls = record(apply, rebuild(leaves), x)
        kernel = _head(logits, calls).parameters["kernel"]
        position.extend(i for i, leaf in enumerate(leaves) if leaf is kernel)
        return logits

    jax.eval_shape(find, everything, x)
    if len(position) != 1:
        raise InputError(
            "layers='last' with method='jacrev' needs the head's kernel among params as it is, "
            "neither cast nor inside another transformation: use method='structured'"
        )
    (at,) = position
    return [everything[at]], lambda new: rebuild(everything[:at] + new + everything[at + 1 :])


# --- the choice -----------------------------------------------------------------------------------


class _Layers(NamedTuple):
    """A choice of parameters: how each method serves it."""

    structured: Callable[..., Array]
    leaves: Callable[..., Any]
    needs_all: bool


def _structured(apply: Apply, layers: _Layers, params: Params, x: Array) -> Any:
    found = survey(apply, params, x)
    if layers.needs_all and found.uncovered:
        raise InputError(f"{found.uncovered}: use method='jacrev' (or 'auto')")
    return partial(layers.structured, apply, found, params), found.query_numbers


def _auto(apply: Apply, layers: _Layers, params: Params, x: Array) -> Any:
    try:
        return _structured(apply, layers, params, x)
    except InputError as reason:
        if not layers.needs_all:
            raise
        cause = str(reason).partition(":")[0]
    warnings.warn(f"gram: {cause}; taking method='jacrev', slower", stacklevel=2)
    return _jacrev(apply, layers, params, x)


_LAYERS = {
    "all": _Layers(_structured_all, _all_leaves, needs_all=True),
    "last": _Layers(_structured_last, _last_kernel, needs_all=False),
}
_METHODS = {"auto": _auto, "structured": _structured, "jacrev": _jacrev}
