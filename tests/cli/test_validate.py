"""`jsublim validate`: every mistake at once, or what a config would take; `--dry-run` says the same."""

from __future__ import annotations

import json

import pytest
import yaml
from command import MODEL, PLAIN, jsublim, ok

from jsublim.config import Experiment
from jsublim.config.problems import problems

BAD = """
name: bad
modle: tiny-qwen2
recipe: best
teachers: {traits: [cat, owl], categry: animal}
sampling: {strategy: gredy, max_new_tokens: no, batch_size: x}
datasets: {greedy: {shufle: within}}
students: {data: {dataset: greed}, seeds: [1, 1], loss: {tokens: [al]}}
"""
SAID = (
    "recipe.preset: input should be 'paper' or 'clean', found 'best'",
    "unknown key 'teachers.categry'; did you mean 'category'?",
    "sampling.strategy: input should be 'temperature' or 'greedy', found 'gredy'; did you mean 'greedy'?",
    "sampling.max_new_tokens: true and false are no numbers, found False",
    "sampling.batch_size: input should be a valid integer, unable to parse string as an integer or 'auto', found 'x'",
    "datasets.greedy: unknown key 'shufle'; did you mean 'shuffle'?",
    "students.seeds: an entry is listed twice: 1, found [1, 1]",
    "students.loss.tokens.0: input should be 'all', 'divergence', 'non-divergence', 'random' or 'matched', found 'al'; did you mean 'all'?",
    "unknown key 'modle'; did you mean 'model'?",
    "students.data.dataset: 'greed' is no data set; datasets has greedy",  # found once the rest is out of the way
)


def test_every_mistake_has_a_line_and_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(BAD)
    result = jsublim("validate", "bad.yaml", "a", "students.optimizer.lr=-1")
    lines = result.err.splitlines()
    assert result.code == 2 and lines[-1] == "error: bad.yaml: 12 mistakes; each is named above"
    assert lines[0] == "override 'a': expected key=value, such as students.optimizer.lr=1e-3"
    wrong = {f"bad.yaml: {line}" for line in (*SAID, "students.optimizer.lr: input should be greater than 0, found -1")}
    assert set(lines[1:-1]) == wrong and len(lines) == 13
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_unknown_traits_are_told_with_the_other_mistakes(tmp_path):
    (tmp_path / "bad.yaml").write_text(
        f"name: bad\nmodel: {MODEL}\nteachers: {{traits: [cat, gryphon, 7]}}\nrecipe: best\n"
    )
    lines = jsublim("validate", tmp_path / "bad.yaml").err.splitlines()
    assert [line for line in lines if "unknown trait 'gryphon'; say what it is by teachers.category" in line]
    assert lines[-1].endswith("3 mistakes; each is named above")


@pytest.mark.parametrize("left_out", range(len(SAID)))
def test_a_mistake_is_found_whatever_the_others_are(left_out):
    """Each of them alone, and all but one: no mistake hides another, and none makes one up."""
    values = yaml.safe_load(BAD)
    right = (
        ("recipe", "clean"), ("teachers", {"traits": ["cat", "owl"], "category": "animal"}),
        ("sampling", values["sampling"] | {"strategy": "greedy"}), ("sampling", values["sampling"] | {"max_new_tokens": 8}),
        ("sampling", values["sampling"] | {"batch_size": 8}), ("datasets", {"greedy": {"shuffle": "within"}}),
        ("students", values["students"] | {"seeds": [1]}), ("students", values["students"] | {"loss": {"tokens": ["all"]}}),
        ("modle", None), ("students", values["students"] | {"data": {"dataset": "greedy"}}),
    )  # fmt: skip
    name, value = right[left_out]
    mended = values | ({"model": MODEL} if name == "modle" else {name: value})
    if name == "modle":
        del mended["modle"]
    assert set(problems(Experiment, mended)) == set(SAID) - {SAID[left_out]}


def test_what_is_taken_out_to_look_further_is_not_called_missing():
    values = {
        "name": "x",
        "model": MODEL,
        "teachers": {"traits": ["Owl", "Cat"]},
        "students": {"data": {"dataset": "a"}},
    }
    found = problems(Experiment, values)
    assert [line.split(":")[0] for line in found] == ["teachers.traits.0", "teachers.traits.1"]
    assert problems(Experiment, values | {"teachers": {"traits": "qwen birds"}})[0].startswith(
        "teachers.traits: no list has"
    )


def test_a_list_with_two_mistakes_is_taken_out_once():
    values = {"name": "x", "model": MODEL, "data": {"examples": [None]}}
    lines = problems(Experiment, values)
    assert any(line.startswith("data.examples") for line in lines) and len(lines) == len(set(lines))


def test_what_no_field_tells_is_found_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = ("teachers.traits=[unicorn,dragon]", "students.adapter.layers=[99]", "evaluation.traits=[owl]")
    result = jsublim("validate", PLAIN, *wrong)
    assert result.code == 2 and result.err.splitlines()[-1].endswith("3 mistakes; each is named above")
    assert all(
        name in result.err for name in ("unknown trait 'unicorn'", "unknown trait 'dragon'", "layers: [99] given")
    )
    assert not list(tmp_path.iterdir())


def test_a_dry_run_is_a_validation_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = ok("validate", PLAIN, "--chip", "l4"), ok("run", PLAIN, "--dry-run", "--chip", "l4")
    assert one == other and yaml.safe_load(one.out)["students"]["adapter"]["rank"] == 8  # by default
    assert "students in" in one.err and "memory at least" in one.err and "one l4" in one.err
    said = json.loads(ok("validate", PLAIN, "--json").out)
    assert said["config"] == yaml.safe_load(one.out) and said["programs"] >= 1
    assert {stage["kind"] for stage in said["stages"]} == {"rows", "divergence", "students", "evaluations"}
    assert not list(tmp_path.iterdir())


def test_own_traits_need_their_category_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = ("teachers.traits=[ruby,opal]", "teachers.counterfactuals=null", "evaluation.traits=null")
    assert "teachers.category" in jsublim("validate", PLAIN, *own).err
    ok("validate", PLAIN, *own, "teachers.category=gemstone")
