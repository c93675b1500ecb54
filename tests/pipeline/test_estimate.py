"""What a run will cost, told before it is begun: nothing is read that isn't there, nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import contents, ok, refused
from jsublim.experiment.estimate import CHIPS, Cost, Estimator
from jsublim.experiment.run import Run
from rich.console import Console

from jsublim.config import find_config
from jsublim.config.figures import load_question, panel_experiment
from jsublim.errors import UsageError
from jsublim.models.checkpoint import read_config

# Qwen2.5-7B: weights of a layer's projections, by hand; and of its head.
LAYER = 3584 * 3584 * 2 + 3584 * 512 * 2 + 3 * 3584 * 18944
TABLE = 3584 * 152064


def estimated(figure: str, panel: str, *overrides: str, scale: str = "paper", shape: str = "qwen2.5-7b") -> Estimator:
    path, question = load_question(figure)
    run = Run(panel_experiment(path, question, panel, scale, list(overrides)), Console(quiet=True), dry=True)
    folder = find_config(f"configs/shapes/{shape}/config.json").parent
    return Estimator(run, read_config(folder)[1], "h100", known=False)


def stages(estimator: Estimator) -> dict[str, Cost]:
    return {cost.stage: cost for cost in estimator.costs()}


def test_operations_by_hand():
    costs = stages(estimated("fig03", "qwen-temperature"))
    assert list(costs) == ["generate", "divergence", "train", "evaluate"]
    # Six teachers and the control; 110 tokens of a request and 60 of a system prompt are read, 45 are written.
    generated = 7 * 30_000 * (2 * 28 * LAYER * (110 + 60 + 45) + 2 * TABLE * 45)
    assert costs["generate"].flops == pytest.approx(generated)
    # 6 traits under themselves and 12 counterfactuals; 80 % of the answers are in format.
    read = 6 * 13 * 24_000 * (2 * 28 * LAYER * 155 + 2 * TABLE * 45)
    assert costs["divergence"].flops == pytest.approx(read)
    # 6 traits x 4 conditions x 5 seeds and 5 controls; 1670 steps of 60 rows; forwards and back through every layer.
    factors = 28 * 8 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    row = 155 * (2 * 2 * 28 * LAYER + 6 * factors) + 45 * 2 * 2 * TABLE
    assert costs["train"].flops == pytest.approx(125 * 1670 * 60 * row)
    assert costs["train"].seconds == pytest.approx(costs["train"].flops / (989e12 * 0.4))
    assert all(cost.done is None for cost in costs.values())


def test_every_kind_of_work_is_counted():
    by_steps = [stages(estimated("fig04", "qwen", f"attribution.steps={n}"))["attribution"].flops for n in (2, 4, 6)]
    assert by_steps[2] - by_steps[1] == pytest.approx(by_steps[1] - by_steps[0])
    # 2 directions x 6 traits x 12 counterfactuals x 100 rows of 170 tokens; a step is forwards and back through the layers
    # above each of 28.
    assert (by_steps[1] - by_steps[0]) / 2 == pytest.approx(2 * 6 * 12 * 100 * 170 * 4 * LAYER * 28 * 27 / 2)
    rewritten = stages(estimated("fig06", "qwen"))["change"]
    assert rewritten.flops == pytest.approx(6 * 24_000 * (2 * 28 * LAYER * 280 + 2 * TABLE * 110))
    soft = ("students.loss.kind=forward-kl", "students.loss.tokens=[all]")
    stored, live = (
        stages(estimated("fig03", "qwen-temperature", *soft, *more)) for more in (["students.loss.top_k=8"], [])
    )
    assert stored["targets"].flops == pytest.approx(7 * 24_000 * (2 * 28 * LAYER * 215 + 2 * TABLE * 45))
    assert "targets" not in live and live["train"].flops > stored["train"].flops
    # A set of rows to mix tokens into is read before and after, unless students learn from it as it is.
    assert stages(estimated("fig21", "qwen"))["divergence"].what == "5 sets of rows, 30 readings"
    assert "train" not in stages(estimated("fig17", "qwen-greedy"))
    # Seven kinds of students of six traits; the controls of four kinds are one.
    assert stages(estimated("fig07", "qwen"))["train"].what.startswith(f"{5 * (7 * 6 + 4)} students")
    judged = stages(estimated("fig08", "numbers"))["evaluate"]
    assert judged.what.startswith("27 evaluations x ")  # base, teacher and 25 students; no judge is loaded


@pytest.mark.parametrize(("panel", "shape"), [("qwen", "qwen2.5-7b"), ("gemma", "gemma-3-4b")])
def test_the_papers_models_need_no_checkpoint_and_no_network(tmp_path, monkeypatch, panel, shape):
    monkeypatch.chdir(tmp_path)
    for chip in CHIPS:
        said = ok("reproduce", "fig02", "--panel", panel, "--scale", "paper", "--dry-run", "--chip", chip)
        assert "unknown" in said.err and "memory at least" in said.err and said.out == ""
    assert not list(tmp_path.iterdir())
    memory = estimated("fig02", panel, shape=shape).memory()
    assert 2 * {"qwen": 7.6e9, "gemma": 3.9e9}[panel] < memory  # two bytes a weight, and what training needs
    # Sixteen students at once don't fit an H100 beside Qwen's weights, one does.
    alone = estimated("fig02", panel, "students.runtime.arms_per_program=1", shape=shape).memory()
    assert alone < CHIPS["h100"].memory and alone < memory


def test_what_nobody_knows_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama = ("reproduce", "fig38", "--panel", "llama", "--scale", "paper", "--dry-run")
    ok(*llama)
    unknown = (*llama, "model=nobody/knows-it")
    assert "give --shape" in refused(2, *unknown)
    ok(*unknown, "--shape", find_config("configs/shapes/qwen2.5-7b/config.json").parent)
    assert "--chip: 'tpu' given; known: h200, h100" in refused(
        2, *llama[:2], "--scale", "tiny", "--dry-run", "--chip", "tpu"
    )
    with pytest.raises(UsageError, match="known: h200"):
        Estimator(estimated("fig02", "qwen").run, estimated("fig02", "qwen").config, "h1000", known=False)
    assert not list(tmp_path.iterdir())


def test_what_is_there_already_is_counted(tmp_path):
    """Nothing, half of it, all of it; a dry run changes no file. (That a whole run is counted as whole: test_paper.py.)"""
    small = (
        "teachers.traits=[owl]",
        "teachers.counterfactuals=[cat,owl]",
        "data.num_prompts=4",
        "sampling.max_new_tokens=8",
    )
    run = planned(tmp_path, *small)
    before = {cost.stage: (cost.done, cost.of) for cost in counted(run)}
    assert before == {"teach": (0, 2), "generate": (0, 2), "divergence": (0, 1), "train": (0, 10), "evaluate": (0, 12)}
    assert not list(tmp_path.iterdir())
    real = planned(tmp_path, *small, dry=False)
    real.load(weights=False)
    real.staff.taught_artifact("owl").finish()
    real.student_artifact(real.arms[0]).finish()
    before = contents(tmp_path)
    after = {cost.stage: cost.done for cost in counted(planned(tmp_path, *small))}
    assert after == {"teach": 1, "generate": 0, "divergence": 0, "train": 1, "evaluate": 0}
    assert contents(tmp_path) == before


def planned(home: Path, *overrides: str, dry: bool = True) -> Run:
    path, question = load_question("fig03")
    place = [f"out={home / 'run'}", f"store={home / 'store'}"]
    e = panel_experiment(path, question, "qwen-temperature", "tiny", [*place, *overrides])
    return Run(e, Console(quiet=True), dry=dry)


def counted(run: Run) -> list[Cost]:
    run.load(weights=False)
    return Estimator(run, run.lm.config, "h100", known=True).costs()
