"""Becoming one of several processes, and who of them is gone: each looks from a thread, and ends where another one does not live any
more."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
import time
from collections.abc import Callable

import jax

from jsublim.errors import UsageError
from jsublim.runtime.processes import TELL, client, is_main_process, process_count, process_index

COME_WITHIN = 300  # seconds in which all processes must have been started


def join_processes(time_out: float) -> None:
    """Make this process one of several that work together, one per host of a pod.

    TPU pods, Slurm and Open MPI are recognised; elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
    say who is who. To be called before anything else of JAX. The only process of a node takes all GPUs that it sees.

    Args:
      time_out: seconds after which a process that gives no sign of life is taken to be gone.

    Raises:
      UsageError: nothing says who the others are, or they don't answer.
    """
    count, index = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
    try:
        jax.distributed.initialize(
            num_processes=int(count) if count else None,
            process_id=int(index) if index else None,
            local_device_ids=_own_gpus(),
            initialization_timeout=COME_WITHIN,
            heartbeat_timeout_seconds=int(2 * time_out) + 10,  # ours is sooner, and says who is gone
            shutdown_timeout_seconds=60,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--distributed: {reason}; set JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None


def _own_gpus() -> list[int] | None:
    """[], all GPUs that this process sees, where it is alone on its node or Slurm has bound its own to it; else None: JAX chooses,
    under Slurm and Open MPI one for each process. What a process sees is cut to its share already, and counted from 0."""
    environment, mpi = (
        os.environ,
        os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"),
    )  # within Slurm, too: there it has started us
    on_nodes = mpi or environment.get("SLURM_STEP_TASKS_PER_NODE", "")  # of each node: 1(x2), or 2,1(x3)
    alone = set(re.findall(r"(?:^|,)(\d+)", on_nodes)) == {"1"}
    bound = mpi is None and "SLURM_GPUS_PER_TASK" in environment
    return [] if (alone or bound) and "JAX_LOCAL_DEVICE_IDS" not in environment else None


class Watch:
    """Looks from a thread whether the other processes live, and ends this one where one does not: the main thread may be
    waiting for it among the devices, where nothing can wake it.

    Args:
      time_out: seconds without a sign of life after which a process is gone.
      end: ends this process with a message and an exit code, from whichever thread.
    """

    def __init__(self, time_out: float, end: Callable[[str, int], None]):
        self.time_out, self.every, self._end = time_out, min(2.0, time_out / 20), end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        heard = {i: ("", time.monotonic()) for i in range(process_count())}
        for beat in itertools.count():
            with contextlib.suppress(
                jax.errors.JaxRuntimeError
            ):  # of a service that is gone; JAX ends the process then
                self._tell(str(beat))
                for key, sign in client().key_value_dir_get(f"{TELL}/alive"):
                    who = int(key.rsplit("/", 1)[1])
                    if sign != heard[who][0]:
                        heard[who] = sign, time.monotonic()
            if self._over.wait(self.every):
                return
            self._judge(heard)

    def _judge(self, heard: dict[int, tuple[str, float]]) -> None:
        for who, (sign, when) in heard.items():
            if who == process_index():
                continue
            if sign.startswith("stopped"):
                self._end(f"process {who} has stopped; it says why", int(sign.split()[1]))
            if time.monotonic() - when > self.time_out:
                self._end(f"{gone(who)} for {self.time_out:g} s; run the same command again to continue", 1)

    def _tell(self, what: str) -> None:
        client().key_value_set(f"{TELL}/alive/{process_index()}", what, allow_overwrite=True)

    def close(self) -> None:
        """All have finished."""
        self._over.set()
        self._thread.join()

    def stop_all(self, code: int) -> None:
        """This process has failed: the others need not wait for it. Returns when they have had time to hear of it."""
        self.close()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._tell(f"stopped {code}")
        # What the processes know of one another lives in the first.
        time.sleep(3 * self.every if is_main_process() else 0)


def gone(process: int) -> str:
    return f"process {process} gives no sign of life"


LOST = re.compile("gloo|UNAVAILABLE|ABORTED|CANCELLED|INTERNAL|UNKNOWN", re.IGNORECASE)


def may_be_lost(error: BaseException) -> bool:
    """Whether an error may be due to another process that is gone."""
    of_devices = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    return of_devices and LOST.search(str(error)[:200]) is not None
