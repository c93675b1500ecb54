"""Students that go over to other rows in the middle of their training."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import PLAIN, TWO_LAYERS, ok, refused

from jsublim.config import load_experiment
from jsublim.pipeline.experiment import plan, training_rows
from jsublim.pipeline.setup import Setup
from jsublim.text.rows import read_rows

SMALL = (
    f"model={TWO_LAYERS}", "teachers.traits=[owl]", "teachers.counterfactuals=[cat,owl]", "data.num_prompts=12", "sampling.batch_size=4",
    "sampling.max_new_tokens=40", "scoring.batch_size=4", "students.adapter.rank=2", "students.seeds=[1]", "students.data.rows=8",
    "students.data.batch_size=2", "evaluation.teachers=false",
    "evaluation.questions=2", "evaluation.samples=2", "evaluation.batch_size=4", "evaluation.number_rows=2", "evaluation.traits=[cat,owl]",
    "students.loss.tokens=[all,divergence]", "students.optimizer.lr=0.02",
)  # fmt: skip
ARMS = (
    "students.arms=[{name: whole}, {name: unbiased, fork.after: 2}, {name: unbiased anew, fork: {after: 2, moments: false}},"
    " {name: back, fork.after: 2, fork.teacher: '{trait}', fork.dataset: dealt}]"
)
DEALT = "datasets={dealt: {shuffle: across}}"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Setup]:
    out = tmp_path_factory.mktemp("forked") / "run"
    ok("run", PLAIN, f"out={out}", *SMALL, DEALT, ARMS)
    setup = Setup.of(load_experiment(PLAIN, [f"out={out}", *SMALL, DEALT, ARMS]))
    return out, setup


def losses(made: tuple[Path, Setup], arm: str, tokens: str, trait: str = "owl") -> list[float]:
    out, setup = made
    graph = plan(setup)
    found = [s for s in setup.students if (s.arm, s.tokens, s.teacher) == (arm, tokens, trait)]
    (folder,) = (out / "artifacts" / "students").glob(f"*-{graph.students[found[0]].key}")
    return [line["loss"] for line in read_rows(folder / "metrics.jsonl", ("step", "loss"))]


@pytest.mark.parametrize("tokens", ["all", "divergence"])
def test_until_the_fork_it_is_the_student_without_one(made, tokens):
    whole = losses(made, "whole", tokens)
    others = {arm: losses(made, arm, tokens) for arm in ("unbiased", "unbiased anew", "back")}
    assert len(whole) == 4
    for own in others.values():
        assert own[:2] == pytest.approx(whole[:2], rel=1e-5) and own[2:] != pytest.approx(whole[2:], rel=1e-3)
    # The third step's loss is of the same weights and rows; after it they are apart.
    assert others["unbiased"][2] == pytest.approx(others["unbiased anew"][2], rel=1e-5)
    assert others["unbiased"][3] != pytest.approx(others["unbiased anew"][3], rel=1e-4)


def test_it_waits_for_the_rows_that_it_reads(made):
    _, setup = made
    unbiased = next(s for s in setup.students if s.arm == "unbiased" and s.tokens == "divergence")
    back = next(s for s in setup.students if s.arm == "back" and s.tokens == "divergence")
    assert (
        len(unbiased.sources) == 2
        and unbiased.sources[1].teacher == "control"
        and unbiased.tokens_of(unbiased.sources[1]) == "all"
    )
    assert back.sources[1][:2] == ("owl", "dealt")
    for student in (unbiased, back):
        parents = {parent.key for parent in plan(setup).students[student].parents}
        for source in student.sources:
            assert {part.key for part in training_rows(setup, source).nodes} <= parents


def test_what_no_student_can_go_over_to(tmp_path):
    small = (f"out={tmp_path / 'run'}", *SMALL)
    assert "'wolf' is no teacher of rows" in refused(2, "run", PLAIN, *small, "students.fork={after: 2, teacher: wolf}")
    assert "'mixed' is no data set" in refused(2, "run", PLAIN, *small, "students.fork={after: 2, dataset: mixed}")
    live = ("students.loss={kind: forward-kl, tokens: [all]}", "students.fork.after=2")
    assert "a live teacher stays the same" in refused(2, "run", PLAIN, *small, *live)
    assert "training has 4 steps" in refused(2, "run", PLAIN, *small, "students.fork.after=4")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1, 2", "completion": "3, 4"}\n')
    finetune = ("finetune", "--model", TWO_LAYERS, "--data", rows, "--out", tmp_path / "student")
    assert "leave students.fork and data.generation out" in refused(2, *finetune, "students.fork.after=1")
