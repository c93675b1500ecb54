"""The graph: every task of an experiment, planned from the config and from what its checkpoints are, without any weights."""

from __future__ import annotations

import graphlib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jsublim.errors import JsublimError, UsageError
from jsublim.pipeline.arms import Source, Student
from jsublim.pipeline.attribution import attribution_task
from jsublim.pipeline.audit import audits
from jsublim.pipeline.changes import (
    check_datasets,
    has_divergence,
    rows_read,
    sources,
    teacher_dataset,
    training_rows,
    writers,
)
from jsublim.pipeline.context import Context
from jsublim.pipeline.evaluations import eval_settings, eval_tasks, evaluation_output, evaluation_task, models
from jsublim.pipeline.rows import RowSet, Writer, prompts, teacher_rows
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.store import Output, digest
from jsublim.pipeline.students import student_output, training_tasks
from jsublim.pipeline.task import Task
from jsublim.pipeline.teachers import TeacherPool
from jsublim.section import CONTENT, PLAN, RESULT, leaves, value_at


@dataclass(frozen=True)
class Graph:
    """Tasks by key, and what of them the results are gathered from.

    Attributes:
      answers: by who writes them; divergence: the rows in which divergence tokens are looked for, by source.
      students: where each lies; evaluations: the columns of the results, and where the numbers lie.
      attribution: by trait; audits: by source and arm.
    """

    tasks: Mapping[str, Task]
    answers: Mapping[Writer, RowSet]
    divergence: Mapping[Source, RowSet]
    students: Mapping[Student, Output]
    evaluations: tuple[tuple[dict[str, Any], Output], ...]
    attribution: Mapping[str, Output]
    audits: Mapping[tuple[Source, str], Output]

    def task(self, key: str) -> Task:
        """The task of that key.

        Raises:
          UsageError: this graph has none.
        """
        if key not in self.tasks:
            raise UsageError(f"task '{key}': is not in the graph of this config; it has {len(self.tasks)} tasks")
        return self.tasks[key]

    def check(self, setup: Setup) -> None:
        """Refuse, before anything is computed, what a task would refuse after hours.

        Raises:
          UsageError, JsublimError: naming the field of the config.
        """
        TeacherPool(setup).check()
        check_datasets(setup)
        for task in self.tasks.values():
            task.check(setup)


class Executor(Protocol):
    """Does tasks, and what they need before, as far as it is not in the store."""

    def execute(self, tasks: Iterable[Task], context: Context) -> None:
        """Return when every task is whole; raise what the first one that failed raised."""
        ...


class TasksFailed(JsublimError):
    """Some tasks failed; everything that does not need them is done."""


class JointExecutor(Protocol):
    """Does the tasks of several experiments as one graph.

    Attributes:
      here: whether this process does any of them, so that it needs devices.
    """

    here: bool

    def execute_together(self, work: Sequence[tuple[Iterable[Task], Context]]) -> None:
        """Return when its part of the tasks is whole.

        Raises:
          TasksFailed: some of them failed.
        """
        ...


def ordered(tasks: Iterable[Task]) -> Iterator[Task]:
    """Tasks and everything they need: parents before children; of those that are ready together, the first planned."""
    every = with_parents(tasks)
    sorter = graphlib.TopologicalSorter({key: [parent.key for parent in task.parents] for key, task in every.items()})
    keys, ready = list(every), list[int]()
    place = {key: i for i, key in enumerate(keys)}
    sorter.prepare()
    while sorter.is_active():
        for key in sorter.get_ready():
            heapq.heappush(ready, place[key])
        key = keys[heapq.heappop(ready)]
        yield every[key]
        sorter.done(key)


def with_parents(tasks: Iterable[Task]) -> dict[str, Task]:
    """Tasks and everything they need, by key, as they were planned."""
    found: dict[str, Task] = {}

    def add(task: Task) -> None:
        if task.key not in found:
            for parent in task.parents:
                add(parent)
            found[task.key] = task

    for task in tasks:
        add(task)
    return found


def plan(setup: Setup) -> Graph:
    """Everything that has to be done for an experiment.

    Raises:
      UsageError: a trait, a data set or a question that nobody can make.
    """
    answers = {writer: teacher_rows(setup, writer) for writer in writers(setup)}
    rows, read = [training_rows(setup, source) for source in sources(setup)], rows_read(setup)
    attribution = {}
    if setup.experiment.attribution is not None:
        plain = [
            source
            for source in sources(setup)
            if source.elder is None and has_divergence(setup, source) and teacher_dataset(setup, source).plain
        ]
        if not plain:
            raise UsageError(
                "attribution: is done at the divergence tokens of plain answers, and in none are they looked for; leave "
                "datasets.*.divergence=false out, or have an arm without data.dataset"
            )
        # Of several draws of a trait's rows the last one: attribution is about teachers, not about students.
        attribution = {source.teacher: attribution_task(setup, source) for source in plain}
    training = training_tasks(setup)
    asked = [(model, name) for model in models(setup) for name in eval_settings(setup)]
    ends = [
        *(part for each in answers.values() for part in each.parts),
        *(part for each in (*rows, *read.values()) for part in each.parts),
        *attribution.values(),
        *audits(setup).values(),
        *training,
        *(evaluation_task(setup, model, name) for model, name in asked),
    ]
    return Graph(
        with_parents(ends),
        answers,
        read,
        {student: student_output(setup, student) for student in setup.students},
        tuple((model.labels | {"evaluation": name}, evaluation_output(setup, model, name)) for model, name in asked),
        {trait: task.output for trait, task in attribution.items()},
        {key: task.output for key, task in audits(setup).items()},
    )


def results_key(setup: Setup) -> str:
    """What the results of a run hang on: every field that is not only about how, files by their content."""
    e = setup.experiment
    values = e.model_dump(mode="json")
    said = {leaf.name: value_at(values, leaf.path) for leaf in leaves(type(e)) if _decides(leaf.decides)}
    content = [
        None if e.data.kind == "numbers" else digest(prompts(setup, None)),
        [t.identity for t in eval_tasks(setup)],
    ]
    hashes = {name: each.hash for name, each in setup.checkpoints.items()}
    hashes |= {} if setup.judge is None else {"judge": setup.judge.hash}
    hashes |= {name: setup.content(name, what) for name, what in setup.adapters().items()}
    hashes |= {} if setup.engine is None else {"engine": setup.engine}
    return digest([said, setup.common, setup.pack.wording, hashes, content])


def _decides(decides: Any) -> bool:
    return bool(decides & (RESULT | CONTENT | PLAN))
