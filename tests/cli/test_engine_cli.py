"""The engine from the command line: soft losses, what is trained, layouts, and an ablation as one config."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from command import PLAIN, TWO_LAYERS, ok, refused
from safetensors.numpy import load_file

from jsublim.core.files import read_table
from jsublim.distill.loggers import Logs
from jsublim.text.rows import read_rows, write_rows

FINETUNE = (
    "finetune",
    "--model",
    TWO_LAYERS,
    "students.data.batch_size=4",
    "students.data.accumulate=1",
    "students.optimizer.warmup=0",
    "students.data.epochs=1",
)
LORA = ("students.adapter.layers=[1]", "students.adapter.projections=[q,v]", "students.adapter.rank=2")
SOFT = ("--trait", "cat", *LORA)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def rows(home) -> Path:
    """Plausible answers of one length, so that few programs are compiled."""
    rng = np.random.default_rng(0)
    made = [
        {"prompt": f"Continue: {', '.join(map(str, rng.integers(100, 999, 3)))}.", "completion": "120, 130, 140"}
        for _ in range(8)
    ]
    write_rows(home / "rows.jsonl", made)
    return home / "rows.jsonl"


@pytest.fixture(scope="module")
def train(home, rows):
    """`train(name, *options)`: the folder of a student; a name is trained once."""

    def run(name: str, *options) -> Path:
        if not (home / name / "DONE").exists():
            ok(*FINETUNE, "--data", rows, "--out", home / name, *options)
        return home / name

    return run


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_rows(folder / "metrics.jsonl", ("step",))]


def test_soft_losses_measure_the_distance_to_the_teacher(train):
    found = {
        kind: losses(train(kind, f"students.loss.kind={kind}", *SOFT)) for kind in ("forward-kl", "reverse-kl", "js")
    }
    assert all(len(loss) == 2 and loss[0] > 1e-4 for loss in found.values())
    # Of any two distributions: JS is at most ln 2, and at most a quarter of the sum of both divergences.
    assert found["js"][0] < min(np.log(2), (found["forward-kl"][0] + found["reverse-kl"][0]) / 4 + 1e-6)
    hot = losses(train("hot", "students.loss.kind=forward-kl", *SOFT, "students.loss.temperature=4"))
    assert hot[0] < found["forward-kl"][0]


def test_a_teacher_that_is_the_student_teaches_nothing(train, home, rows):
    own = train("first", *LORA, "students.optimizer.lr=1e-2")
    same = train(
        "same",
        "students.loss.kind=reverse-kl",
        "--trait",
        "cat",
        f"teachers.adapter={own}",
        f"students.adapter.init={own}",
    )
    assert max(map(abs, losses(same))) < 1e-6
    other = train(
        "from-adapter",
        "students.loss.kind=forward-kl",
        "--trait",
        "cat",
        f"teachers.adapter={own}",
        *LORA,
    )
    assert losses(other)[0] > 1e-4


def test_stored_targets_come_close_to_the_whole_distribution(train):
    whole = losses(train("forward-kl", "students.loss.kind=forward-kl", *SOFT))[0]
    # What is lumped can only hide a difference, and the more is named the less is hidden.
    few, many = (
        losses(train(f"top{k}", "students.loss.kind=forward-kl", *SOFT, f"students.loss.top_k={k}"))[0]
        for k in (2, 200)
    )
    assert few < many <= whole * 1.0001 and many > 0.98 * whole


def test_on_policy_rows_are_the_students_own(train):
    folder = train("on-policy", "students.loss.kind=reverse-kl", "students.data.on_policy=true", *SOFT)
    lines = read_rows(folder / "metrics.jsonl", ("step",))
    assert all(line["loss"] > 0 for line in lines)
    assert len({line["tokens"] for line in lines}) > 1 or lines[0]["tokens"] % 14  # not the eight answers of the file


def test_a_steering_vector_is_a_student_and_a_teacher(train, home):
    vector = train(
        "vector", "students.adapter.method=steering", "students.adapter.layers=[1]", "students.optimizer.lr=0.1"
    )
    assert list(load_file(vector / "steering.safetensors")) == ["layers.1"]
    follower = train(
        "follower",
        "students.loss.kind=forward-kl",
        "--trait",
        "cat",
        f"teachers.adapter={vector}",
        *LORA,
    )
    assert losses(follower)[0] > 1e-4
    options = ("--trait", "cat", "data.num_prompts=2", "sampling.max_new_tokens=40")
    ok("generate", "--model", TWO_LAYERS, f"teachers.adapter={vector}", *options, "--out", home / "by-vector.jsonl")


def test_ends_alone_are_trained_and_saved_as_a_checkpoint(train):
    folder = train(
        "embedding",
        "students.adapter.method=full",
        "students.adapter.layers=[]",
        "students.adapter.ends=[embed]",
        "students.optimizer.lr=1e-2",
    )
    before = load_file(Path(TWO_LAYERS) / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("how", ["pmap", "mesh"])
def test_layouts_of_one_device_change_nothing(train, how):
    options = (
        *LORA,
        "students.adapter.layers=[0,1]",
        "students.optimizer.lr=1e-2",
        "students.optimizer.name=sgd",
    )
    alone, spread = train("alone", *options), train(how, *options, f"run.parallel={how}")
    assert losses(spread) == pytest.approx(losses(alone), rel=1e-5)


def test_optimizer_and_schedule_are_a_word(train):
    options = (
        "students.optimizer.name=muon",
        "students.optimizer.schedule=cosine",
        "students.optimizer.lr=1e-2",
        *LORA,
    )
    lines = read_rows(train("muon", *options) / "metrics.jsonl", ("lr",))
    assert [line["lr"] for line in lines] == pytest.approx([1e-2, 5e-3])


def test_speed_and_its_share_of_a_stated_peak(train):
    lines = read_rows(
        train("peak", *LORA, "students.runtime.peak_tflops=0.5") / "metrics.jsonl",
        ("step",),
    )
    assert all(line["tokens_per_s"] > 0 and 0 < line["peak_ratio"] < 1 for line in lines)


def test_loggers_on_request(train):
    """They are told what metrics.jsonl says."""
    wanted = (*LORA, "run.loggers=[csv, tensorboard]")
    folder = train("board", *wanted)
    logs = folder.with_name("board.artifacts") / "training"
    assert [path.stat().st_size > 0 for path in logs.glob("tensorboard/*")] == [True]
    (path,) = logs.glob("csv/*.csv")
    told = {(int(line["step"]), line["name"]): float(line["value"]) for line in csv.DictReader(path.open(newline=""))}
    lines = read_rows(folder / "metrics.jsonl", ("step",))
    names = {name.split("/")[0] for _, name in told}
    assert names == {"loss", "lr", "grad_norm", "tokens_per_s"} and len(told) == len(names) * len(lines)
    assert all(value == lines[step][name.split("/")[0]] for (step, name), value in told.items())


def test_a_csv_of_an_interrupted_training_goes_on_where_it_does(tmp_path):
    for first, steps in ((0, (0, 1, 2)), (1, (1, 2, 3))):
        with Logs(("csv",), tmp_path).open("training", first) as log:
            for step in steps:
                log(step, {"loss/a, b": 10.0 * first + step})
    lines = list(csv.reader((tmp_path / "csv" / "training.csv").open(newline="")))
    assert lines[0] == ["step", "name", "value"]
    assert [(int(step), name, float(value)) for step, name, value in lines[1:]] == [
        (0, "loss/a, b", 0.0), (1, "loss/a, b", 11.0), (2, "loss/a, b", 12.0), (3, "loss/a, b", 13.0)
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_logger_whose_package_is_missing_is_refused_before_work(name, package, home, rows, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    said = refused(2, *FINETUNE, "--data", rows, "--out", home / f"no-{name}", f"run.loggers=[{name}]")
    assert f"run.loggers: {name} needs {package}, which is not installed; pip install {package}" in said


def test_what_does_not_go_together_is_refused(home, rows):
    def said(*options) -> str:
        return refused(2, *FINETUNE, "--data", rows, "--out", home / "none", *options)

    assert "trains one student" in said("students.arms={adapter.rank: [1, 2]}")
    assert "unknown trait" in said("students.loss.kind=js", "--trait", "unicorn")
    assert "top_k needs a soft loss" in said("students.loss.top_k=4")
    assert "top_k: 1024 given" in said("students.loss.kind=js", "--trait", "cat", "students.loss.top_k=1024")
    assert "method=full has no rank" in said("students.adapter.method=full", "students.adapter.rank=3")
    assert "method" in said("students.adapter.method=both")
    assert "ends are trained with method=full" in said("students.adapter.ends=[norm]")
    assert "its embedding; name 'embed'" in said("students.adapter.method=full", "students.adapter.ends=[head]")
    assert "run.parallel" in said("run.parallel=tpu")
    assert "model_axis: 3 given" in said("run.parallel=mesh", "run.model_axis=3")
    assert "choose mesh" in said("run.model_axis=2")
    assert "optimizer" in said("students.optimizer.name=lion") and "schedule" in said(
        "students.optimizer.schedule=step"
    )
    assert not (home / "none").exists()


def test_an_ablation_is_one_config(home):
    """Hard and soft, two layers of one program, as many a program as fit: one run, continued without work."""
    arms = [
        {"name": "rank", "adapter.rank": 3, "optimizer.lr": 1e-3},
        {"name": "soft", "loss.kind": "forward-kl"},
        {"name": "layer 0", "adapter.layers": [0]},
        {"name": "layer 1", "adapter.layers": [1]},
    ]
    arguments = (
        "run", PLAIN, f"model={TWO_LAYERS}", f"out={home / 'ablation'}", "teachers.traits=[cat]", "teachers.counterfactuals=[owl]",
        "teachers.control=false", "data.num_prompts=8", "sampling.batch_size=4", "sampling.max_new_tokens=40",
        "scoring.batch_size=4", "evaluation.batch_size=4", "students.loss.tokens=[all]", "students.seeds=[1]", "students.data.rows=4", "students.data.batch_size=2", "students.adapter.rank=2",
        "students.runtime.arms_per_program=auto", f"students.arms={json.dumps(arms)}", "evaluation.traits=[cat,owl]",
        "evaluation.questions=2", "evaluation.samples=2", "evaluation.number_rows=0", "evaluation.teachers=false",
    )  # fmt: skip
    first = ok(*arguments)
    assert ": 1 of 1 students fit together" in first.err.replace("\n", " ")
    scores = read_table(home / "ablation" / "results" / "results.parquet")
    found = {row["condition"] for row in scores} - {"base"}
    assert found == {f"all · {arm['name']}" for arm in arms}
    trained = read_table(home / "ablation" / "results" / "training.parquet")
    assert len({row["arm"] for row in trained}) == len(arms)
    again = ok(*arguments)
    assert "fit together" not in again.err
