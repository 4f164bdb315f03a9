"""Seconds of work, with what compiling takes apart, and which programs were compiled."""

import contextlib
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    _COMPILED,
)

_FOUND = "/jax/compilation_cache/cache_hits"

programs: Counter[str] = Counter()
"""How often this process has compiled a program, by the name of its function."""
_spent = Counter(seconds=0.0, found=0)
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


def _listen_once(event: str, **said: str) -> None:
    _spent["found"] += event == _FOUND


jax.monitoring.register_event_duration_secs_listener(_listen)
jax.monitoring.register_event_listener(_listen_once)


class Compiled(NamedTuple):
    """Programs that this process has compiled, or found compiled on disk, and the seconds."""

    programs: int = 0
    found: int = 0
    """Of the programs, those that an earlier process had compiled."""
    seconds: float = 0.0
    """Of tracing, of lowering and of XLA."""

    @classmethod
    def so_far(cls) -> "Compiled":
        """All since the process began."""
        return cls(programs.total(), int(_spent["found"]), float(_spent["seconds"]))

    def since(self, before: "Compiled") -> "Compiled":
        """What came after another count."""
        return Compiled(*(now - then for now, then in zip(self, before, strict=True)))

    def __str__(self) -> str:
        found = f", {self.found} of them found on disk" if self.found else ""
        return f"{self.programs} compiled in {self.seconds:.1f} s{found}"


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
