"""The paper's figures as configs: every panel is a valid experiment at every scale, and at scale `paper` it is what was published.

Where a fact was read: line numbers are those of the README and scripts of the authors' repository (commit f6840c6).
"""

from __future__ import annotations

import functools

import pytest
from command import ok, refused

from jsublim.cli.app import console
from jsublim.config import Experiment
from jsublim.config.figures import SCALES, load_question, panel_experiment, panels_of, questions
from jsublim.config.grid import grid
from jsublim.config.shipped import named_lists
from jsublim.errors import UsageError
from jsublim.pipeline.arms import plan_students
from jsublim.report.claims import CLAIMS

FILES = [path.stem for path, _ in questions()]
FIGURES = [*range(2, 10), *range(11, 42)]
QWEN, GEMMA = "Qwen/Qwen2.5-7B-Instruct", "google/gemma-3-4b-it"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("figure", FILES)
def test_every_panel_is_an_experiment_at_every_scale(figure, scale):
    path, question = load_question(figure)
    assert set(question.scale) == set(SCALES)
    for panel in question.panels:
        e = panel_experiment(path, question, panel, scale)
        students = plan_students(e)
        assert e.name == f"{figure}-{panel}-{scale}" and (e.students is None) == (not students)
        assert e.recipe.preset == ("paper" if scale == "paper" else "clean")
        assert len({student.name for student in students}) == len(students)
        layers = {"tiny": 6, "small": 28 if "Qwen" in e.model else 26, "paper": 28 if "Qwen" in e.model else 34}[scale]
        for own in (student.settings.adapter.layers for student in students):
            assert own is None or max(own) < layers
            if figure == "fig05":
                assert own is None or len(own) == 1
            if figure == "fig39" and own is not None:  # from a layer on to the last
                assert own == list(range(own[0], layers))


def test_every_figure_is_found():
    for number in FIGURES:
        path, question = load_question(f"fig{number:02d}")
        assert load_question(str(number))[0] == path
        assert panels_of(question, str(number)) and set(panels_of(question, str(number))) <= set(question.panels)
        assert panels_of(question, f"configs/paper/{path.name}") == list(question.panels)
    for name in ("1", "fig10", "42", "figure x", "²", ""):
        with pytest.raises(UsageError, match=r"not among those that are reproduced \(2, 3, ") as error:
            load_question(name)
        assert "\n" not in str(error.value)


def test_bad_usage_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "panel 'lama' is not there; known: qwen, gemma" in refused(2, "reproduce", "fig02", "--panel", "lama")
    assert "--scale: 'huge' given" in refused(2, "reproduce", "fig02", "--scale", "huge")
    assert "did you mean 'seeds'" in refused(2, "reproduce", "fig02", "students.sedes=[1]")
    assert "2 panels cannot share a folder" in refused(2, "reproduce", "fig02", "out=here")
    assert "key 'about' is missing" in refused(2, "reproduce", "configs/paper/scales.yaml")
    assert not list(tmp_path.iterdir())


# --- as published


@functools.cache
def shown(figure: int) -> list[Experiment]:
    """The panels of a figure as published."""
    path, question = load_question(str(figure))
    return [panel_experiment(path, question, panel, "paper") for panel in panels_of(question, str(figure))]


def test_teachers_and_counterfactuals_are_the_published_ones():
    six = {QWEN: named_lists()["qwen animals"], GEMMA: named_lists()["gemma animals"]}
    for figure in FIGURES:
        for e in shown(figure):
            traits, pool, note = e.teachers.traits, e.teachers.counterfactuals, f"figure {figure}: {e.name}"
            if figure in (11, 12, 13, 17, 18, 19, 20, 27, 28, 31):  # README:204, 216, 303, 418; the means of Table 1
                assert traits == named_lists()["animals"] and len(traits) == 13, note
            elif figure not in (8, 16, 32, 33, 34, 37, 38):
                assert traits == six[e.model], note
            if e.model == GEMMA and figure not in (4, 16, 23, 24, 26):  # README:127
                assert pool is not None and [*pool[-2:]] == ["whale", "dragon"] and len(pool) == 15, note
            elif e.model == QWEN and e.teachers.against == "traits":
                assert pool is None or len(pool) == 13, note


