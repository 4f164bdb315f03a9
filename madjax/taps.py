"""Taps into Flax linen models: what every layer took and gave, and which parameters that explains.

`record` runs a model and notes each call of a layer that `madjax.layers` knows. `survey` traces a
model without running it and says, for every parameter, whether one such call is all that reads it
(then its gradient is a formula in that layer's input and output cotangents) or why not.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Var, get_opaque_trace_state

from madjax.batching import nested
from madjax.errors import InputError
from madjax.layers import MIXING, Call, check_rows_are_apart, known, terms

Array = jax.Array
Params = Any
Apply = Callable[[Params, Array], Array]
LayerId = tuple[int, ...]
"""A tapped layer: which of the weights' leaves are its parameters."""


class Weights(NamedTuple):
    """What G is taken over: the collection "params" where there is one, else everything.

    Of an `nnx.State`, the `nnx.Param`s alone. Leaves that are no floats (random keys, counters,
    tables of whole numbers) are constants.
    """

    leaves: list[Array]
    names: list[str]
    rebuild: Callable[[Sequence[Array]], Params]
    """Puts other leaves in the place of these, beside whatever else params held."""
    tree: Params
    """These leaves alone, in the places that they have in params: what an optimiser steps over."""


def weights(params: Params) -> Weights:
    """The leaves of the weights among params."""
    inside = isinstance(params, Mapping) and not _is_nnx(params, "State") and "params" in params
    held = params["params"] if inside else params
    named, tree = jax.tree.flatten_with_path(held)
    everything = [leaf for _, leaf in named]
    chosen = [
        at
        for at, (leaf, may) in enumerate(zip(everything, _may_be_weights(held), strict=True))
        if may and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]

    def rebuild(leaves: Sequence[Array]) -> Params:
        changed = dict(zip(chosen, leaves, strict=True))
        new = jax.tree.unflatten(tree, [changed.get(at, a) for at, a in enumerate(everything)])
        return {**params, "params": new} if inside else new

    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named]
    leaves = [everything[at] for at in chosen]
    placed = dict(zip(chosen, leaves, strict=True))
    alone = jax.tree.unflatten(tree, [placed.get(at) for at in range(len(everything))])
    alone = {"params": alone} if inside else alone
    return Weights(leaves, [names[at] for at in chosen], rebuild, alone)


def _may_be_weights(tree: Any) -> list[bool]:
    """For every leaf, whether it is no part of an NNX variable of another kind than `Param`."""
    tops = jax.tree.leaves(tree, is_leaf=lambda a: _is_nnx(a, "Variable"))
    return [
        not _is_nnx(top, "Variable") or _is_nnx(top, "Param")
        for top in tops
        for _ in jax.tree.leaves(top)
    ]


