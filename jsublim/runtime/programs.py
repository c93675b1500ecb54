"""Programs that JAX has compiled: kept on disk, so that nobody compiles what another run has; counted, so that a run can say it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import threading
import time
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jsublim.core.files import sha256, write_text

ENTRY, DIGEST = "-cache", ".sha256"  # how the name of a kept program ends; of what says which bytes it consists of
SETTINGS = {
    "min_compile_time_secs": 0.0,
    "min_entry_size_bytes": -1,  # any
    # What XLA keeps beside whole programs, it keeps under a path that is then part of every program's key: a program would be
    # found in the folder of one machine only.
    "enable_xla_caches": "none",
}
WORTH_SAYING = 0.3  # seconds
BEING_WRITTEN = 60.0  # seconds: JAX writes a program under its final name, so a young file may be another worker's half


def jit_directions(**options: Any) -> Callable[[Callable], Callable]:
    """`jax.jit`, for derivatives in several directions of what these share, taken by `vmap`. On a CPU jaxlib 0.10 fuses x * sum(x * g)
    wrongly if g has an axis that x has not: all have the sum of the first (YNN's reductions; 0.12 is right)."""

    def decorate(function: Callable) -> Callable:
        @functools.cache
        def program() -> Callable:  # made where it is called, since asking for the backend starts it
            wrong = metadata.version("jaxlib").startswith("0.10.") and jax.default_backend() == "cpu"
            plain = {"xla_cpu_experimental_ynn_fusion_type": ""} if wrong else None
            return jax.jit(function, compiler_options=plain, **options)

        return functools.wraps(function)(lambda *args, **kwargs: program()(*args, **kwargs))

    return decorate


def programs_folder(folder: Path) -> Path:
    """Where programs for these devices lie below `folder`: another jaxlib, or another machine's CPU, has its own."""
    kind = jax.devices()[0].device_kind
    cpu = f"-{_instructions()}" if jax.devices()[0].platform == "cpu" else ""
    return folder / re.sub(r"[^\w.-]+", "-", f"jaxlib-{metadata.version('jaxlib')}-{kind}{cpu}")


def _instructions() -> str:
    """8 hex digits of what this machine's CPU can do: a program that was compiled for another one may not run here."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8", errors="replace").splitlines() if known.exists() else []
    about = {line for line in lines if line.partition(":")[0].strip() in ("flags", "Features", "model name")}
    return hashlib.sha256(repr(sorted(about) or (platform.machine(), platform.processor())).encode()).hexdigest()[:8]


def keep_programs(folder: Path, say: Callable[[str], None]) -> None:
    """Have JAX keep what it compiles in a folder (of `programs_folder`), and read what others have kept there. A user's own settings count: another
    folder (JAX_COMPILATION_CACHE_DIR), none (JAX_ENABLE_COMPILATION_CACHE=false). A process takes the first folder that it is given. Of a kept
    program that is damaged `say` is told; it is removed, and compiled again."""
    options: Any = jax.config
    if options.jax_compilation_cache_dir is not None or not options.jax_enable_compilation_cache:
        return

    whole_programs(folder, say)
    jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
    for name, value in SETTINGS.items():
        if f"JAX_PERSISTENT_CACHE_{name.upper()}" not in os.environ:
            jax.config.update(f"jax_persistent_cache_{name}", value)
    # What another worker is just writing cannot be read yet, and is compiled here too: nothing that a user could mend.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")


def whole_programs(folder: Path, say: Callable[[str], None], known: Container[str] = ()) -> dict[Path, str]:
    """The programs of a folder that are what was written, with their digests, but for those whose names are known. What a kill
    has cut or a disk has changed is removed, which is said: JAX writes a program under its final name, and never again."""
    programs = {}
    for path in sorted(folder.glob(f"*{ENTRY}")):
        # Another worker may have removed it, or another user may own it: then there is one program less.
        with contextlib.suppress(OSError):
            if path.name not in known and (digest := _digest(path, say)) is not None:
                programs[path] = digest
    return programs


def _digest(path: Path, say: Callable[[str], None]) -> str | None:
    """The digest of a program that is what was written; None of one that is not, or that may still be written."""
    mark, digest = path.with_name(path.name + DIGEST), sha256(path)
    written = mark.read_text(encoding="utf-8", errors="replace").strip() if mark.exists() else None
    if written is None and _is_whole(path.read_bytes()):
        write_text(mark, digest)
        return digest
    if written == digest:
        return digest
    if written is not None or time.time() - path.stat().st_mtime > BEING_WRITTEN:
        path.unlink(missing_ok=True)
        mark.unlink(missing_ok=True)
        say(f"{path}: a damaged program; it is compiled again")
    return None


def _is_whole(entry: bytes) -> bool:
    """Whether what JAX has compressed can be read to its end. Which library it uses depends on what is installed."""
    try:
        if entry[:4] == b"\x28\xb5\x2f\xfd":
            import zstandard

            return bool(zstandard.ZstdDecompressor().decompress(entry))
        return bool(zlib.decompress(entry))
    except Exception:  # each library has its own
        return False


_COMPILE = "/jax/core/compile/backend_compile_duration"  # reading one from the cache counts as compiling it
_STEPS = (_COMPILE, "/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")
_HIT, _READ = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_retrieval_time_sec"


@functools.cache
def _listening() -> dict[str, float]:
    """Counts of JAX's events and sums of their seconds, from now on."""
    seen: dict[str, float] = defaultdict(float)

    def happened(event: str, **_: str | int) -> None:
        seen[event] += event == _HIT

    def took(event: str, duration_secs: float, **_: str | int) -> None:
        if event in (_COMPILE, _READ):
            seen[event] += duration_secs
            seen["programs"] += event == _COMPILE

    jax.monitoring.register_event_listener(happened)
    jax.monitoring.register_event_duration_secs_listener(took)
    return seen


@contextlib.contextmanager
def counting_programs(say: Callable[[str], object]) -> Iterator[None]:
    """Say, when the block has ended, how many programs JAX compiled and read in it, and the seconds that took in this process."""
    seen = _listening()
    before = seen.copy()
    yield
    spent = {name: seen[name] - before[name] for name in ("programs", _COMPILE, _HIT, _READ)}
    compiled, compiling = spent["programs"] - spent[_HIT], spent[_COMPILE] - spent[_READ]
    say(
        f"programs: {compiled:.0f} compiled in {compiling:.1f} s, {spent[_HIT]:.0f} read from the cache in {spent[_READ]:.1f} s"
    )


class CompileClock:
    """What JAX compiles in this process, tracing included and programs that it reads from the cache."""

    def __init__(self) -> None:
        self._over, self._lock = 0.0, threading.Lock()
        self._open: dict[int, list[tuple[str, float]]] = defaultdict(
            list
        )  # by thread: functions, and when each was begun
        jax.monitoring.register_scalar_listener(self._begins)
        jax.monitoring.register_event_duration_secs_listener(self._ends)

    def _begins(self, event: str, value: float, **about: str | int) -> None:
        if event in _STEPS:
            with self._lock:
                self._open[threading.get_ident()].append((str(about.get("fun_name", "")), time.perf_counter()))

    def _ends(self, event: str, duration_secs: float, **about: str | int) -> None:
        if event in _STEPS:
            with self._lock:
                begun = self._open[threading.get_ident()]
                if begun and (first := begun.pop()) and not begun:
                    self._over += time.perf_counter() - first[1]

    @property
    def seconds(self) -> float:
        """So far."""
        with self._lock:
            return self._over + sum(time.perf_counter() - begun[0][1] for begun in self._open.values() if begun)

    @property
    def name(self) -> str | None:
        """The function that is being compiled, if that has taken long enough to be worth saying."""
        with self._lock:
            first = min((begun[0] for begun in self._open.values() if begun), key=lambda one: one[1], default=None)
        if first is None or time.perf_counter() - first[1] < WORTH_SAYING:
            return None
        return re.sub(r"^jit[_(]|\)$", "", first[0])


compile_clock = functools.cache(CompileClock)  # one listens for the whole process
