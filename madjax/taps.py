"""Taps into Flax linen models: what every layer took and gave, and which parameters that explains.

`record` runs a model and notes each call of a layer whose gradient is known: rows of inputs times a
kernel, plus a bias. `survey` traces a model without running it and says whether such calls account
for every parameter exactly once, which the structured Gram matrix needs.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import lax
from jax.extend.core import Jaxpr, Var

from madjax.conv import convolution, patch_convolution, unfold

Array = jax.Array
Params = Any
Apply = Callable[[Params, Array], Array]


class Call(NamedTuple):
    """One call of a layer."""

    module: nn.Module
    parameters: Mapping[str, Array]
    inputs: Array
    output: Array

    def rows(self) -> Array | None:
        """The rows [B, P, F] that the kernel [F, O] multiplies, or None for an unknown layer."""
        if not set(self.parameters) <= {"kernel", "bias"} or self.inputs.ndim < 2:
            return None
        return _ROWS[type(self.module)](self.module, self.inputs)


def record(
    apply: Apply, params: Params, x: Array, offsets: list[Array] | None = None
) -> tuple[Array, list[Call]]:
    """Run the model: its logits, and the calls in their order, offsets[i] added to the i-th output.

    The derivative with respect to the offsets is the layers' output cotangents.
    """
    calls: list[Call] = []
    # Inside jit a call of the same shapes may be taken from a cache, where no tap hears of it.
    if isinstance(apply, jax.stages.Wrapped):
        apply = apply.__wrapped__
    with _taps(calls, offsets):
        return apply(params, x), calls


@contextlib.contextmanager
def _taps(calls: list[Call], offsets: list[Array] | None) -> Iterator[None]:
    def tap(call: Callable[..., Array], args: tuple, kwargs: dict, context: Any) -> Array:
        output = call(*args, **kwargs)
        inputs = args[0] if args else kwargs.get("inputs")
        if context.method_name != "__call__" or type(context.module) not in _ROWS:
            return output
        if offsets is not None:
            output = output + offsets[len(calls)]
        parameters = context.module.variables.get("params", {})
        calls.append(Call(context.module, parameters, inputs, output))
        return output

    with nn.intercept_methods(tap):
        yield


def _dense_rows(module: nn.Dense, x: Array) -> Array | None:
    if module.dot_general is not None or module.dot_general_cls is not None:
        return None
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _conv_rows(module: nn.Conv, x: Array) -> Array | None:
    """The patches of a plain two-dimensional convolution."""

    def pair(value: Any) -> tuple[Any, Any]:
        return tuple(value) if isinstance(value, tuple | list) else (value or 1,) * 2

    padding, own = module.padding, module.conv_general_dilated
    plain = (
        x.ndim == 4
        and isinstance(module.kernel_size, tuple | list)
        and len(module.kernel_size) == 2
        and module.feature_group_count == 1
        and pair(module.input_dilation) == (1, 1)
        and module.mask is None
        and own in (None, lax.conv_general_dilated, patch_convolution, convolution)
        and module.conv_general_dilated_cls is None
        and (not isinstance(padding, str) or padding in ("SAME", "VALID"))
    )
    if not plain:
        return None
    if not isinstance(padding, str):
        sides = (padding,) * 2 if isinstance(padding, int) else padding
        padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in sides)
    patches = unfold(
        x,
        tuple(module.kernel_size),
        strides=pair(module.strides),
        padding=padding,
        dilation=pair(module.kernel_dilation),
    )
    return patches.reshape(x.shape[0], -1, patches.shape[-1])


_ROWS: dict[type[nn.Module], Callable[[Any, Array], Array | None]] = {
    nn.Dense: _dense_rows,
    nn.Conv: _conv_rows,
}


class Survey(NamedTuple):
    """What tracing a model says about it."""

    outputs: list[jax.ShapeDtypeStruct]
    """Tapped outputs of two queries."""
    uncovered: str | None
    """Why the calls do not explain all parameters, or None."""
    num_classes: int
    query_numbers: int
    """Inputs of layers and output cotangents of all classes: how many numbers a query needs."""


def survey(apply: Apply, params: Params, x: Array) -> Survey:
    """Trace the model on two and on three queries, for what depends on neither its data nor B.

    A parameter is explained when exactly one operation of the whole program reads it, and that
    operation is a known layer's, called with the queries along its first axis.
    """
    two, three = (_trace(apply, params, x, batch) for batch in (2, 3))
    same = len(two.calls) == len(three.calls) and all(
        a.inputs.shape[1:] == b.inputs.shape[1:] and a.output.shape[1:] == b.output.shape[1:]
        for a, b in zip(two.calls, three.calls, strict=True)
    )
    by_rows = same and all(
        array.shape[0] == batch
        for batch, traced in ((2, two), (3, three))
        for call in traced.calls
        for array in (call.inputs, call.output)
    )
    uncovered = two.uncovered if by_rows else "a layer's first axis is not the batch"
    outputs = [jax.ShapeDtypeStruct(c.output.shape, c.output.dtype) for c in two.calls]
    k = two.logits.shape[-1]
    numbers = 2 * k * sum(o.size // 2 for o in outputs) + two.row_numbers // 2 + x[:1].size
    return Survey(outputs, uncovered, k, numbers)


class _Traced(NamedTuple):
    logits: jax.ShapeDtypeStruct
    calls: list[Call]
    """With shapes in place of arrays."""
    row_numbers: int
    uncovered: str | None


def _trace(apply: Apply, params: Params, x: Array, batch: int) -> _Traced:
    leaves, rebuild = split_weights(params)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(weights(params))]
    calls: list[Call] = []
    owners: list[list[int]] = [[] for _ in leaves]
    row_numbers = 0
    strangers = False

    def run(leaves: list[Array], x: Array) -> Array:
        nonlocal row_numbers, strangers
        logits, seen = record(apply, rebuild(leaves), x)
        for i, call in enumerate(seen):
            inputs, output = (jax.ShapeDtypeStruct(v.shape, v.dtype) for v in call[2:])
            calls.append(Call(call.module, {}, inputs, output))
            # A layer inside another transformation holds other values than params.
            known = [
                at
                for own in jax.tree.leaves(call.parameters)
                for at, leaf in enumerate(leaves)
                if leaf is own
            ]
            strangers |= len(known) < len(jax.tree.leaves(call.parameters))
            rows = call.rows() if len(known) == len(call.parameters) else None
            if rows is not None:
                row_numbers += rows.size
                for at in known:
                    owners[at].append(i)
        return logits

    shape = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    program, logits = jax.make_jaxpr(run, return_shape=True)(leaves, shape)
    uses = [_uses(program.jaxpr, var) for var in program.jaxpr.invars[: len(leaves)]]
    uncovered = None
    for name, owner, count in zip(names, owners, uses, strict=True):
        if len(owner) > 1 or (owner and count > 1):
            uncovered = f"parameter {name} is used more than once"
        elif not owner:
            uncovered = f"parameter {name} belongs to no dense or plain convolution layer"
        if uncovered:
            break
    else:
        if strangers:
            uncovered = "a layer holds parameters that are not in params"
    return _Traced(logits, calls, row_numbers, uncovered)


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


def weights(params: Params) -> Params:
    """What G is taken over: the collection "params" where there is one, else everything."""
    return params["params"] if isinstance(params, Mapping) and "params" in params else params


def split_weights(params: Params) -> tuple[list[Array], Callable[[list[Array]], Params]]:
    """The leaves of the weights, and the function that puts others in their place."""
    leaves, tree = jax.tree.flatten(weights(params))

    def rebuild(leaves: list[Array]) -> Params:
        new = jax.tree.unflatten(tree, leaves)
        return new if weights(params) is params else {**params, "params": new}

    return leaves, rebuild
