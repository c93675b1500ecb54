"""A worker: a process that does any task of any experiment by its key, and keeps what it has loaded."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

from jsublim.config import Experiment
from jsublim.core.progress import Progress
from jsublim.errors import JsublimError
from jsublim.executors.frontier import checkpoint_of, in_one_line
from jsublim.executors.local import execute
from jsublim.pipeline.context import Context
from jsublim.pipeline.experiment import plan
from jsublim.pipeline.graph import Graph
from jsublim.pipeline.stage import Task
from jsublim.runtime.processes import Preempted, comes_true

SEEN_WITHIN = 60.0  # seconds until every machine must see what another one has left in the store


@dataclass(frozen=True)
class TaskOutcome:
    """How a task ended.

    Attributes:
      seconds: from its begin to its end, the reading of the checkpoint included.
      lines: for the user; error: why it failed, in one line; preempted: it was told to stop, and can be continued.
    """

    seconds: float
    lines: tuple[str, ...] = ()
    error: str | None = None
    preempted: bool = False


@dataclass
class Worker:
    """Experiments of one checkpoint share its weights; with the first task of another one they are let go. `folder`:
    where the command was given, for names of files that are relative to it."""

    folder: str
    _planned: dict[str, tuple[Context, Graph]] = field(default_factory=dict, repr=False)
    _checkpoint: Hashable = None

    def __post_init__(self) -> None:
        for name in ("absl", "orbax", "jax", "transformers"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # A machine that has no such folder needs none if all places are absolute, or URLs.
        if Path(self.folder).is_dir():
            os.chdir(self.folder)

    def where(self) -> str:
        """Machine and process, for people."""
        return f"{socket.gethostname()}, process {os.getpid()}"

    def make(self, experiment: Experiment, key: str) -> TaskOutcome:
        """Do one task whose parents are done. Whatever fails is told, not raised."""
        began, progress = time.perf_counter(), Progress()
        error, preempted = None, False
        try:
            context, graph = self._plan(experiment, progress)
            task = graph.task(key)
            if absent := [parent for parent in task.parents if not seen(parent, context)]:
                raise JsublimError(
                    f"{experiment.store_dir}: does not show {absent[0].kind} {absent[0].label}, which is done; all machines must "
                    "share the store"
                )
            execute(task, context)
        except Preempted as stopped:
            error, preempted = str(stopped), True
        except Exception as failed:
            error = f"{in_one_line(failed)} (on {socket.gethostname()})"
        return TaskOutcome(time.perf_counter() - began, tuple(progress.lines), error, preempted)

    def _plan(self, experiment: Experiment, progress: Progress) -> tuple[Context, Graph]:
        """The context and the graph of an experiment, made once."""
        if checkpoint_of(experiment) != self._checkpoint:
            self._planned.clear()
            self._checkpoint = checkpoint_of(experiment)
        name = experiment.model_dump_json()
        if name not in self._planned:
            context = Context.load(experiment, progress)
            for other, _ in self._planned.values():
                context = context.sharing(other)
            self._planned[name] = context, plan(context.setup)
        context, graph = self._planned[name]
        return dataclasses.replace(context, progress=progress), graph


def seen(task: Task, context: Context) -> bool:
    """Whether what a task left can be seen here, now or soon."""
    return comes_true(lambda: task.done(context.store), SEEN_WITHIN)
