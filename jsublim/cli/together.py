"""One command as several processes (`--distributed`): they join, speak with one voice, and end together."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

from jsublim.cli.app import console
from jsublim.errors import JsublimError, UsageError

if TYPE_CHECKING:
    from jsublim.config import Experiment

Distributed = Annotated[bool, "One of several processes, with run.parallel (docs/pods.md)."]


class Speaker:
    """Who says what goes wrong: nobody by name, where there is one process, or this is the first."""

    name = ""
    _one = threading.Lock()

    @classmethod
    def end(cls, message: str, code: int) -> None:
        """End the process at once with one line, from whichever thread; the main one may never wake up again."""
        if not cls._one.acquire(blocking=False):
            time.sleep(60)  # another thread is ending it
        print(f"error: {cls.name}{message}", file=sys.stderr, flush=True)
        os._exit(code)


@contextlib.contextmanager
def together(distributed: bool, experiments: Iterable[Experiment]) -> Iterator[None]:
    """Do what follows as one of several processes, if `distributed`; it must be all that uses JAX."""
    if not distributed:
        yield
        return
    from jsublim.runtime.processes import Preempted, everywhere, heeding_signals
    from jsublim.runtime.watch import COME_WITHIN, Watch, join_processes, may_be_lost

    time_out = max(map(_time_out, experiments))
    absent = f"not all processes have come within {COME_WITHIN} s; start the same command on every host"
    _silence(lambda: Speaker.end(f"--distributed: {absent}", 1))
    join_processes(time_out)
    _speak()
    watch = Watch(time_out, Speaker.end)
    try:
        with heeding_signals():
            yield
        everywhere(True)
    except Preempted:  # on all of them
        watch.close()
        raise
    except BaseException as error:
        if may_be_lost(error):
            time.sleep(time_out + 10)  # the watch knows whether and who, sooner or later, and ends the process
        code = error.code if isinstance(error, JsublimError) else 1
        watch.stop_all(code)
        atexit.register(os._exit, code)  # JAX would wait for the others
        raise
    watch.close()


def _time_out(e: Experiment) -> float:
    from jsublim.config import variants

    if e.run.parallel == "none":
        raise UsageError("--distributed: needs run.parallel=mesh (or pmap), by which the processes share the work")
    if e.students is not None and any(students.data.on_policy for students in variants(e.students).values()):
        raise UsageError("students.data.on_policy: not with --distributed; use the devices of one process")
    return e.run.time_out


_kept: list[Any] = []  # what C calls must not be collected


def _silence(on_abort: Callable[[], None]) -> None:
    """Leave standard output and error to Python: what libraries written in C++ print goes nowhere, unless asked for with --debug. JAX
    aborts a process that does not find others, or whose first process is gone, from a thread of its own and with pages of addresses:
    `on_abort` is called instead."""
    if logging.getLogger("jax").isEnabledFor(logging.DEBUG):
        return
    if not _kept:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for name, number in (("stdout", 1), ("stderr", 2)):
            stream = getattr(sys, name)
            stream.flush()
            setattr(sys, name, os.fdopen(os.dup(number), "w", 1, stream.encoding, stream.errors))
            os.dup2(nowhere, number)
    # Python's own handler would wait for the main thread.
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: on_abort())
    _kept.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def _speak() -> None:
    """From here on the first process alone prints."""
    from jsublim.runtime.processes import is_main_process, process_index
    from jsublim.runtime.watch import gone

    lost = "another process gives no sign of life" if is_main_process() else gone(0)
    _silence(lambda: Speaker.end(f"{lost}; run the same command again to continue", 1))
    if not is_main_process():
        Speaker.name = f"process {process_index()}: "
        console.quiet = True
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process lives)
