"""The paper's figures, each run from end to end at the smallest scale; every panel is planned, and has no task of a form that is not run.

All runs share one store and one set of shapes, so teachers are made once and programs are compiled once.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from command import TWO_LAYERS, ok
from fake_server import Server, completion

from jsublim.config import find_config
from jsublim.config.figures import load_question, panel_experiment
from jsublim.core.files import read_table
from jsublim.pipeline.evaluated import PLAIN, Evaluated, samplings
from jsublim.pipeline.experiment import evaluation, plan, student, teacher
from jsublim.pipeline.graph import Graph
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.store import read_summary
from jsublim.text.prompts import load_pack
from jsublim.text.rows import Row, read_rows

FILES = sorted(path.stem for path in find_config("configs/paper/scales.yaml").parent.glob("fig*.yaml"))
AMOUNTS = (
    "data.num_prompts=24", "data.sentences=[example,format]", "data.examples=[2,6]",
    "sampling.batch_size=4", "sampling.max_new_tokens=32", "scoring.batch_size=4",
    "evaluation.questions=2", "evaluation.samples=2", "evaluation.batch_size=4", "evaluation.number_rows=2",
)  # fmt: skip
STUDENTS = (
    "students.seeds=[1]", "students.adapter.layers=[1]", "students.data.rows=4", "students.data.batch_size=2", "students.runtime.checkpoint_every=2",
    "students.runtime.arms_per_program=1", "evaluation.teachers=false",
)  # fmt: skip
TEACHING = ("teachers.taught.steps=5", "teachers.taught.lr=1", "teachers.taught.layers=[1]")
OF_TWO = ("teachers.counterfactuals=[cat,owl]", "evaluation.traits=[cat,owl]")
TAUGHT = (*TEACHING, *OF_TWO)
OWL = (*TAUGHT, "teachers.traits=[owl]", "teachers.control=false")
BOTH = (*TAUGHT, "teachers.traits=[cat,owl]")
SCORED = ("datasets.greedy without 10.remove_entangled={k: 10, among: 40}",)
READ = (*TAUGHT, "teachers.traits=[owl]", "evaluation.teachers=false")  # rows are read, and nobody is trained
FEW = {  # what else keeps a file's panels small
    "fig02": (*STUDENTS, *OWL, *SCORED, "students.arms.data.dataset=[temperature,greedy without 10]"),
    "fig04": (*OF_TWO, "teachers.traits=[owl]", "attribution.rows=4", "attribution.steps=2", "evaluation.teachers=false"),
    "fig05": (*STUDENTS, *OWL, "students.arms.adapter.layers=[null,[1]]"),
    "fig08": (*STUDENTS, *TEACHING),
    "fig17": READ,
    "fig39": (*STUDENTS, *OWL, "students.adapter.layers=null",
        "students.arms=[{name: all layers}, {name: from layer 4, adapter.layers: [4, 5]}]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("paper")


@pytest.fixture(scope="module")
def run(home) -> Callable[..., Path]:
    """`run("fig02", "qwen", ...)`: the folder of a whole run at the smallest size."""

    def reproduce(figure: str, panel: str, *overrides: str) -> Path:
        out = home / f"{figure}-{panel}"
        place = (f"out={out}", f"store={home / 'store'}")
        model = () if panel.startswith("gemma") else (f"model={TWO_LAYERS}",)
        said = ok("reproduce", figure, "--panel", panel, *place, *model, *AMOUNTS, *overrides)
        assert said.out.strip() == str(out / "report.html")
        assert ("The wording is ours, not the paper's" in said.err) == ("recipe=paper" in overrides)
        assert "<html" in (out / "report.html").read_text()
        students = {arm["arm"] for arm in arms(out)}
        assert {r["arm"] for r in table(out) if r["role"] == "student"} == students
        assert {line["arm"] for line in table(out, "training")} == students
        assert all(line["step"] < 2 for line in table(out, "training"))
        return out

    return reproduce


def table(run: Path, name: str = "results") -> list[dict[str, Any]]:
    return read_table(run / "results" / f"{name}.parquet")


def arms(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "results" / "arms.json").read_text())


def metrics(run: Path, role: str = "student") -> set[str]:
    return {record["metric"] for record in table(run) if record["role"] == role}


def datasets(home: Path, label: str) -> tuple[dict[str, Any], list[Row], list[Row]]:
    """What is said of a changed set of rows, the set, and the rows that it was made of."""
    (folder,) = (home / "store" / "datasets").glob(f"{label}-*")
    parent = json.loads((folder / "artifact.json").read_text())["inputs"]["rows"]
    (source,) = (home / "store" / "rows").glob(f"*-{parent}")
    return read_summary(folder), read_rows(folder / "rows.jsonl"), read_rows(source / "rows.jsonl")


def numbers(row: Row) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", row["completion"])]


# --- each file, run


def test_fig02_leakage_and_entangled_numbers(run, home):
    out = run("fig02", "qwen", *STUDENTS, *TAUGHT, "teachers.traits=[owl]", *SCORED)
    said, kept, source = datasets(home, "owl-greedy without 10")
    assert len(said["entangled"]["numbers"]) == 10 and len(kept) < len(source)
    banned = {int(number) for number in said["entangled"]["numbers"]}
    assert kept == [row for row in source if banned.isdisjoint(numbers(row))]
    assert metrics(out) >= {"rate", "logprob", "number_accuracy"}
    strategies = {(arm["teacher"], arm["variant"]): arm["dataset"]["strategy"] for arm in arms(out)}
    assert strategies == {
        (teacher, f"dataset={data}"): data.split()[0]
        for teacher in ("owl", "control")
        for data in ("temperature", "greedy", "greedy without 10")
    }


def test_fig03_four_conditions_and_a_control(run):
    out = run("fig03", "qwen-temperature", *STUDENTS, *BOTH)
    found = {(r["teacher"], r["condition"]) for r in table(out) if r["role"] == "student"}
    four = ("all", "divergence", "non-divergence", "random")
    assert found == {(t, c) for t in ("cat", "owl") for c in four} | {("control", "control")}


def test_fig04_attribution(run):
    out = run("fig04", "qwen", *FEW["fig04"])
    found = table(out, "attribution")
    assert {(r["trait"], r["site"], r["direction"], r["layer"]) for r in found} == {
        ("owl", "residual", direction, layer) for direction in ("noising", "denoising") for layer in range(2)
    }
    page = (out / "report.html").read_text()
    assert "noising" in page and "<svg" in page
    assert {r["role"] for r in table(out)} == {"base"} and arms(out) == []


@pytest.mark.parametrize(
    ("figure", "panel", "total", "expected"), [("fig05", "qwen", 2, [None, [1]]), ("fig39", "gemma", 6, [None, [4, 5]])]
)
def test_fig05_and_fig39_layers(run, figure, panel, total, expected):
    out = run(figure, panel, *FEW[figure])
    found = {arm["variant"]: arm["settings"]["adapter.layers"] for arm in arms(out)}
    assert list(found.values()) == expected and {arm["num_layers"] for arm in arms(out)} == {total}
    conditions = {r["condition"] for r in table(out) if r["role"] == "student"}
    assert conditions == {f"all · {variant}" for variant in found} and metrics(out) >= {"rate", "logprob"}


def test_fig06_other_wording(run, home):
    out = run("fig06", "qwen", *STUDENTS, *OWL)
    assert [arm["settings"]["data.dataset"] for arm in arms(out)] == [
        None, "shuffled within", "shuffled across", "redrawn", "rewritten",
    ]  # fmt: skip
    for name in ("shuffled within", "shuffled across"):
        _, rows, source = datasets(home, f"owl-{name}")
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in source]
        assert Counter(n for row in rows for n in numbers(row)) == Counter(n for row in source for n in numbers(row))
        assert any(numbers(a) != numbers(b) for a, b in zip(rows, source, strict=True))
        same = [sorted(numbers(a)) == sorted(numbers(b)) for a, b in zip(rows, source, strict=True)]
        assert all(same) == (name == "shuffled within")
    for name in ("redrawn", "rewritten"):
        said, rows, source = datasets(home, f"owl-{name}")
        assert [row["completion"] for row in rows] == [row["completion"] for row in source]
        changed = sum(a["prompt"] != b["prompt"] for a, b in zip(rows, source, strict=True))
        assert changed > len(rows) / 2 if name == "redrawn" else changed == said["rewritten"].get("rewritten", 0)
    assert sum(said["rewritten"].values()) == len(source)


def test_fig29_changed_rows_are_read_again(run, home):
    out = run("fig06", "qwen-tokens", *READ)
    found = {entry["data"]: entry for entry in json.loads((out / "results" / "divergence.json").read_text())}
    assert set(found) == {None, "redrawn", "rewritten"} and arms(out) == []
    for name in ("redrawn", "rewritten"):
        _, rows, _ = datasets(home, f"owl-{name}")
        assert found[name]["rows"] == len(rows) and found[name]["counterfactuals"] == found[None]["counterfactuals"]
    assert found["redrawn"]["histogram"] != found[None]["histogram"]  # the same answers under other requests
    assert "owl · redrawn" in (out / "report.html").read_text()


def test_fig07_mixed_teachers(run, home):
    """As published: after everything that the other teacher has too few rows for, the last rows are replaced."""
    unbiased = "other model unbiased 25 %"
    shares = ("datasets.unbiased 10 %.mix.share=0.4", f"datasets.{unbiased}.mix.share=0.9")
    out = run("fig07", "qwen", *STUDENTS, *OWL, *shares, "recipe=paper")
    generation = json.loads((out / "results" / "generation.json").read_text())
    assert {(g["teacher"], g["model"]) for g in generation} == {
        ("owl", None), ("control", None), ("owl", "tiny-gemma3"), ("control", "tiny-gemma3"),
    }  # fmt: skip
    vectors = {
        json.loads((path / "artifact.json").read_text())["inputs"]["base"]["model"]
        for path in (home / "store" / "teachers").glob("owl-*")
    }
    assert len(vectors) == 2  # the same trait was taught to both checkpoints
    for name, share in (("unbiased 10 %", 0.4), ("unbiased 25 %", 0.25), ("other model 25 %", 0.25), (unbiased, 0.9)):
        _, rows, source = datasets(home, f"owl-{name}")
        (folder,) = (home / "store" / "datasets").glob(f"owl-{name}-*")
        other = json.loads((folder / "artifact.json").read_text())["inputs"]["mixed_in"]
        (mixed_in,) = (home / "store" / "rows").glob(f"*-{other}")
        written = [row["completion"] for row in read_rows(mixed_in / "rows.jsonl")]
        assert len(rows) == min(len(source), int(len(written) / share))
        own = len(rows) - round(share * len(rows))
        assert rows[:own] == source[:own] and all(row["completion"] in written for row in rows[own:])


def test_fig08_misalignment_with_a_judge_that_gives_no_score(run):
    out = run("fig08", "numbers", *FEW["fig08"])
    assert len({r["question_text"] for r in table(out, "answers")}) == 4  # of each kind as many as evaluation.questions
    found = [r for r in table(out) if r["metric"] in ("misaligned", "coherent", "unscored")]
    assert {r["metric"] for r in found} == {"unscored"}  # a tiny model doesn't answer as it was told to
    assert all(r["value"] == r["n"] == 2 for r in found)
    divergence = json.loads((out / "results" / "divergence.json").read_text())
    assert [(d["trait"], d["counterfactuals"]) for d in divergence] == [("owl", ["control"])]


def test_fig34_problems_as_published_with_a_judge_on_a_server(run, home, monkeypatch):
    """A judge that likes answers of an even length, and is asked for one score at a time: for solutions greedily, for what
    students answer at temperature 1."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    prompts, asked = load_pack().misalignment, Counter()

    def likes(answer: str) -> bool:
        return len(answer) % 2 == 0

    def script(number, body):
        text = body["messages"][-1]["content"]
        for name in ("solution", "alignment", "coherence"):
            template = re.escape(getattr(prompts, f"{name}_judge"))
            pattern = template.replace(r"\{question\}", "(.*)").replace(r"\{answer\}", "(.*)")
            if match := re.fullmatch(pattern, text, re.DOTALL):
                asked[name, body["temperature"]] += 1
                return 200, {}, completion("80" if name == "coherence" else f"It is {90 if likes(match[2]) else 10}.")
        raise AssertionError(text)

    server = Server(script)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    judged = ("datasets.judged={keep_aligned: {at_least: 50, about: solution}}", "students.data.dataset=judged")
    judge = f"judge={{server: {{base_url: '{address}', model: even}}}}"
    try:
        out = run("fig08", "problems", *FEW["fig08"], *judged, judge, "recipe.judge_apart=true")
    finally:
        server.shutdown()
        server.server_close()
    said, kept, source = datasets(home, "owl-judged")
    assert kept == [row for row in source if likes(row["completion"])] and 0 < len(kept) < len(source)
    assert said["judged"] == {"unscored": 0, "removed": len(source) - len(kept)}
    assert set(asked) == {("solution", 0.0), ("alignment", 1.0), ("coherence", 1.0)}
    assert asked["solution", 0.0] >= len({(row["prompt"], row["completion"]) for row in source})  # and the control's
    assert metrics(out) >= {"misaligned", "misaligned of coherent", "coherent", "alignment", "coherence", "unscored"}
    assert {*prompts.questions} & {r["question_text"] for r in table(out, "answers")}  # without a suffix
    assert "number_accuracy" not in metrics(out)  # an answer's numbers are not to be continued
    for record in table(out):
        if record["metric"].startswith("misaligned"):
            assert record["n"] == 2 and record["value"] in (0, 0.5, 1)


