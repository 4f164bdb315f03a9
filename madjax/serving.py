"""The defence before a real classifier: batches, one function, and a file that holds it.

`perturb` poisons a batch of posteriors. `defend` joins the victim's forward pass, the Gram matrix
of the surrogate and the solution into one jit-able function of the queries. `export` lowers either
to StableHLO, parameters included, for platforms that need not be there; `load` runs such a file
without the code of the model.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from madjax.batching import map_within
from madjax.errors import InputError
from madjax.files import check_can_write, write_atomically
from madjax.gram import gram
from madjax.mad import (
    AnySolver,
    LineSearch,
    as_posterior,
    check_epsilon,
    check_gram,
    check_solver,
    solve,
)
from madjax.taps import as_logits
from madjax.weights.fits import check_finite

Array = jax.Array
Predict = Callable[..., Array]

PLATFORMS = ("cpu", "cuda", "tpu")


def perturb(
    apply: Callable[[Any, Array], Array],
    params: Any,
    x: Array,
    y: Array,
    *,
    epsilon: Array | float,
    solver: AnySolver = LineSearch(),
    layers: str = "all",
    gram_method: str = "auto",
    chunk: int | None = None,
    memory: int | None = None,
) -> Array:
    """Poison a batch of posteriors: `gram` of the surrogate at x, then `solve` for every query.

    y~ = argmax H(y~) s.t. distance(y~, y) <= epsilon (Eq. 4 to 7), for every row of y. Programs are
    compiled once for each apply and each shape: give the same function at every call, and not a new
    lambda, which compiles the surrogate's Gram matrix anew.

    Args:
        apply: the surrogate, apply(params, x [B, ...]) -> logits [B, K].
        params: the surrogate's parameters.
        x: the queries [B, ...].
        y: the victim's posteriors [B, K]; see `solve`.
        epsilon: one budget, or a grid of them [E], which costs hardly more than one.
        solver: see `solve`. Programs are compiled once for each, too. Equal ones count as one, but
            no two with a `functools.partial` are equal: make such a solver once.
        layers: see `gram`.
        gram_method: the method of `gram`.
        chunk: see `gram`.
        memory: bytes of intermediate results, of `gram` and of the solution; queries go in chunks
            that fit. The Gram matrices themselves, 4 B K^2 bytes, come on top.

    Returns:
        y_tilde float32 [B, K], or [E, B, K] for a grid. Every row is a function of its own x and y.

    Edge cases:
        epsilon = 0: y, bit for bit.
        no query: y_tilde is [0, K].
        a grid of no budgets: y_tilde is [0, B, K].
        a query alone: the answer it has in any batch.
        under jit, a query whose gradients leave float32: the answer of G = I, for which gram is the
            identity. Where nothing is traced it is refused.

    Raises:
        InputError: see `solve`, shapes that do not fit, and, under jit, parameters that are known
            there and not finite.

    Example:
        >>> import jax, madjax
        >>> x, w = jax.random.normal(jax.random.key(0), (2, 4, 4))
        >>> query = lambda w, x: x @ w, w, x, jax.nn.softmax(3 * x)
        >>> madjax.perturb(*query, epsilon=[0.5, 1], gram_method="jacrev").shape
        (2, 4, 4)
    """
    check_epsilon(epsilon)
    check_solver(solver)
    y = as_posterior(y)
    if y.ndim != 2 or y.shape[0] != x.shape[0]:
        raise InputError(
            f"perturb takes posteriors y [B, K] for {x.shape[0]} queries, not {y.shape}"
        )
    epsilon = jnp.asarray(epsilon, jnp.float32)
    if epsilon.ndim > 1:
        raise InputError(f"epsilon has shape {epsilon.shape}: give one budget or a list of them")
    m = gram(apply, params, x, layers=layers, method=gram_method, chunk=chunk, memory=memory)
    check_gram(m)
    if isinstance(m, jax.core.Tracer):
        _check_finite(params)
    if m.shape[-1] != y.shape[-1]:
        raise InputError(
            f"the surrogate has {m.shape[-1]} classes and the posteriors {y.shape[-1]}: "
            "give a surrogate with the victim's classes"
        )

    return _solve_all(solver, memory, y, m, epsilon)


def _check_finite(params: Any) -> None:
    """Refuse parameters that a compiled program would hold, and that are NaN or infinite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        known = not isinstance(leaf, jax.core.Tracer)
        if known and jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            name = f"the parameter {jax.tree_util.keystr(path)}"
            check_finite("the surrogate", name, np.asarray(leaf).astype(np.float32))


