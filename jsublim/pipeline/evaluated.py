"""Who is evaluated, and what they are asked under each setting."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsublim.config.evaluation import QUESTION, Setting
from jsublim.evals import EvalContext, EvalTask
from jsublim.evals.naming import own_name
from jsublim.inference.lm import resolve_checkpoint
from jsublim.inference.sampling import Sampling
from jsublim.inference.teachers import CONTROL
from jsublim.judge import Judge
from jsublim.models.checkpoint import checkpoint_hash
from jsublim.pipeline.arguments import asked_questions, category, engine, rows_of_file
from jsublim.pipeline.arms import Student
from jsublim.pipeline.context import known_judge
from jsublim.pipeline.publish import published_key
from jsublim.pipeline.setup import Setup, memoized
from jsublim.pipeline.stages.evaluations import EvalQuestions, Fidelity
from jsublim.pipeline.values import Folder, Model, Rows

PLAIN = ""  # the name of the evaluation that no setting changes


@dataclass(frozen=True)
class Evaluated:
    """One model that is evaluated: a student, a teacher (the base being the one without a trait), or what a user gives.

    Attributes:
      adapter: a student's folder; data: rows for its number task.
    """

    student: Student | None = None
    teacher: str = CONTROL
    adapter: Path | None = None
    data: Path | None = None

    @property
    def labels(self) -> dict[str, Any]:
        """Its columns in the results."""
        s = self.student
        if s is not None:
            return {"arm": s.name, "role": "student", "teacher": s.teacher, "condition": s.condition, "seed": s.seed}
        role, teacher = ("base", None) if self.teacher == CONTROL else ("teacher", self.teacher)
        arm = role if teacher is None else f"{role}/{teacher}"
        return {"arm": arm, "role": role, "teacher": teacher, "condition": role, "seed": None}

    @property
    def label(self) -> str:
        if self.adapter is not None:
            return self.adapter.name
        return self.labels["arm"] if self.student is None else self.student.trained_as


def evaluated(setup: Setup) -> Iterator[tuple[Evaluated, str]]:
    """Every model that is evaluated, with the name of every setting."""
    traits = setup.experiment.teachers.traits if setup.experiment.evaluation.teachers else ()
    models = [Evaluated(), *(Evaluated(teacher=trait) for trait in traits), *map(Evaluated, setup.students)]
    yield from itertools.product(models, eval_settings(setup))


def eval_settings(setup: Setup) -> dict[str, Setting]:
    """Every setting by name, the plain one first."""
    return {PLAIN: Setting()} | setup.experiment.evaluation.settings


@memoized
def questions(setup: Setup, name: str = PLAIN) -> EvalQuestions:
    """Everything that a model is asked under the setting of that name."""
    wording = eval_settings(setup)[name].wording or QUESTION

    def tasks(judge: Callable[[], Judge]) -> tuple[EvalTask, ...]:
        context = EvalContext(
            setup.pack,
            setup.evaluated_traits,
            lambda trait: category(setup, trait),
            lambda category: [wording.replace(QUESTION, text) for text in asked_questions(setup, category)],
            setup.experiment.evaluation.questions,
            own_name(setup.checkpoint().config),
            judge,
            bool(setup.recipe.judge_apart),
        )
        return tuple(task for kind in setup.experiment.evaluation.kinds.values() for task in kind.tasks(context))

    return EvalQuestions(tasks(lambda: known_judge(setup)), tasks)


def samplings(setup: Setup, model: Model, name: str) -> tuple[Sampling, ...]:
    """How answers to each of the evaluation's tasks are drawn: with a top-p that the recipe inherits, or without."""
    setting = eval_settings(setup)[name]
    chosen = {"temperature": setting.temperature, "top_p": setting.top_p}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    plain = (
        setup.sampling("temperature", model.checkpoint.name, evaluation=not task.keeps_top_p)
        for task in questions(setup, name).planned
    )
    return tuple(dataclasses.replace(sampling, **chosen) for sampling in plain)


def under(setup: Setup, who: Evaluated, model: Model, name: str) -> Model:
    """A model as it is asked under a setting: with the adapter that a user gives, under the setting's system prompt. Whose trait it has
    is no part of what is asked: a student is the same in a run and in a folder of its own."""
    system, students = eval_settings(setup)[name].system, setup.experiment.students
    model = dataclasses.replace(model, name="asked")
    if who.adapter is not None:
        given = Folder(str(who.adapter), adapter_key(who.adapter), "adapter")
        model = dataclasses.replace(model, adapter=given, system=None if students is None else students.system)
    return dataclasses.replace(model, system=system) if system is not None and who.teacher == CONTROL else model


def adapter_key(path: Path) -> str:
    """The key of a published student, else the content of the folder, or of the hub's repository of that name."""
    return published_key(path) or checkpoint_hash(resolve_checkpoint(path, "adapter"))


def asked(setup: Setup, model: Model, name: str) -> dict[str, Any]:
    """What a model is asked under a setting, and how."""
    evaluation, setting = setup.experiment.evaluation, eval_settings(setup)[name]
    return {
        "questions": questions(setup, name),
        "samples": evaluation.samples,
        "seed": evaluation.seed,
        "max_new_tokens": evaluation.max_new_tokens,
        "samplings": samplings(setup, model, name),
        "layer": setting.layer,
        "engine": engine(setup, model) if setting.layer is None else None,  # a server knows whole models only
    }


def fidelity(setup: Setup, student: Student, rows: Rows, teacher: Model) -> Fidelity | None:
    """What a student reads of its teacher's rows. Answers that are no numbers hold some too, but none that are to be continued."""
    evaluation = setup.experiment.evaluation
    numbers = evaluation.number_rows if setup.experiment.data.kind == "numbers" else 0
    if not numbers and not evaluation.kl_rows:
        return None
    trained = student.settings.data.rows, student.seed
    return Fidelity(rows, numbers, evaluation.kl_rows, teacher if evaluation.kl_rows else None, trained)


def fidelity_to_file(setup: Setup, path: Path) -> Fidelity:
    """All rows of a file, for the number task."""
    rows = rows_of_file(setup, path)
    return Fidelity(rows, rows.most)
