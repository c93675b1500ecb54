"""What an experiment becomes: the students to train, with everything in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jsublim.distill.data import steps_per_epoch
from jsublim.errors import UsageError
from jsublim.experiment.spec import Experiment, Students, variants
from jsublim.experiment.spec.data import Dataset
from jsublim.prompts import Pack
from jsublim.teachers import CONTROL


@dataclass(frozen=True)
class Student:
    """One arm of the ablation: whose rows it learns from, on which tokens, with which seed, under which settings."""

    teacher: str
    condition: str
    seed: int
    variant: str = ""
    settings: Students = field(default_factory=Students, compare=False)

    @property
    def name(self) -> str:
        kind = (CONTROL,) if self.teacher == CONTROL else (self.teacher, self.condition)
        return "/".join([*kind, *([self.variant] if self.variant else []), f"seed{self.seed}"])

    @property
    def trained_as(self) -> str:
        """The name it is trained under: control students of several variants that differ in nothing are one."""
        return f"{CONTROL}/seed{self.seed}" if self.teacher == CONTROL else self.name

    @property
    def pair(self) -> tuple[str, str | None]:
        """The rows it learns from: their teacher, and the data set (None: the answers as they are)."""
        return self.teacher, self.settings.data

    @property
    def reported(self) -> str:
        """The condition under which results list it."""
        condition = CONTROL if self.teacher == CONTROL else self.condition
        return f"{condition} · {self.variant}" if self.variant else condition

    @property
    def program(self) -> str:
        """What it shares with students that it can be trained beside, as text: what the compiled step depends on."""
        s = self.settings
        static = (
            "model", "system", "max_tokens", "method", "layers", "projections", "ends", "init_adapter", "loss", "temperature",
            "top_k", "targets", "on_policy", "optimizer", "momentum", "schedule", "restarts", "warmup", "clip", "weight_decay",
        )  # fmt: skip
        return repr([getattr(s, name) for name in static] + [s.kl_to_base > 0])


def plan_students(experiment: Experiment) -> list[Student]:
    """Every teacher's students under every condition and seed, variant by variant; the control's under "all" only, and but
    once where no variant changes anything for them."""
    arms, every = [], variants(experiment.students) if experiment.students else {}
    controls = {name: _of_control(experiment, students) for name, students in every.items()}
    alike = len({repr(settings) for settings in controls.values()}) == 1
    for number, (name, students) in enumerate(every.items()):
        arms += [
            Student(trait, condition, seed, name, students)
            for trait in experiment.teachers.traits
            for condition in students.conditions
            for seed in students.seeds
        ]
        if experiment.teachers.control and not (alike and number):
            variant, settings = "" if alike else name, controls[name]
            arms += [Student(CONTROL, "all", seed, variant, settings) for seed in settings.seeds]
    return arms


def as_planned(arm: Student) -> Hashable:
    """What tells students apart before there are any rows."""
    return arm.trained_as, repr(arm.settings)


def distinct(arms: Sequence[Student], identity: Callable[[Student], Hashable] = as_planned) -> list[Student]:
    """The first of those that are one and the same under several variants' names."""
    first: dict[Hashable, Student] = {}
    for arm in arms:
        first.setdefault(identity(arm), arm)
    return list(first.values())


def _of_control(experiment: Experiment, students: Students) -> Students:
    """The same settings without what means nothing to a student of the teacher without a trait."""
    names = ("conditions", "points", "points_share", "by_margin")
    update: dict[str, Any] = {
        name: Students.model_fields[name].get_default(call_default_factory=True) for name in names
    }
    changed = Dataset() if students.data is None else experiment.datasets[students.data].of(CONTROL)
    if changed.plain and changed.strategy in (None, experiment.teachers.strategy):
        update["data"] = None
    return students.model_copy(update=update)


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
    for trait in experiment.teachers.traits if experiment.teachers.against == "traits" else ():
        traits += [other for other in counterfactuals(experiment, pack, trait) if other not in traits]
    return traits


def total_steps(students: Students, rows: int) -> int:
    """Optimizer steps of `rows` rows: epochs of whole batches, the last one of an epoch partly filled."""
    steps = steps_per_epoch(rows, students.batch_size * students.accumulate) * students.epochs
    return min(steps, students.max_steps) if students.max_steps else steps


def programs(arms: Sequence[Student], size: int) -> list[list[Student]]:
    """Students in groups that train together: alike in what is compiled, at most `size`, as few and even as can be."""
    alike: dict[str, list[Student]] = {}
    for arm in arms:
        alike.setdefault(arm.program, []).append(arm)
    groups = []
    for members in alike.values():
        each = -(-len(members) // -(-len(members) // size))
        groups += [members[i : i + each] for i in range(0, len(members), each)]
    return groups
