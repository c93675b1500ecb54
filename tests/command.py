"""The command line as tests use it: in this process (nothing is compiled twice), or as a child that can be killed."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from imported import PATH, Fork, may_fork

from jsublim.cli import main
from jsublim.text.rows import read_rows

ROOT = Path(__file__).parents[1]
MODEL = "tiny-qwen2"
PATIENCE = 400  # seconds
AS_INSTALLED = str(ROOT / "tests" / "as_installed.py")
# What runs in tests: half the programs' size and a tenth of the arithmetic of the one that ships (scripts/build_tiny_models.py wrote it).
TWO_LAYERS = str(ROOT / "tests" / "two_layers")
PLAIN = str(ROOT / "tests" / "plain.yaml")  # a small experiment that tests lay their own fields over


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


def jsublim(*args: Any) -> Result:
    """Run one command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["jsublim", *map(str, args)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())


def ok(*args: Any) -> Result:
    result = jsublim(*args)
    assert result.code == 0, result.err
    return result


def refused(code: int, *args: Any) -> str:
    """The one line a command that must fail says, without progress bars and tables."""
    result = jsublim(*args)
    assert result.code == code, result
    assert "Traceback" not in result.err
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and result.err.rstrip().endswith(lines[0]), result.err
    return lines[0]


def start(
    *args: Any,
    program: Sequence[str] = (AS_INSTALLED,),
    inside: Sequence[str] = (),
) -> subprocess.Popen:
    """Run one command as a child of its own, from a shell's point of view; `inside` is a command that runs it."""
    env = os.environ | PATH
    process = Fork if not inside and may_fork(env) else subprocess.Popen
    return process(
        [*inside, sys.executable, *program, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        # A shell starts what it puts in the background with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def stop_when(child: subprocess.Popen, ready: Callable[[], bool], how: signal.Signals) -> tuple[int, str]:
    """Signal a child as soon as `ready`, and wait for its end: exit code and standard error."""
    try:
        wait_until(lambda: ready() or child.poll() is not None)
        assert child.poll() is None, f"ended before it was stopped: {child.communicate()[1]}"
        child.send_signal(how)
        _, err = child.communicate(timeout=PATIENCE)
        return child.returncode, err
    finally:
        child.kill()  # whatever became of the test, it leaves nobody behind


def wait_until(ready: Callable[[], bool]) -> None:
    """Return when it is; a busy machine is slow, not wrong."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline, "never got so far"
        time.sleep(0.005)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to compare what two runs left."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def same_student(a: Path, b: Path) -> bool:
    """Bit for bit, but for how fast it was trained."""
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (a, b)]
    lines = [[line | {"tokens_per_s": 0} for line in read_rows(f / "metrics.jsonl", ("step",))] for f in (a, b)]
    return weights[0] == weights[1] and lines[0] == lines[1]
