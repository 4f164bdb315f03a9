"""The Gram matrix without Jacobians: one forward pass, cotangents, and layers' terms.

`structured_all` sums what `madjax.layers` knows of every layer that explains its parameters;
`structured_last` is the kernel of the last dense layer alone. Both are a `GramShare`.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Var

from madjax import backend
from madjax.batching import MEMORY, map_chunks
from madjax.errors import InputError
from madjax.layers import Call, GramTerm, terms
from madjax.taps import Apply, LayerId, Params, Survey, record, weights

Array = jax.Array


def _comfortable() -> int:
    """Bytes of intermediate results up to which it pays to take more queries at a time.

    A CPU is fastest while a chunk stays near its caches; an accelerator wants to be filled.
    """
    return 2**25 if backend.platform() == "cpu" else 2**30


class GramShare(NamedTuple):
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


def structured_all(apply: Apply, found: Survey, params: Params, x: Array) -> GramShare:
    """All layers that explain their parameters."""
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
    return GramShare(run, k, per_query, 2 * outputs, kept + 6 * k, once)


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
        logits, seen, layer_ids, _ = record(apply, weights(params), x, offsets, inline=found.inline)
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


def structured_last(apply: Apply, found: Survey, params: Params, x: Array) -> GramShare:
    """The kernel of the last dense layer, with input h and output z: M = |h|^2 A A'.

    A = d log F / d z [K, K], by as many pull-backs through what follows the layer. Where that is
    nothing, or a change of type, A = I - 1 p'.
    """
    k = found.num_classes
    head = find_head(apply, found, params, x)

    def closed(x: Array) -> tuple[Array, Array]:
        logits, calls, _, _ = record(apply, weights(params), x, inline=found.inline)
        p = jax.nn.softmax(logits.astype(jnp.float32))
        return calls[head.number].inputs, jnp.eye(k, dtype=jnp.float32)[None] - p[:, None, :]

    def by_the_tail(x: Array) -> tuple[Array, Array]:
        def log_likelihoods(offset: Array) -> tuple[Array, Array]:
            offsets = {head.layer_id: offset}
            seen = record(apply, weights(params), x, offsets, inline=found.inline)
            h = seen.calls[head.number].inputs
            return jax.nn.log_softmax(seen.logits.astype(jnp.float32)), h

        offset = jnp.zeros((x.shape[0], k), head.dtype)
        _, pull_back, h = jax.vjp(log_likelihoods, offset, has_aux=True)
        seeds = jnp.broadcast_to(jnp.eye(k, dtype=jnp.float32)[:, None], (k, x.shape[0], k))
        (rows,) = jax.vmap(pull_back)(seeds)
        return h, rows.astype(jnp.float32).swapaxes(0, 1)

    def run(x: Array, classes: int) -> Array:
        del classes
        h, rows = (closed if head.is_last else by_the_tail)(x)
        m = jnp.einsum("bik,bjk->bij", rows, rows)
        return jnp.square(h.astype(jnp.float32)).sum(axis=-1)[:, None, None] * m

    tail = 0 if head.is_last else 2 * k * k
    return GramShare(run, k, 3 * found.largest + x[:1].size, 0, 3 * k + tail, 0)


class Head(NamedTuple):
    """The last dense layer of a model."""

    number: int
    """Of its call, among the recorded ones."""
    layer_id: LayerId
    dtype: Any
    """Of its output."""
    is_last: bool
    """Whether its output is the logits, up to their type."""


def find_head(apply: Apply, found: Survey, params: Params, x: Array) -> Head:
    """The dense layer through which alone the logits depend on the weights, the last of those.

    What may follow it reads no weights: a change of type, a temperature, a mask, a log-softmax.

    Raises:
        InputError: there is none with an output for each class.
    """
    k, everything = found.num_classes, weights(params)
    heads: list[Head] = []

    def run(leaves: list[Array], x: Array) -> tuple[Array, list[Array]]:
        seen = record(apply, everything._replace(leaves=leaves), x, inline=found.inline)
        outputs = []
        for number, (call, layer_id) in enumerate(zip(seen.calls, seen.layer_ids, strict=True)):
            plain = isinstance(call.module, nn.Dense) and terms(call) is not None
            once = seen.layer_ids.count(layer_id) == 1
            if plain and once and call.output.shape == seen.logits.shape == (x.shape[0], k):
                heads.append(Head(number, layer_id, call.output.dtype, is_last=False))
                outputs.append(call.output)
        return seen.logits, outputs

    two = jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype)
    jaxpr = jax.make_jaxpr(run)(everything.leaves, two).jaxpr
    logits, *outputs = jaxpr.outvars
    read = set(jaxpr.invars[: len(everything.leaves)])
    for head, output in reversed(list(zip(heads, outputs, strict=True))):
        if logits is output:
            return head._replace(is_last=True)
        if logits not in _depending(jaxpr, read, output) and logits in _depending(
            jaxpr, {output}, None
        ):
            return head._replace(is_last=_is_cast(jaxpr, output, logits))
    raise InputError(
        "layers='last' needs a Flax linen model whose logits come from a Dense layer of as many "
        "outputs, with nothing behind it that has weights: this one does not; use layers='all'"
    )


def _depending(jaxpr: Jaxpr, on: Collection[Var], cut: Var | None) -> set[Var]:
    """The variables of a program that depend on some, in other ways than through `cut`."""
    found = set(on)
    for equation in jaxpr.eqns:
        if any(isinstance(read, Var) and read in found for read in equation.invars):
            found |= set(equation.outvars) - {cut}
    return found


def _is_cast(jaxpr: Jaxpr, before: Var, after: Var) -> bool:
    """Whether a variable is another one in another type."""
    made = next(equation for equation in jaxpr.eqns if after in equation.outvars)
    return made.primitive.name == "convert_element_type" and made.invars[0] is before
