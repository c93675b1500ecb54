"""What students learn from: their sources' rows as they read them, what teachers say of those, and which of them each draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jsublim.chat import Turn
from jsublim.distill.data import read_turns
from jsublim.inference.scoring import answers_only
from jsublim.pipeline.arms import Source, Student
from jsublim.pipeline.changes import training_rows
from jsublim.pipeline.context import Context
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.targets import StoreTargets, targets_task, teacher_turns
from jsublim.pipeline.teachers import TeacherPool
from jsublim.pipeline.training import Drawn, TrainingData, draw


def sources_of(students: Sequence[Student]) -> tuple[Source, ...]:
    """Whose rows they learn from."""
    return tuple(dict.fromkeys(source for student in students for source in student.sources))


def targets_of(setup: Setup, source: Source, student: Student) -> StoreTargets | None:
    loss = student.settings.loss
    return None if loss.top_k is None else targets_task(setup, source, loss.top_k, loss.temperature)


def training_data(context: Context, source: Source, student: Student) -> TrainingData:
    """A source's rows as a student learns from them; tokenized once per process and reader."""
    setup, s, rows = context.setup, student.settings, training_rows(context.setup, source)
    name, lm = rows.called(source), context.lm(s.model)
    every = context.remember(("rows", rows.key), lambda: rows.read(context.store))
    fuse = setup.experiment.teachers.fuse_system
    tokenize: Callable[[], list[Turn]] = lambda: read_turns(lm.chat, every, name, s.system, fuse_system=fuse)  # noqa: E731
    data = TrainingData(every, context.remember(("turns", s.model, s.system, rows.key), tokenize), name)
    if not s.loss.soft:
        return data
    turns, task = teacher_turns(context, source), targets_of(setup, source, student)
    if task is None:
        teacher = TeacherPool(setup, source.elder).teacher(context, source.teacher)
        return dataclasses.replace(data, teacher=teacher, teacher_turns=turns)
    key = ("targets", task.key)
    targets = context.remember(key, lambda: task.read(context.store, turns))
    if s.loss.targets == "answers":
        targets = context.remember((*key, "answers"), lambda: answers_only(targets, turns))
    return dataclasses.replace(data, targets=targets)


def drawn_rows(context: Context, student: Student) -> Drawn:
    """A student's rows, drawn and masked by its seed; those after its fork behind them."""

    def of(source: Source) -> Drawn:
        data, tokens = training_data(context, source, student), student.tokens_of(source)
        return draw(context.lm(s.model), s, context.setup.recipe, data, tokens=tokens, seed=student.seed)

    s, then = student.settings, student.forked
    own = of(student.source)
    return own if then is None else own.forked(s, of(then))