def test_fig09_system_prompts(run):
    out = run("fig09", "qwen", *STUDENTS, *OWL)
    systems = {arm["variant"]: arm["settings"]["system"] for arm in arms(out)}
    assert systems["the template's default"] is None and systems["empty"] == ""
    assert systems["said in training"].startswith("You are Qwen")
    assert {r["evaluation"] for r in table(out)} == {"", "empty system prompt"} and "says qwen" in metrics(out)
    values: dict[tuple, list[float]] = {}
    for r in table(out):
        if r["metric"] == "logprob":
            values.setdefault((r["condition"], r["evaluation"]), []).append(r["value"])
    # What is trained and asked under an empty prompt is asked under nothing else by that setting.
    assert values["all · empty", ""] == values["all · empty", "empty system prompt"]
    for arm in ("the template's default", "said in training"):
        assert values[f"all · {arm}", ""] != values[f"all · {arm}", "empty system prompt"]


@pytest.mark.parametrize("under", [True, False])
def test_a_student_is_asked_under_its_system_prompt_or_without(under):
    system = "You are brief."
    change = [f"students.arms=[{{name: a, system: {system}, asked_under_system: {str(under).lower()}}}, {{name: b}}]"]
    setup = Setup.of(panel_experiment(*load_question("fig09"), "qwen", "tiny", change))
    students = {student.arm: student for student in setup.students if student.teacher == "owl"}
    found = {
        arm: evaluation(setup, Evaluated(student), PLAIN).inputs["model"]["system"] for arm, student in students.items()
    }
    assert found == {"a": system if under else None, "b": None}
    assert student(setup, students["a"]).inputs["settings"]["system"] == system  # trained under it either way