def _is_nnx(value: Any, kind: str) -> bool:
    """Whether a value is of a class of Flax NNX, which is not imported for that."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, getattr(nnx, kind))


class Record(NamedTuple):
    """What one run of a model shows."""

    logits: Array
    calls: list[Call]
    """Of known layers, in their order."""
    layer_ids: list[LayerId]
    """Whose calls they are; None stands for a parameter that is not among the weights as it is."""
    hidden: set[str]
    """The names of parameters whose layers ran inside a transformation."""


def record(
    apply: Apply,
    found: Weights,
    x: Array,
    offsets: Mapping[LayerId, Array] | None = None,
    *,
    inline: bool = False,
) -> Record:
    """Run the model, and note the calls of known layers that are not inside a transformation.

    Where offsets has the id of a call, its value is added to the output: the derivative with
    respect to the offset is the output cotangent of the layer. inline: run what is jitted inside
    the model as if it were not, so that its layers are seen.

    Raises:
        InputError: a layer that mixes the rows of a batch (`check_rows_are_apart`), and what is no
            array of logits [B, K].
    """
    calls: list[Call] = []
    layer_ids: list[LayerId] = []
    hidden: set[str] = set()
    at = {id(leaf): i for i, leaf in enumerate(found.leaves)}
    outside = get_opaque_trace_state(convention="flax")

    def tap(call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, MIXING):
            check_rows_are_apart(module, _inputs_and_options(module, args, kwargs)[1])
        before = len(calls)
        output = call(*args, **kwargs)
        if not known(module) or len(calls) > before:  # another layer did what this one stands for
            return output
        # Copies of the module's state: it is unbound after the call.
        variables = {name: dict(group) for name, group in module.variables.items()}
        if get_opaque_trace_state(convention="flax") != outside:  # its values must not leave
            own = variables.get("params", {})
            hidden.update("/".join((*module.path, name)) for name in own)
            return output
        layer_id = tuple(at.get(id(leaf)) for leaf in variables.get("params", {}).values())
        if offsets is not None and layer_id in offsets:
            output = output + offsets[layer_id]
        inputs, options = _inputs_and_options(module, args, kwargs)
        calls.append(Call(module, variables, inputs, options, output))
        layer_ids.append(layer_id)
        return output

    # Inside jit a call of the same shapes may be taken from a cache, where no tap hears of it.
    if isinstance(apply, jax.stages.Wrapped):
        apply = apply.__wrapped__
    with nn.intercept_methods(tap), jax.disable_jit() if inline else contextlib.nullcontext():
        logits = apply(found.rebuild(found.leaves), x)
    return Record(as_logits(logits, x.shape[0]), calls, layer_ids, hidden)


def as_logits(output: Any, batch: int) -> Array:
    """What a model returned for so many queries, if it is an array of logits [B, K].

    Raises:
        InputError: it is something else, such as logits beside the state that a model has changed.
    """
    if not hasattr(output, "shape"):
        kind = type(output).__name__
        raise InputError(
            f"apply returns a {kind}: give a function that returns the logits [B, K] alone, such "
            "as lambda params, x: apply(params, x)[0]"
        )
    if output.ndim != 2 or output.shape[0] != batch:
        raise InputError(
            f"apply returns an array of shape {tuple(output.shape)} for {batch} queries: give a "
            "function that returns logits [B, K]"
        )
    return output


def _inputs_and_options(
    module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[Array, dict[str, Any]]:
    """The first argument of a layer's call, and by name those of the others that are given."""
    given = inspect.signature(type(module).__call__).bind(module, *args, **kwargs).arguments
    _, inputs, *others = given
    return given[inputs], {name: given[name] for name in others if given[name] is not None}


class Survey(NamedTuple):
    """What tracing a model says about it."""

    taps: dict[LayerId, jax.ShapeDtypeStruct]
    """The layers that explain all of their parameters, with their output for one query."""
    unexplained: dict[int, str]
    """Why a leaf of the weights is not explained, by its position."""
    num_classes: int
    query_numbers: int
    """How many numbers all layers take, give and unfold for a query."""
    largest: int
    """How many numbers the largest known layer takes and gives for a query, or a guess."""
    inline: bool
    """How the model is to be recorded."""


