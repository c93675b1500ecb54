"""The students of a run: what each learns from, who is trained with whom, and the training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsublim.chat import Turn
from jsublim.distill.arm import Arm, Settings
from jsublim.distill.data import Shape, read_turns
from jsublim.distill.memory import arms_that_fit
from jsublim.experiment import stages
from jsublim.experiment.corpus import Pair
from jsublim.experiment.plan import Student, distinct, programs, total_steps
from jsublim.experiment.spec import Students
from jsublim.experiment.store import Artifact, digest
from jsublim.experiment.students import Lesson, make_arm, shape_of
from jsublim.experiment.students import settings as settings_of
from jsublim.inference.scoring import Targets, answers_only
from jsublim.teachers import read_as

if TYPE_CHECKING:
    from jsublim.experiment.run import Run

Group = tuple[Path, list[Student]]  # where a program's state is kept while it trains, and its students


class Training:
    """Of one run, whose rows are there and whose students have their artifacts."""

    def __init__(self, run: Run):
        self.run = run
        # By the checkpoint and the system prompt that they are read with.
        self.turns: dict[tuple[str | None, str | None, Pair], list[Turn]] = {}
        self.teacher_turns: dict[Pair, list[Turn]] = {}
        self.targets: dict[str, list[Targets]] = {}  # by the key of their artifact

    def groups(self) -> list[Group]:
        """The programs that have something left to train."""
        return [group for company in self._companies() if (group := self._unfinished(company))]

    def steps(self, groups: Sequence[Group]) -> int:
        """Steps of all programs, each as long as its longest student."""
        return sum(max(self._steps(student) for student in students) for _, students in groups)

    def train(self, work: Path, students: list[Student], tick: stages.Tick) -> None:
        """One program."""
        # Made when their turn comes: a hundred students' adapters need not lie on the device together.
        how, shape, arms = self._prepare(students)
        members = [(arm, self.run.student_artifact(student)) for arm, student in zip(arms, students, strict=True)]
        lm = self.run.lm_of(students[0].settings)
        stages.train_students(lm, members, how, work, shape=shape, tick=tick)

    def _companies(self) -> list[list[Student]]:
        """Who is trained with whom. Of all students, whole ones too: a run that is continued finds the state it left."""
        run, size = self.run, self.run.arms[0].settings.arms_per_program
        arms = distinct(run.arms, lambda arm: run.student_artifact(arm).key)
        if size != "auto":
            return programs(arms, size)
        alike = programs(arms, len(arms))
        plan = run.store / "training" / f"fit-{digest([run.student_artifact(arm).key for arm in run.arms])}.json"
        if not plan.exists():  # what fits is measured once: a continued run must not be planned anew
            plan.parent.mkdir(parents=True, exist_ok=True)
            stages.write_json(plan, [self._fits(company) for company in alike])
        sizes = json.loads(plan.read_text(encoding="utf-8"))
        return [part for company, size in zip(alike, sizes, strict=True) for part in programs(company, size)]

    def _fits(self, company: list[Student]) -> int:
        largest = max(company, key=lambda student: student.settings.rank)  # ranks are padded to it
        settings, shape, (arm,) = self._prepare([largest])
        run, lm = self.run, self.run.lm_of(largest.settings)
        count = arms_that_fit(lm.config, lm.params, arm, settings, shape, most=len(company))
        run.console.print(f"{largest.reported}: {count} of {len(company)} students fit together")
        return count

    def _unfinished(self, company: list[Student]) -> Group | None:
        artifact = self.run.student_artifact
        work = self.run.store / "training" / digest([artifact(student).key for student in company])
        missing = [student for student in company if not artifact(student).done]
        return (work, company if (work / "state").exists() else missing) if missing else None

    def _steps(self, student: Student) -> int:
        rows = len(self.run.corpus.rows(student.pair))
        return total_steps(student.settings, min(rows, student.settings.rows or rows))

    def _prepare(self, students: list[Student]) -> tuple[Settings, Shape, list[Arm]]:
        run, e, shared = self.run, self.run.experiment, students[0].settings
        how = settings_of(
            shared, run.recipe, parallel=e.parallel, model_axis=e.model_axis,
            tensorboard=run.dir / "tensorboard" if shared.tensorboard else None,
        )  # fmt: skip
        # Of all students of this kind, not of this company alone: all their programs have one shape.
        pairs = dict.fromkeys(arm.pair for arm in run.arms if arm.program == students[0].program)
        lessons = {pair: self._lesson(pair, shared) for pair in pairs}
        shape = shape_of(shared, list(lessons.values()), e.data.max_new_tokens)
        arms = [
            make_arm(
                run.lm_of(shared), each.settings, run.recipe, lessons[each.pair], name=each.trained_as, condition=each.condition,
                seed=each.seed, max_new_tokens=e.data.max_new_tokens,
            )
            for each in students
        ]  # fmt: skip
        return how, shape, arms

    def _lesson(self, pair: Pair, students: Students) -> Lesson:
        """A teacher's rows as these students learn from them; tokenized once for all of them."""
        run, source = self.run, f"rows of {' · '.join(filter(None, pair))}"
        teacher, rows, lm = run.staff.teacher(pair[0]), run.corpus.rows(pair), run.lm_of(students)
        reader = students.model, students.system, pair
        if reader not in self.turns:
            self.turns[reader] = read_turns(
                lm.chat, rows, source, students.system, fuse_system=run.experiment.teachers.fuse_system
            )
        lesson = Lesson(rows, self.turns[reader], source)
        if students.loss == "hard":
            return lesson
        if pair not in self.teacher_turns:
            extra = bool(run.recipe.extra_bos)
            self.teacher_turns[pair] = read_as(run.lm.chat, teacher, rows, source, extra_bos=extra)
        turns = self.teacher_turns[pair]
        if students.top_k is None:
            return replace(lesson, teacher=teacher, teacher_turns=turns)
        artifact = self.targets_artifact(pair, students)
        if artifact.key not in self.targets:
            self.targets[artifact.key] = stages.stored_targets(
                artifact, run.lm, turns, teacher, top_k=students.top_k, temperature=students.temperature,
                batch_size=run.experiment.divergence.batch_size,
            )  # fmt: skip
        targets = self.targets[artifact.key]
        if students.targets == "answers":
            targets = answers_only(targets, turns)
        return replace(lesson, targets=targets)

    def targets_artifact(self, pair: Pair, students: Students) -> Artifact:
        """What the teacher of a pair said, cut to what these students need of it."""
        numbers = {"top_k": students.top_k, "temperature": students.temperature}
        inputs = self.run.common | self.run.staff.inputs(pair[0]) | numbers
        return self.run.artifact("targets", pair[0], inputs | {"rows": self.run.corpus.final(pair).key})
