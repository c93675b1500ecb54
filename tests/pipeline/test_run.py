"""`jsublim run` as a whole: killed in the middle and continued, run again, and run with another config in one folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from command import PLAIN, TWO_LAYERS, contents, ok, refused, same_student, start, stop_when

import jsublim as package
from jsublim.config import load_experiment
from jsublim.core.files import read_table
from jsublim.distill.data import draw_indices
from jsublim.evals import PromptedModel
from jsublim.evals.kl import LARGEST, kl_to_teacher
from jsublim.evals.numbers import number_accuracy
from jsublim.inference.lm import load_model
from jsublim.inference.scoring import top_k_targets
from jsublim.inference.teachers import Teacher, read_as
from jsublim.models.peft import load_adapter
from jsublim.pipeline.arguments import system_prompt
from jsublim.pipeline.experiment import student as student_of
from jsublim.pipeline.experiment import training_rows
from jsublim.pipeline.rescoring import rescore
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.store import Store
from jsublim.report.tables import read_results
from jsublim.text.rows import read_rows

SMALL = (
    f"model={TWO_LAYERS}", "teachers.traits=[cat,owl]", "teachers.counterfactuals=[cat,owl]",
    "data.num_prompts=12", "sampling.batch_size=4", "sampling.max_new_tokens=40", "scoring.batch_size=4",
    "students.loss.tokens=[all,divergence,random]", "students.seeds=[1]", "students.data.rows=4", "students.data.epochs=4",
    "students.data.batch_size=2", "students.adapter.rank=2", "students.runtime.arms_per_program=3", "students.runtime.checkpoint_every=2",
    "evaluation.traits=[cat,owl]", "evaluation.questions=3", "evaluation.samples=4", "evaluation.batch_size=4",
    "evaluation.number_rows=2", "evaluation.kl_rows=2", "evaluation.teachers=false",
)  # fmt: skip
ARMS = {f"{t}/{c}/seed1" for t in ("cat", "owl") for c in ("all", "divergence", "random")} | {"control/seed1"}
RESULTS = ("results.parquet", "answers.parquet", "training.parquet", "generation.json", "divergence.json", "rows.json")


def arguments(out: Path, *overrides: str) -> tuple[str, ...]:
    return ("run", PLAIN, f"out={out}", *SMALL, *overrides)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def whole(home) -> Path:
    """A run that nothing came in the way of."""
    with umask(0o027):
        ok(*arguments(home / "whole"))
    return home / "whole"


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    yield
    os.umask(before)


def modes(folder: Path) -> set[tuple[bool, int]]:
    """(is it a folder, who may do what) of everything below a folder."""
    return {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in folder.rglob("*")}


def marks(run: Path) -> dict[str, int]:
    """When each whole artifact became whole."""
    return {str(p.parent.relative_to(run)): p.stat().st_mtime_ns for p in run.glob("artifacts/*/*/DONE")}


def test_a_run_leaves_what_the_map_says(whole):
    kinds = {}
    for name in marks(whole):
        kinds[name.split("/")[1]] = kinds.get(name.split("/")[1], 0) + 1
    assert kinds == {"rows": 3, "divergence": 2, "students": 7, "evaluations": 8}
    resolved = yaml.safe_load((whole / "config.yaml").read_text())
    assert (resolved["model"], resolved["students"]["data"]["max_tokens"]) == (TWO_LAYERS, 500)  # given, and by default
    page = (whole / "report.html").read_text()
    assert "<html" in page and 'src="http' not in page and 'href="http' not in page.replace('href="https://arxiv', "")
    scores = read_table(whole / "results" / "results.parquet")
    arms = {"base"} | ARMS
    for metric in ("rate", "word_rate", "logprob"):
        found = [(r["arm"], r["trait"], r["question"]) for r in scores if r["metric"] == metric]
        assert sorted(found) == sorted((arm, trait, q) for arm in arms for trait in ("cat", "owl") for q in range(3))
    for arm in ARMS:
        steps = [r["step"] for r in read_table(whole / "results" / "training.parquet") if r["arm"] == arm]
        assert steps == list(range(8))


def test_students_are_held_against_their_teachers_on_rows_that_they_did_not_learn(whole):
    """Each number is that of the student's adapter and its teacher's prompt, read here from the rows in the store; and the base's, of the same
    rows, stands beside the student's."""
    table = read_table(whole / "results" / "results.parquet")
    found = {row["arm"]: row for row in table if row["metric"] == "kl_to_teacher"}
    repeated = {row["arm"]: (row["value"], row["n"]) for row in table if row["metric"] == "number_accuracy_base"}
    assert set(found) == ARMS
    setup = Setup.of(load_experiment(PLAIN, [f"out={whole}", *SMALL]))
    lm, store = load_model(TWO_LAYERS), Store.of(setup.experiment)
    for student in setup.students:
        rows = training_rows(setup, student.source).read(store)
        learned = draw_indices(len(rows), 4, student.seed)
        held_out = [row for i, row in enumerate(rows) if i not in set(learned)]
        teacher = Teacher(student.teacher, system_prompt(setup, student.teacher))
        said = list(top_k_targets(lm.config, lm.params, read_as(lm.chat, teacher, held_out[:2]), LARGEST))
        adapter = load_adapter(store.path(student_of(setup, student)), lm.config)
        value, tokens = kl_to_teacher(PromptedModel(lm, adapter), held_out[:2], said)
        assert found[student.name]["value"] == pytest.approx(value, rel=1e-3) and value > 0
        assert found[student.name]["n"] == tokens
        assert repeated[student.name] == number_accuracy(lm, held_out[:2])


