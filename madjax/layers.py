"""What the parameters of one layer add to the Gram matrix, from its input and output cotangents.

A layer with input a and output cotangents d_k, k = 1..K, gives each of its parameters a gradient
g_k that is a short formula in a and d_k. `GramTerm` is that formula for one parameter: `reduce`
turns the cotangents of some classes into the numbers that are needed later, `product` turns those
of all classes into g_k . g_l. In between nothing of the network is needed, so classes can be pulled
back a few at a time. Positions p are all axes of a layer's output between the batch and the
features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from madjax.conv import convolution, patch_convolution, unfold
from madjax.errors import InputError

Array = jax.Array


class GramTerm(Protocol):
    """The gradient of one parameter as a function of the layer's output cotangents."""

    def reduce(self, d: Array, num_classes: int) -> Array:
        """Output cotangents [k, B, ...], float32, of some classes -> what is kept, [k, B, ...]."""

    def product(self, kept: Array) -> Array:
        """What is kept of all K classes, [K, B, ...] -> [B, K, K], sum_n g_kn g_ln."""


@dataclass(frozen=True)
class Kernel:
    """g_k = sum_p a_p (x) d_kp: a matrix [F, O] that multiplies rows, in G separate groups.

    A dense layer has one row for every position, a convolution the patch under its window. A bias
    is one more row of the matrix, which multiplies 1.
    """

    rows: Array
    """a: [B, P, G, F], float32."""
    bias: bool

    def reduce(self, d: Array, num_classes: int) -> Array:
        """The gradients [k, B, G O F], or the cotangents [k, B, P, G, O] where they cost less."""
        b, p, g, f = self.rows.shape
        f += self.bias
        d = d.reshape(len(d), b, p, g, -1)
        k, o = num_classes, d.shape[-1]
        materialise = k * p * f * o + k * k * f * o
        products = p * p * f + k * p * p * o + k * k * p * o
        if products <= materialise:
            return d
        # All classes beside each other make one long product; XLA would choose short ones.
        wide = lax.optimization_barrier(d.transpose(1, 2, 3, 0, 4)).reshape(b, p, g, -1)
        margin = ((0, 0), (0, 0), (0, 0), (0, int(self.bias)))
        rows = jnp.pad(self.rows, margin, constant_values=1)
        gradients = jnp.einsum("bpgf,bpgn->bgfn", rows, wide)
        gradients = gradients.reshape(b, g * f, len(d), o)
        return gradients.transpose(2, 0, 1, 3).reshape(len(d), b, -1)

    def product(self, kept: Array) -> Array:
        """By the gradients, or as sum_pq (a_p . a_q) (d_kp . d_lq) without forming them."""
        if kept.ndim == 3:
            return _inner(kept)
        products = jnp.einsum("bpgf,bqgf->bgpq", self.rows, self.rows) + int(self.bias)
        return _weighted_inner(products, kept)


@dataclass(frozen=True)
class Lookup:
    """g_k = sum_p onehot(i_p) (x) d_kp: a table [V, O] of which tokens i_p pick the rows."""

    tokens: Array
    """i: [B, P], whole numbers."""

    def reduce(self, d: Array, num_classes: int) -> Array:
        """The cotangents [k, B, P, 1, O]: the gradient is as large as the table."""
        del num_classes
        return d.reshape(len(d), *self.tokens.shape, 1, -1)

    def product(self, kept: Array) -> Array:
        """sum_pq [i_p = i_q] (d_kp . d_lq)."""
        same = self.tokens[:, None, :, None] == self.tokens[:, None, None, :]
        return _weighted_inner(same.astype(jnp.float32), kept)


@dataclass(frozen=True)
class Scale:
    """g_k = sum_p a_p * d_kp, feature by feature: the scale of a normalisation."""

    inputs: Array
    """a: [B, P, O], float32."""

    def reduce(self, d: Array, num_classes: int) -> Array:
        """The gradients [k, B, O]."""
        del num_classes
        return jnp.einsum("bpo,kbpo->kbo", self.inputs, d.reshape(len(d), *self.inputs.shape))

    def product(self, kept: Array) -> Array:
        """By the gradients."""
        return _inner(kept)


