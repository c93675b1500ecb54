"""Single commands and `run` do the same tasks: either finds what the other has made."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import jax
import pytest
import yaml
from command import PLAIN, TWO_LAYERS, ok, refused

from jsublim.core.files import read_table
from jsublim.inference.lm import load_model
from jsublim.models.peft import load_adapter
from jsublim.text.rows import read_rows

FIELDS = (
    PLAIN, f"model={TWO_LAYERS}", "teachers.traits=[owl]", "teachers.counterfactuals=[cat]", "teachers.control=false", "evaluation.teachers=false",
    "data.num_prompts=12", "sampling.batch_size=4", "sampling.max_new_tokens=40", "sampling.shard=8", "scoring.batch_size=4",
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


def test_a_student_goes_out_with_a_card_and_as_a_checkpoint(whole, tmp_path, monkeypatch):
    """What is loaded from either is what the store has; the card says what decided it."""
    (student,) = (whole / "students").iterdir()
    monkeypatch.chdir(student.parent)
    ok("export", student.name, "--out", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (TWO_LAYERS, None)
    ours, theirs = load_adapter(student), load_adapter(tmp_path / "adapter")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), ours, theirs))
    card = (tmp_path / "adapter" / "README.md").read_text()
    head, body = yaml.safe_load(card.split("---\n")[1]), card.split("---\n")[2]
    assert head["library_name"] == "peft" and "jsublim" in head["tags"]
    record = json.loads((student / "artifact.json").read_text())
    told = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert told[student.name] == record["inputs"]
    assert [name.split("/")[0] for name in told] == [student.name, "divergence", "rows"]  # and what it was made from
    assert told[list(told)[2]]["data"]["kind"] == "numbers" and list(told)[2].endswith(" and 1 more")
    assert f"| key | `{record['key']}` |" in body and "| seed | 1 |" in body

    ok("export", student, "--merged", "--out", tmp_path / "merged")
    lm, merged = load_model(TWO_LAYERS), load_model(tmp_path / "merged")
    tokens = lm.tokenizer(["1, 2, 3"])["input_ids"]
    assert abs(lm.logits(tokens, adapter=ours) - merged.logits(tokens)).max() < 1e-4
    assert "already exists" in refused(2, "export", student, "--out", tmp_path / "merged")


def test_rows_and_results_go_out(whole, tmp_path):
    rows = min((whole / "divergence").iterdir())  # of two shards, the first
    ok("export", rows, "--out", tmp_path / "rows")
    ok("import", tmp_path / "rows", "--out", tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl") == read_rows(rows / "rows.jsonl")
    ok("export", whole.parent / "run", "--out", tmp_path / "tables")
    records = read_table(whole.parent / "run" / "results" / "results.parquet")
    with (tmp_path / "tables" / "results.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [float(row["value"]) for row in found] == pytest.approx([record["value"] for record in records])
    assert {path.name for path in (tmp_path / "tables").iterdir()} >= {"results.csv", "answers.csv", "run.json"}
    assert "holds no rows, no adapter" in refused(2, "export", whole, "--out", tmp_path / "x")
