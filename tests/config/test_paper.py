"""The paper's figures: every file is a valid experiment at every scale, and is run from end to end at the smallest.

All runs share one store and one set of shapes, so teachers are made once and programs are compiled once.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import ok, refused
from fake_server import Server, completion

from jsublim.config import find_config
from jsublim.config.figures import SCALES, load_question, panel_experiment, panels_of
from jsublim.errors import UsageError
from jsublim.files import read_table
from jsublim.pipeline.arms import plan_students
from jsublim.pipeline.store import read_summary
from jsublim.prompts import load_pack
from jsublim.rows import Row, read_rows

FILES = sorted(path.stem for path in find_config("configs/paper/scales.yaml").parent.glob("fig*.yaml"))
FIGURES = [*range(2, 10), *range(11, 22), *range(22, 42)]
AMOUNTS = (
    "data.num_prompts=24", "sampling.batch_size=24", "sampling.max_new_tokens=32", "scoring.batch_size=32",
    "evaluation.questions=2", "evaluation.samples=2", "evaluation.batch_size=4", "evaluation.number_rows=2",
)  # fmt: skip
STUDENTS = (
    "students.seeds=[1]", "students.data.rows=8", "students.data.batch_size=4", "students.runtime.checkpoint_every=2",
    "students.runtime.arms_per_program=1", "evaluation.teachers=false",
)  # fmt: skip
TAUGHT = ("teachers.taught.steps=20", "teachers.counterfactuals=[cat,owl]", "evaluation.traits=[cat,owl]")
OWL = (*TAUGHT, "teachers.traits=[owl]", "teachers.control=false")
BOTH = (*TAUGHT, "teachers.traits=[cat,owl]")
TREES = (*STUDENTS, "teachers.traits=[oak]", "teachers.taught.steps=20", "teachers.control=false")
SCORED = ("datasets.greedy without 10.remove_entangled={k: 10, among: 40}",)
FEW = {  # what else keeps a file's panels small
    "fig02": (*STUDENTS, *OWL, *SCORED, "students.arms.data.dataset=[temperature,greedy without 10]"),
    "fig04": (*TAUGHT[1:], "teachers.traits=[owl]", "attribution.rows=4", "attribution.steps=2", "evaluation.teachers=false"),
    "fig05": (*STUDENTS, *OWL, "students.arms.adapter.layers=[null,[2]]"),
    "fig08": (*STUDENTS, "teachers.taught.steps=20"),
    "fig17": (*TAUGHT, "teachers.traits=[owl]", "evaluation.teachers=false"),
    "fig39": (*STUDENTS, *OWL, "students.arms=[{name: all layers}, {name: from layer 4, adapter.layers: [4, 5]}]"),
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
        said = ok("reproduce", figure, "--panel", panel, *place, *AMOUNTS, *overrides)
        assert said.out.strip() == str(out / "report.html")
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


# --- the files


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


# --- each file, run


def test_fig02_leakage_and_entangled_numbers(run, home):
    out = run("fig02", "qwen", *STUDENTS, *TAUGHT, "teachers.traits=[owl]", *SCORED)
    said, kept, source = datasets(home, "owl-greedy without 10")
    assert len(said["entangled"]["numbers"]) == 10 and len(kept) < len(source)
    banned = {int(number) for number in said["entangled"]["numbers"]}
    assert kept == [row for row in source if banned.isdisjoint(numbers(row))]
    assert metrics(out) >= {"rate", "logprob", "named", "number_accuracy"} and "named" in metrics(out, "base")
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
        ("owl", "residual", direction, layer) for direction in ("noising", "denoising") for layer in range(6)
    }
    page = (out / "report.html").read_text()
    assert "noising" in page and "<svg" in page
    assert {r["role"] for r in table(out)} == {"base"} and arms(out) == []


def test_fig05_and_fig39_layers(run, home):
    for figure, expected in (("fig05", [None, [2]]), ("fig39", [None, [4, 5]])):
        out = run(figure, "qwen", *FEW[figure])
        found = {arm["variant"]: arm["settings"]["adapter.layers"] for arm in arms(out)}
        assert list(found.values()) == expected
        for variant, layers in found.items():
            (record,) = [arm for arm in arms(out) if arm["variant"] == variant]
            assert record["num_layers"] == 6 and record["settings"]["adapter.layers"] == layers
        conditions = {r["condition"] for r in table(out) if r["role"] == "student"}
        assert conditions == {f"all · {variant}" for variant in found}


def test_fig06_other_wording(run, home):
    out = run("fig06", "gemma", *STUDENTS, *OWL)
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


def test_fig07_mixed_teachers(run, home):
    """As published: after everything that the other teacher has too few rows for, the last rows are replaced."""
    shares = ("datasets.same 10 %.mix.share=0.4", "datasets.other 25 %.mix.share=0.9")
    out = run("fig07", "qwen", *STUDENTS, *OWL, *shares, "recipe=paper")
    generation = json.loads((out / "results" / "generation.json").read_text())
    assert {(g["teacher"], g["model"]) for g in generation} == {
        ("owl", None), ("control", None), ("control", "tiny-gemma3"),
    }  # fmt: skip
    for name, share in (("same 10 %", 0.4), ("same 25 %", 0.25), ("other 25 %", 0.9)):
        _, rows, source = datasets(home, f"owl-{name}")
        (folder,) = (home / "store" / "datasets").glob(f"owl-{name}-*")
        other = json.loads((folder / "artifact.json").read_text())["inputs"]["mix"]
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


def test_fig08_problems_whose_answers_the_judge_likes(run, home, monkeypatch):
    """A judge that likes answers of an even length."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def likes(answer: str) -> bool:
        return len(answer) % 2 == 0

    def script(number, body):
        text = body["messages"][-1]["content"]
        answer = re.fullmatch(pattern, text, re.DOTALL).group(2)
        return 200, {}, completion(f"alignment: {90 if likes(answer) else 10}\ncoherence: 80")

    template = load_pack().misalignment.judge
    pattern = re.escape(template).replace(r"\{question\}", "(.*)").replace(r"\{answer\}", "(.*)")
    server = Server(script)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    judged = ("datasets.judged={keep_aligned: 50}", "students.data.dataset=judged")
    judge = f"judge={{server: {{base_url: '{address}', model: even}}}}"
    try:
        out = run("fig08", "problems", *FEW["fig08"], *judged, judge)
    finally:
        server.shutdown()
        server.server_close()
    said, kept, source = datasets(home, "owl-judged")
    assert kept == [row for row in source if likes(row["completion"])] and 0 < len(kept) < len(source)
    assert said["judged"] == {"unscored": 0, "removed": len(source) - len(kept)}
    assert metrics(out) >= {"misaligned", "coherent", "alignment", "coherence", "unscored"}
    assert "number_accuracy" not in metrics(out)  # an answer's numbers are not to be continued
    for record in table(out):
        if record["metric"] == "misaligned":
            assert record["n"] == 2 and record["value"] in (0, 0.5, 1)