@partial(jax.jit, static_argnums=(0, 1))
def _solve_all(
    solver: AnySolver, memory: int | None, y: Array, gram: Array, epsilon: Array
) -> Array:
    """Queries [B, ...] at one budget or at E of them: [B, K] or [E, B, K]."""

    def answer(query: tuple[Array, Array]) -> Array:
        y, gram = query
        # Or a query that takes its gradients out of float32 would be told the truth.
        gram = jnp.where(jnp.isfinite(gram).all(), gram, jnp.eye(y.size, dtype=gram.dtype))

        def within(epsilon: Array) -> Array:
            return solve(y, gram, epsilon=epsilon, solver=solver)

        return jax.vmap(within)(epsilon) if epsilon.ndim else within(epsilon)

    answers = map_within(jax.vmap(answer), (y, gram), memory)
    return answers.swapaxes(0, 1) if epsilon.ndim else answers


def defend(
    victim_apply: Callable[[Array], Array],
    surrogate: tuple[Callable[[Any, Array], Array], Any],
    *,
    epsilon: Array | float,
    solver: AnySolver = LineSearch(),
    layers: str = "all",
    gram_method: str = "auto",
    chunk: int | None = None,
    memory: int | None = None,
) -> Predict:
    """The victim's prediction API behind MAD: one function of the queries, to be jitted.

    y = softmax(victim_apply(x)); y~ = argmax H(y~) s.t. distance(y~, y) <= epsilon (Eq. 4 to 7).

    Args:
        victim_apply: victim_apply(x [B, ...]) -> logits [B, K], parameters bound, e.g.
            `partial(network.apply, params)`.
        surrogate: (apply, params) with apply(params, x [B, ...]) -> logits [B, K].
        epsilon: see `madjax.perturb`.
        solver: see `madjax.solve`.
        layers: see `madjax.gram`. "last" costs one forward pass of the surrogate and no more.
        gram_method: the method of `madjax.gram`.
        chunk: see `madjax.gram`.
        memory: see `madjax.perturb`.

    Returns:
        predict(x [B, ...]) -> y_tilde float32 [B, K], or [E, B, K] for budgets [E]. Rows lie on
        the simplex within epsilon of the victim's posteriors, and depend on their own query alone.

    Edge cases:
        epsilon = 0: the victim's posteriors, bit for bit.
        a victim in half precision: its softmax is taken in float32.
        a grid of budgets: y_tilde is [E, B, K].
        no query: y_tilde is [0, K].
        a query that the victim gives logits of NaN: NaN under jit, else refused.

    Raises:
        InputError: at the first call: see `madjax.perturb`.

    Example:
        >>> import jax, madjax
        >>> x, w = jax.random.normal(jax.random.key(0), (2, 4, 4))
        >>> sees = madjax.defend(lambda x: x, (lambda w, x: x @ w, w), epsilon=1, layers="identity")
        >>> abs(sees(x) - jax.nn.softmax(x)).sum(axis=1).round(5)
        Array([1., 1., 1., 1.], dtype=float32)
    """
    apply, params = surrogate

    def predict(x: Array) -> Array:
        if x.shape[0] == 0:
            return _no_answers(predict, x)
        y = jax.nn.softmax(as_logits(victim_apply(x), x.shape[0]).astype(jnp.float32))
        return perturb(
            apply,
            params,
            x,
            y,
            epsilon=epsilon,
            solver=solver,
            layers=layers,
            gram_method=gram_method,
            chunk=chunk,
            memory=memory,
        )

    return predict


