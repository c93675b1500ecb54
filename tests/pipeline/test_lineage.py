"""Lineages: students of one generation are the teachers of the next."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command import PLAIN, TWO_LAYERS, ok, refused
from safetensors.numpy import load_file

from jsublim.config import load_experiment
from jsublim.core.files import read_table
from jsublim.pipeline.arms import Student
from jsublim.pipeline.experiment import plan
from jsublim.pipeline.graph import Graph
from jsublim.pipeline.setup import Setup
from jsublim.text.rows import read_rows

SMALL = (
    f"model={TWO_LAYERS}", "teachers.traits=[cat,owl]", "teachers.counterfactuals=[cat,owl]", "data.num_prompts=12", "sampling.batch_size=4",
    "sampling.max_new_tokens=40", "scoring.batch_size=4", "students.seeds=[1]", "students.data.rows=4", "students.data.batch_size=2",
    "evaluation.teachers=false", "evaluation.questions=2", "evaluation.samples=2", "evaluation.batch_size=4", "evaluation.number_rows=2", "evaluation.traits=[cat,owl]",
)  # fmt: skip
LORA = ("students.adapter.rank=2", "students.loss.tokens=[all,divergence]", "students.optimizer.lr=0.02")
FULL = (
    "students.loss.tokens=[all]",
    "students.adapter={method: full, projections: [q, k, v, o, gate, up, down]}",
    "students.optimizer.lr=0.001",
)


def planned(*fields: str) -> tuple[Setup, Graph]:
    setup = Setup.of(load_experiment(PLAIN, list(fields)))
    return setup, plan(setup)


def folder(out: Path, kind: str, key: str) -> Path:
    (found,) = (out / "artifacts" / kind).glob(f"*-{key}")
    return found


def student(setup: Setup, trait: str, tokens: str, arm: str) -> Student:
    (found,) = (s for s in setup.students if (s.teacher, s.tokens, s.arm) == (trait, tokens, arm))
    return found


@pytest.mark.parametrize(("method", "fields"), [("lora", LORA), ("full", FULL)])
def test_a_student_that_writes_rows_is_the_teacher_that_has_its_weights(method, fields, tmp_path):
    """The second generation of a run is the first of another, whose teachers are the first generation's folders."""
    out, again = tmp_path / "lineage", tmp_path / "again"
    ok("run", PLAIN, f"out={out}", *SMALL, *fields, "students.arms={data.generation: [1, 2]}")
    setup, graph = planned(f"out={out}", *SMALL, *fields, "students.arms={data.generation: [1, 2]}")
    first = {trait: graph.students[student(setup, trait, "all", "generation=1")] for trait in ("cat", "owl")}
    for trait, output in first.items():
        (tmp_path / "elders").mkdir(exist_ok=True)
        (tmp_path / "elders" / trait).symlink_to(folder(out, "students", output.key))
    given = f"teachers.{'checkpoint' if method == 'full' else 'adapter'}={tmp_path / 'elders'}/{{trait}}"
    one = (f"out={again}", *SMALL, *fields, given, "students.loss.tokens=[all]", "teachers.control=false")
    ok("run", PLAIN, *one)
    other, its = planned(*one)
    for trait in ("cat", "owl"):
        late, early = student(setup, trait, "all", "generation=2"), student(other, trait, "all", "")
        rows = {w.teacher: r for w, r in graph.answers.items() if w.parent is not None and w.parent.tokens == "all"}[
            trait
        ]
        key = next(r.key for w, r in its.answers.items() if w.teacher == trait)
        texts = [read_rows(folder(o, "rows", k) / "raw.jsonl") for o, k in ((out, rows.key), (again, key))]
        assert texts[0] == texts[1]
        file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
        a, b = (
            load_file(folder(o, "students", g.students[s].key) / file)
            for o, g, s in ((out, graph, late), (again, its, early))
        )
        for name in a:
            np.testing.assert_allclose(a[name], b[name], atol=2e-5)
        start = load_file(folder(out, "students", first[trait].key) / file)
        assert any(np.abs(start[name] - a[name]).max() > 1e-4 for name in a)  # another student than the one that wrote
    conditions = {row["condition"] for row in read_table(out / "results" / "results.parquet")}
    assert {"all · generation=1", "all · generation=2"} <= conditions
    said = json.loads((out / "results" / "generation.json").read_text())
    assert {entry.get("students") for entry in said} >= {None, "all/generation=1"}
    assert "its students all/generation=1" in (out / "report.html").read_text()


def test_each_generation_waits_for_the_one_before_and_has_the_tokens_of_its_own():
    setup, graph = planned(*SMALL, *LORA, "students.arms={data.generation: [1, 2, 3]}")
    tasks = {node: task for task in graph.tasks.values() for node in task.nodes}
    third, second = (
        tasks[graph.students[student(setup, "owl", "divergence", f"generation={number}")]] for number in (3, 2)
    )

    def above(task) -> set[str]:
        return {parent.key for parent in task.parents}.union(*map(above, task.parents))

    assert second.key in above(third) and third.key not in above(second)
    assert not {o.key for o in second.outputs} & {o.key for o in third.outputs}
    elders = {w.parent for w in graph.answers if w.parent is not None and w.teacher == "owl"}
    assert {(e.tokens, e.arm) for e in elders} == {
        (t, f"generation={g}") for t in ("all", "divergence") for g in (1, 2)
    }
    assert {w.parent.tokens for w in graph.answers if w.parent is not None and w.teacher == "control"} == {"all"}


def test_what_no_lineage_can_be_made_of():
    alone = refused(2, "run", PLAIN, "students.data.generation=2", "--dry-run")
    assert "no arm has generation 1" in alone
    gap = refused(2, "run", PLAIN, "students.arms={data.generation: [1, 3]}", "--dry-run")
    assert "arm 'generation=3'" in gap and "no arm has generation 2" in gap
    nobody = (*SMALL, *LORA, "teachers.counterfactuals=[cat,owl,dog]", "students.arms={data.generation: [1, 2]}")
    assert "'dog' has no student in arm 'generation=1'" in refused(2, "run", PLAIN, *nobody, "--dry-run")
    other = refused(
        2,
        "run",
        PLAIN,
        "students.model=tiny-gemma3",
        "students.loss.tokens=[all]",
        "students.arms={data.generation: [1, 2]}",
    )
    assert "students of another model are no teachers here" in other
