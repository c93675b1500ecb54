"""Students and teachers whose numbers stop being finite: the others go on, and nobody takes them for students."""

from __future__ import annotations

import json

from command import PLAIN, TWO_LAYERS, ok, refused

from jsublim.core.files import read_table

SMALL = (
    f"model={TWO_LAYERS}", "teachers.traits=[cat]", "teachers.counterfactuals=[cat,owl]", "teachers.control=false",
    "data.num_prompts=8", "sampling.batch_size=4", "sampling.max_new_tokens=40", "scoring.batch_size=4",
    "students.loss.tokens=[all]", "students.seeds=[1]", "students.data.rows=6", "students.data.epochs=2",
    "students.data.batch_size=2", "students.adapter.rank=2",
    "evaluation.traits=[cat]", "evaluation.questions=2", "evaluation.samples=2", "evaluation.batch_size=4",
    "evaluation.number_rows=0", "evaluation.teachers=false",
)  # fmt: skip
ARMS = "students.arms=[{name: sane, optimizer.lr: 1e-3}, {name: wild, optimizer.lr: 3e38}]"


def test_a_student_that_diverges_is_named_and_counted_nowhere(tmp_path):
    command = ("run", PLAIN, f"out={tmp_path / 'run'}", *SMALL, ARMS)
    said = ok(*command)
    results = tmp_path / "run" / "results"
    (name, what), *more = json.loads((results / "diverged.json").read_text()).items()
    assert "wild" in name and "step 1 " in what and "rows [" in what and not more
    line = next(line for line in said.err.splitlines() if "diverged at" in line)
    assert "wild" in line and "students.optimizer.lr" in said.err.replace("\n", " ")
    assert [arm["variant"] for arm in json.loads((results / "arms.json").read_text())] == ["sane"]
    scores = read_table(results / "results.parquet")
    assert {row["arm"] for row in scores if row["role"] == "student"} == {"cat/all/sane/seed1"}
    assert "1 student diverged" in (tmp_path / "run" / "report.html").read_text()
    marks = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/artifacts/*/*/DONE")}
    ok(*command)
    assert {path: path.stat().st_mtime_ns for path in marks} == marks  # whole is whole


def test_a_teacher_that_diverges_ends_the_run(tmp_path):
    taught = "teachers.taught={method: steering, layers: [1], steps: 3, lr: 3e38}"
    command = ("run", PLAIN, f"out={tmp_path / 'run'}", *SMALL, taught)
    for _ in range(2):
        line = refused(1, *command)
        assert "cat: diverged at step" in line and "teachers.taught.lr" in line
    assert not list(tmp_path.glob("run/artifacts/teachers/*/DONE"))
