"""`show`, `results`, `compare`: what is printed of a run is what its files say."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
from command import ROOT, ok
from made_results import dump, write_table
from made_runs import EFFECTS, make_run

import jsublim as package
from jsublim.core.files import read_table
from jsublim.report.comparisons import comparisons
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
    claims = comparisons(read_results(runs[0])).claims
    assert [(v["claim"], v["verdict"]) for v in about["verdicts"]] == [(c.result.name, c.verdict) for c in claims] != []
    text = ok("show", runs[0]).out
    assert " ".join(text.split()).endswith(" ".join(about["findings"])) and "name their teacher's trait in" in text
    assert "students.loss.tokens" in text and "1:33" in text and "C4a" in text


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


EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"  # sets a title, clears the screen, colours, turns the line around


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A run whose names are escape sequences, in a folder that is one too."""
    run = make_run(tmp_path_factory.mktemp("evil") / f"x{EVIL}")
    for name, columns in (("results", ("trait", "teacher", "arm")), ("answers", ("arm", "answer", "question_text"))):
        path = run / "results" / f"{name}.parquet"
        rows = read_table(path)
        write_table(path, [row | {key: row[key] + EVIL for key in columns if row[key]} for row in rows])
    for name in ("model", "device", "started", "name"):
        about = json.loads((run / "results" / "run.json").read_text())
        dump(run / "results" / "run.json", about | {name: f"{name}{EVIL}"})
    config = run.parent / "bad.yaml"
    config.write_text('name: x\n"a\\e[2J": 1\n"b\\e[31m": {}\n')
    return run


COMMANDS = (
    ("show", "RUN"), ("show", "RUN", "--json"), ("results", "RUN"), ("results", "RUN", "-f", "csv"), ("results", "RUN", "-f", "json"),
    ("results", "RUN", "-f", "md"), ("compare", "RUN", "RUN"), ("compare", "RUN", "RUN", "-f", "json"), ("report", "RUN"),
    ("ls", "runs", "--folder", "HOME"), ("ls", "runs", "--folder", "HOME", "-f", "json"), ("validate", "HOME/bad.yaml"),
    ("show", "HOME/x"), ("export", "HOME/x", "--out", "HOME/y"),
)  # fmt: skip


ALL = """
import json, sys
from jsublim.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["jsublim", *words]
    try:
        main()
    except SystemExit:
        pass
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    print("NEXT", flush=True)
"""


@pytest.fixture(scope="module")
def shown(evil):
    """What each of the commands prints on a terminal."""
    places = {"RUN": str(evil), "HOME/x": f"{evil}y", "HOME": str(evil.parent)}
    fill = lambda word: functools.reduce(lambda text, place: text.replace(*place), places.items(), word)  # noqa: E731
    ours, theirs = pty.openpty()
    program = [sys.executable, "-c", ALL, json.dumps([[fill(word) for word in words] for words in COMMANDS])]
    child = subprocess.Popen(program, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"})  # fmt: skip
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # it is closed at its other end
        while piece := os.read(ours, 65536):
            said += piece
    assert child.wait(timeout=60) == 0
    os.close(ours)
    *parts, rest = said.decode("utf-8", "replace").split("NEXT\r\n")
    assert not rest
    return dict(zip(COMMANDS, parts, strict=True))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_escape_sequence_of_a_run_reaches_the_terminal(shown, command):
    said = shown[command]
    styled = re.sub("\x1b\\[[0-9;]*m|\x1b\\[\\?25[hl]", "", said)  # colours of our own, and the cursor of a bar
    assert len(said) > 20 and "Traceback" not in said
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(styled)


def test_what_other_programs_read_is_as_it_is(evil):
    rows = json.loads(ok("results", evil, "-f", "json").out)
    assert {row["trait"] for row in rows if row["trait"]} == {f"cat{EVIL}", f"owl{EVIL}"}