@dataclass(frozen=True)
class Bias:
    """g_k = sum_p d_kp: what is added to every position."""

    size: int

    def reduce(self, d: Array, num_classes: int) -> Array:
        """The gradients [k, B, O]."""
        del num_classes
        return d.reshape(*d.shape[:2], -1, self.size).sum(axis=2)

    def product(self, kept: Array) -> Array:
        """By the gradients."""
        return _inner(kept)


def _inner(g: Array) -> Array:
    """sum_n g_kn g_ln: [K, B, N] -> [B, K, K]."""
    g = g.swapaxes(0, 1)  # queries first, or XLA's CPU backend takes twice the time
    return jnp.einsum("bkn,bln->bkl", g, g)


def _weighted_inner(weights: Array, d: Array) -> Array:
    """sum_gpq weights_gpq (d_kpg . d_lqg): [B, G, P, P] and [K, B, P, G, O] -> [B, K, K]."""
    d = lax.optimization_barrier(d.transpose(1, 3, 0, 2, 4))
    weighted = jnp.einsum("bgpq,bgkqo->bgkpo", weights, d)
    b, _, k = d.shape[:3]
    weighted, d = (each.swapaxes(1, 2).reshape(b, k, -1) for each in (weighted, d))
    return jnp.einsum("bkn,bln->bkl", weighted, d)


# --- layers ---------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call of a layer."""

    module: nn.Module
    variables: Mapping[str, Any]
    inputs: Array
    options: Mapping[str, Any]
    """Arguments of the call other than the inputs."""
    output: Array

    @property
    def parameters(self) -> Mapping[str, Array]:
        """The layer's parameters by name."""
        return self.variables.get("params", {})


MIXING = (nn.BatchNorm, nn.Dropout)
"""Layers that in training mode make the answer to one query depend on its batch."""


