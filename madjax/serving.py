"""The defence before a real classifier: one function, and a file that holds it.

`defend` joins the victim's forward pass, the Gram matrix of the surrogate and the solution into one
jit-able function of the queries. `export` lowers it to StableHLO, parameters included, for
platforms that need not be there; `load` runs such a file without the code of the model.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from madjax.constraints import l1
from madjax.errors import InputError
from madjax.files import write_atomically
from madjax.mad import Objective, Oracle, deviation, extreme, perturb
from madjax.steps import Constraint, Distance

Array = jax.Array
Predict = Callable[[Array], Array]

PLATFORMS = ("cpu", "cuda", "tpu")


def defend(
    victim_apply: Callable[[Array], Array],
    surrogate: tuple[Callable[[Any, Array], Array], Any],
    *,
    epsilon: Array | float,
    oracle: Oracle = extreme,
    distance: Distance = l1,
    constraints: Sequence[Constraint] = (),
    objective: Objective = deviation,
    method: str = "line_search",
    layers: str = "all",
    gram_method: str = "auto",
    chunk: int | None = None,
    memory: int | None = None,
) -> Predict:
    """The victim's prediction API behind MAD: predict(x[B, ...]) -> y_tilde [B, K], Algorithm 1.

    victim_apply(x[B, ...]) -> logits [B, K], parameters bound, e.g. `partial(network.apply,
    params)`; surrogate = (apply, params) with apply(params, x) -> logits [B, K]. The rest is as for
    `madjax.perturb`; layers="last" costs one forward pass of the surrogate and nothing more. Rows
    of y_tilde lie on the simplex within epsilon of the victim's posteriors and depend on their own
    query alone. jit it.

    Raises:
        InputError: at the first call: see `madjax.perturb`.
    """
    apply, params = surrogate

    def predict(x: Array) -> Array:
        y = jax.nn.softmax(victim_apply(x).astype(jnp.float32))
        return perturb(
            apply,
            params,
            x,
            y,
            epsilon=epsilon,
            oracle=oracle,
            distance=distance,
            constraints=constraints,
            objective=objective,
            method=method,
            layers=layers,
            gram_method=gram_method,
            chunk=chunk,
            memory=memory,
        )

    return predict


def export(
    predict: Predict,
    path: str | Path,
    *,
    shape: Sequence[int],
    dtype: Any = jnp.uint8,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Write predict to a file that `load`, or `jax.export.deserialize`, runs anywhere.

    shape: of one query, [H, W, C] for images; batches may have any size. platforms: what the file
    runs on; none of them need be here. `madjax.conv.convolution` chooses its form for the platform
    it is traced on: for others give networks `convolution=jax.lax.conv_general_dilated`.

    Raises:
        InputError: an unknown platform.
    """
    unknown = set(platforms) - {*PLATFORMS, "rocm"}
    if unknown or not platforms:
        raise InputError(
            f"platforms is {','.join(platforms)!r}: choose among {', '.join(PLATFORMS)}, rocm"
        )
    queries = (*jax.export.symbolic_shape("batch"), *shape)
    program = jax.export.export(jax.jit(predict), platforms=tuple(platforms))
    exported = program(jax.ShapeDtypeStruct(queries, dtype))
    write_atomically(Path(path), lambda draft: draft.write_bytes(exported.serialize()))


def load(path: str | Path) -> Predict:
    """The function in a file that `export` wrote: predict(x[B, ...]) -> y_tilde [B, K].

    Raises:
        InputError: no such file, not an export, or one for other platforms than the one here; and
            at a call, queries of another shape or type than the file was made for.
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
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if here not in exported.platforms:
        raise InputError(
            f"{path} runs on {', '.join(exported.platforms)}, not on {here}: export it again with "
            f"--platforms {','.join((*exported.platforms, here))}"
        )
    (wanted,) = exported.in_avals
    call = jax.jit(exported.call)

    def predict(x: Array) -> Array:
        x = jnp.asarray(x)
        if x.shape[1:] != wanted.shape[1:] or x.dtype != wanted.dtype:
            shape = ", ".join(map(str, wanted.shape[1:]))
            raise InputError(
                f"{path} takes {wanted.dtype} queries [B, {shape}], not {x.dtype} {list(x.shape)}"
            )
        return call(x)

    return predict
