"""Rows in chunks: bounded memory, one compiled body."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

Array = jax.Array

QUERIES = 1000
"""Solved at a time at most: more make nothing faster."""
MEMORY = 2**31
"""Bytes that intermediate results may take where nothing else is said."""


def map_chunks(function: Callable[[Any], Any], x: Any, chunk: int) -> Any:
    """Apply function to x [N, ...] in chunks of at most `chunk` rows, and join the results.

    x is an array or a pytree of arrays with the same N; function([n, ...]) -> a pytree of
    [n, ...], every row a function of its own row of x. Chunks are as even as can be; the last is
    filled up with copies, whose results are dropped, so that one body is compiled. N may be
    symbolic, as in an export for batches of any size.
    """
    n = jax.tree.leaves(x)[0].shape[0]
    if isinstance(n, int) and n <= chunk:
        return function(x)
    count = _ceil(n, jax.core.min_dim(n, chunk))
    chunk = _ceil(n, count)
    # Gathers, as a symbolic N has no padding that is known not to be negative.
    rows = jnp.minimum(jnp.arange(count * chunk), n - 1)
    x = jax.tree.map(lambda a: a[rows].reshape(count, chunk, *a.shape[1:]), x)
    results = jax.lax.map(function, x)
    return jax.tree.map(lambda a: a.reshape(count * chunk, *a.shape[2:])[jnp.arange(n)], results)


def _ceil(n: Any, size: Any) -> Any:
    """N / size rounded up, at least 1, which a symbolic one is not known to be."""
    return jax.core.max_dim((n + size - 1) // size, 1)


_AT_MOST = 5000
"""Times a query's own bytes: four times what a search of the 512 subsets of ten classes makes."""


def map_within(function: Callable[[Any], Any], x: Any, memory: int | None = None) -> Any:
    """`map_chunks` with as many rows at a time as fit, by `bytes_made`, into memory bytes.

    At least one row, at most `QUERIES`; memory is `MEMORY` by default. Without a bound of the
    user's, few and small rows are not counted, which takes a trace: they go at once.
    """
    leaves = jax.tree.leaves(x)
    n, size = leaves[0].shape[0], sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in leaves)
    if memory is None and isinstance(n, int) and n * size * _AT_MOST <= MEMORY:
        return map_chunks(function, x, QUERIES)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), x)
    fit = (MEMORY if memory is None else memory) // max(bytes_made(function, one), 1)
    return map_chunks(function, x, min(max(fit, 1), QUERIES))


def bytes_of(tree: Any) -> int:
    """Bytes of the arrays of a pytree, or of those of these shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_made(function: Callable[..., Any], *args: Any) -> int:
    """Bytes of all that a function computes on the way, counted in a trace.

    args are arrays or `jax.ShapeDtypeStruct`. It is what the function would take if nothing were
    freed; what a loop's body makes counts once.
    """
    return sum(
        int(np.prod(out.aval.shape)) * out.aval.dtype.itemsize
        for jaxpr in nested(jax.make_jaxpr(function)(*args).jaxpr)
        for equation in jaxpr.eqns
        for out in equation.outvars
        if hasattr(out.aval, "dtype")
    )


def nested(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    """A program, and those inside its operations: bodies of loops, branches, calls."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for inner in inside(equation):
            yield from nested(inner)


def inside(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs in one operation."""
    values = list(equation.params.values())
    for inner in jax.tree.leaves(values, is_leaf=lambda a: isinstance(a, ClosedJaxpr | Jaxpr)):
        if isinstance(inner, ClosedJaxpr | Jaxpr):
            yield getattr(inner, "jaxpr", inner)