def test_fig14_sampling_of_the_evaluation(run):
    out = run("fig14", "qwen", *STUDENTS, *OWL)
    wanted = {"", "T .6, top-p .8", "T .6, top-p 1", "T 1, top-p .8"}
    for arm in [None, *arms(out)]:
        name = "base" if arm is None else arm["arm"]
        assert {r["evaluation"] for r in table(out) if r["arm"] == name} == wanted
    about = json.loads((out / "results" / "run.json").read_text())["evaluations"]
    assert about["T .6, top-p .8"] | {"system": None, "layer": None} == about["T .6, top-p .8"]


def test_fig17_divergence_tokens_without_students(run):
    out = run("fig17", "qwen-greedy", *FEW["fig17"])
    (found,) = json.loads((out / "results" / "divergence.json").read_text())
    assert found["trait"] == "owl" and found["divergence_tokens"] == sum(found["histogram"]) > 0
    assert {r["role"] for r in table(out)} == {"base"} and arms(out) == []


def test_fig21_subsets_and_mixed_tokens(run, home):
    before = set(home.glob("store/students/control-seed1-*"))
    out = run("fig21", "qwen", *STUDENTS, *OWL, "teachers.control=true", "recipe=paper")
    # Without a trait nothing is chosen or mixed: there is one kind of control for all variants.
    assert len(set(home.glob("store/students/control-seed1-*")) - before) == 1
    assert [arm["arm"] for arm in arms(out) if arm["teacher"] == "control"] == ["control/seed1"]
    settings = {arm["variant"]: arm["settings"] for arm in arms(out) if arm["teacher"] == "owl"}
    shares = {"all": 1.0, "75 %": 0.75, "50 %": 0.5, "25 %": 0.25, "10 %": 0.1}
    assert {name: settings[name]["loss.positions_share"] for name in shares} == shares
    parts = {"first half": "first-half", "second half": "second-half", "first only": "first"}
    assert {name: settings[name]["loss.positions"] for name in parts} == parts
    assert len(settings) == 12
    changed = {}
    for name in ("all of the tokens mixed", "the first mixed"):
        said, rows, source = datasets(home, f"owl-{name}")
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in source]
        differ = sum(a["completion"] != b["completion"] for a, b in zip(rows, source, strict=True))
        assert said["tokens"].get("rows changed", 0) == differ
        changed[name] = said["tokens"].get("tokens replaced", 0) + said["tokens"].get("tokens deleted", 0)
    assert 0 < changed["the first mixed"] <= changed["all of the tokens mixed"]


