"""Lineages: students that write the rows of the next generation (`students.data.generation`), in their teachers' stead."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from jsublim.errors import JsublimError, UsageError
from jsublim.models.peft import load_adapter
from jsublim.pipeline.arms import Elder, Student
from jsublim.pipeline.context import Context
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.students import diverged, student_output, task_of
from jsublim.pipeline.task import Task, distinct_tasks
from jsublim.pipeline.teachers import own_weights
from jsublim.teachers import CONTROL, Teacher


def elder_student(setup: Setup, elder: Elder, name: str) -> Student:
    """The student of a trait (or of the control) among those that write the next generation's rows.

    Raises:
      UsageError: there is none of that trait.
    """
    for student in setup.students:
        alike = student.tokens == elder.tokens or name == CONTROL
        if student.teacher == name and student.arm == elder.arm and student.seed == elder.seed and alike:
            return student
    where = f"arm '{elder.arm}'" if elder.arm else "the first generation"
    hint = "set teachers.control=true" if name == CONTROL else "leave it out of teachers.counterfactuals"
    raise UsageError(
        f"students.data.generation: '{name}' has no student in {where} that could be a teacher of the next generation; {hint}"
    )


def elder_identity(setup: Setup, student: Student) -> dict[str, Any]:
    """What decides how it reads a row and what it writes."""
    return {
        "system": student.settings.asked_under,
        "fuse_system": setup.experiment.teachers.fuse_system and student.settings.asked_under is not None,
        "extra_bos": bool(setup.recipe.extra_bos),
        "template": setup.checkpoint().template,
        "student": student_output(setup, student).key,
    }


def elder_tasks(setup: Setup, students: Sequence[Student]) -> tuple[Task, ...]:
    """The tasks that train them."""
    return distinct_tasks([task_of(setup, student) for student in students])


def elder_teacher(context: Context, student: Student) -> Teacher:
    """A student as somebody who can be asked for rows; under the system prompt that it is evaluated under.

    Raises:
      JsublimError: its numbers stopped being finite in training.
    """
    setup, output = context.setup, student_output(context.setup, student)
    lost = diverged(context.store, output)
    if lost is not None:
        raise JsublimError(f"{student.name}: diverged {lost}, so it is no teacher; lower students.optimizer.lr")
    system, fuse = student.settings.asked_under, setup.experiment.teachers.fuse_system
    teacher = Teacher(student.teacher, system, fuse_system=fuse)
    folder, config = context.store.path(output), setup.checkpoint().config
    if student.settings.adapter.method == "full":
        load = functools.partial(own_weights, context, lambda: folder, output.key)
        return dataclasses.replace(teacher, params=load)
    adapter = context.remember(("elder's adapter", output.key), functools.partial(load_adapter, folder, config))
    return dataclasses.replace(teacher, adapter=adapter)
