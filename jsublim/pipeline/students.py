"""Students: what decides each, who is trained together, and the training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp

from jsublim.config import Students
from jsublim.config.students import StudentAdapter
from jsublim.distill.arm import Arm, Settings
from jsublim.distill.batches import Shape, packed
from jsublim.distill.cost import training_flops
from jsublim.distill.loggers import Logs, check_loggers
from jsublim.distill.memory import arms_that_fit, rows_at_once
from jsublim.distill.metrics import last_loss
from jsublim.errors import UsageError
from jsublim.inference.batching import PREFIX_STEP, shared_beginning
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import abstract_params
from jsublim.models.lora import Adapter
from jsublim.parallel import device_bytes
from jsublim.pipeline.arms import Student, distinct, split_evenly, total_steps
from jsublim.pipeline.changes import training_rows
from jsublim.pipeline.context import Context
from jsublim.pipeline.defences import (
    away,
    beside,
    beside_kind,
    beside_tasks,
    check_defences,
    defence_inputs,
    projected_out,
)
from jsublim.pipeline.learned import drawn_rows, sources_of, targets_of, training_data
from jsublim.pipeline.rows import answer_tokens, rows_kept
from jsublim.pipeline.setup import Setup, memoized
from jsublim.pipeline.store import Output, Store, digest
from jsublim.pipeline.task import Cost, Sizes, Task, distinct_tasks
from jsublim.pipeline.teachers import TeacherPool
from jsublim.pipeline.training import (
    caches_below,
    check_start,
    in_pieces,
    make_arm,
    program_of,
    settings_of,
    shape_of,
    start_adapter,
    train_students,
)
from jsublim.processes import on_main_process
from jsublim.progress import Tick
from jsublim.section import identity

MOST_TOGETHER = 16  # students of a task, where how many fit decides: a task is one machine's, and others wait for work


@memoized
def student_output(setup: Setup, student: Student) -> Output:
    """Where a student lies once it is trained. It does not depend on who is trained beside it."""
    settings, e = student.settings, setup.experiment
    start = settings.adapter.init
    inputs = setup.common | {
        "rows": training_rows(setup, student.source).key,
        "tokens": student.tokens,
        "seed": student.seed,
        "teacher": TeacherPool(setup, student.source.elder).identity(student.teacher) if settings.loss.soft else None,
        "student_model": None if settings.model is None else setup.checkpoint(settings.model).hash,
        "students": identity(settings),
        "fuse_system": e.teachers.fuse_system if settings.system is not None else None,
        "max_new_tokens": e.sampling.max_new_tokens if settings.data.on_policy else None,
        "recipe": setup.recipe.of("students", settings),
        "init": None if start is None else setup.content(start, "students.adapter.init"),
    }
    if student.forked is not None:
        inputs["rows after the fork"] = training_rows(setup, student.forked).key
    return Output("students", student.trained_as, inputs | defence_inputs(setup, student))


def abstract_start(setup: Setup, student: Student) -> Adapter:
    """Shapes of what a student trains."""
    return _abstract_start(setup, student.settings.model, student.settings.adapter.model_dump_json())


@memoized
def _abstract_start(setup: Setup, model: str | None, adapter: str) -> Adapter:
    """Made once for all students that train the same: a graph has hundreds of students, and few kinds of them."""
    config = setup.checkpoint(model).config
    how = Students(adapter=StudentAdapter.model_validate_json(adapter))
    params = abstract_params(config, setup.experiment.dtype)
    return jax.eval_shape(lambda params: start_adapter(config, params, how, 0), params)


def compiled(setup: Setup, student: Student) -> Hashable:
    """The program that a student is trained by: equal for students that can be trained in one.

    Static arguments of the step, the structure of what is trained (ranks are padded to the largest, so they are left out),
    and what a batch consists of.
    """
    s, checkpoint = student.settings, setup.checkpoint(student.settings.model)
    trained = _structure(setup, s.model, s.adapter.model_dump_json())
    batch = (
        s.data.batch_size,
        s.data.accumulate,
        s.data.max_tokens,
        s.data.on_policy,
        s.loss.top_k,
        caches_below(checkpoint.config, s),
    )
    more = bool(projected_out(student)), beside_kind(setup, student), s.fork is not None
    return checkpoint.hash, s.system, program_of(s, setup.recipe), batch, trained, more


@memoized
def _structure(setup: Setup, model: str | None, adapter: str) -> Hashable:
    start = _abstract_start(setup, model, adapter)
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda start: start.with_rank(1), start))
    return str(structure), tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def training_tasks(setup: Setup) -> tuple[TrainStudents, ...]:
    """The tasks that train every student."""
    generations = sorted({student.settings.data.generation for student in setup.students})
    return tuple(task for each in generations for task in _generation(setup, each))


@memoized
def _generation(setup: Setup, generation: int) -> tuple[TrainStudents, ...]:
    """All students of a generation in groups that train together: those of one program, at most `arms_per_program`, as few groups
    and as even ones as can be. With "auto", how many of a group fit is found when they are trained."""
    members = [student for student in setup.students if student.settings.data.generation == generation]
    programs: dict[Hashable, list[Student]] = {}
    for student in distinct(members, lambda student: student_output(setup, student).key):
        programs.setdefault(compiled(setup, student), []).append(student)
    tasks = []
    for members in programs.values():
        most = members[0].settings.runtime.arms_per_program
        groups = split_evenly(members, MOST_TOGETHER if most == "auto" else most)
        tasks += [training_task(setup, tuple(group), tuple(members)) for group in groups]
    return tuple(tasks)


def training_task(setup: Setup, members: tuple[Student, ...], everyone: tuple[Student, ...]) -> TrainStudents:
    sources = sources_of(everyone)
    parents = [part for source in sources for part in training_rows(setup, source).parts]
    for student in members:
        if student.settings.loss.soft:
            parents += TeacherPool(setup, student.source.elder).tasks(student.teacher)
        parents += beside_tasks(setup, student)
    targets = [targets_of(setup, source, members[0]) for source in sources]
    parents += [task for task in targets if task is not None]
    outputs = tuple(student_output(setup, student) for student in members)
    return TrainStudents(outputs, distinct_tasks(parents), members, everyone)


@memoized
def task_of(setup: Setup, student: Student) -> Task:
    """The task that a student is trained by."""
    return _tasks_by_student(setup, student.settings.data.generation)[student_output(setup, student).key]


@memoized
def _tasks_by_student(setup: Setup, generation: int) -> dict[str, Task]:
    return {output.key: task for task in _generation(setup, generation) for output in task.outputs}


@dataclass(frozen=True, eq=False)
class TrainStudents(Task):
    """Students of one program, trained together; each leaves an adapter (or a checkpoint) and its `metrics.jsonl`.

    Attributes:
      everyone: all students of the program, those of other groups too: they have one shape.
    """

    kind: ClassVar[str] = "students"
    members: tuple[Student, ...]
    everyone: tuple[Student, ...]

    def make(self, context: Context, tick: Tick) -> None:
        if context.setup.experiment.judge is not None:
            context.judge.release_memory()  # a judge may be larger than the model: students need its memory
        say = context.progress.say
        told = lambda what: say(f"{what}; lower students.optimizer.lr, or look at those rows")  # noqa: E731
        for work, group in self._groups(context):
            # Made when their turn comes: a hundred students' adapters need not lie on the device together.
            settings, shape, arms = self._prepare(context, group)
            outputs = [student_output(context.setup, student) for student in group]
            members = [(arm, context.store.open(output)) for arm, output in zip(arms, outputs, strict=True)]
            lm = context.lm(group[0].settings.model)
            context.progress.watch(functools.partial(_loss_so_far, work / "metrics.jsonl"))
            train_students(lm, members, settings, work, shape=shape, tick=tick, say=say, on_diverged=told)
        context.forget("targets")

    def _groups(self, context: Context) -> list[tuple[Path, list[Student]]]:
        """Who is still to be trained, with whom, and where their state is kept. A training that was begun goes on with
        everybody it was begun with."""
        store, found = context.store, []
        for group in self._parts(context):
            outputs = [student_output(context.setup, student) for student in group]
            work = store.training(digest([output.key for output in outputs]))
            left = on_main_process(functools.partial(_left, store, outputs, work))
            if left:
                found.append((work, [group[i] for i in left]))
        return found

    def _parts(self, context: Context) -> list[list[Student]]:
        members = list(self.members)
        if members[0].settings.runtime.arms_per_program != "auto":
            return [members]
        # What fits is measured once: a continued run must not be planned anew.
        return split_evenly(members, context.store.agreed(f"fit-{self.key}", lambda: self._fits(context)))

    def _fits(self, context: Context) -> int:
        largest = max(self.members, key=lambda student: student.settings.adapter.rank)  # ranks are padded to it
        settings, shape, (arm,) = self._prepare(context, [largest])
        lm = context.lm(largest.settings.model)
        count = arms_that_fit(lm.config, lm.params, arm, settings, shape, most=len(self.members))
        context.progress.say(f"{largest.condition}: {count} of {len(self.members)} students fit together")
        return count

    def _prepare(self, context: Context, group: list[Student]) -> tuple[Settings, Shape, list[Arm]]:
        setup, shared = context.setup, group[0].settings
        e, lm = setup.experiment, context.lm(shared.model)
        data = {source: training_data(context, source, group[0]) for source in sources_of(self.everyone)}
        plain = shape_of(shared, list(data.values()), e.sampling.max_new_tokens)
        settings = settings_of(
            lm.config,
            shared,
            setup.recipe,
            parallel=e.run.parallel,
            model_axis=context.layout.model,
            tokens=sum(len(each.rows) for each in data.values()) * plain.tokens,
            logs=Logs(tuple(e.run.loggers), context.store.root / "training"),
        )
        rows = shared.runtime.rows_at_once
        if rows == "auto" and shared.runtime.arms_per_program == "auto":
            rows = settings.batch_size  # how many students fit is measured with these pieces
        elif rows == "auto":
            itemsize = jnp.dtype(e.dtype).itemsize
            rows = rows_at_once(lm.config, settings, plain.tokens, len(group), itemsize=itemsize, limit=device_bytes())
        settings, plain = in_pieces(settings, plain, rows)
        shapes = setup.memo.setdefault("shapes", {})  # of a few numbers each, so nothing is pushed out
        if (self.everyone, rows) not in shapes:
            shapes[self.everyone, rows] = self._packed(context, plain)
        shape = shapes[self.everyone, rows]
        arms = []
        for student in group:
            own = training_data(context, student.source, student)
            self._say_if_few(context, student, len(own.rows))
            about = {"name": student.trained_as, "seed": student.seed, "max_new_tokens": e.sampling.max_new_tokens}
            arm = make_arm(lm, student.settings, own, drawn_rows(context, student), **about)
            defended = {
                "projected_directions": away(context, student, arm.adapter),
                "frozen_adapter": beside(context, student),
            }
            arms.append(dataclasses.replace(arm, **defended))
        return settings, shape, arms

    def _packed(self, context: Context, plain: Shape) -> Shape:
        """The shape of everybody's batches, with as many rows per line as pay. Rows of on-policy students are not known yet."""
        first = self.everyone[0]
        if first.settings.data.on_policy:
            return plain
        lm, orders, turns = context.lm(first.settings.model), [], []
        for student in self.everyone:
            orders += drawn_rows(context, student).orders(student.seed)
        for source in sources_of(self.everyone):
            turns += training_data(context, source, first).turns
        beginning = shared_beginning([turn.tokens[: turn.header] for turn in turns], PREFIX_STEP)
        return packed(plain, lm.config, orders, beginning)

    def _say_if_few(self, context: Context, student: Student, have: int) -> None:
        wanted = student.settings.data.rows or 0
        if have < wanted:
            steps = total_steps(student.settings, have)
            context.progress.say(
                f"{student.source.name}: {have} rows, fewer than students.data.rows={wanted}: {steps} steps"
            )

    @staticmethod
    def _check_pieces(setup: Setup, settings: Students, config: ModelConfig) -> None:
        """Refuse pieces that `in_pieces` would."""
        rows, data, run = settings.runtime.rows_at_once, settings.data, setup.experiment.run
        if rows != "auto":
            how = settings_of(config, settings, setup.recipe, parallel=run.parallel, model_axis=run.least_axis)
            in_pieces(how, Shape.fit(data.accumulate, data.batch_size, 1, 1), rows)

    def units(self, context: Context) -> int:
        def steps(student: Student) -> int:
            rows = len(training_rows(context.setup, student.source).read(context.store))
            return total_steps(student.settings, min(rows, student.settings.data.rows or rows))

        return sum(max(map(steps, group)) for _, group in self._groups(context))

    def cost(self, setup: Setup, sizes: Sizes) -> Cost:
        long, kept, first = sizes.lengths, rows_kept(setup, sizes), self.members[0]
        answer, s = answer_tokens(setup, sizes), first.settings
        each = training_flops(
            sizes.config,
            abstract_start(setup, first),
            program_of(s, setup.recipe).loss,
            tokens=long.prompt + answer,
            supervised=answer,
            teacher_tokens=(long.prompt + long.system + answer) if s.loss.live else 0,
            stored=not s.loss.live,
            cached=caches_below(sizes.config, s),
        )
        steps = sum(total_steps(m.settings, min(m.settings.data.rows or kept, kept)) for m in self.members)
        rows = steps * s.data.batch_size * s.data.accumulate
        return Cost(rows * (long.prompt + answer), rows * each, "train", rows=rows)

    def check(self, setup: Setup) -> None:
        check_loggers(setup.experiment.run.loggers)
        for student in self.members:
            check_defences(setup, student)
        for student in distinct(self.members, lambda student: student.arm):
            checkpoint, own = setup.checkpoint(student.settings.model), setup.checkpoint()
            check_start(checkpoint.config, abstract_params(checkpoint.config, setup.experiment.dtype), student.settings)
            self._check_pieces(setup, student.settings, checkpoint.config)
            counted = [each.chat.identity for each in (own, checkpoint) if each.chat is not None]
            masked = any(each.tokens != "all" for each in self.members if each.settings.model == student.settings.model)
            if masked and len(set(counted)) > 1:
                raise UsageError(
                    f"students.model: divergence positions are counted in the tokenizer and template of {own.name} "
                    f"({counted[0]}), and {checkpoint.name} has another one ({counted[1]}); use loss.tokens=[all]"
                )
            if student.settings.loss.soft and not checkpoint.has_words_of(own):
                raise UsageError(
                    f"students.model: {checkpoint.name} has other tokens than its teachers; use loss.kind=hard"
                )


def _loss_so_far(metrics: Path) -> str:
    loss = last_loss(metrics)
    return "" if loss is None else f"loss {loss:.4f}"


def _left(store: Store, outputs: Sequence[Output], work: Path) -> list[int]:
    """Which of these are still to be trained; all, if their training was begun."""
    missing = store.missing(outputs)
    return list(range(len(outputs))) if missing and (work / "state").exists() else missing


def diverged(store: Store, student: Output) -> str | None:
    """Where a student's numbers stopped being finite, and how; None of a student that is sound. One that is not is not
    evaluated: it would be counted as a student that learned nothing."""
    return store.summary(student).get("diverged")