def check_rows_are_apart(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Refuse one of the `MIXING` layers in training mode.

    options are the arguments of the call by name.

    Raises:
        InputError: a BatchNorm that takes its batch's statistics, or a Dropout that drops.
    """
    flag = "use_running_average" if isinstance(module, nn.BatchNorm) else "deterministic"
    if getattr(module, "rate", 1) == 0:  # a Dropout that never drops
        return
    if not nn.merge_param(flag, getattr(module, flag), options.get(flag)):
        kind = type(module).__name__
        raise InputError(
            f"{'/'.join(module.path) or kind} is a {kind} in training mode, whose answers depend "
            f"on the other queries of a batch or their order: apply the model with {flag}=True"
        )


def known(module: nn.Module) -> bool:
    """Whether the type of a layer has terms."""
    return type(module) in _TERMS


def terms(call: Call) -> list[GramTerm] | None:
    """Terms for all the parameters of a layer, or None where this call is not the plain layer."""
    found = _TERMS[type(call.module)](call)
    if found is None or {name for names in found for name in names} != call.parameters.keys():
        return None
    return list(found.values())


Explained = dict[tuple[str, ...], GramTerm]
"""A term, by the names of the parameters whose gradient it is."""


def _product(call: Call, rows: Array) -> Explained:
    """A kernel that multiplies rows [B, P, G, F], and its bias if there is one."""
    bias = "bias" in call.parameters
    names = ("kernel", "bias") if bias else ("kernel",)
    return {names: Kernel(rows.astype(jnp.float32), bias)}


def _dense(call: Call) -> Explained | None:
    module, x = call.module, call.inputs
    if call.options or module.dot_general is not None or module.dot_general_cls is not None:
        return None
    return _product(call, x.reshape(x.shape[0], -1, 1, x.shape[-1]))


def _dense_general(call: Call) -> Explained | None:
    """Over the last axes of the input: the projections of an attention layer."""
    module, x = call.module, call.inputs
    axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    axes = tuple(axis % x.ndim for axis in axes)
    last = tuple(range(x.ndim - len(axes), x.ndim))
    plain = axes == last and 0 not in axes and not module.batch_dims and not call.options
    if not plain or module.dot_general is not None or module.dot_general_cls is not None:
        return None
    width = int(np.prod([x.shape[axis] for axis in axes]))
    return _product(call, x.reshape(x.shape[0], -1, 1, width))


def _conv(call: Call) -> Explained | None:
    """A convolution over one or two axes, in groups or not."""
    module, x = call.module, call.inputs
    own = (None, lax.conv_general_dilated, patch_convolution, convolution)
    if (
        call.options
        or x.ndim not in (3, 4)
        or x.ndim != len(_each(module.kernel_size, 1)) + 2
        or any(d != 1 for d in _each(module.input_dilation, x.ndim - 2))
        or module.mask is not None
        or module.conv_general_dilated not in own
        or module.conv_general_dilated_cls is not None
        or (isinstance(module.padding, str) and module.padding not in ("SAME", "VALID"))
    ):
        return None
    window, strides, dilation = (
        _each(value, x.ndim - 2)
        for value in (module.kernel_size, module.strides, module.kernel_dilation)
    )
    padding = module.padding
    if not isinstance(padding, str):
        sides = _each(padding, x.ndim - 2)
        padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in sides)
    if x.ndim == 3:  # an image of one row
        x, window, strides, dilation = x[:, None], (1, *window), (1, *strides), (1, *dilation)
        padding = padding if isinstance(padding, str) else ((0, 0), *padding)
    patches = unfold(x, window, strides=strides, padding=padding, dilation=dilation)
    groups, channels = module.feature_group_count, x.shape[-1]
    rows = patches.reshape(x.shape[0], -1, window[0] * window[1], groups, channels // groups)
    rows = rows.swapaxes(2, 3).reshape(*rows.shape[:2], groups, -1)
    return _product(call, rows)


def _each(value: Any, count: int) -> tuple[Any, ...]:
    """An option of `nn.Conv` for every axis."""
    if isinstance(value, tuple | list):
        return tuple(value) * count if len(value) == 1 else tuple(value)
    return (1 if value is None else value,) * count


def _embed(call: Call) -> Explained | None:
    tokens = call.inputs.reshape(call.inputs.shape[0], -1)
    return None if call.options else {("embedding",): Lookup(tokens)}


def _normalisation(call: Call) -> Explained | None:
    """Scale and bias over the last axis, after a normalisation of each example by itself."""
    if call.options:
        return None
    return _scaled(call, {})


def _batch_norm(call: Call) -> Explained | None:
    if set(call.options) - {"use_running_average"}:
        return None
    return _scaled(call, {"batch_stats": call.variables["batch_stats"]})


def _scaled(call: Call, state: Mapping[str, Any]) -> Explained | None:
    module, x = call.module, call.inputs
    features = getattr(module, "feature_axes", getattr(module, "axis", -1))
    if _each(features, 1) not in ((-1,), (x.ndim - 1,)):
        return None
    bare = {"dtype": jnp.float32, "parent": None, "name": None}
    changes = {"use_scale": False, "use_bias": False, "use_running_average": True}
    bare |= {field: value for field, value in changes.items() if hasattr(module, field)}
    normalised = module.clone(**bare).apply(state, x)
    made = {
        "scale": Scale(normalised.reshape(x.shape[0], -1, x.shape[-1])),
        "bias": Bias(x.shape[-1]),
    }
    return {(name,): made[name] for name in call.parameters}


_TERMS: dict[type[nn.Module], Callable[[Call], Explained | None]] = {
    nn.Dense: _dense,
    nn.DenseGeneral: _dense_general,
    nn.Conv: _conv,
    nn.Embed: _embed,
    nn.BatchNorm: _batch_norm,
    nn.LayerNorm: _normalisation,
    nn.RMSNorm: _normalisation,
    nn.GroupNorm: _normalisation,
    nn.InstanceNorm: _normalisation,
}
