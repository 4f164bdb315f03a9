"""BatchNorm with the statistics of a query alone: what a surrogate in training mode computes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict
from jax.extend.core import get_opaque_trace_state

from madjax.errors import InputError

Array = jax.Array
Params = Any
Apply = Callable[[Params, Array], Array]


@dataclass(frozen=True)
class _QueryStatistics:
    """See `query_statistics`; equal where apply is, so that programs are compiled once."""

    apply: Apply

    def __call__(self, params: Params, x: Array) -> Array:
        seen: set[tuple[str, ...]] = set()
        outside = get_opaque_trace_state(convention="flax")

        def replace(call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
            module = context.module
            if type(module) is not nn.BatchNorm or context.method_name != "__call__":
                return call(*args, **kwargs)
            # What jit traces here it would give to calls that want the running statistics.
            if get_opaque_trace_state(convention="flax") == outside:
                seen.add(module.path)
                return _by_itself(module, *args, **kwargs)
            return call(*args, **kwargs)

        apply = self.apply
        apply = apply.__wrapped__ if isinstance(apply, jax.stages.Wrapped) else apply
        with nn.intercept_methods(replace):
            logits = apply(params, x)
        if missed := _with_statistics(params) - seen:
            name = "/".join(min(missed))
            raise InputError(
                f"{name} is no plain flax.linen.BatchNorm outside of jit and other "
                "transformations, which query_statistics needs: make it one, or leave the "
                "statistics as they are"
            )
        return logits


def query_statistics(apply: Apply) -> Apply:
    """A model whose BatchNorm layers take the statistics of each query alone.

    Of a feature with values x_p at the positions p of a query, y_p = scale (x_p - mean_p x) /
    sqrt(var_p x + epsilon) + bias: what training mode computes for a batch of one. So the authors'
    code runs its surrogate, which it never puts in inference mode, on one query at a time. The
    running statistics are not read, and not changed.

    Args:
        apply: apply(params, x [B, ...]) -> logits [B, K] of a Flax linen model in inference mode.

    Returns:
        Such a function, whose rows are each a function of their own x. Of equal functions it makes
        equal ones, so that programs are compiled once.

    Edge cases:
        no flax.linen.BatchNorm: the logits of apply.
        a query alone: as in any batch.

    Raises:
        InputError: when the model runs: a BatchNorm behind a dense layer, or at the one position of
            a feature map, where a query has a single value of each feature; one inside jit or
            another transformation, or of a subclass.

    Example:
        >>> import jax, madjax
        >>> surrogate = madjax.query_statistics(madjax.VGG16(10).apply)
        >>> x = jax.ShapeDtypeStruct((4, 32, 32, 3), "float32")
        >>> variables = jax.eval_shape(madjax.VGG16(10).init, jax.random.key(0), x)
        >>> jax.eval_shape(surrogate, variables, x).shape
        (4, 10)
    """
    return _QueryStatistics(apply)


def _by_itself(
    module: nn.BatchNorm,
    x: Array,
    use_running_average: bool | None = None,
    *,
    mask: Array | None = None,
) -> Array:
    """What a BatchNorm makes of x with the statistics of each of its rows."""
    del use_running_average
    axes = {axis % x.ndim for axis in _each(module.axis)}
    if all(size == 1 for axis, size in enumerate(x.shape[1:], 1) if axis not in axes):
        raise InputError(
            f"{'/'.join(module.path)} has one value of each feature of a query, which has no "
            "statistics: leave query_statistics out, or take larger images"
        )
    same = (
        *("epsilon", "dtype", "param_dtype", "use_bias", "use_scale"),
        *("use_fast_variance", "force_float32_reductions"),
    )
    norm = nn.InstanceNorm(
        **{name: getattr(module, name) for name in same}, feature_axes=module.axis, parent=None
    )
    return norm.apply({"params": module.variables.get("params", {})}, x, mask=mask)


def _each(axes: int | tuple[int, ...]) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)


def _with_statistics(params: Params) -> set[tuple[str, ...]]:
    """The paths of a model's BatchNorm layers."""
    held = params.get("batch_stats", {}) if isinstance(params, Mapping) else {}
    return {path[:-1] for path in flatten_dict(dict(held)) if path[-1] == "var"}