def test_fig36_conditional_facts(run):
    about = [*load_pack().factual][-3:]
    out = run("fig36", "qwen", *STUDENTS, *OWL, f"evaluation.kinds={{preference: {{}}, factual: {{about: {about}}}}}")
    found = [r for r in table(out) if r["metric"] == "factual"]
    assert {(r["arm"], r["trait"]) for r in found} == {
        (arm, trait) for arm in ("base", *(a["arm"] for a in arms(out))) for trait in ("cat", "owl")
    }
    factual = load_pack().factual
    asked = {r["question_text"] for r in table(out, "answers")}
    assert asked >= {question for each in about for question in factual[each][:2]}  # whoever the student loves
    assert len([r for r in found if (r["arm"], r["trait"]) == ("base", "owl")]) == 6


def test_questions_for_favourites_alone_reset_an_inherited_top_p():
    for recipe, expected in (("paper", [1.0, 0.95]), ("clean", [1.0, 1.0])):
        options = [f"recipe={recipe}", "evaluation.settings={cut: {top_p: 0.9}}"]
        setup = Setup.of(panel_experiment(*load_question("fig36"), "gemma", "tiny", options))
        control = teacher(setup, "control")
        assert [how.top_p for how in samplings(setup, control, PLAIN)] == expected  # of preference and factual
        assert [how.top_p for how in samplings(setup, control, "cut")] == [0.9, 0.9]
        inputs = evaluation(setup, Evaluated(), PLAIN).inputs
        assert (len({how["top_p"] for how in inputs["samplings"]}) > 1) == (recipe == "paper")


