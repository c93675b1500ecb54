"""Parts of one graph in several processes, and what a kill leaves of them."""

from __future__ import annotations

import shutil

import pytest
from command import PLAIN, ok, refused
from faulty_runs import contents
from soak import SMALL as FIELDS

from jsublim.executors import shards


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    ok("run", PLAIN, f"out={out}", *FIELDS)
    return contents(out)


def test_shards_one_after_another_leave_what_one_process_leaves(tmp_path, monkeypatch, whole):
    """The first one helps where it would wait; the last one writes the report."""
    monkeypatch.setattr(shards, "LOOK", 0.01)
    monkeypatch.setattr(shards, "HELP_AFTER", 0.0)
    command = ("run", PLAIN, f"out={tmp_path / 'run'}", *FIELDS)
    first = ok(*command, "--shard", "0/2")
    assert "shard 0/2: its" in first.err and "of others are not" in first.err
    assert first.out == "" and not (tmp_path / "run" / "report.html").exists()
    said = ok(*command, "--shard", "1/2")
    assert said.out.strip() == str(tmp_path / "run" / "report.html")
    assert contents(tmp_path / "run") == whole
    # Of a shard that lost what it had made, the same command makes that again, and nothing else.
    before = contents(tmp_path / "run")
    shutil.rmtree(next((tmp_path / "run" / "artifacts" / "evaluations").iterdir()))
    for shard in ("0/2", "1/2"):
        ok(*command, "--shard", shard)
    assert contents(tmp_path / "run") == before


def test_a_task_that_fails_holds_back_only_what_needs_it(tmp_path, monkeypatch, whole):
    """Two traits: the answers of one cannot be written, and everything about the other is done."""
    from jsublim.pipeline.rows import WriteRows

    made = WriteRows.make

    def make(self, context, tick):
        if self.writer.teacher == "owl":
            raise OSError(28, "No space left on device", "owl.jsonl")
        made(self, context, tick)

    monkeypatch.setattr(WriteRows, "make", make)
    fields = (*FIELDS, "teachers.traits=[cat,owl]", "students.loss.tokens=[all]", "students.runtime.arms_per_program=1")
    command = ("run", PLAIN, f"out={tmp_path / 'run'}", *fields, "--shard", "0/1")
    line = refused(1, *command)
    assert "failed tasks: 1" in line and "same command" in line
    monkeypatch.setattr(WriteRows, "make", made)
    assert ok(*command).out


@pytest.mark.parametrize("text", ["2/2", "1", "a/b", "-1/2", "0/0"])
def test_what_is_no_shard_is_refused(text):
    assert "write i/n" in refused(2, "run", PLAIN, "--shard", text)


def test_options_that_contradict_one_another_are_refused():
    assert "not both" in refused(2, "run", PLAIN, "--on", "ray", "--shard", "0/2")
    assert "known: local, ray" in refused(2, "run", PLAIN, "--on", "dask")
    assert "--on ray" in refused(2, "run", PLAIN, "--ray-address", "auto")
    assert "leave them out" in refused(2, "run", "configs/digits.yaml", "--shard", "0/2")
