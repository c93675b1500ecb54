"""`show`, `results`, `compare`: what is printed of a run is what its files say."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from command import ok
from made_runs import EFFECTS, make_run

import jsublim as package
from jsublim.files import read_table
from jsublim.report.claims import check_claims
from jsublim.report.statistics import Estimate
from jsublim.report.tables import read_results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    weak = EFFECTS | {"all": 0.05}
    return make_run(home / "owls"), make_run(home / "weak", "weak", effects=weak)


def test_show_says_what_was_run_and_what_came_of_it(runs):
    about = json.loads(ok("show", runs[0], "--json").out)
    assert about["status"] == "finished" and about["seconds"] == {"generate": 12.5, "distil": 80.25}
    assert about["config"] == {
        "name": "owls", "model": "Qwen/Qwen2.5-7B-Instruct", "dtype": "bfloat16",
        "teachers.traits": ["cat", "owl"], "teachers.counterfactuals": ["cat", "owl"],
        "students.seeds": [1, 2, 3], "students.loss.tokens": ["all", "divergence"],
    }  # fmt: skip
    claims = check_claims(read_results(runs[0]))
    assert [(v["claim"], v["verdict"]) for v in about["verdicts"]] == [(c.name, c.verdict) for c in claims] != []
    text = ok("show", runs[0]).out
    assert "students.loss.tokens" in text and "1.5 minutes" in text and "C4a" in text


def test_results_are_means_over_questions_and_sql_chooses(runs):
    rows = list(csv.DictReader(io.StringIO(ok("results", *runs, "-f", "csv").out)))
    stored = [row for row in read_table(runs[0] / "results" / "results.parquet") if row["metric"] == "rate"]
    for row in (row for row in rows if row["run"] == "owls" and row["metric"] == "rate"):
        own = [s for s in stored if s["arm"] == row["arm"] and s["trait"] == row["trait"]]
        assert float(row["value"]) == pytest.approx(np.mean([s["value"] for s in own]))
        assert (row["questions"], row["answers"]) == (str(len(own)), str(sum(s["n"] for s in own)))
    chosen = json.loads(ok("results", runs[0], "--where", "metric = 'rate' and teacher = trait", "-f", "json").out)
    assert {(row["teacher"], row["trait"]) for row in chosen} == {("cat", "cat"), ("owl", "owl")}
    every = json.loads(ok("results", runs[0], "--questions", "--where", "metric = 'rate'", "-f", "json").out)
    assert len(every) == len(stored)
    for how, sign in {"md": "| --- |", "latex": r"\begin{tabular}"}.items():
        text = ok("results", runs[0], "--where", "metric = 'rate'", "-f", how).out
        assert sign in text and text.count("owl/all/seed1") == 2


def test_results_in_python_are_the_same(runs):
    frame = package.results(*runs, where="metric = 'rate' and teacher = trait")
    rows = json.loads(ok("results", *runs, "--where", "metric = 'rate' and teacher = trait", "-f", "json").out)
    assert frame["value"].tolist() == [row["value"] for row in rows] and set(frame["run"]) == {"owls", "weak"}
    table = package.Run(runs[0]).results(questions=True, frame=False)
    assert table.num_rows == len(read_table(runs[0] / "results" / "results.parquet"))
    assert package.Run(runs[0]).about["name"] == "owls"


def test_compare_gives_differences_with_their_intervals(runs):
    rows = json.loads(ok("compare", *runs, "-f", "json").out)
    a, b = (read_results(run) for run in runs)
    for row in (row for row in rows if row["condition"] in ("all", "divergence")):
        own = [[s.mean for s in r.select(row["metric"], row["condition"], row["trait"], row["trait"])] for r in (a, b)]
        assert row["b - a"] == pytest.approx(np.mean(own[1]) - np.mean(own[0])) and row["students"] == [3, 3]
        assert row["low"] < row["b - a"] < row["high"]
        if row["metric"] == "logprob":
            interval = (Estimate.of(own[1]) - Estimate.of(own[0])).interval()
            assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    (own,) = (row for row in rows if (row["condition"], row["metric"], row["trait"]) == ("all", "logprob", "owl"))
    assert own["high"] < 0  # what was planted
    text = ok("compare", *runs).out
    assert "Their configs say the same." in text and "verdicts" in text
