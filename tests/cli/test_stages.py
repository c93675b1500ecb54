"""Single commands and `run` do the same tasks: either finds what the other has made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import PLAIN, ok, refused

from jsublim.files import read_table
from jsublim.rows import read_rows

FIELDS = (
    PLAIN, "teachers.traits=[owl]", "teachers.counterfactuals=[cat]", "teachers.control=false", "evaluation.teachers=false",
    "data.num_prompts=12", "sampling.batch_size=4", "sampling.max_new_tokens=40", "sampling.shard=8", "scoring.batch_size=16",
    "students.seeds=[1]", "students.loss.tokens=[divergence]", "students.data.rows=4", "students.data.batch_size=2",
    "students.adapter.rank=2", "evaluation.traits=[cat,owl]", "evaluation.questions=2", "evaluation.samples=2",
    "evaluation.batch_size=4", "evaluation.number_rows=0",
)  # fmt: skip


def marks(store: Path) -> dict[str, int]:
    return {str(path.parent.relative_to(store)): path.stat().st_mtime_ns for path in store.glob("*/*/DONE")}


def stage_by_stage(home: Path, store: Path) -> None:
    fields = (*FIELDS, f"store={store}")
    ok("generate", *fields, "--trait", "owl", "--out", home / "owl.jsonl")
    ok("divergence", *fields, "--trait", "owl", "--data", home / "owl.jsonl", "--out", home / "found.jsonl")
    learn = ("--tokens", "divergence", "--seed", 1)
    ok("finetune", *fields, "--trait", "owl", "--data", home / "found.jsonl", *learn, "--out", home / "student")
    ok("evaluate", *fields, "--adapter", home / "student", "--out", home / "answers")
    ok("evaluate", *fields, "--out", home / "base")


def keys(store: Path) -> set[str]:
    return {name.rsplit("-", 1)[-1] for name in marks(store)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A store that `run` has filled."""
    home = tmp_path_factory.mktemp("stages")
    ok("run", *FIELDS, f"out={home / 'run'}", f"store={home / 'store'}")
    return home / "store"


def test_single_commands_find_what_run_has_made(whole, tmp_path):
    before = marks(whole)
    stage_by_stage(tmp_path, whole)
    assert marks(whole) == before
    assert json.loads((tmp_path / "student" / "artifact.json").read_text())["key"] in keys(whole)
    assert read_rows(tmp_path / "found.jsonl", ("divergence_positions",))


def test_run_finds_what_single_commands_have_made(whole, tmp_path):
    stage_by_stage(tmp_path, tmp_path / "store")
    before = marks(tmp_path / "store")
    assert keys(tmp_path / "store") == keys(whole)
    ok("run", *FIELDS, f"out={tmp_path / 'run'}", f"store={tmp_path / 'store'}")
    assert marks(tmp_path / "store") == before
    results = [read_table(run / "results" / "results.parquet") for run in (tmp_path / "run", whole.parent / "run")]
    assert results[0] == results[1]


def test_rows_that_were_edited_are_other_rows(whole, tmp_path):
    """A published file is known by its content: with another line in it, it is nobody's copy any more."""
    fields, out = (*FIELDS, f"store={whole}"), tmp_path / "owl.jsonl"
    ok("generate", *fields, "--trait", "owl", "--out", out)
    before = marks(whole)
    rows = out.read_text().splitlines()
    out.write_text("\n".join(rows[::-1]) + "\n")
    ok("divergence", *fields, "--trait", "owl", "--data", out, "--out", tmp_path / "found.jsonl")
    assert {name.split("/")[0] for name in marks(whole).keys() - before.keys()} == {"divergence"}
    assert "not a result of ours" in refused(2, "generate", *fields, "--trait", "owl", "--out", out)
    assert out.read_text().splitlines() == rows[::-1]


def test_what_differs_is_named(whole, tmp_path):
    fields, out = (*FIELDS, f"store={whole}"), tmp_path / "owl.jsonl"
    ok("generate", *fields, "--trait", "owl", "--out", out)
    line = refused(2, "generate", *fields, "sampling.seed=3", "--trait", "owl", "--out", out)
    assert "seed was 0, is 3" in line and str(out) in line
    assert "give --model" in refused(2, "generate", "--trait", "owl", "--out", tmp_path / "none.jsonl")
