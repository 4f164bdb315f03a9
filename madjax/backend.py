"""The platform that programs are written for, by which layers, types and chunks are chosen."""

import contextlib
from collections.abc import Iterator

import jax

# A part of the key of all that JAX keeps: nothing that was traced for one platform serves another.
_TRACED_FOR = jax.make_user_context(None)


def platform() -> str:
    """What is traced now is for: "cpu", "gpu" or "tpu", by default JAX's default backend."""
    return _TRACED_FOR.value or jax.default_backend()


@contextlib.contextmanager
def traced_for(name: str | None) -> Iterator[None]:
    """Inside, programs are traced as for another platform, to be looked at; None: as they are."""
    with _TRACED_FOR(name):
        yield