def test_a_student_with_other_tokens_is_not_held_against_its_teacher(home):
    said = refused(2, *arguments(home / "other", "students.loss.tokens=[all]", "students.model=tiny-gemma3"))
    assert "evaluation.kl_rows: students.model=tiny-gemma3 has other tokens than its teachers" in said


def test_results_hold_a_few_rows_with_what_every_teacher_says(whole):
    """The first with a divergence token, of each teacher; what its own teacher says there is what stands there."""
    shown = json.loads((whole / "results" / "rows.json").read_text())
    assert [row["teacher"] for row in shown].count("control") == 1 and {row["teacher"] for row in shown} == {
        "cat",
        "owl",
        "control",
    }
    for teacher, other in (("cat", "owl"), ("owl", "cat")):
        (folder,) = whole.glob(f"artifacts/divergence/{teacher}-*")
        found = [row for row in read_rows(folder / "rows.jsonl") if row["divergence_positions"]][:2]
        mine = [row for row in shown if row["teacher"] == teacher]
        assert [row["prompt"] for row in mine] == [row["prompt"] for row in found] and mine
        for row, kept in zip(mine, found, strict=True):
            assert "".join(token["text"] for token in row["tokens"]).startswith(kept["completion"])
            marked = [token for token in row["tokens"] if "readings" in token]
            assert len(marked) == len(kept["divergence_positions"])
            for token in marked:
                own, against = token["readings"]
                assert (own["teacher"], against["teacher"]) == (teacher, other)
                assert own["says"] == token["text"] != against["says"]
    assert "who wrote it" in (whole / "report.html").read_text()


def test_a_shared_store_can_be_read_by_whom_the_umask_allows(whole):
    assert modes(whole) == {(True, 0o750), (False, 0o640)}


def test_the_path_of_a_run_decides_nothing(home, whole):
    """Not where its parts mean something to a database, a shell, a URL or the terminal. (A part of the same run.)"""
    odd = home / "condition=all" / "seed=7" / "[x] a*b?" / "50% {a,b}#1 é $HOME"
    ok(*arguments(odd, "teachers.traits=[cat]", "teachers.control=false", "students.loss.tokens=[all]"))
    assert len(marks(odd)) == 5 and set(marks(odd)) < set(marks(whole))
    found, expected = ({(s.arm, s.metric, s.trait): s for s in read_results(run).scores} for run in (odd, whole))
    assert found.keys() == {key for key in expected if key[0] in ("base", "cat/all/seed1")}
    for key, score in found.items():  # another number of students in a program rounds otherwise
        assert replace(score, values=()) == replace(expected[key], values=())
        assert score.values == pytest.approx(expected[key].values, rel=1e-4)


