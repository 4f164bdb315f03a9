"""Convolution in the forms that suit the platform, and cells side by side.

Inside `lax.scan` XLA runs the derivatives of a convolution, and convolutions of few channels,
several times slower on a CPU than the same arithmetic as a product of patches and a matrix.
`experiments/bench_training.py` and `experiments/bench_mad.py` measure it. And on any platform the
convolutions of cells side by side, whose kernels differ, are one grouped convolution, where the
products of patches are one batched product.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from madjax import backend

Array = jax.Array
Padding = str | Sequence[tuple[int, int]]


_MANY_COLUMNS = 64
"""Beyond so many a piece for each would make the program of `unfold` slow to compile: VGG16's for
224x224 took four times as long."""


def unfold(
    x: Array,
    window: tuple[int, int],
    *,
    strides: tuple[int, int] = (1, 1),
    padding: Padding = "VALID",
    dilation: tuple[int, int] = (1, 1),
) -> Array:
    """The patches under a sliding window, flattened: [B, H, W, C] -> [B, H', W', h*w*C].

    The last axis is ordered (row, column, channel), as `kernel.reshape(-1, features)` of a kernel
    [h, w, C, features] is, so that `unfold(x, ...) @ kernel.reshape(-1, features)` is the
    convolution. Columns are cut first, then rows: long runs of memory in place of h * w short ones.
    """
    x, (rows, columns) = _pad(x, window, strides, padding, dilation)
    (h, w), (sh, sw), (dh, dw) = window, strides, dilation
    b, height, width, c = x.shape
    if dw == 1 and columns <= _MANY_COLUMNS:  # one run of w * C numbers for every output column
        x = x.reshape(b, height, width * c)
        starts = range(0, columns * sw * c, sw * c)
        x = jnp.stack([x[:, :, at : at + w * c] for at in starts], axis=2)
    else:
        x = _cut_columns(x, w, columns, sw, dw)
    return jnp.stack(_cut_rows(x, h, rows, sh, dh), axis=3).reshape(b, rows, columns, h * w * c)


def _pad(
    x: Array,
    window: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
) -> tuple[Array, tuple[int, int]]:
    """The image with its margins, and the rows and columns of the result."""
    reach = tuple((n - 1) * d + 1 for n, d in zip(window, dilation, strict=True))
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], reach, strides, padding)
    if any(p for pair in padding for p in pair):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    sizes = zip(x.shape[1:3], reach, strides, strict=True)
    rows, columns = ((n - r) // s + 1 for n, r, s in sizes)
    return x, (rows, columns)


def _cut_columns(x: Array, w: int, columns: int, stride: int, dilation: int) -> Array:
    """[B, H, W, C] -> [B, H, W', w*C]: the columns under each position of the window."""
    cut = [x[:, :, j * dilation :: stride][:, :, :columns] for j in range(w)]
    return jnp.concatenate(cut, axis=-1)


def _cut_rows(x: Array, h: int, rows: int, stride: int, dilation: int) -> list[Array]:
    """The i-th array holds the row of x under the i-th row of the window, for every position."""
    return [x[:, i * dilation :: stride][:, :rows] for i in range(h)]


_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


class _ConvOptions(NamedTuple):
    """The options of a convolution."""

    strides: tuple[int, int]
    padding: Padding
    dilation: tuple[int, int]
    precision: lax.PrecisionLike
    own_from: float
    """Channels from which on XLA's own convolution is taken."""


_MANY = 32
"""From so many channels on XLA's own convolution beats patches on a CPU (3 x 3 windows, 2026)."""
WIDE = 64
"""From so many channels on XLA's own convolution is taken on an accelerator. That is a guess. Cells
whose networks have such layers are trained one after another (`madjax.sweep.mesh.one_by_one`)."""


def _evaluate(x: Array, kernel: Array, options: _ConvOptions) -> Array:
    """The convolution by whichever way is faster, which goes by the shapes.

    XLA's own takes a slow road for images smaller than the window and for few channels.
    """
    h, w, channels, features = kernel.shape
    if channels >= options.own_from and x.shape[1] >= h and x.shape[2] >= w:
        return lax.conv_general_dilated(
            x,
            kernel,
            options.strides,
            options.padding,
            rhs_dilation=options.dilation,
            dimension_numbers=_NHWC,
            precision=options.precision,
        )
    patches = unfold(
        x, (h, w), strides=options.strides, padding=options.padding, dilation=options.dilation
    )
    # Two-dimensional, so that its transpose is a product without a transposed copy.
    flat = patches.reshape(-1, patches.shape[-1])
    out = jnp.matmul(flat, kernel.reshape(-1, features), precision=options.precision)
    return out.reshape(*patches.shape[:-1], features)


_convolve = jax.custom_jvp(_evaluate, nondiff_argnums=(2,))


def _convolve_jvp(
    options: _ConvOptions, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    """Linear in each argument; both tangents are written for what their transposes cost."""
    (x, kernel), (dx, dkernel) = primals, tangents
    out = _convolve(x, kernel, options)
    tangent = jnp.zeros_like(out)
    if not isinstance(dkernel, SymbolicZero):
        # The barrier keeps the kernel's gradient as [features, h*w*C] until it is summed: XLA would
        # fold the transpose into a product that runs at half the speed.
        flat = lax.optimization_barrier(dkernel.reshape(-1, dkernel.shape[-1]).T)
        patches = unfold(
            x,
            kernel.shape[:2],
            strides=options.strides,
            padding=options.padding,
            dilation=options.dilation,
        )
        product = jnp.einsum(
            "np,op->no", patches.reshape(-1, patches.shape[-1]), flat, precision=options.precision
        )
        tangent += product.reshape(out.shape)
    if not isinstance(dx, SymbolicZero):
        many = kernel.shape[2] >= options.own_from and options.strides == (1, 1)
        push = _by_the_flipped_kernel if many else _by_rows
        tangent += push(dx, kernel, out, options)
    return out, tangent


_convolve.defjvp(_convolve_jvp, symbolic_zeros=True)


def _by_the_flipped_kernel(dx: Array, kernel: Array, out: Array, options: _ConvOptions) -> Array:
    """The convolution of dx, as the transpose of the convolution that its own transpose is.

    That one takes cotangents to the image with the flipped kernel. JAX's rule would leave the
    exchange of the kernel's channels to the convolution, which XLA runs at a sixth of the speed
    inside a loop; here the kernel is flipped and exchanged first.
    """
    reach = [(n - 1) * d + 1 for n, d in zip(kernel.shape[:2], options.dilation, strict=True)]
    padding = options.padding
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(dx.shape[1:3], reach, options.strides, padding)
    margins = [(r - 1 - low, r - 1 - high) for r, (low, high) in zip(reach, padding, strict=True)]
    if any(m < 0 for pair in margins for m in pair):
        return _by_rows(dx, kernel, out, options)
    flipped = lax.optimization_barrier(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))

    def pull(cotangent: Array) -> Array:
        return _evaluate(cotangent, flipped, options._replace(padding=margins))

    (pushed,) = jax.linear_transpose(pull, out)(dx)
    return pushed


def _by_rows(dx: Array, kernel: Array, out: Array, options: _ConvOptions) -> Array:
    """The convolution of dx, cut so that its transpose adds few arrays.

    The transpose of `unfold` would scatter h * w overlapping pieces. One product for each row of
    the kernel has h products of the same total size, whose transposes are added row by row.
    """
    h, w, _, features = kernel.shape
    dx, (rows, columns) = _pad(dx, (h, w), options.strides, options.padding, options.dilation)
    dx = _cut_columns(dx, w, columns, options.strides[1], options.dilation[1])
    total = jnp.zeros_like(out)
    for i, part in enumerate(_cut_rows(dx, h, rows, options.strides[0], options.dilation[0])):
        flat = part.reshape(-1, part.shape[-1])
        product = jnp.matmul(flat, kernel[i].reshape(-1, features), precision=options.precision)
        total += product.reshape(out.shape)
    return total


def patch_convolution(
    x: Array,
    kernel: Array,
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvDimensionNumbers | None = None,
    feature_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    own_from: float = _MANY,
    **kwargs,
) -> Array:
    """`lax.conv_general_dilated` for NHWC images, as products of patches and a matrix.

    From `own_from` channels on it is XLA's own; by default where that is faster on a CPU. Takes the
    arguments that `flax.linen.Conv(conv_general_dilated=...)` passes, so the module and its
    parameters stay ordinary. Grouped, transposed, or not two-dimensional convolutions, other
    layouts and other options go to `lax.conv_general_dilated` unchanged.
    """
    dilated = lhs_dilation is not None and any(d != 1 for d in lhs_dilation)
    layout = lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
    if x.ndim != 4 or feature_group_count != 1 or dilated or layout != _NHWC or kwargs:
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
            **kwargs,
        )
    padding = padding if isinstance(padding, str) else tuple(map(tuple, padding))
    options = _ConvOptions(
        tuple(window_strides), padding, tuple(rhs_dilation or (1, 1)), precision, own_from
    )
    return _convolve(x, kernel, options)


