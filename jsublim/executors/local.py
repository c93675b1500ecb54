"""This process: one task after the other, parents first. Other processes that share the store do what this one leaves."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import jax

from jsublim.pipeline.context import Context
from jsublim.pipeline.graph import Work, expected, ordered
from jsublim.pipeline.stage import Node, Task, tasks_of, with_parents
from jsublim.runtime.processes import heeding_signals, leave_if_asked, on_main_process, wait_until_seen


def execute_work(work: Sequence[Work]) -> None:
    """Experiments one after another, as `execute_tasks`."""
    for tasks, context in work:
        execute_tasks(tasks, context)


@heeding_signals()
def execute_tasks(tasks: Iterable[Task], context: Context) -> None:
    """Return when every task is whole; what one raises is raised, and what is whole stays. After a signal it is `Preempted`. Tasks of
    one kind share a progress bar, as they follow one another."""
    every = results_first(list(ordered(tasks)))
    mend(every, context)
    missing = [every[i] for i in on_main_process(lambda: _missing(every, context))]
    context.progress.expect(expected(missing, context.setup))
    while missing:
        leave_if_asked()
        task = _next(missing, context)
        execute(task, context)
        missing.remove(task)
        context.progress.left.forget(task.key)  # another process may have done it


def results_first(tasks: list[Task]) -> list[Task]:
    """The same order, but that whoever is no student is asked as soon as it is there: the first results come within a minute."""
    place = {task.key: float(number) for number, task in enumerate(tasks)}
    for task in tasks:
        if task.kind == "evaluations" and all(behind.kind != "students" for behind in with_parents([task]).values()):
            place[task.key] = max((place[parent.key] for parent in task.parents), default=-1.0) + 0.5
    return sorted(tasks, key=lambda task: place[task.key])


def execute_nodes(nodes: Iterable[Node], context: Context) -> None:
    """Make some artifacts, and what they need, in this process. Raises UsageError, JsublimError: what cannot be made,
    before anything is computed."""
    tasks = tasks_of(nodes).values()
    for task in tasks:
        task.check(context.setup)
    execute_tasks(tasks, context)


def _next(missing: list[Task], context: Context) -> Task:
    """The first task that can be done and that no other process is at; if there is none, the first: it is waited for."""
    if jax.process_count() > 1:
        return missing[0]  # the same one on all of them
    keys = {task.key for task in missing}
    ready = (task for task in missing if not any(parent.key in keys for parent in task.parents))
    return next((task for task in ready if not context.store.busy(task.outputs)), missing[0])


def _missing(tasks: Sequence[Task], context: Context) -> list[int]:
    """Which tasks are to be done, by their places."""
    return [i for i, task in enumerate(tasks) if not task.done(context.store)]


def mend(tasks: Iterable[Task], context: Context) -> None:
    """`Store.mend` of all that tasks leave."""
    context.store.mend([output for task in tasks for output in task.outputs])


def execute(task: Task, context: Context) -> None:
    """Do one task whose parents are done; nothing, if it is whole already. If another command is at it, wait for that one.
    Processes that work together do it together."""
    store = context.store
    if on_main_process(lambda: task.done(store)):
        return
    told = f"{task.kind} {task.label}: another process is making it; waiting"
    with store.locked(task.outputs, lambda: context.progress.say(told)):
        if not on_main_process(lambda: task.done(store)):
            with context.progress.stage(task.kind, task.units(context), task.label, task.key) as tick:
                task.make(context, tick)
    wait_until_seen((store.place(output), functools.partial(store.done, output)) for output in task.outputs)