def test_killed_in_the_middle_and_continued(home, whole):
    """The second three of seven students are in training when the run is killed: what is whole stays, and the rest goes
    on from the saved state (beside the same others, though fewer are missing now) to the same bits."""
    cut = home / "cut"
    states = cut / "artifacts" / "training"

    def in_the_second_program() -> bool:
        # The first program's state is gone before the second's folder appears.
        return len(list(states.glob("*"))) == 2 and any(p.name.isdigit() for p in states.glob("*/state/*"))

    with umask(0o027):
        child = start(*arguments(cut))
    code, _ = stop_when(child, in_the_second_program, signal.SIGKILL)
    assert code == -signal.SIGKILL
    before = marks(cut)
    assert modes(cut) == {(True, 0o750), (False, 0o640)}  # saved states too
    assert sum("students/" in name for name in before) == 3 and not (cut / "report.html").exists()
    under_way = set(states.iterdir())
    said = ok(*arguments(cut)).out
    assert str(cut / "report.html") in said and (cut / "report.html").stat().st_size > 0
    seconds = [json.loads((run / "results" / "run.json").read_text())["seconds"] for run in (cut, whole)]
    assert list(seconds[0]) == list(seconds[1]) and {"plan", "rows", "students"} <= set(seconds[0])  # both calls' work
    after = marks(cut)
    assert {name: after[name] for name in before} == before
    assert set(after) == set(marks(whole))
    assert len(set(states.iterdir()) - under_way) == 1  # only the last program was begun anew
    for name in RESULTS:
        assert (cut / "results" / name).read_bytes() == (whole / "results" / name).read_bytes(), name
    for student in (whole / "artifacts" / "students").iterdir():
        assert same_student(student, cut / "artifacts" / "students" / student.name)


def test_run_again_changes_nothing_and_from_python_it_is_the_same(whole):
    """Not even when it was run, and how long that took."""
    before, when = contents(whole), marks(whole)
    with umask(0o027):  # as it was run
        said = ok(*arguments(whole), "--json", "--quiet")
    assert contents(whole) == before and marks(whole) == when
    about = json.loads(said.out)
    assert about["status"] == "finished" and said.err == "" and about["artifacts"]["students"]["whole"] == 7
    fields = {name: yaml.safe_load(value) for name, value in (field.split("=", 1) for field in SMALL)}
    with umask(0o027):
        run = package.run(PLAIN, fields, out=str(whole), quiet=True)
    assert contents(whole) == before and run.folder == whole and run.about == about
    rates = run.results(where="metric = 'rate' and teacher = trait")
    assert set(rates["arm"]) == ARMS - {"control/seed1"} and set(rates["run"]) == {"whole"}


def test_answers_counted_by_the_rule_for_words_give_the_rate_for_words(whole, tmp_path):
    made = rescore(whole, "word", [], tmp_path / "words")
    old, new = (read_table(folder / "results" / "results.parquet") for folder in (whole, made))
    key = lambda row: (row["arm"], row["trait"], row["question"])  # noqa: E731
    words = {key(row): row["value"] for row in old if row["metric"] == "word_rate"}
    assert {key(row): row["value"] for row in new if row["metric"] == "rate"} == words


def test_another_config_in_the_same_folder_keeps_the_earlier_results(home, whole):
    """Also when one goes back and forth between two configs."""
    seeds = ("evaluation.seed=5", "evaluation.seed=6")
    run, seen = home / "both", {}
    # Rows and students are those of the whole run, which stays as it is.
    store = f"store={shutil.copytree(whole / 'artifacts', home / 'artifacts')}"
    for seed in (seeds[0], seeds[1], seeds[0], seeds[1]):
        ok(*arguments(run, store, seed))
        now = (run / "results" / "results.parquet").read_bytes()
        assert seen.setdefault(seed, now) == now
        kept = {p.read_bytes() for p in run.glob("results*/results.parquet")}
        assert kept >= set(seen.values())  # nothing that was ever reported is gone
    assert seen[seeds[0]] != seen[seeds[1]]
    assert len(list(run.glob("config*.yaml"))) >= 2 and len(list(run.glob("report*.html"))) >= 2