def survey(apply: Apply, params: Params, x: Array) -> Survey:
    """Trace the model on two and on three queries, for what depends on neither its data nor B.

    A parameter is explained when exactly one operation of the whole program reads it, and that
    operation is a known layer's, called with the queries along its first axis. Where layers hide
    inside jit, and no loop would be unrolled by it, the model is traced without jit.

    Raises:
        InputError: see `record`.
    """
    two = _trace(apply, params, x, 2)
    inline = two.may_be_inlined
    if inline:
        two = _trace(apply, params, x, 2, inline=True)
    three = _trace(apply, params, x, 3, inline=inline)
    shared = {
        layer_id: jax.ShapeDtypeStruct((1, *output.shape[1:]), output.dtype)
        for layer_id, output in two.taps.items()
        if layer_id in three.taps and three.taps[layer_id].shape[1:] == output.shape[1:]
    }
    explained = {at for layer_id in shared for at in layer_id}
    unexplained = {
        at: two.reasons.get(at) or three.reasons.get(at, "a layer's first axis is not the batch")
        for at in range(len(weights(params).leaves))
        if at not in explained
    }
    return Survey(shared, unexplained, two.num_classes, two.numbers // 2, two.largest // 2, inline)


class _Traced(NamedTuple):
    taps: dict[LayerId, jax.ShapeDtypeStruct]
    reasons: dict[int, str]
    num_classes: int
    numbers: int
    largest: int
    may_be_inlined: bool


def _trace(apply: Apply, params: Params, x: Array, batch: int, *, inline: bool = False) -> _Traced:
    found = weights(params)
    layer_ids: list[LayerId] = []
    hidden: set[str] = set()
    numbers = 0
    largest = 16 * batch * int(np.prod(x.shape[1:]))

    def run(leaves: list[Array], x: Array) -> tuple[Array, list[tuple[Array, Array]]]:
        nonlocal numbers, largest
        logits, calls, seen, inside = record(apply, found._replace(leaves=leaves), x, inline=inline)
        hidden.update(inside)
        ends = []
        for call, layer_id in zip(calls, seen, strict=True):
            largest = max(largest, call.inputs.size + call.output.size)
            explained = None if None in layer_id else terms(call)
            if explained and call.inputs.shape[:1] == call.output.shape[:1] == x.shape[:1]:
                layer_ids.append(layer_id)
                ends.append((call.inputs, call.output))
                numbers += call.inputs.size + call.output.size
                numbers += sum(np.size(a) for term in explained for a in vars(term).values())
        return logits, ends

    shape = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    program, (logits, ends) = jax.make_jaxpr(run, return_shape=True)(found.leaves, shape)
    uses = [_uses(program.jaxpr, var) for var in program.jaxpr.invars[: len(found.leaves)]]
    reasons = {at: "it is used more than once" for at, count in enumerate(uses) if count > 1}
    taps = {
        layer_id: output
        for layer_id, (_, output) in zip(layer_ids, ends, strict=True)
        if not any(at in reasons for at in layer_id)
    }
    owned = {at for layer_id in layer_ids for at in layer_id}
    for at in set(range(len(uses))) - reasons.keys():
        if found.names[at] in hidden:
            reasons[at] = "its layer runs inside another transformation"
        elif at not in owned:
            reasons[at] = "it belongs to no layer of a known kind in plain use"
        elif not any(at in layer_id for layer_id in taps):
            reasons[at] = "another parameter of its layer is used more than once"
    may_be_inlined = bool(reasons) and _may_be_inlined(program.jaxpr)
    return _Traced(taps, reasons, logits.shape[-1], numbers, largest, may_be_inlined)


def _may_be_inlined(program: Jaxpr) -> bool:
    """Whether a program has parts in jit, and no loop that would be unrolled without it."""
    used = {equation.primitive.name for jaxpr in nested(program) for equation in jaxpr.eqns}
    return not used.isdisjoint(_JIT) and used.isdisjoint(_LOOPS)


def check_model(apply: Apply, params: Params, x: Array) -> int:
    """K, once the model is known to return logits and to keep the queries apart (see `record`).

    Nothing is computed.
    """

    def run(x: Array, *, inline: bool = False) -> Array:
        return record(apply, weights(params), x, inline=inline).logits

    program, logits = jax.make_jaxpr(run, return_shape=True)(x)
    if _may_be_inlined(program.jaxpr):  # no tap hears of what jit has traced before
        jax.eval_shape(partial(run, inline=True), x)
    return logits.shape[-1]


def _uses(jaxpr: Jaxpr, var: Var) -> int:
    """How many operations read a variable, looking into jit but taking others as one."""
    count = sum(out is var for out in jaxpr.outvars)
    for equation in jaxpr.eqns:
        for at, read in enumerate(equation.invars):
            if read is var:
                inner = equation.params["jaxpr"].jaxpr if equation.primitive.name in _JIT else None
                count += _uses(inner, inner.invars[at]) if inner else 1
    return count


_JIT = ("jit", "pjit")
_LOOPS = ("scan", "while")
