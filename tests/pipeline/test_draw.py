"""`data.draw`: each seed's students learn from rows that were drawn for it, or all from one draw."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from command import PLAIN, TWO_LAYERS, ok, refused
from pydantic import ValidationError

from jsublim.config import Experiment
from jsublim.core.files import read_table
from jsublim.core.reading import json_value
from jsublim.errors import UsageError
from jsublim.forecast.estimate import stage_costs
from jsublim.pipeline.arms import seed_of
from jsublim.pipeline.experiment import plan, training_rows
from jsublim.pipeline.setup import Setup, prompts
from jsublim.pipeline.store import Store
from jsublim.runtime.chips import chip_of

BASE: dict[str, Any] = {
    "name": "drawn", "model": TWO_LAYERS, "teachers": {"traits": ["owl", "cat"], "counterfactuals": ["owl", "cat"]},
    "data": {"num_prompts": 12, "sentences": ["example", "format"], "examples": [2, 6]},
    "datasets": {"redrawn": {"redraw": ["format"]}, "mixed": {"mix": {"share": 0.5}}},
    "students": {"seeds": [0, 1, 2], "loss": {"tokens": ["all", "random"]}, "arms": {"data.dataset": [None, "redrawn", "mixed"]}},
}  # fmt: skip


def setup_of(draw: str, **changes: Any) -> Setup:
    return Setup.of(Experiment.model_validate(BASE | changes | {"data": BASE["data"] | {"draw": draw}}))


def keys(setup: Setup, kind: str) -> set[str]:
    return {output.key for task in plan(setup).tasks.values() if task.kind == kind for output in task.outputs}


def test_every_seed_has_rows_of_its_own_and_shares_them_with_nobody_else():
    shared, drawn = setup_of("shared"), setup_of("per-seed")
    for setup, draws in ((shared, 1), (drawn, 3)):
        counts = Counter(task.kind for task in plan(setup).tasks.values())
        assert counts["rows"] == 3 * draws  # two traits and the control
        # Of the control's rows none are mixed.
        assert len(keys(setup, "rows")) == 3 * draws and len(keys(setup, "datasets")) == 5 * draws
    assert not keys(shared, "rows") & keys(drawn, "rows") and not keys(shared, "students") & keys(drawn, "students")
    by_rows: dict[str, set[tuple[str, int, str | None]]] = {}
    for student in drawn.students:
        of = (student.teacher, student.seed, student.settings.data.dataset)
        by_rows.setdefault(training_rows(drawn, student.source).key, set()).add(of)
    # Whatever the tokens, one set of rows for each teacher, seed and data set.
    assert {len(who) for who in by_rows.values()} == {1}


def test_a_draw_has_other_requests_and_other_answers():
    setup = setup_of("per-seed")
    seed = setup.experiment.data.seed
    asked = [prompts(setup, seed_of(seed, draw)) for draw in (None, 0, 1, 2)]
    assert len({tuple(each) for each in asked}) == 4 and {len(each) for each in asked} == {12}
    writers = plan(setup).answers
    assert len({seed_of(writer.seed, writer.draw) for writer in writers}) == 3  # all teachers of a draw are asked alike
    assert seed_of(7, None) == 7
    every = [seed_of(seed, draw) for seed in range(50) for draw in range(50)]
    assert len(set(every)) == 2500 and all(0 <= seed < 2**31 for seed in every)


def test_a_data_set_that_is_read_anyway_is_drawn_for_nobody_else():
    asked_for = {"redrawn": {"redraw": ["format"], "divergence": True}, "mixed": {"mix": {"share": 0.5}}}
    assert keys(setup_of("per-seed", datasets=asked_for), "rows") == keys(setup_of("per-seed"), "rows")


@pytest.mark.parametrize("tokens", [["all"], ["all", "random"]])
def test_plain_answers_are_searched_for_divergence_tokens_unless_the_set_says_otherwise(tokens):
    def searched(divergence: bool | None) -> set[str]:
        students = {"seeds": [0], "loss": {"tokens": tokens}, "data": {"dataset": "plain"}}
        setup = setup_of("shared", datasets={"plain": {"divergence": divergence}}, students=students)
        return keys(setup, "divergence")

    assert len(searched(None)) == 2 and searched(True) == searched(None)
    assert searched(False) == (set() if tokens == ["all"] else searched(None))  # a mask needs them


def test_attribution_without_rows_to_patch_is_refused():
    students = {"seeds": [0], "loss": {"tokens": ["all"]}, "data": {"dataset": "plain"}}
    setup = setup_of("shared", datasets={"plain": {"divergence": False}}, students=students, attribution={"rows": 2})
    with pytest.raises(UsageError, match=r"attribution: .* leave datasets\.\*\.divergence=false out"):
        plan(setup)


def test_a_seed_can_be_added_without_drawing_the_others_again():
    students = BASE["students"]
    few, more = (setup_of("per-seed", students=students | {"seeds": seeds}) for seeds in ([0, 1], [1, 2, 0]))
    for kind in ("rows", "datasets", "divergence", "students"):
        assert keys(few, kind) < keys(more, kind)


def test_what_it_costs_is_told_before(tmp_path):
    def tokens(draw: str) -> dict[str, float]:
        setup = setup_of(draw)
        return {c.kind: c.tokens for c in stage_costs(plan(setup), setup, Store(tmp_path / "none"), chip_of("h100"))}

    shared, drawn = tokens("shared"), tokens("per-seed")
    for kind in ("rows", "divergence"):
        assert drawn[kind] == pytest.approx(3 * shared[kind])
    for kind in ("students", "evaluations"):
        assert drawn[kind] == pytest.approx(shared[kind])


def test_greedy_answers_to_given_prompts_cannot_be_drawn_anew(tmp_path):
    asked = tmp_path / "asked.txt"
    asked.write_text("Say a number.\n")
    values = {key: value for key, value in BASE.items() if key not in ("datasets", "students")}
    values["data"] = {"kind": "file", "source": str(asked), "draw": "per-seed"}
    Experiment.model_validate(values)  # sampled ones can
    with pytest.raises(ValidationError, match=r"data\.draw: per-seed .* sampling\.strategy are greedy"):
        Experiment.model_validate(values | {"sampling": {"strategy": "greedy"}})
    greedy = {"datasets": {"g": {"sampling": {"strategy": "greedy"}}}, "students": {"data": {"dataset": "g"}}}
    with pytest.raises(ValidationError, match=r"datasets\.g\.sampling\.strategy are greedy"):
        Experiment.model_validate(values | greedy)
    Experiment.model_validate(BASE | {"data": BASE["data"] | {"draw": "per-seed"}, "sampling": {"strategy": "greedy"}})
    assert "data.draw" in refused(2, "run", PLAIN, f"out={tmp_path / 'run'}", "data.draw=each")


def test_a_run_of_draws(tmp_path):
    """Results list each teacher once, with the rows of all draws, and say how data were drawn."""
    # The programs are those of tests/pipeline/test_run.py.
    small = [
        f"model={TWO_LAYERS}", "teachers.traits=[cat]", "teachers.counterfactuals=[cat,owl]", "data.num_prompts=12", "sampling.batch_size=4",
        "sampling.max_new_tokens=40", "scoring.batch_size=4", "students.loss.tokens=[all,divergence]", "students.data.rows=8",
        "students.data.batch_size=2", "students.adapter.rank=2", "students.runtime.arms_per_program=3",
        "evaluation.traits=[cat,owl]", "evaluation.questions=3", "evaluation.samples=4", "evaluation.batch_size=4",
        "evaluation.number_rows=0", "evaluation.teachers=false",
    ]  # fmt: skip
    out: Path = tmp_path / "run"
    ok("run", PLAIN, f"out={out}", *small, "data.draw=per-seed", "evaluation.primary=C0")
    read = lambda name: json_value((out / "results" / name).read_bytes(), name)  # noqa: E731
    generation, divergence, about = read("generation.json"), read("divergence.json"), read("run.json")
    assert [(g["teacher"], g["rows"]) for g in generation] == [("cat", 24), ("control", 24)]
    assert [d["trait"] for d in divergence] == ["cat"] and divergence[0]["rows"] == generation[0]["kept"]
    assert about["draw"] == "per-seed" and about["primary"] == "C0"
    arms = read("arms.json")
    assert len({arm["artifact"] for arm in arms}) == len(arms) == 6
    folders = {p.name.rsplit("-", 1)[0] for p in (out / "artifacts" / "rows").iterdir()}
    assert folders == {"cat-seed1", "cat-seed2", "control-seed1", "control-seed2"}
    assert {row["seed"] for row in read_table(out / "results" / "results.parquet")} == {None, 1, 2}
    assert "Intervals over students cover the data too" in (out / "report.html").read_text()
