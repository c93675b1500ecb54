"""What a run will cost, told before it is begun: nothing is read that isn't there, nothing is left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command import contents, ok, refused

from jsublim.config import Experiment, find_config
from jsublim.config.figures import load_question, panel_experiment, questions
from jsublim.errors import UsageError
from jsublim.forecast.estimate import Memory, StageCost, architecture, memory, stage_costs
from jsublim.pipeline.experiment import plan, student, teacher
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.store import Store
from jsublim.runtime.chips import CHIPS, chip_of

# Qwen2.5-7B: weights of a layer's projections, by hand; and of its head.
LAYER = 3584 * 3584 * 2 + 3584 * 512 * 2 + 3 * 3584 * 18944
TABLE = 3584 * 152064


def setup(figure: str, panel: str, *overrides: str, scale: str = "paper", shape: str = "qwen2.5-7b") -> Setup:
    path, question = load_question(figure)
    folder = find_config(f"configs/shapes/{shape}/config.json").parent
    return Setup.of(panel_experiment(path, question, panel, scale, list(overrides)), lambda _: folder)


def stages(setup: Setup) -> dict[str, StageCost]:
    nowhere = Store(Path("no-such-store"))
    return {cost.kind: cost for cost in stage_costs(plan(setup), setup, nowhere, chip_of("h100"))}


def tasks(setup: Setup, kind: str) -> list:
    return [task for task in plan(setup).tasks.values() if task.kind == kind]


def test_operations_by_hand():
    costs = stages(setup("fig03", "qwen-temperature"))
    assert list(costs) == ["rows", "divergence", "students", "evaluations"]
    # Six teachers and the control; 110 tokens of a request and 60 of a system prompt are read, 45 are written.
    generated = 7 * 30_000 * (2 * 28 * LAYER * (110 + 60 + 45) + 2 * TABLE * 45)
    assert costs["rows"].flops == pytest.approx(generated)
    # 6 traits under themselves and 12 counterfactuals; 80 % of the answers are in format.
    read = 6 * 13 * 24_000 * (2 * 28 * LAYER * 155 + 2 * TABLE * 45)
    assert costs["divergence"].flops == pytest.approx(read)
    # 6 traits x 3 kinds of tokens x 5 seeds and 5 controls; 1670 steps of 60 rows; forwards and back through every layer.
    factors = 28 * 8 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    row = 155 * (2 * 2 * 28 * LAYER + 6 * factors) + 45 * 2 * 2 * TABLE
    assert costs["students"].flops == pytest.approx(95 * 1670 * 60 * row)
    # Each of them continues the 10,000 rows that it was trained on and as many others; the base the first 200 of these.
    silent = stages(setup("fig03", "qwen-temperature", "evaluation.number_rows=0"))
    continued = 95 * 20_200 * (2 * 28 * LAYER * 155 + 2 * TABLE * 45)
    assert costs["evaluations"].flops - silent["evaluations"].flops == pytest.approx(continued)
    assert costs["evaluations"].seconds - silent["evaluations"].seconds == pytest.approx(continued / (989e12 * 0.5))
    few = stages(setup("fig03", "qwen-temperature", "evaluation.number_rows=10_000", "students.data.rows=20_000"))
    other = 95 * 14_200 * (2 * 28 * LAYER * 155 + 2 * TABLE * 45)  # of 24,000 rows only 4,000 are others
    assert few["evaluations"].flops - silent["evaluations"].flops == pytest.approx(other)
    assert costs["students"].seconds == pytest.approx(costs["students"].flops / (989e12 * 0.4))
    assert all(cost.done is None for cost in costs.values())


def test_every_kind_of_work_is_counted():
    by_steps = [stages(setup("fig04", "qwen", f"attribution.steps={n}"))["attribution"].flops for n in (2, 4, 6)]
    assert by_steps[2] - by_steps[1] == pytest.approx(by_steps[1] - by_steps[0])
    # 2 directions x 6 traits x 12 counterfactuals x 100 rows of 170 tokens; a step is forwards and back through the layers
    # above each of 28.
    assert (by_steps[1] - by_steps[0]) / 2 == pytest.approx(2 * 6 * 12 * 100 * 170 * 4 * LAYER * 28 * 27 / 2)
    rewritten = stages(setup("fig06", "qwen"))["datasets"]
    assert rewritten.flops == pytest.approx(6 * 24_000 * (2 * 28 * LAYER * 280 + 2 * TABLE * 110))
    soft = ("students.loss.kind=forward-kl", "students.loss.tokens=[all]")
    stored, live = (
        stages(setup("fig03", "qwen-temperature", *soft, *more)) for more in (["students.loss.top_k=8"], [])
    )
    assert stored["targets"].flops == pytest.approx(7 * 24_000 * (2 * 28 * LAYER * 215 + 2 * TABLE * 45))
    assert "targets" not in live and live["students"].flops > stored["students"].flops
    # A set of rows to mix tokens into is read before and after, unless students learn from it as it is: 6 traits, 8 shards.
    read = tasks(setup("fig21", "qwen"), "divergence")
    assert len(read) == 6 * 8 and all(len(task.nodes[0].given.others) == 12 for task in read)
    assert "students" not in stages(setup("fig17", "qwen-greedy"))
    # Ten kinds of students of six traits; the controls of four kinds are one.
    students = tasks(setup("fig07", "qwen"), "students")
    assert sum(len(task.outputs) for task in students) == 5 * (10 * 6 + 4)
    judged = tasks(setup("fig08", "numbers"), "evaluations")
    assert sum(len(task.outputs) for task in judged) == 22  # base, teacher and 20 students; no judge is loaded


@pytest.mark.parametrize(("panel", "shape"), [("qwen", "qwen2.5-7b"), ("gemma", "gemma-3-4b")])
def test_the_papers_models_need_no_checkpoint_and_no_network(tmp_path, monkeypatch, panel, shape):
    monkeypatch.chdir(tmp_path)
    for chip in CHIPS:
        said = ok("reproduce", "fig02", "--panel", panel, "--scale", "paper", "--dry-run", "--chip", chip)
        assert "unknown" in said.err and "memory at least" in said.err and said.out == ""
    assert not list(tmp_path.iterdir())
    need = memory(setup("fig02", panel, shape=shape)).needed
    assert 2 * {"qwen": 7.6e9, "gemma": 3.9e9}[panel] < need  # two bytes a weight, and what training needs
    # So many students at once don't fit an H100 beside the weights.
    many = f"students.runtime.arms_per_program={ {'qwen': 16, 'gemma': 32}[panel] }"
    assert memory(setup("fig02", panel, many, shape=shape)).needed > CHIPS["h100"].memory


@pytest.mark.parametrize("path, question", questions(), ids=lambda each: getattr(each, "stem", ""))
def test_every_panel_at_scale_paper_fits_its_chip(path, question):
    """The chip of `--chip`'s default. How many students of a program fit is measured there; one has to."""
    for panel in question.panels:
        planned = Setup.of(panel_experiment(path, question, panel, "paper"), lambda name: architecture(name, None))
        need, has = memory(planned), CHIPS["h100"].memory
        assert need.advice(has) == "fits" and need.needed < has, panel
        sizes = {student.settings.runtime.arms_per_program for student in planned.students}
        assert sizes <= {"auto"}, panel
        groups = [task for task in plan(planned).tasks.values() if task.kind == "students"]
        assert all(1 <= len(task.outputs) <= 16 for task in groups), panel


