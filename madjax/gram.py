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

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from madjax.batching import map_chunks
from madjax.conv import unfold
from madjax.errors import InputError

Array = jax.Array
Params = Any
Apply = Callable[[Params, Array], Array]


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
        one_chunk, query_bytes = _METHODS[method](apply, _LAYERS[layers], params, x)
        if chunk is None:
            chunk = max(_chunk_bytes() // query_bytes, 1)
        m = map_chunks(one_chunk, x, chunk)
    return (m + m.mT) / 2


# --- structured -----------------------------------------------------------------------------------


class _Call(NamedTuple):
    """One call of a tapped layer: which leaves it owns and what its gradient is made of."""

    module: nn.Module
    leaves: tuple[Array, ...]
    inputs: Array
    output: Array


@contextlib.contextmanager
def _taps(calls: list[_Call], offsets: list[Array] | None) -> Iterator[None]:
    """Record every call of a known layer, and add offsets[i] to the output of the i-th."""

    def tap(call: Callable[..., Array], args: tuple, kwargs: dict, context: Any) -> Array:
        output = call(*args, **kwargs)
        known = _LAYER_PATCHES.get(type(context.module))
        if context.method_name != "__call__" or known is None:
            return output
        owned = tuple(jax.tree.leaves(context.module.variables.get("params", {})))
        if offsets is not None:
            output = output + offsets[len(calls)]
        calls.append(_Call(context.module, owned, args[0], output))
        return output

    with nn.intercept_methods(tap):
        yield


def _dense_patches(module: nn.Dense, x: Array) -> Array | None:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _conv_patches(module: nn.Conv, x: Array) -> Array | None:
    """The patches a plain two-dimensional convolution multiplies with its kernel, else None."""

    def pair(value: Any) -> tuple[int, int]:
        return (value,) * 2 if value is None or isinstance(value, int) else tuple(value)

    plain = (
        x.ndim == 4
        and len(module.kernel_size) == 2
        and module.feature_group_count == 1
        and set(pair(module.input_dilation)) <= {1, None}
        and module.mask is None
        and (not isinstance(module.padding, str) or module.padding in ("SAME", "VALID"))
    )
    if not plain:
        return None
    padding = module.padding
    if not isinstance(padding, str):
        padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in pair(padding))
    strides, dilation = (
        tuple(s or 1 for s in pair(value)) for value in (module.strides, module.kernel_dilation)
    )
    patches = unfold(
        x, tuple(module.kernel_size), strides=strides, padding=padding, dilation=dilation
    )
    return patches.reshape(x.shape[0], -1, patches.shape[-1])


_LAYER_PATCHES: dict[type[nn.Module], Callable[[Any, Array], Array | None]] = {
    nn.Dense: _dense_patches,
    nn.Conv: _conv_patches,
}
"""Layer -> (module, inputs) -> the rows [B, P, F] that its kernel [F, O] multiplies, if it can."""


def _weights(params: Params) -> Params:
    return params["params"] if isinstance(params, dict) and "params" in params else params


def _trace(apply: Apply, params: Params, x: Array, offsets: list[Array] | None = None) -> Any:
    calls: list[_Call] = []
    with _taps(calls, offsets):
        logits = apply(params, x)
    return logits, calls


class _Plan(NamedTuple):
    """What tracing the model on one query says about it."""

    outputs: list[jax.ShapeDtypeStruct]
    """Shapes of the tapped outputs with a batch of one."""
    uncovered: str | None
    """Why the structured method cannot serve all parameters, or None."""
    num_classes: int
    query_bytes: int


def _plan(apply: Apply, params: Params, x: Array) -> _Plan:
    uncovered: str | None = None
    patches: list[int] = []

    def shapes(params: Params, x: Array) -> tuple[Array, list[Array]]:
        nonlocal uncovered
        logits, calls = _trace(apply, params, x)
        names = {id(v): jax.tree_util.keystr(k) for k, v in _named_leaves(_weights(params))}
        owned: list[int] = []
        for call in calls:
            rows = _LAYER_PATCHES[type(call.module)](call.module, call.inputs)
            if rows is not None:
                owned += [id(leaf) for leaf in call.leaves]
                patches.append(rows.size)
        missing = [name for leaf, name in names.items() if leaf not in owned]
        twice = [name for leaf, name in names.items() if owned.count(leaf) > 1]
        if missing:
            uncovered = f"parameter {missing[0]} belongs to no dense or plain convolution layer"
        elif twice:
            uncovered = f"parameter {twice[0]} is used by more than one call"
        elif len(owned) != len(names):
            uncovered = "a layer holds parameters that are not in params"
        return logits, [call.output for call in calls]

    one = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    logits, outputs = jax.eval_shape(shapes, params, one)
    k = logits.shape[-1]
    per_query = 2 * k * sum(o.size for o in outputs) + sum(patches) + x[:1].size
    return _Plan(outputs, uncovered, k, 4 * per_query)


