"""Programs as forks of one process that has imported what they import: that is a third of a command's time.

`command.start` asks for them. A program that is to have another environment, in what is read at import, is started as anybody starts one.
A shell asks for them by `python imported.py ADDRESS PROGRAM...`, which stands for the program: it has its output, its signals and its end.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

PATH = {"PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}
# What is read at import, or may be: JAX reads where its processes are when it joins them.
BOUND = re.compile(
    "JAX_(?!COORDINATOR_|NUM_PROCESSES|PROCESS_ID|LOCAL_DEVICE_IDS)|HF_(?!XET_)|HOME$|XDG_|PYTHONPATH$|TMPDIR|LD_|TERM$|NO_COLOR|COLUMNS"
)


class Fork(subprocess.Popen):
    """`subprocess.Popen([python, program, ...])` of a program that has its imports."""

    connection: socket.socket

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest) -> None:
        pipes = rest[3:9]  # two ends each, the reader's first: of standard input, output, error
        self.connection, self.pid = _ask(server(), list(map(os.fspath, args[1:])), dict(env), [pipes[3], pipes[5]])
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.connection], [], [], 0)[0]:
            self.returncode = int.from_bytes(_exactly(self.connection, 4), signed=True)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self.connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        code = self.poll()
        assert code is not None
        return code


def _ask(address: str, args: list[str], env: dict[str, str], outputs: list[int]) -> tuple[socket.socket, int]:
    """Have a program forked; outputs are the files of its standard output and error. Where its end is said, and its number."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    os.umask(mask := os.umask(0))
    asked = json.dumps([args, env, os.getcwd(), mask]).encode()
    socket.send_fds(connection, [len(asked).to_bytes(4)], outputs)
    connection.sendall(asked)
    return connection, int.from_bytes(_exactly(connection, 4))


def _stand_for(address: str, args: list[str]) -> int:
    """Have a program forked, and end as it ends."""
    connection, process = _ask(address, args, dict(os.environ), [1, 2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(process, number))
    code = int.from_bytes(_exactly(connection, 4), signed=True)
    return code if code >= 0 else 128 - code


def may_fork(env: dict[str, str]) -> bool:
    """Whether a program of this environment does as a fork what it does otherwise."""
    return sys.platform == "linux" and _bound(env) == _bound(_environment())


def _bound(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if BOUND.match(name)}


@functools.cache
def _environment() -> dict[str, str]:
    """What the process has that is forked: this one's environment when it is first asked for."""
    return os.environ | PATH


@functools.cache
def server() -> str:
    """The address of the process that is forked. It ends with this one."""
    address = os.path.join(tempfile.mkdtemp(prefix="jsublim-forks-"), "socket")
    process = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment())  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    atexit.register(process.kill)
    return address


def _exactly(connection: socket.socket, count: int) -> bytes:
    """So many bytes, which are to come."""
    got = b""
    while len(got) < count:
        more = connection.recv(count - len(got))
        assert more, "the process that was to be forked has ended"
        got += more
    return got


def _serve(address: str) -> None:
    """Fork a watcher per request, and this one the program: the watcher says the number of its process, and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no watcher is waited for
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while sys.stdin not in (ready := select.select([listener, sys.stdin], [], [])[0]):
        connection = ready[0].accept()[0]
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            size, ends, *_ = socket.recv_fds(connection, 4, 2)
            args, env, folder, mask = json.loads(_exactly(connection, int.from_bytes(size)))
            program = os.fork()
            if program == 0:
                listener.close()
                connection.close()
                os.umask(mask)
                _become(args, env, folder, ends)
            for end in ends:
                os.close(end)
            connection.sendall(program.to_bytes(4))
            _, status = os.waitpid(program, 0)
            connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, signed=True))
            os._exit(0)
        connection.close()


def _become(args: Sequence[str], env: dict[str, str], folder: str, ends: Sequence[int]) -> None:
    """Run a program as Python does, to its end."""
    os.environ.clear()
    os.environ |= env
    os.chdir(folder)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, end in enumerate((nothing, *ends)):
        os.dup2(end, number)
        os.close(end)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    code = 1
    try:
        _program(args)()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _program(args: Sequence[str]) -> Callable[[], Any]:
    """What `python ARGS` runs."""
    if args[0] == "-c":
        sys.argv = ["-c", *args[2:]]
        return lambda: exec(args[1], {"__name__": "__main__"})
    sys.argv = list(args)
    if os.path.basename(args[0]) != "as_installed.py":
        sys.path.insert(0, os.path.dirname(args[0]))
        return lambda: runpy.run_path(args[0], run_name="__main__")
    from jsublim.cli import main

    return main


if __name__ == "__main__":
    if sys.argv[2:]:
        sys.exit(_stand_for(sys.argv[1], sys.argv[2:]))
    import as_installed  # noqa: F401 (before all others)
    import duckdb  # noqa: F401
    import pandas  # noqa: F401 (which pyarrow and duckdb import)
    import scipy.special  # noqa: F401
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    import jsublim.cli.experiments
    import jsublim.pipeline.run
    import jsublim.report  # noqa: F401

    sys.path.pop(0)  # the tests' own folder
    _serve(sys.argv[1])
