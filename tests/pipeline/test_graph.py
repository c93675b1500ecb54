"""The graph: planned without weights, plain data, and every kind of task done by a fresh process that is told its key alone."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Any, ClassVar

import bitflips
import numpy as np
import pytest
from command import TWO_LAYERS, start
from safetensors.numpy import load_file

from jsublim.config import Experiment
from jsublim.core.files import read_table
from jsublim.core.section import RESULT
from jsublim.evals import EVAL_KINDS, EvalContext, EvalKind, EvalTask, PromptedModel, Record
from jsublim.executors import execute_tasks, worker
from jsublim.executors.local import results_first
from jsublim.pipeline import context as contexts
from jsublim.pipeline.context import Context
from jsublim.pipeline.experiment import plan
from jsublim.pipeline.graph import Graph, ordered
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.stage import Task
from jsublim.pipeline.store import Store, read_summary
from jsublim.text.rows import Row, read_rows, revised
from jsublim.transforms import CHANGES, Change, Changed, ChangeRun

# Between them, every kind of task.
STUDENTS: dict[str, Any] = {
    "name": "graph",
    "model": TWO_LAYERS,
    "teachers": {
        "traits": ["owl"],
        "counterfactuals": ["cat", "owl"],
        "taught": {"method": "steering", "layers": [1], "steps": 10, "lr": 0.2},
    },
    "data": {"num_prompts": 12, "sentences": ["example", "format"], "examples": [2, 6]},
    "sampling": {"max_new_tokens": 40, "batch_size": 4, "shard": 8},
    "scoring": {"batch_size": 4},
    "datasets": {"left": {"remove_entangled": {"k": 2, "among": 20}, "drop_audited": 0.25}},
    "students": {
        "seeds": [1],
        "data": {"rows": 4, "epochs": 1, "batch_size": 2, "accumulate": 1},
        "adapter": {"method": "steering", "layers": [1]},
        "optimizer": {"lr": 0.5, "warmup": 0},
        "arms": [
            {"name": "hard", "loss.tokens": ["divergence"]},
            {"name": "soft", "loss": {"kind": "forward-kl", "top_k": 8, "tokens": ["all"]}},
            {"name": "left", "loss.tokens": ["all"], "data.dataset": "left"},
        ],
    },
    "audit": {"rows": 2},
    "evaluation": {
        "traits": ["owl", "cat"],
        "questions": 2,
        "samples": 2,
        "batch_size": 4,
        "max_new_tokens": 6,
        "number_rows": 2,
    },
}
PROMPTED: dict[str, Any] = STUDENTS | {
    "teachers": {"traits": ["owl"], "counterfactuals": ["cat", "owl"]},
    "datasets": {},
    "students": None,
    "attribution": {"rows": 3, "steps": 1, "sites": ["residual"], "directions": ["noising"]},
    "evaluation": STUDENTS["evaluation"] | {"teachers": False},
}
KINDS = (
    "teachers",
    "rows",
    "divergence",
    "entangled",
    "influence",
    "datasets",
    "targets",
    "students",
    "evaluations",
    "audit",
    "attribution",
)


def experiment(values: dict[str, Any], store: Path, **changes: Any) -> Experiment:
    return Experiment.model_validate(values | {"store": str(store), "out": str(store / "run")} | changes)


def values_of(kind: str) -> dict[str, Any]:
    return PROMPTED if kind == "attribution" else STUDENTS


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("graph")


@pytest.fixture(scope="module")
def whole(home) -> Store:
    """Both experiments, done by this process in one store."""
    for values in (STUDENTS, PROMPTED):
        context = Context.load(experiment(values, home / "store"))
        execute_tasks(plan(context.setup).tasks.values(), context)
    return Store(home / "store")


def graph_of(values: dict[str, Any], store: Path) -> Graph:
    return plan(Setup.of(experiment(values, store)))


def test_whoever_is_no_student_is_asked_first(tmp_path):
    """Parents stay before children; what a run shows first needs no student."""
    values = values_of("numbers") | {"students": {"seeds": [1]}}
    tasks = list(ordered(graph_of(values, tmp_path).tasks.values()))
    first = results_first(tasks)
    place = {task.key: number for number, task in enumerate(first)}
    assert set(place) == {task.key for task in tasks}
    assert all(place[parent.key] < place[task.key] for task in first for parent in task.parents)
    assert first[0].kind == "evaluations" and "base" in first[0].label
    asked = [i for i, task in enumerate(first) if task.kind == "evaluations"]
    trained = min(i for i, task in enumerate(first) if task.kind == "students")
    assert sum(i < trained for i in asked) == sum("seed" not in first[i].label for i in asked) >= 2


def test_a_graph_is_planned_without_weights_and_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("jsublim.inference.lm.load_params", refuse)
    monkeypatch.setattr(contexts, "load_model", refuse)
    graph = graph_of(STUDENTS, tmp_path / "store")
    assert {task.kind for task in graph.tasks.values()} == set(KINDS) - {"attribution"}
    assert not list(tmp_path.iterdir())


def test_a_graph_is_the_same_wherever_it_is_planned(tmp_path):
    """Keys hang on the config and the checkpoints: not on the place, the process, or what is done already."""
    here = {key: task.label for key, task in graph_of(STUDENTS, tmp_path / "a").tasks.items()}
    assert here == {key: task.label for key, task in graph_of(STUDENTS, tmp_path / "b").tasks.items()}
    config = tmp_path / "config.json"
    config.write_text(experiment(STUDENTS, tmp_path / "c").model_dump_json())
    line = (
        "import sys, json; from pathlib import Path; from jsublim.config import Experiment;"
        "from jsublim.pipeline.experiment import plan; from jsublim.pipeline.setup import Setup;"
        f"e = Experiment.model_validate(json.loads(Path({str(config)!r}).read_text()));"
        "print(json.dumps({key: task.label for key, task in plan(Setup.of(e)).tasks.items()}))"
    )
    assert json.loads(child(line, tmp_path)) == here


def test_parents_come_first_and_each_task_once(tmp_path):
    graph, seen = graph_of(STUDENTS, tmp_path), set()
    for task in ordered(graph.tasks.values()):
        assert {parent.key for parent in task.parents} <= seen and task.key not in seen
        seen.add(task.key)
    assert seen == set(graph.tasks)
    (student,) = [task for task in graph.tasks.values() if task.kind == "students" and "divergence" in task.label]
    needed = {task.key for task in ordered([student])}
    assert needed < seen and not any(graph.tasks[key].kind == "evaluations" for key in needed)


def test_shards_follow_from_the_config(tmp_path):
    """Prompts are shared out by `sampling.shard`, rows to read by the same number, whatever passes the filter."""
    graph = graph_of(STUDENTS, tmp_path)
    assert [task.label for task in graph.tasks.values() if task.kind == "rows"][:2] == ["owl-1", "owl-2"]
    assert [task.label for task in graph.tasks.values() if task.kind == "divergence"] == ["owl-1", "owl-2"]
    one = graph_of(STUDENTS | {"sampling": STUDENTS["sampling"] | {"shard": 100}}, tmp_path)
    assert [task.label for task in one.tasks.values() if task.kind == "rows"] == ["owl", "control"]


def test_shards_write_the_rows_of_one_task(whole, home):
    """A row depends on its place among all prompts, not on the task that it is made in."""
    values = STUDENTS | {"sampling": STUDENTS["sampling"] | {"shard": 100}}
    context = Context.load(experiment(values, home / "one"))
    one, shards = plan(context.setup), graph_of(STUDENTS, home / "store")
    execute_tasks([task for task in one.tasks.values() if task.kind in ("rows", "divergence")], context)
    for own, several in zip(one.answers.values(), shards.answers.values(), strict=True):
        assert own.read(context.store) == several.read(whole)
    for own, several in zip(one.divergence.values(), shards.divergence.values(), strict=True):
        assert own.read(context.store) == several.read(whole)


def child(line: str, folder: Path) -> str:
    """What a fresh process in another working directory prints."""
    with contextlib.chdir(folder):
        process = start(program=("-c", line))
    out, err = process.communicate()
    assert process.returncode == 0, err[-2000:]
    return out


def test_a_fresh_process_does_a_task_of_any_kind_from_its_key_alone(whole, home, tmp_path):
    """Parents lie in the store, and nothing else does; everything follows from config and key."""
    elsewhere, lines = (
        tmp_path / "elsewhere",
        ["import json; from pathlib import Path; from jsublim.config import Experiment"],
    )
    elsewhere.mkdir()
    lines.append("from jsublim.executors.worker import Worker")
    done: list[tuple[Task, Store]] = []
    for kind in KINDS:
        values, store = values_of(kind), Store(tmp_path / kind)
        task = [task for task in graph_of(values, home / "store").tasks.values() if task.kind == kind][-1]
        for each in ordered([task]):
            if each is not task:
                for output in each.outputs:
                    shutil.copytree(whole.path(output), store.path(output), dirs_exist_ok=True)
        config = tmp_path / f"{kind}.json"
        config.write_text(experiment(values, store.root).model_dump_json())
        lines.append(f"e = Experiment.model_validate(json.loads(Path({str(config)!r}).read_text()))")
        lines.append(f"outcome = Worker('.').make(e, {task.key!r})")
        lines.append("assert outcome.error is None, outcome.error")
        done.append((task, store))
    child("\n".join(lines), elsewhere)
    assert not list(elsewhere.iterdir())
    for task, store in done:
        for output in task.outputs:
            assert_equal(whole.path(output), store.path(output))


def assert_equal(ours: Path, theirs: Path) -> None:
    """Two artifacts with the same content, whatever the times and speeds that stand in them."""
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for path in ours.iterdir():
        other = theirs / path.name
        if path.suffix == ".safetensors":
            mine, its = load_file(path), load_file(other)
            assert mine.keys() == its.keys() and all(np.array_equal(mine[key], its[key]) for key in mine)
        elif path.suffix == ".parquet":
            assert read_table(path) == read_table(other)
        elif path.suffix == ".npz":
            with np.load(path) as mine, np.load(other) as its:
                assert all(np.array_equal(mine[key], its[key]) for key in mine.files)
        elif path.name == "metrics.jsonl":
            lines = [[r | {"tokens_per_s": 0} for r in read_rows(p, ("step",))] for p in (path, other)]
            assert lines[0] == lines[1]
        elif path.name == "DONE":
            assert read_summary(ours) == read_summary(theirs)
        elif path.name != "artifact.json":
            assert path.read_bytes() == other.read_bytes(), path


def test_a_flipped_bit_in_any_kind_of_artifact_is_noticed(whole):
    """By whoever reads it, and by `jsublim verify`, though size and time stay; scripts/bitflips.py flips more."""
    missed = bitflips.flips(whole.root, 6)
    assert missed == {kind: [] for kind in KINDS}


def test_a_task_whose_parents_are_missing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "SEEN_WITHIN", 0.0)
    graph = graph_of(STUDENTS, tmp_path / "store")
    key = next(key for key, task in graph.tasks.items() if task.kind == "divergence")
    make = worker.Worker(".").make
    assert "does not show rows" in str(make(experiment(STUDENTS, tmp_path / "store"), key).error)
    assert "'none': is not in the graph" in str(make(experiment(STUDENTS, tmp_path / "store"), "none").error)


# --- a new kind of evaluation, and a new change of rows, are one class each


@pytest.fixture
def toys():
    """Registered as a file of `evals/` and one of `transforms/` would register them."""

    @EVAL_KINDS.add("length")
    class LengthKind(EvalKind):
        question: Annotated[str, RESULT] = "Say something."

        def tasks(self, context: EvalContext) -> list[EvalTask]:
            def records(model: PromptedModel, answers: Any) -> list[Record]:
                return [Record("length", 0, float(np.mean([len(text) for text in answers[0]])), len(answers[0]))]

            return [EvalTask((self.question,), {"length": [self.question]}, records, max_new_tokens=3)]

    @CHANGES.add("reverse")
    class Reverse(Change):
        order: ClassVar[int] = 35
        times: Annotated[int, RESULT] = 1

        def apply(self, rows: list[Row], run: ChangeRun) -> Changed:
            turned = rows[::-1] if self.times % 2 else rows
            return [revised(row) for row in turned], {"turned": len(rows)}

    yield
    del EVAL_KINDS.known["length"], CHANGES.known["reverse"]


def test_a_new_kind_and_a_new_change_need_nothing_else(toys, whole, home):
    values = STUDENTS | {
        "datasets": {"turned": {"reverse": True}},
        "students": STUDENTS["students"] | {"arms": [{"name": "turned", "loss.tokens": ["all"], "data.dataset": "turned"}]},
        "evaluation": STUDENTS["evaluation"] | {"kinds": {"length": {"question": "Count."}}},
    }  # fmt: skip
    context = Context.load(experiment(values, home / "store"))
    graph = plan(context.setup)
    for check in graph.checks(context.setup):
        check()
    execute_tasks(graph.tasks.values(), context)
    (changed,) = [task for task in graph.tasks.values() if task.kind == "datasets" and task.label == "owl-turned"]
    own = next(iter(graph.answers.values())).read(context.store)
    assert read_rows(context.store.path(changed.nodes[0]) / "rows.jsonl") == own[::-1]
    assert context.store.summary(changed.nodes[0])["turned"] == len(own)
    records = read_table(context.store.path(graph.evaluations[0][1]) / "records.parquet")
    assert {record["metric"] for record in records} == {"length"}
    assert Experiment.model_validate(context.setup.experiment.model_dump(mode="json")) == context.setup.experiment
    two = graph_of(values | {"datasets": {"turned": {"reverse": {"times": 2}}}}, home / "store")
    assert {t.key for t in two.tasks.values() if t.kind == "datasets"} != {changed.key}
