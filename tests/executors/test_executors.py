"""Workers of Ray, and shards: what they leave is what one process leaves, whoever is killed and whatever fails."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import threading
import time

import pytest
import soak
from command import PLAIN, ROOT, TWO_LAYERS, jsublim, ok, refused, start
from faulty_runs import contents

from jsublim.executors import shards
from jsublim.pipeline.stage import Task

FIELDS = (*soak.SMALL, f"model={TWO_LAYERS}")
# Not imported here: Ray reads its settings when it is imported.
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run that all others must equal."""
    out = tmp_path_factory.mktemp("whole") / "whole"
    ok("run", PLAIN, f"out={out}", *FIELDS)
    return out


def test_shards_wait_for_one_another_and_leave_what_one_process_leaves(tmp_path, monkeypatch, undisturbed):
    """A shard that has not been started holds the other up, which does its own tasks alone; who ends last writes the report."""
    monkeypatch.setattr(shards, "LOOK", 0.1)
    command = ("run", PLAIN, f"out={tmp_path / 'run'}", *FIELDS)
    other = start(*command, "--shard", "1/2")
    done = lambda: {mark.parent for mark in (tmp_path / "run" / "artifacts").glob("*/*/DONE")}  # noqa: E731
    said, clock = "", time.monotonic()
    while "waits for" not in said:
        assert other.poll() is None and time.monotonic() - clock < 180 and other.stderr is not None
        said = other.stderr.readline()
    alone = done()
    time.sleep(3)
    assert other.poll() is None and done() == alone and "shard 1/2: waits for" in said
    first = ok(*command, "--shard", "0/2")
    out, err = other.communicate(timeout=180)
    assert other.returncode == 0 and done() > alone, err
    report = tmp_path / "run" / "report.html"
    ends = [("1/2", out, err), ("0/2", first.out, first.err)]
    assert all(f"shard {shard}: its" in err for shard, _, err in ends)
    assert all((text.strip() == str(report)) != ("of others are not" in err) for _, text, err in ends)
    assert report.exists() and contents(tmp_path / "run") == contents(undisturbed)
    # Of a shard that lost what it had made, the same command makes that again, and nothing else.
    before = contents(tmp_path / "run")
    shutil.rmtree(next((tmp_path / "run" / "artifacts" / "evaluations").iterdir()))
    for shard in ("0/2", "1/2"):
        ok(*command, "--shard", shard)
    assert contents(tmp_path / "run") == before


def test_a_task_that_fails_holds_back_only_what_needs_it(tmp_path, monkeypatch):
    """Two traits: the answers of one cannot be written, and everything about the other is done."""
    made = Task.make

    def make(self, context, tick):
        if (self.kind, self.label) == ("rows", "owl"):
            raise OSError(28, "No space left on device", "owl.jsonl")
        made(self, context, tick)

    monkeypatch.setattr(Task, "make", make)
    fields = (*FIELDS, "teachers.traits=[cat,owl]", "students.loss.tokens=[all]", "students.runtime.arms_per_program=1")
    command = ("run", PLAIN, f"out={tmp_path / 'run'}", *fields, "--shard", "0/1")
    line = refused(1, *command)
    assert "failed tasks: 1" in line and "same command" in line
    done = {mark.parent.name.rsplit("-", 1)[0] for mark in (tmp_path / "run" / "artifacts").glob("*/*/DONE")}
    assert done == {"cat", "base"}  # rows, and the evaluation of the base
    monkeypatch.setattr(Task, "make", made)
    assert ok(*command).out


@pytest.mark.parametrize("text", ["2/2", "1", "a/b", "-1/2", "0/0"])
def test_what_is_no_shard_is_refused(text):
    assert "write i/n" in refused(2, "run", PLAIN, "--shard", text)


def test_options_that_contradict_one_another_are_refused():
    assert "not both" in refused(2, "run", PLAIN, "--on", "ray", "--shard", "0/2")
    assert "known: local, ray" in refused(2, "run", PLAIN, "--on", "dask")
    assert "--on ray" in refused(2, "run", PLAIN, "--ray-address", "auto")
    assert "leave them out" in refused(2, "run", "configs/digits.yaml", "--shard", "0/2")


@needs_ray
def test_killed_workers_drivers_and_shards_leave_what_an_undisturbed_run_leaves(undisturbed, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "without_torch"))
    soak.main([str(undisturbed.parent), "--kills", "3", "--ways", "ray,shard", "--workers", "1", "--fields", *FIELDS])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sum(said["kills"].values()) >= 3 and said["kills"].keys() & {"ray's worker", "ray's driver"}


@needs_ray
def test_failed_tasks_are_named_and_nothing_listens_outside(tmp_path, monkeypatch):
    """Answers of one token: there is nothing to learn from them. What cluster there may be elsewhere is not asked."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
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
    failed = re.findall(r"failed: \w+ cat", words)
    assert failed and f"error: failed tasks: {len(failed)} of " in words and "that need them were not begun" in words
    assert listening and all("127.0.0.1" in address for address in listening), listening
    assert not soak.ray_workers(os.getpid())