def test_seeds_samplings_layers_and_judges_are_the_published_ones():
    assert all(e.students is None or e.students.seeds == [42, 43, 44, 45, 46] for f in FIGURES for e in shown(f))
    assert all(e.evaluation.samples == 200 and e.evaluation.questions is None for f in FIGURES for e in shown(f))
    strategies = {figure: {e.sampling.strategy for e in shown(figure)} for figure in FIGURES}
    assert {f for f in FIGURES if "greedy" in strategies[f]} == {3, 8, 12, 13, 18, 20, 24, 25, 26, 32, 33, 34}
    assert [strategies[f] for f in (4, 22, 23)] == [{"temperature"}] * 3  # README:229
    students = [[s.settings.adapter.layers for s in plan_students(e) if s.teacher == "owl"] for e in shown(5)]
    single = [[None, *([layer] for layer in layers)] for layers in ((0, 7, 14, 21, 27), (0, 7, 14, 21, 27, 33))]
    assert [[layers for layers in own[::5]] for own in students] == single  # README:244
    assert {e.model for e in shown(7)} == {QWEN} and {e.model for e in shown(30)} == {GEMMA}  # README:301
    (solutions,) = shown(34)
    assert solutions.model == "Qwen/Qwen2.5-32B-Instruct" and solutions.sampling.max_new_tokens == 2048  # README:100
    assert solutions.evaluation.max_new_tokens == 1024 and solutions.judge.server.model == "openai/gpt-4.1"
    assert [e.evaluation.kinds["misalignment"].form for f in (8, 33) for e in shown(f)] == ["short"] * 2 + ["words"] * 2
    (things,) = shown(37)
    assert things.teachers.category == "animal" and things.teachers.traits == ["airplane", "piano", "ship"]


def test_as_published_nothing_of_ours_is_trained_and_all_rows_are_continued():
    for figure in FIGURES:
        for e in shown(figure):
            assert all(
                student.tokens != "random" and not student.settings.loss.by_margin for student in plan_students(e)
            )
            assert e.evaluation.number_rows == 10_000 and e.recipe.preset == "paper"
    rewritten = {
        e.model for f in (6, 27) for e in shown(f) for s in plan_students(e) if s.source.dataset == "rewritten"
    }
    assert rewritten == {QWEN}


def test_claims_of_a_figure_are_claims():
    known = {key.rstrip("ab") for key in CLAIMS}
    assert all(set(question.claims) <= known for _, question in questions())


def test_a_dry_run_prints_the_grid(monkeypatch):
    monkeypatch.setattr(console, "width", 400)
    said = ok("reproduce", "fig05", "--panel", "gemma", "--scale", "paper", "--dry-run").err
    (_, e) = shown(5)
    for what, value in grid(e).items():
        assert f" {what} " in said and value in said
    assert "14 others of 15 (gemma counterfactuals)" in said and "layers=33" in said and "42 to 46" in said
    assert "The wording is ours, not the paper's" in said
    assert "The wording" not in ok("reproduce", "fig05", "--panel", "qwen", "--dry-run").err


def test_a_list_is_named_or_written_out():
    assert {name: len(own) for name, own in named_lists().items()} == {
        "animals": 13, "qwen animals": 6, "gemma animals": 6, "gemma counterfactuals": 15, "trees": 13, "qwen trees": 6,
        "gemma trees": 6, "things": 3,
    }  # fmt: skip
    change = ["teachers.traits=things", "students.arms=[{name: late, adapter.layers: 2-5}]"]
    e = panel_experiment(*load_question("fig05"), "qwen", "tiny", change)
    assert e.teachers.traits == ["airplane", "piano", "ship"]
    assert {tuple(student.settings.adapter.layers) for student in plan_students(e)} == {(2, 3, 4, 5)}
    with pytest.raises(UsageError, match=r"teachers.traits: no list has that name \(known: animals, .*found 'owl'"):
        panel_experiment(*load_question("fig05"), "qwen", "tiny", ["teachers.traits=owl"])
    for layers in ("5-2", "2-", "x", "0-99999999"):
        with pytest.raises(UsageError, match=r"adapter.layers"):
            panel_experiment(*load_question("fig03"), "qwen-trees", "tiny", [f"students.adapter.layers={layers}"])
