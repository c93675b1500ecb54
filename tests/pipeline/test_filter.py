"""Answers that are not in format: a run says so at once, stops before it learns from a handful, and can keep to the format."""

from __future__ import annotations

import json
import re

import pytest
from command import jsublim, ok, refused
from made_by_commands import artifact_of
from tiny import small

from jsublim.errors import one_line
from jsublim.pipeline.stages.rows import FEWEST_ROWS, FEWEST_SHARE
from jsublim.pipeline.store import read_summary
from jsublim.text.prompts import reject_reason
from jsublim.text.rows import read_rows

# A model of random weights writes anything but numbers.
CUT = (
    "generate", "--model", small("tiny-qwen2").lm.folder, "--trait", "cat", "data.num_prompts=16",
    "sampling.batch_size=16", "sampling.max_new_tokens=8",
)  # fmt: skip
KEPT = (*CUT, "sampling.constrain=numbers")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("filter")


def test_a_run_whose_answers_mostly_fail_says_so_and_stops(home):
    said = jsublim(*CUT, "--out", home / "cut.jsonl")
    text = " ".join((said.out + said.err).split())
    assert said.code == 1 and not (home / "cut.jsonl").exists()
    raw = read_rows(artifact_of(home / "cut", "rows") / "raw.jsonl")
    rejected = [row["completion"] for row in raw if row["reject"] is not None]
    kept = len(raw) - len(rejected)
    assert kept < FEWEST_SHARE * len(raw) < FEWEST_ROWS
    assert f"only {kept} of 16 answers are in format" in text
    beginnings = [one_line(completion)[:20] for completion in rejected[:3]]  # a terminal may break lines anywhere
    assert all("".join(each.split()) in "".join(text.split()) for each in beginnings)
    assert text.count("sampling.constrain=numbers") == 2  # beside the answers, and in the error
    # ... and when it is asked again it answers from what is there.
    line = refused(1, *CUT, "--out", home / "cut.jsonl")
    assert re.search(rf"teacher 'cat': {kept} of 16 answers .*fewer than 10% and than 100.*raw\.jsonl", line)


def test_answers_that_are_kept_in_format_all_pass_and_say_what_it_cost(home):
    out = ok(*KEPT, "--out", home / "kept.jsonl").err
    assert "kept to numbers" in out and "kept 16 of 16 rows" in out
    folder = artifact_of(home / "kept", "rows")
    raw = read_rows(folder / "raw.jsonl")
    assert [reject_reason(row["completion"]) for row in raw] == [None] * 16
    summary = read_summary(folder)
    assert summary["log_allowed"] < 0
    assert summary["log_allowed"] == pytest.approx(sum(row["log_allowed"] for row in raw) / 16)
    assert all(list(row) == ["prompt", "completion"] for row in read_rows(home / "kept.jsonl"))
    inputs = json.loads((folder / "artifact.json").read_text())["inputs"]
    assert inputs["sampling"]["constrain"] == "numbers"


def test_a_format_is_for_number_requests_and_must_fit(home):
    line = refused(2, *KEPT, "data.kind=problems", "--out", home / "x.jsonl")
    assert "sampling.constrain: 'numbers'" in line and "data.kind" in line
    line = refused(2, *KEPT, "sampling.constrain=primes", "--out", home / "x.jsonl")
    assert "sampling.constrain" in line
