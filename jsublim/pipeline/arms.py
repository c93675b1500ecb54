"""The students of an experiment, with everything in which they differ. A pure function of the config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from jsublim.config import Dataset, Experiment, Students, elders, variants
from jsublim.core.section import NEEDS_TRAIT, with_defaults
from jsublim.distill.batches import steps_per_epoch
from jsublim.inference.sampling import seed_within
from jsublim.inference.teachers import CONTROL, OWN


class Parent(NamedTuple):
    """Students of the generation before, one per trait, who write rows in their teachers' stead."""

    arm: str
    tokens: str
    seed: int

    @property
    def group(self) -> str:
        """Those of all seeds."""
        return "/".join(filter(None, [self.tokens, self.arm]))

    def __str__(self) -> str:
        return f"by student {self.group}/seed{self.seed}"


class Source(NamedTuple):
    """Where a student's rows come from: a teacher, a data set of the config (None: the answers as they are), the draw that
    was made for a student's seed (None: the one that all share), and the student that stands in for the teacher (None: nobody)."""

    teacher: str
    dataset: str | None = None
    draw: int | None = None
    parent: Parent | None = None

    @property
    def name(self) -> str:
        drawn = None if self.draw is None else f"drawn for seed {self.draw}"
        return " · ".join(filter(None, [self.teacher, self.dataset, drawn, self.parent and str(self.parent)]))


class Writer(NamedTuple):
    """Who writes rows, and how: a teacher, a strategy, the seed of the sampling, another checkpoint than the experiment's,
    the draw that the rows are of, and the students that stand in for the teachers."""

    teacher: str
    strategy: str
    seed: int
    model: str | None = None
    draw: int | None = None
    parent: Parent | None = None


def seed_of(seed: int, draw: int | None) -> int:
    """What a seed of the config (`data.seed`, say) is in a draw: another one, of 31 bits, in each."""
    return seed if draw is None else seed_within(seed, draw)


@dataclass(frozen=True)
class Student:
    """One student: whose rows it learns from, on which tokens, with which seed, under which arm of the ablation. Of a later
    generation, `parent` is the arm whose students write its rows."""

    teacher: str
    tokens: str
    seed: int
    arm: str = ""
    draw: int | None = None
    settings: Students = field(default_factory=Students, compare=False)
    parent: str | None = None

    @property
    def name(self) -> str:
        kind = (CONTROL,) if self.teacher == CONTROL else (self.teacher, self.tokens)
        return "/".join([*kind, *([self.arm] if self.arm else []), f"seed{self.seed}"])

    @property
    def trained_as(self) -> str:
        """The name it is trained under: control students of several arms that differ in nothing are one."""
        return f"{CONTROL}/seed{self.seed}" if self.teacher == CONTROL else self.name

    @property
    def source(self) -> Source:
        parent = None if self.parent is None else Parent(self.parent, self.tokens, self.seed)
        return Source(self.teacher, self.settings.data.dataset, self.draw, parent)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where its rows come from; a second one is for after its fork."""
        fork = self.settings.fork
        if fork is None:
            return (self.source,)
        return self.source, Source(fork.teacher.replace(OWN, self.teacher), fork.dataset, self.draw)

    def tokens_of(self, source: Source) -> str:
        """Which tokens of a source's rows it learns: rows of the control have no divergence tokens."""
        return "all" if source.teacher == CONTROL else self.tokens

    @property
    def frozen_adapter(self) -> str | None:
        """The adapter that is added to it in training: a teacher's trait, or a place."""
        named = self.settings.adapter.frozen_adapter
        return None if named is None else named.replace(OWN, self.teacher)

    @property
    def condition(self) -> str:
        """The condition under which results list it."""
        tokens = CONTROL if self.teacher == CONTROL else self.tokens
        return f"{tokens} · {self.arm}" if self.arm else tokens


def plan_students(experiment: Experiment) -> list[Student]:
    """Every teacher's students on all kinds of tokens and with all seeds, arm by arm; the control's on all tokens only, and
    once only where no arm changes anything for them."""
    planned, every = [], variants(experiment.students) if experiment.students else {}
    controls = {name: _of_control(experiment, students) for name, students in every.items()}
    alike, before = len({repr(settings) for settings in controls.values()}) == 1, elders(every)
    drawn: Callable[[int], int | None] = lambda seed: seed if experiment.data.draw == "per-seed" else None  # noqa: E731
    for number, (name, students) in enumerate(every.items()):
        planned += [
            Student(trait, tokens, seed, name, drawn(seed), students, before.get(name))
            for trait in experiment.teachers.traits
            for tokens in students.loss.tokens
            for seed in students.seeds
        ]
        if experiment.teachers.control and not (alike and number):
            arm, own, parent = "" if alike else name, controls[name], before.get(name)
            planned += [Student(CONTROL, "all", seed, arm, drawn(seed), own, parent) for seed in own.seeds]
    return planned


def _of_control(experiment: Experiment, students: Students) -> Students:
    """The same settings without what means nothing to a student of the teacher without a trait."""
    settings, name = with_defaults(students, NEEDS_TRAIT), students.data.dataset
    adapter, optimizer = settings.adapter, settings.optimizer
    if OWN in (adapter.frozen_adapter or ""):
        adapter = adapter.model_copy(update={"frozen_adapter": None})
    others = [trait for trait in optimizer.project_out if trait != OWN]
    optimizer = optimizer.model_copy(update={"project_out": others})
    settings = settings.model_copy(update={"adapter": adapter, "optimizer": optimizer})
    changed = Dataset() if name is None else experiment.datasets[name].of(CONTROL)
    same = changed.sampling.strategy in (None, experiment.sampling.strategy)
    if changed.plain and same and changed.sampling.seed in (None, experiment.sampling.seed):
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"dataset": None})})
    return settings


def total_steps(students: Students, rows: int) -> int:
    """Optimizer steps of `rows` rows: epochs of whole batches, the last one of an epoch partly filled."""
    data = students.data
    steps = steps_per_epoch(rows, data.batch_size * data.accumulate) * data.epochs
    return min(steps, data.max_steps) if data.max_steps else steps
