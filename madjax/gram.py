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
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from madjax.batching import MEMORY, map_chunks
from madjax.errors import InputError
from madjax.layers import Call, GramTerm, terms
from madjax.taps import Apply, LayerId, Params, Survey, record, survey, weights

Array = jax.Array


def _comfortable() -> int:
    """Bytes of intermediate results up to which it pays to take more queries at a time.

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
    memory: int | None = None,
) -> Array:
    """The Gram matrix of the surrogate's log-likelihood gradients, for every query.

    M = G G' with G = d log F_sur(x; w) / d w [K, D] (Eq. 5), F_sur = softmax(apply(params, x)).

    Args:
        apply: apply(params, x [B, ...]) -> logits [B, K]; every row is a function of its own x.
        params: the surrogate's; w is `params["params"]` where there is that key, else all of them.
        x: the queries [B, ...], as apply takes them.
        layers: "all" parameters (the paper); the kernel of the "last" dense layer (the authors'
            code); or "identity", M = I, the paper's ablation without a Jacobian.
        method: "structured", for Flax linen models of Dense, DenseGeneral (so attention), Conv,
            Embed, BatchNorm with fixed statistics, LayerNorm, RMSNorm, GroupNorm and InstanceNorm,
            each parameter read by one of them once; "jacrev", any model; or "auto": structured for
            every parameter that it explains and jacrev for the others, with a warning where those
            are more than a tenth of D. `coverage` says which are which.
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
        InputError: an unknown layers or method; a model that the method cannot handle; a BatchNorm
            in training mode; memory that is too small for one query.

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


