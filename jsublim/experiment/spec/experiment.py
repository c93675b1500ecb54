"""A whole experiment."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from jsublim.experiment.spec.attribution import Attribution
from jsublim.experiment.spec.base import Config, Positive
from jsublim.experiment.spec.data import Data, Dataset, Scoring
from jsublim.experiment.spec.evaluation import Evaluation, JudgeChoice
from jsublim.experiment.spec.recipe import Recipe
from jsublim.experiment.spec.students import Students, variants
from jsublim.experiment.spec.teachers import Teachers


class Experiment(Config):
    """A whole experiment: one checkpoint, teachers, students, evaluations, a report."""

    kind: Literal["language"] = "language"
    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    parallel: Literal["none", "pmap", "mesh"] = "none"  # how training is spread over the devices
    model_axis: Positive = 1  # with mesh: devices that one copy of the checkpoint is spread over
    prompts: str | None = None  # a prompt pack; None: the default one
    recipe: Recipe = Recipe()
    teachers: Teachers
    data: Data = Data()
    datasets: dict[str, Dataset] = {}  # by the names that students.data says
    divergence: Scoring = Scoring()
    students: Students | None = Students()  # null: none are trained
    evaluation: Evaluation = Evaluation()
    attribution: Attribution | None = None
    judge: JudgeChoice | None = None  # who scores answers for misalignment

    @model_validator(mode="after")
    def _names_are_known(self) -> Experiment:
        for name, students in variants(self.students).items() if self.students else ():
            if students.data is not None and students.data not in self.datasets:
                where = f"arm '{name}': " if name else ""
                known = ", ".join(self.datasets) or "none"
                raise ValueError(f"students.data: {where}'{students.data}' is no data set; datasets has {known}")
            if self.teachers.checkpoint is not None and students.loss != "hard" and students.top_k is None:
                raise ValueError(
                    "students.top_k: a live teacher shares the students' checkpoint; with teachers.checkpoint, give it"
                )
        if self.attribution is not None and not (self.teachers.are_prompted and self.teachers.against == "traits"):
            raise ValueError("attribution: patches one trait's system prompt for another's; the teachers have none")
        if self.attribution is not None and self.teachers.own_weights:
            raise ValueError("attribution: the teachers differ in more than their prompts; leave their own weights out")
        judged = [name for name, each in self.datasets.items() if each.keep_aligned is not None]
        if self.judge is None and (judged or "misalignment" in self.evaluation.kinds):
            raise ValueError(
                f"judge: {f'datasets.{judged[0]}' if judged else 'evaluation.kinds'} needs one; give judge.model"
            )
        return self
