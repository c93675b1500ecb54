"""Several graphs as one, and what of it can be done now: what every executor with more than one worker asks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from jsublim.config import Experiment
from jsublim.errors import JsublimError, one_line
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Sizes
from jsublim.pipeline.graph import ordered
from jsublim.pipeline.stage import Task
from jsublim.runtime.chips import CHIPS, Chip

Work = tuple[Iterable[Task], Context]  # tasks of one experiment, and what they are done with


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
      key: of the task in its store; parents: keys of nodes; cost: seconds on one chip, under assumed lengths.
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
        """As `checkpoint_of`."""
        return checkpoint_of(self.context.setup.experiment)


def merged(work: Sequence[Work], chip: Chip = CHIPS["h100"]) -> dict[str, Job]:
    """Every task once, by its store and key, parents before children. Experiments that share a store share tasks.

    Args:
      chip: what costs are seconds of.
    """
    found: dict[str, Job] = {}
    for tasks, context in work:
        setup, sizes = context.setup, Sizes.of(context.setup)
        for task in ordered(tasks):
            key = _key(context, task)
            if key not in found:
                parents = tuple(_key(context, parent) for parent in task.parents)
                found[key] = Job(key, task, context, parents, task.cost(setup, sizes).seconds(chip))
    return found


def _key(context: Context, task: Task) -> str:
    return f"{context.setup.experiment.store_dir}#{task.key}"


class Frontier:
    """The tasks that are to be done. Of those that are ready, the one with the longest way to the end comes first."""

    def __init__(self, nodes: Mapping[str, Job]):
        """Of `nodes`, those that are not in `nodes` are done: parents that are missing here hold nobody back."""
        self.nodes = nodes
        self.left = set(nodes)  # neither done nor given up
        self.children: dict[str, list[str]] = {key: [] for key in nodes}
        self._missing = {key: {parent for parent in node.parents if parent in nodes} for key, node in nodes.items()}
        for key, parents in self._missing.items():
            for parent in parents:
                self.children[parent].append(key)
        self.way: dict[
            str, float
        ] = {}  # seconds from a task's begin to the end of all that waits for it, if nothing else had to wait
        for key in reversed(list(nodes)):  # children come after parents
            self.way[key] = nodes[key].cost + max((self.way[child] for child in self.children[key]), default=0.0)
        self._order = {key: i for i, key in enumerate(sorted(nodes, key=lambda key: -self.way[key]))}
        self._ready = {key for key, parents in self._missing.items() if not parents}

    @property
    def ready(self) -> list[Job]:
        """What can be done now, first things first."""
        return [self.nodes[key] for key in sorted(self._ready, key=self._order.__getitem__)]

    def take(self, prefers: Callable[[Job], bool] = lambda node: True) -> Job | None:
        """The first ready task that is preferred, or else the first one; None if nothing is ready."""
        ready = self.ready
        node = next((node for node in ready if prefers(node)), ready[0] if ready else None)
        if node is not None:
            self.remove(node.key)
        return node

    def remove(self, key: str) -> None:
        """A ready task is at somebody's now."""
        self._ready.remove(key)

    def give_back(self, key: str) -> None:
        """A task that was taken is ready again."""
        self._ready.add(key)

    def finish(self, key: str) -> None:
        """A task is done; what waited for it alone is ready."""
        self.left.discard(key)
        for child in self.children[key]:
            self._missing[child].discard(key)
            if not self._missing[child] and child in self.left:
                self._ready.add(child)

    def see(self) -> None:
        """Take note of everything that is done by now, whoever did it."""
        while done := [node.key for node in self.ready if node.done]:  # what becomes ready may be done already
            for key in done:
                self.remove(key)
                self.finish(key)

    def give_up(self, key: str) -> list[Job]:
        """A task failed. Returns the tasks that will not be begun because they need it."""
        lost, stack = [], [key]
        while stack:
            each = stack.pop()
            if each in self.left:
                self.left.discard(each)
                lost.append(self.nodes[each])
                stack += self.children[each]
        return lost[1:]
