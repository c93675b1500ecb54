"""What students are trained with beside their own settings, so that a trait is not learned: directions that no gradient has."""

from __future__ import annotations

from typing import Any

from jsublim.config.students import OWN
from jsublim.distill.projection import orthonormal
from jsublim.models.lora import Adapter, Trainable
from jsublim.parallel import Layout
from jsublim.pipeline.arms import Student
from jsublim.pipeline.context import Context
from jsublim.pipeline.directions import directions_of, questions_about
from jsublim.pipeline.setup import Setup


def defence_inputs(setup: Setup, student: Student) -> dict[str, Any]:
    """What it adds to a student's key, of what its settings only name."""
    found: dict[str, Any] = {}
    traits = projected_out(student)
    if traits:
        asked = [[list(questions), own] for questions, own in questions_about(setup, traits)]
        found["projected out"] = {"asked": asked, "extra_bos": bool(setup.recipe.extra_bos)}
    return found


def check_defences(setup: Setup, student: Student) -> None:
    """Refuse what cannot be made.

    Raises:
      UsageError: a trait of no category.
    """
    questions_about(setup, projected_out(student))


def projected_out(student: Student) -> list[str]:
    """The traits whose directions its gradients are kept at right angles to."""
    named = student.settings.optimizer.project_out
    return list(dict.fromkeys(student.teacher if trait == OWN else trait for trait in named))


def away(context: Context, student: Student, start: Adapter) -> Trainable | None:
    """Those directions, as `Arm.away` has them; None without any."""
    traits, setup, s = projected_out(student), context.setup, student.settings
    if not traits:
        return None

    def make() -> Trainable:
        found = directions_of(setup, context.lm(s.model), start, s, questions_about(setup, traits), traits)
        return orthonormal(Layout.host(found))

    seed = student.seed if s.adapter.method == "lora" else None  # all others start at one place
    about = s.model, s.system, s.asked_under_system, s.adapter.model_dump_json(), seed, tuple(traits)
    return context.remember(("away", *about), make)
