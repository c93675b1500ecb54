"""Whole experiments as several processes: stopped, killed and started again, they leave what one process leaves."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import PLAIN, ok, start, stop_when
from faulty_runs import FIELDS, TIMED
from pod import ends, errors, run_together, together, wait_for
from safetensors.numpy import load_file

from jsublim.core.files import read_table


def command(out: Path, *fields: str) -> tuple:
    # Adam divides rounding by rounding where a gradient is nearly zero.
    return ("run", PLAIN, f"out={out}", *FIELDS, "students.optimizer.name=sgd", "students.optimizer.lr=0.1", *fields)


def left(run: Path) -> int:
    """How much of a run is there: its files, and what is finished of those that are not. They come and go meanwhile."""
    count = 0
    for at, folders, files in os.walk(run):
        count += len(folders) + len(files)
        with contextlib.suppress(FileNotFoundError):
            count += Path(at, "progress.jsonl").read_bytes().count(b"\n")
    return count


def said(path: Path) -> Any:
    if path.suffix == ".parquet":
        return read_table(path)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text())


def check_alike(a: Any, b: Any) -> None:
    """Equal, numbers to float rounding."""
    if isinstance(a, float) and isinstance(b, float):
        assert math.isclose(a, b, rel_tol=1e-4, abs_tol=5e-5) or (math.isnan(a) and math.isnan(b))
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            check_alike(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            check_alike(x, y)
    else:
        assert a == b


def contents(run: Path) -> dict[str, Path]:
    """What a run leaves, without times, locks, and the empty folder of what was trained."""
    files = {path.relative_to(run).as_posix(): path for path in sorted(run.rglob("*")) if path.is_file()}
    passing = ("artifacts/training", "artifacts/locks")
    return {name: path for name, path in files.items() if not name.startswith(passing) and path.name not in TIMED}


def check_same(run: Path, other: Path) -> None:
    """The same files: texts and tokens to the letter, adapters to 1e-6 of their largest number, other numbers to rounding."""
    ours, theirs = contents(run), contents(other)
    assert ours.keys() == theirs.keys()
    for name, path in ours.items():
        if path.suffix == ".safetensors":
            a, b = load_file(path), load_file(theirs[name])
            assert a.keys() == b.keys()
            for key in a:
                np.testing.assert_allclose(a[key], b[key], rtol=0, atol=1e-6 * max(1, np.abs(b[key]).max()))
        elif path.suffix in (".parquet", ".jsonl", ".json"):
            check_alike(said(path), said(theirs[name]))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """What one process leaves that was stopped by SIGTERM while it sampled."""
    out = tmp_path_factory.mktemp("pods") / "alone"
    logs = out / "artifacts" / "rows"
    child = start(*command(out))
    code, err = stop_when(child, lambda: any(p.stat().st_size for p in logs.glob("*/progress.jsonl")), signal.SIGTERM)
    assert code == 75 and "Traceback" not in err, err
    assert (
        err.splitlines()[-1]
        == "error: stopped by a signal; what was finished is kept; run the same command again to continue"
    )
    assert not (out / "report.html").exists()
    ok(*command(out))
    return out


def test_two_processes_that_are_stopped_and_killed(alone, tmp_path):
    out, draw, whole = tmp_path / "run", random.Random(20), left(alone)
    both = command(out, "run.parallel=mesh")
    with together(1, *both) as children:
        moment = draw.randrange(2, whole // 2)
        wait_for(children, lambda: left(out) >= moment)
        children[draw.randrange(2)].send_signal(draw.choice((signal.SIGTERM, signal.SIGINT)))
        codes, heard = ends(children)
    assert codes == [75, 75], heard
    first, other = errors(heard)
    assert "the same command" in first and other == f"error: process 1: {first.removeprefix('error: ')}"
    with together(1, *both, "run.time_out=10") as children:
        moment = draw.randrange(left(out) + 1, max(whole - 20, left(out) + 2))
        wait_for(children, lambda: left(out) >= moment)
        which = draw.randrange(2)
        children[which].kill()
        (code,), heard = ends([children[1 - which]])
    assert code == 1, heard
    assert f"process {which} gives no sign of life" in heard[0].splitlines()[-1] and "Traceback" not in heard[0]
    run_together(1, *both)
    check_same(out, alone)
