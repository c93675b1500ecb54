"""The graph: every task of an experiment, planned from the config and from what its checkpoints are, without any weights."""

from __future__ import annotations

import functools
import graphlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jsublim.core.section import CONTENT, PLAN, RESULT, facts
from jsublim.core.timeleft import Expected
from jsublim.errors import JsublimError, UsageError
from jsublim.pipeline.arguments import check_datasets, check_teachers
from jsublim.pipeline.arms import Source, Student, Writer
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Sizes
from jsublim.pipeline.evaluated import questions
from jsublim.pipeline.setup import Setup, prompts
from jsublim.pipeline.stage import Node, Task, with_parents
from jsublim.pipeline.store import digest
from jsublim.pipeline.values import Rows
from jsublim.runtime.chips import Chip, this_machine

LEAST = 0.1  # seconds of a task, beside what its cost says: files, a step's launches
Work = tuple[Iterable[Task], Context]  # tasks of one experiment, and what they are done with


@dataclass(frozen=True)
class Graph:
    """Tasks by key, and the nodes that the results are gathered from.

    Attributes:
      answers: by who writes them; divergence: the rows in which divergence tokens are looked for, by source.
      evaluations: the columns of the results, and where the numbers lie.
      attribution: by trait; audits: by source and arm.
    """

    tasks: Mapping[str, Task]
    answers: Mapping[Writer, Rows]
    divergence: Mapping[Source, Rows]
    students: Mapping[Student, Node]
    evaluations: tuple[tuple[dict[str, Any], Node], ...]
    attribution: Mapping[str, Node]
    audits: Mapping[tuple[Source, str], Node]

    def task(self, key: str) -> Task:
        """The task of that key. Raises UsageError: this graph has none."""
        if key not in self.tasks:
            raise UsageError(f"task '{key}': is not in the graph of this config; it has {len(self.tasks)} tasks")
        return self.tasks[key]

    def checks(self, setup: Setup) -> Iterator[Callable[[], Any]]:
        """What is refused before anything is computed, each by itself, that a task would refuse after hours: UsageError or
        JsublimError, naming the field of the config."""
        yield lambda: check_teachers(setup)
        yield lambda: check_datasets(setup)
        for task in self.tasks.values():
            yield functools.partial(task.check, setup)


class TasksFailed(JsublimError):
    """Some tasks failed; everything that does not need them is done."""


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


def expected(tasks: Iterable[Task], setup: Setup, chip: Chip | None = None) -> dict[str, Expected]:
    """What tasks should take on a chip (None: on this machine, measured if there is any task), by key. Those of one kind that cost the same are
    taken to have the same shapes, and so the same programs."""
    sizes = Sizes.of(setup)
    costs = {task.key: (task.kind, task.cost(setup, sizes)) for task in tasks}
    return {
        key: Expected(kind, cost.seconds(chip or this_machine(None, setup.experiment.dtype)) + LEAST, (kind, cost))
        for key, (kind, cost) in costs.items()
    }


def results_key(setup: Setup) -> str:
    """What the results of a run hang on: every field that is not only about how, files by their content."""
    e = setup.experiment
    content = [None if e.data.kind == "numbers" else digest(prompts(setup, e.data.seed)), questions(setup).identity]
    hashes = {name: checkpoint.hash for name, checkpoint in setup.checkpoints.items()}
    hashes |= {} if setup.judge is None else {"judge": setup.judge.hash}
    hashes |= {name: setup.content(name, what) for name, what in setup.adapters().items()}
    hashes |= {} if setup.engine is None else {"engine": setup.engine}
    return digest([facts(e, RESULT | CONTENT | PLAN), setup.common, setup.pack.wording, hashes, content])
