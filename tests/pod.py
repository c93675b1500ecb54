"""One command as several real processes that know of each other, as the hosts of a pod do; their sums go by gloo."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from unittest import mock

from command import start


@contextlib.contextmanager
def together(devices: int, *args, count: int = 2) -> Iterator[list[subprocess.Popen]]:
    """A command as so many processes, with so many devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count), "XLA_FLAGS": flags}
    children = []
    try:
        for process in range(count):
            with mock.patch.dict(os.environ, shared | {"JAX_PROCESS_ID": str(process)}):
                children.append(start(*args, "--distributed"))
        yield children
    finally:
        for child in children:
            child.kill()


def ends(children: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Exit codes and standard errors."""
    said = [child.communicate(timeout=400)[1] for child in children]
    return [child.returncode for child in children], said


def wait_for(children: list[subprocess.Popen], ready: Callable[[], bool]) -> None:
    """Return when processes have got so far."""
    deadline = time.monotonic() + 180
    while not ready():
        assert all(child.poll() is None for child in children), ends(children)[1]
        assert time.monotonic() < deadline, "never got so far"
        time.sleep(0.005)


def errors(said: list[str]) -> list[str]:
    """The one line of each process, without the bars and tables of the first, which alone may say more."""
    lines = [re.findall("^error: .*$", err, re.MULTILINE) for err in said]
    assert [len(own) for own in lines] == [1] * len(said), said
    assert not any("Traceback" in err for err in said), said
    assert all(err.count("\n") == 1 for err in said[1:]), said
    return [own for (own,) in lines]


def run_together(devices: int, *args, count: int = 2) -> None:
    with together(devices, *args, count=count) as children:
        codes, said = ends(children)
    assert codes == [0] * count and not any(said[1:]), said
