"""What students are trained with beside their own settings, so that a trait is not learned: directions that no gradient has, and
adapters that stand beside them."""

from __future__ import annotations

from typing import Any

from jsublim.distill.projection import orthonormal
from jsublim.errors import UsageError
from jsublim.models.lora import Adapter, Trainable
from jsublim.models.peft import load_adapter
from jsublim.parallel import Layout
from jsublim.pipeline.arms import Student
from jsublim.pipeline.context import Context
from jsublim.pipeline.directions import directions_of, questions_about, start_inputs
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.store import digest
from jsublim.pipeline.task import Task
from jsublim.pipeline.teachers import TeacherPool
from jsublim.teachers import OWN


def defence_inputs(setup: Setup, student: Student) -> dict[str, Any]:
    """What it adds to a student's key, of what its settings only name."""
    found: dict[str, Any] = {}
    traits = projected_out(student)
    if traits:
        extra_bos = bool(setup.recipe.extra_bos)
        found["projected out"] = {"asked": questions_about(setup, traits), "extra_bos": extra_bos}
    if student.beside is not None:
        found["beside"] = _beside_key(setup, student.beside)
    return found


def check_defences(setup: Setup, student: Student) -> None:
    """Refuse what cannot be made.

    Raises:
      UsageError: a trait of no category, an adapter that a teacher has not, or that doesn't fit.
    """
    questions_about(setup, projected_out(student))
    name, config = student.beside, setup.checkpoint(student.settings.model).config
    if name is None:
        return
    if name not in setup.biased:
        load_adapter(name, config)
    elif _beside_key(setup, name) is None:
        raise UsageError(
            f"students.adapter.beside: teacher '{name}' has no adapter; give teachers.taught or teachers.adapter, or name a folder"
        )
    elif config != setup.checkpoint().config:
        raise UsageError(
            f"students.adapter.beside: the adapter of teacher '{name}' is of another architecture than students.model; name a folder"
        )


def projected_out(student: Student) -> list[str]:
    """The traits whose directions its gradients are kept at right angles to."""
    named = student.settings.optimizer.project_out
    return list(dict.fromkeys(student.teacher if trait == OWN else trait for trait in named))


def away(context: Context, student: Student, start: Adapter) -> Trainable | None:
    """Those directions, as `Arm.projected_directions` has them; None without any."""
    traits, setup, s = projected_out(student), context.setup, student.settings
    if not traits:
        return None

    def make() -> Trainable:
        found = directions_of(setup, context.lm(s.model), start, s, questions_about(setup, traits), traits)
        return orthonormal(Layout.host(found))

    about = digest({"traits": traits} | start_inputs(setup, s, student.seed))  # students of one start share them
    return context.remember(("away", about), make)


def _beside_key(setup: Setup, name: str) -> str | None:
    """What decides an adapter that stands beside students; None of a teacher that has none."""
    if name in setup.biased:
        return TeacherPool(setup).identity(name).get("adapter")
    return setup.content(name, "students.adapter.beside")


def beside_tasks(setup: Setup, student: Student) -> tuple[Task, ...]:
    """The tasks that make it."""
    return TeacherPool(setup).tasks(student.beside) if student.beside in setup.biased else ()


def beside_kind(setup: Setup, student: Student) -> str | None:
    """Equal for adapters that have one structure, so that their students can be trained together; None without any."""
    taught = student.beside in setup.biased and setup.experiment.teachers.taught is not None
    return "taught" if taught else student.beside


def beside(context: Context, student: Student) -> Adapter | None:
    """The adapter that stands beside a student, as `Arm.frozen_adapter` has it; None without any."""
    name, setup = student.beside, context.setup
    if name is None:
        return None
    if name in setup.biased:
        return TeacherPool(setup).teacher(context, name).adapter
    config = setup.checkpoint(student.settings.model).config
    return context.remember(("beside", student.settings.model, name), lambda: load_adapter(name, config))