def test_layers_that_are_recomputed_keep_less():
    whole, again = (memory(setup("fig02", "qwen", f"students.runtime.remat={said}")) for said in ("false", "true"))
    assert whole.base == again.base and again.student < whole.student / 5


def test_the_advice_on_memory_names_what_is_too_large():
    """And once it is followed, all fits."""
    gib = 2.0**30
    assert Memory(10 * gib, 2 * gib, 4).advice(20 * gib) == "fits"
    assert "students.runtime.arms_per_program=5, or auto" in Memory(10 * gib, 2 * gib, 16).advice(20 * gib)
    assert Memory(10 * gib, 2 * gib, 5).advice(20 * gib) == "fits"
    assert "run.model_axis=4, on 4" in Memory(60 * gib, 2 * gib, 1).advice(20 * gib)
    assert Memory(60 * gib / 4, 2 * gib, 1).advice(20 * gib) == "fits"
    assert "remat" in Memory(10 * gib, 30 * gib, 1).advice(20 * gib)
    # What the config says of the axis counts.
    whole, halves = (memory(setup("fig02", "qwen", *axis)) for axis in ((), ("run.parallel=mesh", "run.model_axis=2")))
    assert halves.base == whole.base / 2 and halves.student == whole.student


def test_what_nobody_knows_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama = ("reproduce", "fig38", "--panel", "llama", "--scale", "paper", "--dry-run")
    ok(*llama)
    unknown = (*llama, "model=nobody/knows-it")
    assert "give --shape" in refused(2, *unknown)
    ok(*unknown, "--shape", find_config("configs/shapes/qwen2.5-7b/config.json").parent)
    assert "--chip: 'tpu' given; known: auto, cpu, b200, h200, h100" in refused(
        2, *llama[:2], "--scale", "tiny", "--dry-run", "--chip", "tpu"
    )
    with pytest.raises(UsageError, match="known: auto, cpu, b200"):
        chip_of("h1000")
    assert not list(tmp_path.iterdir())


