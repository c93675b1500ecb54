"""This process: one task after the other, parents first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from jsublim.pipeline.context import Context
from jsublim.pipeline.graph import ordered
from jsublim.pipeline.task import Task


class LocalExecutor:
    """Tasks of one kind share a progress bar, as they follow one another."""

    def execute(self, tasks: Iterable[Task], context: Context) -> None:
        """Return when every task is whole; what one raises is raised, and what is whole stays."""
        missing = [task for task in ordered(tasks) if not task.done(context.store)]
        context.progress.expect(Counter(task.kind for task in missing))
        for task in missing:
            execute(task, context)


def execute(task: Task, context: Context) -> None:
    """Do one task whose parents are done; nothing, if it is whole already."""
    if task.done(context.store):
        return
    with context.progress.stage(task.kind, task.units(context), task.label) as tick:
        task.make(context, tick)
