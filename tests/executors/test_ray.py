"""Ray's workers: what they leave is what one process leaves, whoever is killed."""

from __future__ import annotations

import re
import subprocess

import pytest
import soak
from command import PLAIN, start
from faulty_runs import FIELDS

pytest.importorskip("ray")


def test_killed_workers_drivers_and_shards_leave_what_an_undisturbed_run_leaves(tmp_path, capsys):
    soak.main([str(tmp_path / "soak"), "--kills", "3", "--ways", "ray worker,ray driver,shard"])
    assert '"kills": {"ray worker": 1, "ray driver": 1, "shard": 1}' in capsys.readouterr().out


def test_failed_tasks_are_named_nothing_listens_outside_and_nothing_is_left_running(tmp_path):
    """Answers of eight tokens are in no format: the rows fail, and with them everything else."""
    fields = (*FIELDS, "sampling.max_new_tokens=1", "run.workers=1")
    child = start("run", PLAIN, f"out={tmp_path / 'run'}", *fields, "--on", "ray")
    listening = set()
    while child.poll() is None:
        below = {child.pid, *soak.below(child.pid)}
        said = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True).stdout.splitlines()
        listening |= {line.split()[3] for line in said if below & {int(pid) for pid in re.findall(r"pid=(\d+)", line)}}
    _, err = child.communicate()
    assert child.returncode == 1
    lines = [line for line in err.splitlines() if line.startswith(("failed: ", "error: "))]
    assert len([line for line in lines if line.startswith("failed: rows cat")]) == 1
    assert lines[-1].startswith("error: failed tasks: 1 of ") and "were not begun" in lines[-1]
    assert listening and all("127.0.0.1" in address for address in listening), listening