class _GramShare(NamedTuple):
    """The share of M that some parameters have: how it is computed, and what that holds at once."""

    run: Callable[[Array, int], Array]
    """(queries [n, ...], classes at a time) -> [n, K, K]."""
    num_classes: int
    per_query: int
    per_class: int
    """For every class of a query that is pulled back at a time."""
    kept: int
    """For every class of a query until the end."""
    once: int
    """However many queries there are: copies of the weights."""

    def plan(self, chunk: int | None, memory: int | None) -> tuple[int, int]:
        """Queries and classes at a time."""
        bound = MEMORY if memory is None else memory
        fixed = self.per_query + self.num_classes * self.kept
        least = _BYTES * (self.once + fixed + self.per_class)
        if memory is not None and memory < least:
            raise InputError(
                f"memory is {memory} bytes: one query of this model takes about {least}"
            )
        left = bound // _BYTES - self.once
        if chunk is None:
            comfortable = min(_comfortable() // _BYTES, left)
            chunk = max(comfortable // (fixed + self.num_classes * self.per_class), 1)
        classes = (left // chunk - fixed) // max(self.per_class, 1)
        return chunk, min(max(classes, 1), self.num_classes)


_BYTES = 6
"""Bytes for every number that is known to be needed: four, and room for what XLA adds."""


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
        k = jax.eval_shape(apply, params, one).shape[-1]
        if layers == _IDENTITY:
            return jnp.broadcast_to(jnp.eye(k, dtype=jnp.float32), (x.shape[0], k, k))
        if not x.shape[0] or k < 2:  # the likelihood of one class is always 1
            return jnp.zeros((x.shape[0], k, k), jnp.float32)
        m = jnp.zeros((), jnp.float32)
        for share in _METHODS[method](apply, _LAYERS[layers], params, x):
            queries, classes = share.plan(chunk, memory)
            m += map_chunks(partial(share.run, classes=classes), x, queries)
    return (m + m.mT) / 2


# --- structured -----------------------------------------------------------------------------------


def _structured_all(apply: Apply, found: Survey, params: Params, x: Array) -> _GramShare:
    k = found.num_classes

    def one_class(x: Array) -> list[Array]:
        _, pull_back, layer_terms = _forward(apply, found, params, x)
        return _pull(pull_back, layer_terms, jnp.ones((1, 1, k), jnp.float32), k)

    one = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    kept = sum(a.size for a in jax.eval_shape(one_class, one))
    outputs = sum(output.size for output in found.taps.values())
    run = partial(_all_layers, apply, found, params)
    per_query = found.query_numbers + one.size
    once = sum(leaf.size for leaf in weights(params).leaves)
    return _GramShare(run, k, per_query, 2 * outputs, kept + 6 * k, once)


def _all_layers(apply: Apply, found: Survey, params: Params, x: Array, classes: int) -> Array:
    """M [B, K, K] as a sum over layers, from activations and output cotangents.

    The rows of G obey sum_k p_k G_k = 0, so K - 1 of them are pulled back and the one of the
    surrogate's top class t, for which the division magnifies no rounding, is
    G_t = - sum_{k != t} (p_k / p_t) G_k.
    """
    k = found.num_classes
    log_p, pull_back, layer_terms = _forward(apply, found, params, x)
    top = log_p.argmax(axis=1)[:, None]
    others = (top + 1 + jnp.arange(k - 1)[None]) % k
    # Rows of a batch do not mix, so one cotangent serves one class of all queries at once.
    seeds = jax.nn.one_hot(others.T, k, dtype=log_p.dtype)
    kept = map_chunks(lambda seeds: _pull(pull_back, layer_terms, seeds, k), seeds, classes)
    m = sum(term.product(each) for (_, term), each in zip(layer_terms, kept, strict=True))
    at = partial(jnp.take_along_axis, log_p, axis=1)
    ratio = -jnp.exp(at(others) - at(top))
    # Sums, not products of small matrices, which cost XLA's CPU backend more than they should.
    row = (ratio[:, None] * m).sum(axis=2)
    corner = (ratio * row).sum(axis=1)
    m = jnp.concatenate([m, row[:, None]], axis=1)
    m = jnp.concatenate([m, jnp.append(row, corner[:, None], axis=1)[:, :, None]], axis=2)
    # From the order of `others` and t to the classes' own: c is row (c - t - 1) mod K.
    return jax.vmap(lambda m, t: jnp.roll(m, (t + 1, t + 1), axis=(0, 1)))(m, top[:, 0])


def _forward(
    apply: Apply, found: Survey, params: Params, x: Array
) -> tuple[Array, Callable[[Array], Any], list[tuple[LayerId, GramTerm]]]:
    """Log-likelihoods [B, K], their pull-back to the tapped outputs, and the layers' terms."""
    calls: list[tuple[LayerId, Call]] = []

    def log_likelihoods(offsets: dict[LayerId, Array]) -> tuple[Array, list[Any]]:
        logits, seen, layer_ids = record(apply, weights(params), x, offsets)
        calls.extend(each for each in zip(layer_ids, seen, strict=True) if each[0] in offsets)
        state = [(call.inputs, call.variables) for _, call in calls]
        return jax.nn.log_softmax(logits.astype(jnp.float32)), state

    offsets = {
        layer_id: jnp.zeros((x.shape[0], *output.shape[1:]), output.dtype)
        for layer_id, output in found.taps.items()
    }
    log_p, pull_back, state = jax.vjp(log_likelihoods, offsets, has_aux=True)
    layer_terms = [
        (layer_id, term)
        for (layer_id, call), (inputs, variables) in zip(calls, state, strict=True)
        for term in terms(call._replace(inputs=inputs, variables=variables))
    ]
    return log_p, pull_back, layer_terms


def _pull(
    pull_back: Callable[[Array], Any],
    layer_terms: Sequence[tuple[LayerId, GramTerm]],
    seeds: Array,
    num_classes: int,
) -> list[Array]:
    """What the terms keep of the cotangents of some classes: seeds [k, B, K]."""
    (cotangents,) = jax.tree.map(lambda d: d.astype(jnp.float32), jax.vmap(pull_back)(seeds))
    return [term.reduce(cotangents[layer_id], num_classes) for layer_id, term in layer_terms]


def _structured_last(apply: Apply, found: Survey, params: Params, x: Array) -> _GramShare:
    """M = |h|^2 (I - 1 p')(I - 1 p')' from the input h of the last dense layer."""
    k = found.num_classes

    def run(x: Array, classes: int) -> Array:
        del classes
        logits, calls, _ = record(apply, weights(params), x)
        h, p = _head(logits, calls).inputs, jax.nn.softmax(logits.astype(jnp.float32))
        centred = jnp.eye(k, dtype=jnp.float32)[None] - p[:, None, :]
        m = jnp.einsum("bik,bjk->bij", centred, centred)
        return jnp.square(h.astype(jnp.float32)).sum(axis=-1)[:, None, None] * m

    return _GramShare(run, k, 3 * found.largest + x[:1].size, 0, 3 * k, 0)


def _head(logits: Array, calls: list[Call]) -> Call:
    """The dense layer whose output is the logits."""
    head = calls[-1] if calls else None
    if (
        head is None
        or head.output is not logits
        or not isinstance(head.module, nn.Dense)
        or terms(head) is None
    ):
        raise InputError(
            "layers='last' needs a Flax linen model that returns the output of a Dense layer as "
            "its logits: this one does not; use layers='all'"
        )
    return head


# --- the reference --------------------------------------------------------------------------------


def _by_jacrev(apply: Apply, chosen: Sequence[int], params: Params, x: Array) -> _GramShare:
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

    k = jax.eval_shape(apply, params, x).shape[-1]
    size = sum(everything.leaves[at].size for at in chosen)
    return _GramShare(run, k, 0, 0, 2 * size, 0)


def _every_leaf(apply: Apply, params: Params, x: Array) -> Sequence[int]:
    del apply, x
    return range(len(weights(params).leaves))


def _last_kernel(apply: Apply, params: Params, x: Array) -> Sequence[int]:
    found = weights(params)
    position: list[int] = []

    def find(leaves: list[Array], x: Array) -> Array:
        logits, calls, _ = record(apply, found._replace(leaves=leaves), x)
        kernel = _head(logits, calls).parameters["kernel"]
        position.extend(i for i, leaf in enumerate(leaves) if leaf is kernel)
        return logits

    jax.eval_shape(find, found.leaves, x)
    if len(position) != 1:
        raise InputError(
            "layers='last' with method='jacrev' needs the head's kernel among params as it is, "
            "neither cast nor inside another transformation: use method='structured'"
        )
    return position


# --- the choice -----------------------------------------------------------------------------------


class _Layers(NamedTuple):
    """A choice of parameters: how each method serves it."""

    structured: Callable[[Apply, Survey, Params, Array], _GramShare]
    leaves: Callable[[Apply, Params, Array], Sequence[int]]
    needs_all: bool = False


def _structured(apply: Apply, layers: _Layers, params: Params, x: Array) -> list[_GramShare]:
    found = survey(apply, params, x)
    if layers.needs_all and found.unexplained:
        raise InputError(f"{_first(found, params)}; use method='auto' or 'jacrev'")
    return [layers.structured(apply, found, params, x)]


def _jacrev(apply: Apply, layers: _Layers, params: Params, x: Array) -> list[_GramShare]:
    return [_by_jacrev(apply, layers.leaves(apply, params, x), params, x)]


def _auto(apply: Apply, layers: _Layers, params: Params, x: Array) -> list[_GramShare]:
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
    "all": _Layers(_structured_all, _every_leaf, needs_all=True),
    "last": _Layers(_structured_last, _last_kernel),
}
_IDENTITY = "identity"
_METHODS = {"auto": _auto, "structured": _structured, "jacrev": _jacrev}
