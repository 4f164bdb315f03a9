"""Seconds of work, with what compiling takes apart, and which programs were compiled."""

import contextlib
import time
from collections import Counter, deque
from collections.abc import Iterator

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    _COMPILED,
)

programs: Counter[str] = Counter()
"""How often this process has compiled a program, by the name of its function."""
_spent = Counter(seconds=0.0)
_spans: deque[tuple[float, float]] = deque(maxlen=1000)
"""When the latest of what was spent began, and how long it took."""


def _listen(event: str, seconds: float, **said: str) -> None:
    if event in _COMPILING:
        began = time.perf_counter() - seconds
        while _spans and _spans[-1][0] >= began:  # a trace inside this one: JAX < 0.10
            _spent["seconds"] -= _spans.pop()[1]
        _spans.append((began, seconds))
        _spent["seconds"] += seconds
    if event == _COMPILED:
        programs[str(said.get("fun_name", "")).removeprefix("jit(").removesuffix(")")] += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


class Stopwatch:
    """Adds up the seconds of its `with` blocks: `running`, and `compiling` beside it.

    Compiling is what JAX reports of tracing, of lowering and of XLA.
    """

    def __init__(self, running: float = 0.0):
        self.running, self.compiling = running, 0.0

    def __enter__(self) -> "Stopwatch":
        self._began, self._compiled = time.perf_counter(), _spent["seconds"]
        return self

    def __exit__(self, *_: object) -> None:
        compiling = _spent["seconds"] - self._compiled
        self.compiling += compiling
        self.running += time.perf_counter() - self._began - compiling

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside a block that is timed, one that is not."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()