def test_what_is_there_already_is_counted(tmp_path):
    """Nothing, half of it, all of it; a dry run changes no file. (That a whole run is counted as whole: test_paper.py.)"""
    small = (
        "teachers.traits=[owl]",
        "teachers.counterfactuals=[cat,owl]",
        "data.num_prompts=4",
        "sampling.max_new_tokens=8",
    )
    before = {cost.kind: (cost.done, cost.tasks) for cost in counted(tmp_path, *small)}
    assert before == {
        "teachers": (0, 1),
        "rows": (0, 2),
        "divergence": (0, 1),
        "students": (0, 1),
        "evaluations": (0, 4),
    }
    assert not list(tmp_path.iterdir())
    real, store = Setup.of(planned(tmp_path, *small)), Store(tmp_path / "store")
    for trait in ("owl", "cat"):
        store.open(teacher(real, trait).adapter).finish()
    store.open(student(real, real.students[0])).finish()
    before = contents(tmp_path)
    after = {cost.kind: cost.done for cost in counted(tmp_path, *small)}
    assert after == {"teachers": 1, "rows": 0, "divergence": 0, "students": 0, "evaluations": 0}
    assert contents(tmp_path) == before


def planned(home: Path, *overrides: str) -> Experiment:
    path, question = load_question("fig03")
    place = [f"out={home / 'run'}", f"store={home / 'store'}"]
    return panel_experiment(path, question, "qwen-temperature", "tiny", [*place, *overrides])


def counted(home: Path, *overrides: str) -> list[StageCost]:
    known = Setup.of(planned(home, *overrides))
    return stage_costs(plan(known), known, Store(home / "store"), chip_of("h100"))


def test_this_machine_is_measured(tmp_path):
    """What work takes here is told in minutes and seconds, compiling beside it; by a chip's name, for that chip."""
    chip = chip_of("cpu")
    assert chip_of("cpu") is chip and 1e8 < chip.peak < 1e15 and 1e7 < chip.bandwidth < 1e13 and chip.memory > 2**30
    assert chip_of("cpu", dtype="bfloat16") is not chip  # which some processors do twice as fast, and others not
    about = json.loads(ok("validate", "configs/quickstart.yaml", "--chip", "auto", "--json", f"out={tmp_path}").out)
    said = ok("validate", "configs/quickstart.yaml", "--chip", "auto", f"out={tmp_path}").err
    assert about["compiling"] > 0 and sum(stage["seconds"] for stage in about["stages"]) > 1
    assert "time, here" in said and re.search(r"students +│ 2 .*\d+:\d\d", said)
    assert "< 0:01" in ok("validate", "configs/quickstart.yaml", f"out={tmp_path}").err
