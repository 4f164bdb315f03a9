"""Taps into Flax linen models: what every layer took and gave, and which parameters that explains.

`record` runs a model and notes each call of a layer that `madjax.layers` knows. `survey` traces a
model without running it and says, for every parameter, whether one such call is all that reads it
(then its gradient is a formula in that layer's input and output cotangents) or why not.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.extend.core import Jaxpr, Var

from madjax.layers import Call, known, terms

Array = jax.Array
Params = Any
Apply = Callable[[Params, Array], Array]
LayerId = tuple[int, ...]
"""A tapped layer: which of the weights' leaves are its parameters."""


class Weights(NamedTuple):
    """What G is taken over: the collection "params" where there is one, else everything."""

    leaves: list[Array]
    names: list[str]
    rebuild: Callable[[Sequence[Array]], Params]
    """Puts other leaves in the place of these, beside whatever else params held."""


def weights(params: Params) -> Weights:
    """The leaves of the weights among params."""
    inside = isinstance(params, Mapping) and "params" in params
    named, tree = jax.tree.flatten_with_path(params["params"] if inside else params)

    def rebuild(leaves: Sequence[Array]) -> Params:
        new = jax.tree.unflatten(tree, leaves)
        return {**params, "params": new} if inside else new

    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named]
    return Weights([leaf for _, leaf in named], names, rebuild)


def record(
    apply: Apply,
    found: Weights,
    x: Array,
    offsets: Mapping[LayerId, Array] | None = None,
) -> tuple[Array, list[Call], list[LayerId]]:
    """Run the model: its logits, the calls of known layers in their order, and whose they are.

    The id of a call has None for a parameter that is not among the weights as it is. Where offsets
    has the id of a call, its value is added to the output: the derivative with respect to the
    offset is the output cotangent of the layer.
    """
    calls: list[Call] = []
    layer_ids: list[LayerId] = []
    at = {id(leaf): i for i, leaf in enumerate(found.leaves)}

    def tap(call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        output = call(*args, **kwargs)
        module = context.module
        if context.method_name != "__call__" or not known(module):
            return output
        # Copies of the module's state: it is unbound after the call.
        variables = {name: dict(group) for name, group in module.variables.items()}
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
    with nn.intercept_methods(tap):
        return apply(found.rebuild(found.leaves), x), calls, layer_ids


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


def survey(apply: Apply, params: Params, x: Array) -> Survey:
    """Trace the model on two and on three queries, for what depends on neither its data nor B.

    A parameter is explained when exactly one operation of the whole program reads it, and that
    operation is a known layer's, called with the queries along its first axis.

    Raises:
        InputError: a BatchNorm in training mode.
    """
    two, three = (_trace(apply, params, x, batch) for batch in (2, 3))
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
    return Survey(shared, unexplained, two.num_classes, two.numbers // 2, two.largest // 2)


class _Traced(NamedTuple):
    taps: dict[LayerId, jax.ShapeDtypeStruct]
    reasons: dict[int, str]
    num_classes: int
    numbers: int
    largest: int


def _trace(apply: Apply, params: Params, x: Array, batch: int) -> _Traced:
    found = weights(params)
    layer_ids: list[LayerId] = []
    numbers = 0
    largest = 16 * batch * int(np.prod(x.shape[1:]))

    def run(leaves: list[Array], x: Array) -> tuple[Array, list[tuple[Array, Array]]]:
        nonlocal numbers, largest
        logits, calls, seen = record(apply, found._replace(leaves=leaves), x)
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
    # What a loop or another transformation computes inside is unknown to the program outside.
    outputs = program.jaxpr.outvars[2::2]
    for layer_id, output in zip(layer_ids, outputs, strict=True):
        if output in program.jaxpr.constvars:
            reasons |= dict.fromkeys(layer_id, "its layer runs inside another transformation")
    taps = {
        layer_id: output
        for layer_id, (_, output) in zip(layer_ids, ends, strict=True)
        if not any(at in reasons for at in layer_id)
    }
    owned = {at for layer_id in layer_ids for at in layer_id}
    for at in set(range(len(uses))) - reasons.keys():
        if at not in owned:
            reasons[at] = "it belongs to no layer of a known kind in plain use"
        elif not any(at in layer_id for layer_id in taps):
            reasons[at] = "another parameter of its layer is used more than once"
    return _Traced(taps, reasons, logits.shape[-1], numbers, largest)


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