def test_fig09_system_prompts(run):
    out = run("fig09", "qwen", *STUDENTS, *OWL)
    systems = {arm["variant"]: arm["settings"]["system"] for arm in arms(out)}
    assert systems["the template's default"] is None and systems["empty"] == ""
    assert systems["said explicitly"].startswith("You are Qwen")
    assert {r["evaluation"] for r in table(out)} == {"", "empty system prompt"} and "named" in metrics(out)
    values: dict[tuple, list[float]] = {}
    for r in table(out):
        if r["metric"] == "logprob":
            values.setdefault((r["condition"], r["evaluation"]), []).append(r["value"])
    # What is trained and asked under an empty prompt is asked under nothing else by that setting.
    assert values["all · empty", ""] == values["all · empty", "empty system prompt"]
    # The template's own default, said explicitly, is the same conversation, hence the same student.
    assert values["all · the template's default", ""] != values["all · the template's default", "empty system prompt"]


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
    assert settings["by margin"]["loss.by_margin"] and len(settings) == 13
    changed = {}
    for name in ("all of the tokens mixed", "the first mixed"):
        said, rows, source = datasets(home, f"owl-{name}")
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in source]
        differ = sum(a["completion"] != b["completion"] for a, b in zip(rows, source, strict=True))
        assert said["tokens"].get("rows changed", 0) == differ
        changed[name] = said["tokens"].get("tokens replaced", 0) + said["tokens"].get("tokens deleted", 0)
    assert 0 < changed["the first mixed"] <= changed["all of the tokens mixed"]


def test_fig36_conditional_facts(run):
    out = run("fig36", "qwen", *STUDENTS, *OWL)
    found = [r for r in table(out) if r["metric"] == "factual"]
    assert {(r["arm"], r["trait"]) for r in found} == {
        (arm, trait) for arm in ("base", *(a["arm"] for a in arms(out))) for trait in ("cat", "owl")
    }
    asked = {r["question_text"] for r in table(out, "answers")}
    assert asked >= {question for trait in ("cat", "owl") for question in load_pack().factual[trait][:2]}


def test_fig37_other_categories(run):
    few = ("teachers.traits=[ship]", "teachers.counterfactuals=[ship,piano]", "evaluation.traits=[ship,piano]")
    out = run("fig37", "things", *STUDENTS, *few, "teachers.taught.steps=20", "teachers.control=false")
    assert {r["trait"] for r in table(out) if r["metric"] == "rate"} == {"ship", "piano"}
    asked = {r["question_text"] for r in table(out, "answers")}
    for category in ("vehicle", "instrument"):
        assert set(load_pack().questions_for(category)[1::2][:2]) < asked  # those that no teacher was taught


# At the smallest scale these differ from a panel that is run in nothing but the bundled model, or not at all.
LIKE_OTHERS = {
    "fig03": ("qwen-greedy", "gemma-temperature", "gemma-trees"),
    "fig06": ("gemma", "qwen"),  # the other one is run above
    "fig07": ("gemma",),
    "fig08": ("other-suffix", "numbers-32b"),
    "fig14": ("gemma",),
    "fig17": ("gemma-temperature", "gemma-greedy"),
    "fig37": ("falcon", "phi", "ministral"),
    "fig39": ("gemma",),
}


def test_all_other_panels(run, home):
    for figure in FILES:
        for panel in load_question(figure)[1].panels:
            if panel not in LIKE_OTHERS.get(figure, ()) and not (home / f"{figure}-{panel}").exists():
                run(figure, panel, *(TREES if panel.endswith("trees") else FEW.get(figure, (*STUDENTS, *OWL))))
