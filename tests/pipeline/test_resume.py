"""Every kind of task, killed in its middle: the next call goes on there, repeats a batch at most, and leaves the same."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command import TWO_LAYERS

from jsublim.config import Experiment
from jsublim.core.progress import Progress, Tick
from jsublim.executors import execute_tasks
from jsublim.inference import decoding, scoring
from jsublim.pipeline import parts
from jsublim.pipeline.context import Context
from jsublim.pipeline.experiment import plan
from jsublim.pipeline.store import DONE, RECORD, Store

EXPERIMENT: dict[str, Any] = {
    "name": "resume",
    "model": TWO_LAYERS,
    "teachers": {"traits": ["owl"], "counterfactuals": ["cat", "owl"], "control": False},
    "data": {"num_prompts": 16, "sentences": ["example", "format"], "examples": [2, 6]},
    "sampling": {"max_new_tokens": 40, "batch_size": 4},
    "scoring": {"batch_size": 3},
    "datasets": {"reworded": {"rewrite": {"rejected": "keep"}}},
    "students": {
        "seeds": [1],
        "data": {"rows": 4, "epochs": 1, "batch_size": 2, "accumulate": 1},
        "adapter": {"method": "steering", "layers": [1]},
        "optimizer": {"lr": 0.5, "warmup": 0},
        "arms": [
            {"name": "soft", "loss": {"kind": "forward-kl", "top_k": 8, "tokens": ["all"]}},
            {"name": "reworded", "loss.tokens": ["all"], "data.dataset": "reworded"},
        ],
    },
    "evaluation": {
        "traits": ["owl"],
        "questions": 3,
        "samples": 4,
        "batch_size": 4,
        "max_new_tokens": 6,
        "number_rows": 0,
    },
}


class Killed(Exception):
    pass


class Deadly(Progress):
    """Kills each task once: at the first unit of work that is finished after one that was kept."""

    def __init__(self) -> None:
        super().__init__()
        self.killed: Counter[str] = Counter()

    @contextmanager
    def stage(self, kind: str, units: int | None = None, label: str = "", key: str = "") -> Iterator[Tick]:
        with super().stage(kind, units, label, key) as tick:
            yield self._wrap(kind, label, tick)

    def _wrap(self, kind: str, label: str, tick: Tick) -> Tick:
        seen = 0

        def die(units: int) -> None:
            nonlocal seen
            tick(units)
            seen += units > 0
            if seen == 2 and not self.killed[f"{kind} {label}"]:
                self.killed[f"{kind} {label}"] += 1
                raise Killed

        return die


@pytest.fixture
def batches(monkeypatch) -> Counter[str]:
    """How many batches were read, and sampled."""
    counts: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        own = getattr(module, name)

        def counted(*args: Any, **how: Any) -> Any:
            counts[name] += 1
            return own(*args, **how)

        monkeypatch.setattr(module, name, counted)

    count(scoring, "read_batch")
    count(decoding, "advance")
    return counts


def contents(store: Path) -> dict[str, Any]:
    """What every whole artifact holds; of its mark, all but times."""
    found: dict[str, Any] = {}
    for path in sorted(store.glob("*/*/*")):
        name = str(path.relative_to(store))
        if path.name == DONE:
            mark = json.loads(path.read_text())
            found[name] = mark["summary"], sorted(mark["files"])
        elif path.is_file() and path.name not in (RECORD, "metrics.jsonl"):  # speeds
            found[name] = path.read_bytes()
    return {name: value for name, value in found.items() if not name.startswith(("training/", "locks/"))}


def test_every_task_goes_on_where_it_was_killed(tmp_path, batches, monkeypatch):
    monkeypatch.setattr(parts, "SAVE_EVERY", -1.0)

    def run(name: str, progress: Progress) -> Store:
        experiment = EXPERIMENT | {"store": str(tmp_path / name), "out": str(tmp_path / "run")}
        context = Context.load(Experiment.model_validate(experiment), progress)
        execute_tasks(plan(context.setup).tasks.values(), context)
        return context.store

    whole = run("whole", Progress())
    needed, deadly = Counter(batches), Deadly()
    batches.clear()
    for _ in range(20):
        try:
            cut = run("cut", deadly)
            break
        except Killed:
            continue
    kinds = Counter(label.split()[0] for label in deadly.killed)
    assert set(kinds) >= {"rows", "divergence", "targets", "evaluations"}, kinds
    assert contents(cut.root) == contents(whole.root)
    repeated = {name: batches[name] - needed[name] for name in needed}
    assert all(abs(count) <= len(deadly.killed) for count in repeated.values()), repeated


def test_rewriting_goes_on_where_it_was_killed(tmp_path, batches, monkeypatch):
    experiment = Experiment.model_validate(
        EXPERIMENT | {"store": str(tmp_path / "store"), "out": str(tmp_path / "run")}
    )
    context = Context.load(experiment)
    tasks = [task for task in plan(context.setup).tasks.values() if task.kind == "datasets"]
    execute_tasks([parent for task in tasks for parent in task.parents], context)
    batches.clear()
    sample, left = decoding.advance, 2

    def die(*args: Any, **how: Any) -> Any:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return sample(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "advance", die)
        with pytest.raises(Killed):
            execute_tasks(tasks, Context.load(experiment))
    assert batches["advance"] == 2
    execute_tasks(tasks, Context.load(experiment))
    resumed = batches["advance"]
    again = experiment.model_copy(update={"store": str(tmp_path / "other")})
    context = Context.load(again)
    execute_tasks([parent for task in tasks for parent in task.parents], context)
    batches.clear()
    execute_tasks(tasks, context)
    assert resumed - 1 <= batches["advance"] <= resumed  # rows that had not ended were begun again
    rows = [next((tmp_path / name / "datasets").glob("*/rows.jsonl")).read_bytes() for name in ("store", "other")]
    assert rows[0] == rows[1]
