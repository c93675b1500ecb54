"""A disk that fails, is full or is slow at any one operation: one line says so, and the next run completes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EVERY = 397  # of about 800 operations; run faulty_runs.py by hand for all of them


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs a C compiler and LD_PRELOAD")
def test_a_disk_that_fails_at_one_operation(tmp_path):
    here, shim, root = Path(__file__).parent, tmp_path / "faults.so", tmp_path / "runs"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, here / "faults.c", "-ldl"], check=True)
    root.mkdir()
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(here / "faulty_runs.py"), str(root), str(shim), str(EVERY), "is cut short"],
        env=os.environ | {"LD_PRELOAD": str(shim), "FAULT_ROOT": str(root), "PYTHONPATH": paths},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["operations"] > 300 and not told["wrong"], told["wrong"][:3]
    assert told["told"]["is cut short: one line"] >= 1
