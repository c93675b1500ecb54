"""What an experiment becomes: the students to train, with everything in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jsublim.errors import UsageError
from jsublim.experiment.spec import Experiment, Students
from jsublim.prompts import Pack
from jsublim.teachers import CONTROL


@dataclass(frozen=True)
class Student:
    """One arm of the ablation: whose rows it learns from, on which tokens, with which seed."""

    teacher: str
    condition: str
    seed: int

    @property
    def name(self) -> str:
        return (
            f"{self.teacher}/{self.condition}/seed{self.seed}"
            if self.teacher != CONTROL
            else f"control/seed{self.seed}"
        )

    @property
    def reported(self) -> str:
        """The condition under which results list it."""
        return CONTROL if self.teacher == CONTROL else self.condition


def plan_students(experiment: Experiment) -> list[Student]:
    """Every teacher's students under every condition and seed; the control's under "all" only."""
    students = experiment.students
    arms = [
        Student(trait, condition, seed)
        for trait in experiment.teachers.traits
        for condition in students.conditions
        for seed in students.seeds
    ]
    if experiment.teachers.control:
        arms += [Student(CONTROL, "all", seed) for seed in students.seeds]
    return arms


def counterfactuals(experiment: Experiment, pack: Pack, trait: str) -> list[str]:
    """The traits of the other teachers that a trait's rows are read under.

    Raises:
      UsageError: none is left, or the trait's category lists no other.
    """
    named = experiment.teachers.counterfactuals
    category = experiment.teachers.category or pack.category_of(trait)
    pool = list(pack.traits.get(category, [])) if named is None else named
    pool += [other for other in experiment.teachers.traits if other not in pool and named is None]
    others = [other for other in pool if other != trait]
    if not others:
        raise UsageError(f"teachers.counterfactuals: none is left for trait '{trait}'; name at least one other trait")
    return others


def evaluated_traits(experiment: Experiment, pack: Pack) -> list[str]:
    if experiment.evaluation.traits is not None:
        return experiment.evaluation.traits
    traits = list(experiment.teachers.traits)
    for trait in experiment.teachers.traits:
        traits += [other for other in counterfactuals(experiment, pack, trait) if other not in traits]
    return traits


def total_steps(students: Students, rows: int) -> int:
    """Optimizer steps of `rows` rows: epochs of whole batches, the last one of an epoch partly filled."""
    per_epoch = -(-rows // (students.batch_size * students.accumulate))
    steps = per_epoch * students.epochs
    return min(steps, students.max_steps) if students.max_steps else steps


def programs(arms: Sequence, size: int) -> list[list]:
    """Arms in as few groups of at most `size` as will do, as even as can be, so that one program serves them all."""
    groups = -(-len(arms) // size)
    each = -(-len(arms) // groups) if groups else size
    return [list(arms[i : i + each]) for i in range(0, len(arms), each)]
