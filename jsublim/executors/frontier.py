"""Several graphs as one, and what of it can be done now: what every executor with more than one worker asks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from jsublim.config import Experiment
from jsublim.errors import JsublimError, one_line
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Sizes
from jsublim.pipeline.graph import Work, ordered
from jsublim.pipeline.stage import Task
from jsublim.runtime.chips import CHIPS, Chip


def in_one_line(error: Exception) -> str:
    """Why a task failed."""
    if isinstance(error, JsublimError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{error.strerror} ({error.filename})" if error.filename else error.strerror)
    return f"{type(error).__name__}: {one_line(str(error))}"


def checkpoint_of(experiment: Experiment) -> Hashable:
    """What a worker must have loaded for an experiment: equal for experiments that can share it."""
    e = experiment
    return e.model, e.dtype, e.chat_template, e.recipe.model_dump_json(), e.run.parallel, e.run.model_axis


@dataclass(frozen=True, eq=False)
class Job:
    """A task, in the first experiment that needs it.

    Attributes:
      key: of the task in its store; parents: keys of jobs; cost: seconds on one chip, under assumed lengths.
    """

    key: str
    task: Task
    context: Context
    parents: tuple[str, ...]
    cost: float

    @property
    def name(self) -> str:
        return f"{self.task.kind} {self.task.label}"

    @property
    def done(self) -> bool:
        return self.task.done(self.context.store)

    @property
    def checkpoint(self) -> Hashable:
        return checkpoint_of(self.context.setup.experiment)


def merged(work: Sequence[Work], chip: Chip = CHIPS["h100"]) -> dict[str, Job]:
    """Every task once, by its store and key, parents before children. Experiments that share a store share tasks.
    `chip`: what costs are seconds of."""
    jobs: dict[str, Job] = {}
    for tasks, context in work:
        setup, sizes = context.setup, Sizes.of(context.setup)
        store = setup.experiment.store_dir
        for task in ordered(tasks):
            if (key := f"{store}#{task.key}") not in jobs:
                parents = tuple(f"{store}#{parent.key}" for parent in task.parents)
                jobs[key] = Job(key, task, context, parents, task.cost(setup, sizes).seconds(chip))
    return jobs


class Frontier:
    """The jobs that are to be done. Of those that are ready, the one with the longest way to the end comes first.

    Attributes:
      left: neither done nor given up; way: seconds from a job's begin to the end of all that waits for it, if nothing else had to wait.
    """

    def __init__(self, jobs: Mapping[str, Job]):
        """Parents that are missing here are done, and hold nobody back."""
        self.jobs, self.left, self.way = jobs, set(jobs), dict[str, float]()
        self._waits_for = {key: {parent for parent in job.parents if parent in jobs} for key, job in jobs.items()}
        self._children: dict[str, list[str]] = {key: [] for key in jobs}
        for key, parents in self._waits_for.items():
            for parent in parents:
                self._children[parent].append(key)
        for key in reversed(list(jobs)):  # children come after parents
            self.way[key] = jobs[key].cost + max((self.way[child] for child in self._children[key]), default=0.0)
        self._order = {key: i for i, key in enumerate(sorted(jobs, key=lambda key: -self.way[key]))}
        self._ready = {key for key, parents in self._waits_for.items() if not parents}

    @property
    def ready(self) -> list[Job]:
        """What can be done now, first things first."""
        return [self.jobs[key] for key in sorted(self._ready, key=self._order.__getitem__)]

    def take(self, prefers: Callable[[Job], bool] = lambda job: True) -> Job | None:
        """The first ready job that is preferred, or else the first one; None if nothing is ready."""
        ready = self.ready
        job = next(filter(prefers, ready), ready[0] if ready else None)
        if job is not None:
            self._ready.remove(job.key)
        return job

    def give_back(self, key: str) -> None:
        """A job that was taken is ready again."""
        self._ready.add(key)

    def finish(self, key: str) -> None:
        """A job is done; what waited for it alone is ready."""
        self.left.discard(key)
        self._ready.discard(key)
        for child in self._children[key]:
            self._waits_for[child].discard(key)
            if not self._waits_for[child] and child in self.left:
                self._ready.add(child)

    def see(self) -> None:
        """Take note of everything that is done by now, whoever did it."""
        while done := [job.key for job in self.ready if job.done]:  # what becomes ready may be done already
            for key in done:
                self.finish(key)

    def give_up(self, key: str) -> list[Job]:
        """A job failed. Returns the jobs that will not be begun because they need it."""
        lost, stack = list[Job](), [key]
        self._ready.discard(key)
        while stack:
            if (key := stack.pop()) in self.left:
                self.left.discard(key)
                lost.append(self.jobs[key])
                stack += self._children[key]
        return lost[1:]
