"""Convolution as patches times a matrix, for XLA's CPU backend.

XLA runs a convolution inside `lax.scan` several times slower on a CPU than the same arithmetic as
one matrix product, and turns a `vmap` over kernels into a grouped convolution, slow everywhere.
`experiments/bench_training.py` measures both.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Padding = str | Sequence[tuple[int, int]]


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
    convolution. Columns are cut first, then rows: h + w slices in place of h * w, each a long run
    of memory, and as many additions in the transpose.
    """
    (h, w), (sh, sw), (dh, dw) = window, strides, dilation
    reach = ((h - 1) * dh + 1, (w - 1) * dw + 1)
    pads = (
        lax.padtype_to_pads(x.shape[1:3], reach, strides, padding)
        if isinstance(padding, str)
        else padding
    )
    if any(p for pair in pads for p in pair):
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = ((n - r) // s + 1 for n, r, s in zip(x.shape[1:3], reach, strides, strict=True))
    b, height, width, c = x.shape
    if dw == 1:  # one run of w * C numbers for every output column
        x = x.reshape(b, height, width * c)
        starts = range(0, columns * sw * c, sw * c)
        x = jnp.stack([x[:, :, at : at + w * c] for at in starts], axis=2)
    else:
        cut = [x[:, :, j * dw :: sw][:, :, :columns] for j in range(w)]
        x = jnp.stack(cut, axis=3).reshape(b, height, columns, w * c)
    cut = [x[:, i * dh :: sh][:, :rows] for i in range(h)]
    return jnp.stack(cut, axis=3).reshape(b, rows, columns, h * w * c)


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
    **kwargs,
) -> Array:
    """`lax.conv_general_dilated` for NHWC images as one matrix product.

    Takes the arguments that `flax.linen.Conv(conv_general_dilated=...)` passes, so the module and
    its parameters stay ordinary. Grouped, transposed, or not two-dimensional convolutions go to
    `lax.conv_general_dilated` unchanged.
    """
    dilated = lhs_dilation is not None and any(d != 1 for d in lhs_dilation)
    if x.ndim != 4 or feature_group_count != 1 or dilated:
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
    h, w, _, features = kernel.shape
    patches = unfold(
        x,
        (h, w),
        strides=tuple(window_strides),
        padding=padding,
        dilation=tuple(rhs_dilation or (1, 1)),
    )
    return jnp.matmul(patches, kernel.reshape(-1, features), precision=precision)


def convolution(x: Array, kernel: Array, *args, **kwargs) -> Array:
    """The faster of the two convolutions on the default backend: patches on a CPU, XLA's elsewhere.

    The choice is made when the program is traced; a model that is lowered for another platform
    names its convolution itself, for instance `LeNet(10, convolution=lax.conv_general_dilated)`.
    """
    chosen = patch_convolution if jax.default_backend() == "cpu" else lax.conv_general_dilated
    return chosen(x, kernel, *args, **kwargs)


def max_pool_2x2(x: Array) -> Array:
    """Maximum over disjoint 2 x 2 windows, [B, H, W, C] -> [B, H/2, W/2, C], by reshaping.

    An odd last row or column is left out, as `flax.linen.max_pool(x, (2, 2), (2, 2))` does. The
    gradient of a reshaped maximum is a comparison; that of a window reduction is a
    select-and-scatter, slow on a CPU. Equal maxima share the gradient.
    """
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