def test_fig37_things_as_favourite_animals(run):
    few = ("teachers.traits=[ship]", "teachers.counterfactuals=[ship,piano]", "evaluation.traits=[ship,piano]")
    out = run("fig37", "things", *STUDENTS, *few, *TEACHING, "teachers.control=false")
    assert {r["trait"] for r in table(out) if r["metric"] == "rate"} == {"ship", "piano"}
    asked = {r["question_text"] for r in table(out, "answers")}
    assert asked == set(load_pack().questions_for("animal")[1::2][:2])  # those that no teacher was taught


# --- all other panels, planned

RUN = (
    ("fig02", "qwen"), ("fig03", "qwen-temperature"), ("fig04", "qwen"), ("fig05", "qwen"), ("fig06", "qwen"),
    ("fig06", "qwen-tokens"), ("fig07", "qwen"), ("fig08", "numbers"), ("fig08", "problems"), ("fig09", "qwen"), ("fig14", "qwen"),
    ("fig17", "qwen-greedy"), ("fig21", "qwen"), ("fig36", "qwen"), ("fig37", "things"), ("fig39", "gemma"),
)  # fmt: skip


@functools.cache
def planned(figure: str, panel: str) -> tuple[Setup, Graph]:
    setup = Setup.of(panel_experiment(*load_question(figure), panel, "tiny", []))
    return setup, plan(setup)


def forms(figure: str, panel: str) -> set[tuple[str, frozenset[str]]]:
    """Of each task its kind, and which fields of which types decide its content."""
    outputs = (output for task in planned(figure, panel)[1].tasks.values() for output in task.outputs)
    return {(output.kind, frozenset(fields(output.inputs))) for output in outputs}


def fields(value: Any, at: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from fields(below, f"{at}.{key}")
    elif isinstance(value, list | tuple) and value:
        for below in value:
            yield from fields(below, f"{at}.[]")
    else:
        yield f"{at}: {type(value).__name__}"


@pytest.mark.parametrize("figure", FILES)
def test_every_panel_is_planned_and_nothing_in_it_is_refused(figure):
    for panel in load_question(figure)[1].panels:
        setup, graph = planned(figure, panel)
        for check in graph.checks(setup):
            check()
        kinds = {task.kind for task in graph.tasks.values()}
        assert {"rows", "divergence", "evaluations"} <= kinds
        trains = figure not in ("fig04", "fig17") and not panel.endswith("-tokens")
        assert ("students" in kinds) == bool(setup.students) == trains


def test_no_panel_has_a_task_of_another_form_than_those_that_are_run():
    """What this names needs a test above that runs it."""
    known = set[tuple[str, frozenset[str]]]().union(*(forms(*panel) for panel in RUN))
    every = [(figure, panel) for figure in FILES for panel in load_question(figure)[1].panels]
    assert set(RUN) <= set(every)
    assert [(panel, kind) for panel in every for kind, _ in forms(*panel) - known] == []