def convolution(x: Array, kernel: Array, *args, **kwargs) -> Array:
    """The form of `lax.conv_general_dilated` that suits the default backend.

    On a CPU that is `patch_convolution`, for speed. Elsewhere it is that too below `WIDE` channels,
    so that small networks side by side are batched products; from `WIDE` on it is XLA's own.

    The choice is made when the program is traced; a model that is lowered for another platform
    names its convolution itself, for instance `LeNet(10, convolution=lax.conv_general_dilated)`.
    """
    if backend.platform() == "cpu":
        return patch_convolution(x, kernel, *args, **kwargs)
    if kernel.shape[-2] < WIDE:
        return patch_convolution(x, kernel, *args, own_from=math.inf, **kwargs)
    return lax.conv_general_dilated(x, kernel, *args, **kwargs)


@jax.custom_jvp
def max_pool_2x2(x: Array) -> Array:
    """Maximum over disjoint 2 x 2 windows, [B, H, W, C] -> [B, H/2, W/2, C], by reshaping.

    An odd last row or column is left out, as `flax.linen.max_pool(x, (2, 2), (2, 2))` does. The
    gradient of a reshaped maximum is a comparison; that of a window reduction is a
    select-and-scatter, slow on a CPU. Equal maxima share the gradient.
    """
    return _windows(x).max(axis=(2, 4))


@max_pool_2x2.defjvp
def _max_pool_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    corners = [(i, j) for i in (0, 1) for j in (0, 1)]
    (a, b, c, d), moves = (
        [_windows(x)[:, :, i, :, j] for i, j in corners] for x in (primals[0], tangents[0])
    )
    # Compared with each other, not with the maximum: XLA may compute what is pooled twice, rounded
    # in two ways, and then none of the four equals a maximum that was taken elsewhere.
    largest = (
        (a >= b) & (a >= c) & (a >= d),
        (b >= a) & (b >= c) & (b >= d),
        (c >= a) & (c >= b) & (c >= d),
        (d >= a) & (d >= b) & (d >= c),
    )
    moved = sum(jnp.where(is_it, move, 0) for is_it, move in zip(largest, moves, strict=True))
    ties = sum(is_it.astype(moved.dtype) for is_it in largest)
    return max_pool_2x2(primals[0]), moved / jnp.maximum(ties, 1)


def _windows(x: Array) -> Array:
    b, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
