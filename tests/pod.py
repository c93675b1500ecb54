"""One command as several real processes that know of each other, as the hosts of a pod do; their sums go by gloo.

They may be hosts in earnest (`hosts`): each with a boot, a home, a folder to work in, a compile cache and a /tmp of its own, and none
sees another's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from command import start


@contextlib.contextmanager
def together(devices: int, *args, count: int = 2, hosts: Path | None = None) -> Iterator[list[subprocess.Popen]]:
    """A command as so many processes, with so many devices each.

    Args:
      hosts: the folder of the hosts' own folders, "0", "1"...; None: processes of this machine.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count), "XLA_FLAGS": flags}
    children = []
    try:
        for process in range(count):
            with mock.patch.dict(os.environ, shared | {"JAX_PROCESS_ID": str(process)}):
                children.append(
                    start(*args, "--distributed") if hosts is None else on_host(hosts, process, *args, "--distributed")
                )
        yield children
    finally:
        for child in children:
            child.kill()


# In a mount namespace of its own: another boot id, and of all hosts' folders only this one's, which also holds its /tmp.
_HOST = """
set -e
mount --bind "$1/boot_id" /proc/sys/kernel/random/boot_id
mkdir -p "$1/tmp" && mount --bind "$1" /mnt
mount -t tmpfs none "$2" && mkdir "$1" && mount --bind /mnt "$1" && umount /mnt
cd "$1"
shift 2
exec "$@"
"""


def on_host(hosts: Path, process: int, *args) -> subprocess.Popen:
    """A command on a host of its own. What it leaves lies in its folder."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("hosts of their own need unshare, and the right to use it")
    own = hosts / str(process)
    own.mkdir(parents=True, exist_ok=True)
    (own / "boot_id").write_text(f"{uuid.uuid5(uuid.NAMESPACE_OID, str(own))}\n")
    places = {"HOME": str(own), "TMPDIR": str(own / "tmp")}
    with mock.patch.dict(os.environ, places):
        for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
            os.environ.pop(name, None)
        return start(*args, inside=("unshare", "-m", "sh", "-c", _HOST, "sh", str(own), str(hosts)))


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


def run_together(devices: int, *args, count: int = 2, hosts: Path | None = None) -> None:
    with together(devices, *args, count=count, hosts=hosts) as children:
        codes, said = ends(children)
    assert codes == [0] * count and not any(said[1:]), said
