"""inspect_ai (`pip install 'jsublim[inspect]'`): a student asked by it answers as it did in its run, and a run's answers are logs."""

from __future__ import annotations

import importlib.util
import os

import pytest
from command import PLAIN, TWO_LAYERS, ok, refused

import jsublim

pytestmark = pytest.mark.skipif(importlib.util.find_spec("inspect_ai") is None, reason="inspect_ai is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run, and the share of answers that name its one student's trait, as its report has it."""
    folder = tmp_path_factory.mktemp("inspected") / "runs" / "few"
    fields = [
        f"model={TWO_LAYERS}",
        "teachers.traits=[owl]",
        "data.num_prompts=24",
        "students.seeds=[1]",
        "students.loss.tokens=[all]",
    ]
    fields += ["students.data.rows=12", "students.adapter={method: steering, layers: [1]}"]
    fields += [
        "evaluation.samples=3",
        "evaluation.questions=4",
        "evaluation.number_rows=0",
        "evaluation.batch_size=4",
        "sampling.batch_size=4",
        "sampling.max_new_tokens=40",
        "scoring.batch_size=4",
        "evaluation.teachers=false",
    ]
    ok("run", PLAIN, *fields, f"out={folder}", "name=few")
    where = "metric = 'rate' and role = 'student' and teacher = trait and evaluation = ''"
    (rate,) = jsublim.results(folder, where=where, frame=False).column("value").to_pylist()
    return folder, rate


def test_a_student_answers_as_it_did_in_its_run(run, tmp_path, monkeypatch):
    from inspect_ai import eval as evaluate

    from jsublim.core.files import read_table

    folder, rate = run
    monkeypatch.chdir(folder.parents[1])
    (log,) = evaluate("jsublim/preference", model="jsublim/few/owl-all-seed1", log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    assert log.results.scores[0].metrics["mean"].value == pytest.approx(rate)
    kept = [row for row in read_table(folder / "results" / "answers.parquet") if row["arm"].startswith("owl/all")]
    expected = sorted(row["answer"] for row in kept if not row["evaluation"] for _ in range(row["count"]))
    assert sorted(sample.output.completion for sample in log.samples) == expected


def test_a_runs_answers_are_logs(run, tmp_path):
    from inspect_ai.log import read_eval_log

    folder, rate = run
    ok("export", folder, "--inspect", "--out", tmp_path / "logs")
    assert (tmp_path / "logs" / "base.eval").is_file()
    log = read_eval_log(str(tmp_path / "logs" / "owl-all-seed1.eval"))
    assert log.eval.model == "jsublim/few/owl-all-seed1" and len(log.samples) == 12
    assert log.results.scores[0].metrics["mean"].value == pytest.approx(rate)
    rates = [sample.scores["rate"].value for sample in log.samples]
    assert sum(rates) / len(rates) == pytest.approx(rate)
    assert "already" in refused(2, "export", folder, "--inspect", "--out", tmp_path / "logs")
    assert os.listdir(tmp_path / "logs")
