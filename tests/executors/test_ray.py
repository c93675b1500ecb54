"""Ray's workers: what they leave is what one process leaves, whoever is killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading

import pytest
import soak
from command import PLAIN, jsublim, ok

pytest.importorskip("ray")


def test_killed_workers_drivers_and_shards_leave_what_an_undisturbed_run_leaves(tmp_path, capsys):
    ok("run", PLAIN, f"out={tmp_path / 'whole'}", *soak.SMALL)
    soak.main([str(tmp_path), "--kills", "3", "--ways", "ray,shard", "--workers", "1"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sum(said["kills"].values()) >= 3 and said["kills"].keys() & {"ray's worker", "ray's driver"}


def test_failed_tasks_are_named_and_nothing_listens_outside(tmp_path):
    """One token is no list of numbers: the rows fail, and with them everything that needs them."""
    listening, ended = set(), threading.Event()

    def look() -> None:
        while not ended.wait(2.0):
            below = {os.getpid(), *soak.below(os.getpid())}
            said = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True).stdout.splitlines()
            ours = [line for line in said if below & {int(pid) for pid in re.findall(r"pid=(\d+)", line)}]
            listening.update(line.split()[3] for line in ours)

    looking = threading.Thread(target=look)
    looking.start()
    fields = (*soak.SMALL, "sampling.max_new_tokens=1", "run.workers=1")
    result = jsublim("run", PLAIN, f"out={tmp_path / 'run'}", *fields, "--on", "ray")
    ended.set()
    looking.join()
    assert result.code == 1 and result.out == ""
    words = " ".join(result.err.split())
    assert words.count("failed: ") == 1 and "failed: rows cat: teacher 'cat': 0 of 6 answers" in words
    assert "error: failed tasks: 1 of " in words and "that need them were not begun" in words
    assert listening and all("127.0.0.1" in address for address in listening), listening
    assert not soak.ray_workers(os.getpid())