def _named_leaves(tree: Params) -> list[tuple[Any, Array]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _structured_all(apply: Apply, plan: _Plan, params: Params, x: Array) -> Array:
    """M [B, K, K] as a sum over layers, from activations and output cotangents."""
    if plan.uncovered:
        raise InputError(f"{plan.uncovered}: use method='jacrev' (or 'auto')")
    b, k = x.shape[0], plan.num_classes

    def log_likelihoods(offsets: list[Array]) -> tuple[Array, list[Array]]:
        logits, calls = _trace(apply, params, x, offsets)
        rows = [_LAYER_PATCHES[type(c.module)](c.module, c.inputs) for c in calls]
        uses_bias.extend(getattr(c.module, "use_bias", False) for c in calls)
        return jax.nn.log_softmax(logits.astype(jnp.float32)), rows

    uses_bias: list[bool] = []
    offsets = [jnp.zeros((b, *o.shape[1:]), o.dtype) for o in plan.outputs]
    log_p, pull_back, rows = jax.vjp(log_likelihoods, offsets, has_aux=True)
    # Rows of a batch do not mix, so one cotangent serves class k of all queries at once.
    seeds = jnp.broadcast_to(jnp.eye(k, dtype=log_p.dtype)[:, None], (k, b, k))
    (cotangents,) = jax.vmap(pull_back)(seeds)
    m = jnp.zeros((b, k, k), jnp.float32)
    for a, d, bias in zip(rows, cotangents, uses_bias, strict=True):
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


def _structured_last(apply: Apply, plan: _Plan, params: Params, x: Array) -> Array:
    """M = |h|^2 (I - 1 p')(I - 1 p')' from the input h of the last dense layer."""
    logits, calls = _trace(apply, params, x)
    h, p = _head(logits, calls).inputs, jax.nn.softmax(logits.astype(jnp.float32))
    centred = jnp.eye(plan.num_classes)[None] - p[:, None, :]
    m = jnp.einsum("bik,bjk->bij", centred, centred)
    return jnp.square(h.astype(jnp.float32)).sum(axis=-1)[:, None, None] * m


def _head(logits: Array, calls: list[_Call]) -> _Call:
    """The dense layer whose output is the logits."""
    if not calls or calls[-1].output is not logits or not isinstance(calls[-1].module, nn.Dense):
        raise InputError(
            "layers='last' needs a Flax linen model that returns the output of a Dense layer as "
            "its logits: this one does not; use layers='all'"
        )
    return calls[-1]


# --- the reference --------------------------------------------------------------------------------


def _jacrev(apply: Apply, select: "_Layers", params: Params, x: Array) -> Any:
    """Per-example Jacobians with respect to the selected leaves, then G G'."""
    leaves, rebuild = select.leaves(apply, params, x)

    def one(example: Array) -> Array:
        def log_likelihoods(leaves: list[Array]) -> Array:
            logits = apply(rebuild(leaves), example[None])[0]
            return jax.nn.log_softmax(logits.astype(jnp.float32))

        rows = jax.tree.leaves(jax.jacrev(log_likelihoods)(leaves))
        rows = [g.reshape(g.shape[0], -1).astype(jnp.float32) for g in rows]
        return sum(g @ g.T for g in rows)

    num_classes = jax.eval_shape(apply, params, x).shape[-1]
    return jax.vmap(one), 4 * 2 * num_classes * max(sum(leaf.size for leaf in leaves), 1)


def _structured(apply: Apply, select: "_Layers", params: Params, x: Array) -> Any:
    plan = _plan(apply, params, x)
    return partial(select.structured, apply, plan, params), plan.query_bytes


def _auto(apply: Apply, select: "_Layers", params: Params, x: Array) -> Any:
    plan = _plan(apply, params, x)
    if select.needs_all and plan.uncovered:
        warnings.warn(f"gram: {plan.uncovered}; using method='jacrev', slower", stacklevel=5)
        return _jacrev(apply, select, params, x)
    return partial(select.structured, apply, plan, params), plan.query_bytes


def _all_leaves(apply: Apply, params: Params, x: Array) -> Any:
    leaves, tree = jax.tree.flatten(_weights(params))

    def rebuild(leaves: list[Array]) -> Params:
        weights = jax.tree.unflatten(tree, leaves)
        return weights if _weights(params) is params else {**params, "params": weights}

    return leaves, rebuild


def _last_kernel(apply: Apply, params: Params, x: Array) -> Any:
    everything, rebuild = _all_leaves(apply, params, x)
    position: list[int] = []

    def find(leaves: list[Array], x: Array) -> Array:
        logits, calls = _trace(apply, rebuild(leaves), x)
        kernel = _head(logits, calls).module.variables["params"]["kernel"]
        position.extend(i for i, leaf in enumerate(leaves) if leaf is kernel)
        return logits

    jax.eval_shape(find, everything, x)
    (at,) = position
    return [everything[at]], lambda new: rebuild(everything[:at] + new + everything[at + 1 :])


class _Layers(NamedTuple):
    """A choice of parameters: how each method serves it."""

    structured: Callable[..., Array]
    leaves: Callable[..., Any]
    needs_all: bool


_LAYERS = {
    "all": _Layers(_structured_all, _all_leaves, needs_all=True),
    "last": _Layers(_structured_last, _last_kernel, needs_all=False),
}
_METHODS = {"auto": _auto, "structured": _structured, "jacrev": _jacrev}