def _no_answers(predict: Predict, *given: Array) -> Array:
    """The answers to no queries: networks and exported programs may not take so few."""
    one = jax.eval_shape(
        predict, *(jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype) for a in given)
    )
    *budgets, _, classes = one.shape
    return jnp.zeros((*budgets, 0, classes), one.dtype)


def export(
    predict: Predict,
    path: str | Path,
    *,
    shape: Sequence[int],
    dtype: Any = jnp.uint8,
    posteriors: bool = False,
    classes: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Write predict to a file that `load`, or `jax.export.deserialize`, runs anywhere.

    Args:
        predict: a jit-able function of queries x [B, ...], such as `defend` makes.
        path: the file.
        shape: of one query, [H, W, C] for images; batches may have any size.
        dtype: of the queries.
        posteriors: whether predict takes the victim's posteriors float32 [B, classes] too, as
            `partial(perturb, apply, params, epsilon=0.5)` does: the file then serves a victim that
            is no JAX function, and holds the surrogate alone.
        classes: K, where posteriors are taken.
        platforms: what the file runs on, as names or as one text, "cpu,cuda"; none of them need be
            here. `madjax.conv.convolution` chooses its form for the platform it is traced on: for
            others give networks `convolution=jax.lax.conv_general_dilated`.

    Raises:
        InputError: an unknown platform, posteriors without classes, or a file that cannot be
            written.
    """
    if isinstance(platforms, str):
        platforms = platforms.split(",")
    unknown = set(platforms) - {*PLATFORMS, "rocm"}
    if unknown or not platforms:
        raise InputError(
            f"platforms is {','.join(platforms)!r}: choose among {', '.join(PLATFORMS)}, rocm"
        )
    if posteriors != (classes is not None):
        raise InputError(
            f"posteriors is {posteriors} and classes {classes}: a file that takes posteriors needs "
            "posteriors=True and the number of classes, another neither"
        )
    check_can_write(Path(path))
    (batch,) = jax.export.symbolic_shape("batch")
    taken = [jax.ShapeDtypeStruct((batch, *shape), dtype)]
    if posteriors:
        taken.append(jax.ShapeDtypeStruct((batch, classes), jnp.float32))
    program = jax.export.export(jax.jit(predict), platforms=tuple(platforms))
    exported = program(*taken)
    write_atomically(Path(path), lambda draft: draft.write_bytes(exported.serialize()))


def load(path: str | Path) -> Predict:
    """The function in a file that `export` wrote: predict(x [B, ...]) -> y_tilde [B, K].

    A file with `posteriors=True` has predict(x, y [B, K]), where y may be a NumPy array.

    Raises:
        InputError: no such file, not an export, or one for other platforms than the one here; and
            at a call, queries of another shape or type than the file was made for, or y that are
            no posteriors.
    """
    try:
        exported = jax.export.deserialize(bytearray(Path(path).read_bytes()))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): give an exported file"
        ) from error
    except Exception as error:
        raise InputError(
            f"{path} is not an exported function: make it with madjax export"
        ) from error
    here = jax.export.default_export_platform()
    if here not in exported.platforms:
        raise InputError(
            f"{path} runs on {', '.join(exported.platforms)}, not on {here}: export it again with "
            f"--platforms {','.join((*exported.platforms, here))}"
        )
    wanted, *wanted_y = exported.in_avals
    call = jax.jit(exported.call)

    def predict(x: Array, *y: Array) -> Array:
        x = jnp.asarray(x)
        if x.shape[1:] != wanted.shape[1:] or x.dtype != wanted.dtype:
            shape = ", ".join(map(str, wanted.shape[1:]))
            raise InputError(
                f"{path} takes {wanted.dtype} queries [B, {shape}], not {x.dtype} {list(x.shape)}"
            )
        given = (x, *map(as_posterior, y))
        shapes = [list(a.shape) for a in given[1:]]
        if shapes != [[len(x), *a.shape[1:]] for a in wanted_y]:
            takes = f"posteriors [B, {wanted_y[0].shape[1]}] too" if wanted_y else "queries alone"
            raise InputError(
                f"{path} takes {takes}: for {len(x)} queries it was given {shapes or 'no others'}"
            )
        return call(*given) if len(x) else _no_answers(call, *given)

    return predict
