"""Evaluations: the base, the teachers and every student, under the plain setting and under every other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jsublim.config.evaluation import Setting
from jsublim.errors import UsageError
from jsublim.evals import EvalContext, EvalTask, PromptedModel
from jsublim.evals.naming import own_name
from jsublim.inference.lm import LanguageModel
from jsublim.inference.sampling import Sampling
from jsublim.judge import Judge
from jsublim.models.lora import Adapter
from jsublim.models.peft import load_adapter
from jsublim.models.weights import load_params
from jsublim.pipeline.arms import Student, distinct, split_evenly
from jsublim.pipeline.asking import evaluate, leave
from jsublim.pipeline.context import Context, known_judge
from jsublim.pipeline.continued import (
    LEARNED,
    Continued,
    check_continued,
    continued_parents,
    number_rows,
    rows_continued,
    rows_read,
)
from jsublim.pipeline.publish import adapter_key, rows_of
from jsublim.pipeline.served import (
    Served,
    drawn_by,
    engine_inputs,
    served_adapter,
    served_student,
    served_teacher,
    server_with,
)
from jsublim.pipeline.setup import Checkpoint, Setup, memoized
from jsublim.pipeline.store import Output
from jsublim.pipeline.students import diverged, student_output, task_of
from jsublim.pipeline.task import Cost, Sizes, Task, distinct_tasks
from jsublim.pipeline.teachers import TeacherPool
from jsublim.processes import on_main_process
from jsublim.progress import Tick
from jsublim.teachers import CONTROL

PLAIN = ""  # the name of the evaluation that no setting changes
ASKED_TOGETHER = 8  # students


@dataclass(frozen=True)
class Model:
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
        if self.teacher == CONTROL:
            return {"arm": "base", "role": "base", "teacher": None, "condition": "base", "seed": None}
        return {
            "arm": f"teacher/{self.teacher}",
            "role": "teacher",
            "teacher": self.teacher,
            "condition": "teacher",
            "seed": None,
        }

    @property
    def label(self) -> str:
        if self.adapter is not None:
            return self.adapter.name
        return self.labels["arm"] if self.student is None else self.student.trained_as


def models(setup: Setup) -> Iterator[Model]:
    """Every model that is evaluated."""
    yield Model()
    for trait in setup.experiment.teachers.traits if setup.experiment.evaluation.teachers else ():
        yield Model(teacher=trait)
    for student in setup.students:
        yield Model(student)


def eval_settings(setup: Setup) -> dict[str, Setting]:
    """Every setting by name, the plain one first."""
    return {PLAIN: Setting()} | setup.experiment.evaluation.settings


@memoized
def eval_tasks(setup: Setup) -> tuple[EvalTask, ...]:
    """Everything that a model is asked under a setting, for plans: nobody judges the answers."""
    return _eval_tasks(setup, lambda: known_judge(setup))


def _eval_tasks(setup: Setup, judge: Callable[[], Judge]) -> tuple[EvalTask, ...]:
    pool, ev = TeacherPool(setup), setup.experiment.evaluation
    asked = EvalContext(
        setup.pack,
        setup.evaluated_traits,
        pool.category,
        pool.questions,
        ev.questions,
        own_name(setup.checkpoint().config),
        judge,
        bool(setup.recipe.judge_apart),
    )
    return tuple(task for kind in ev.kinds.values() for task in kind.tasks(asked))


@memoized
def evaluation_output(setup: Setup, model: Model, name: str) -> Output:
    """What is left of asking a model everything under the setting of that name."""
    ev, setting, reader = setup.experiment.evaluation, eval_settings(setup)[name], _reader(model, name)
    inputs = {
        **setup.common,
        **_manner(setup, model, setting),
        "samples": ev.samples,
        "seed": ev.seed,
        "max_new_tokens": ev.max_new_tokens,
        "tasks": [task.identity for task in eval_tasks(setup)],
        "layer": setting.layer,
        "sampling": sampling_of(setup, model, setting).numbers(),
        "number_rows": number_rows(setup) if reader else 0,
        "student": _student_key(setup, model),
        "teacher": TeacherPool(setup).identity(model.teacher),
        "template": _checkpoint(setup, model).template,
        **engine_inputs(setup, _served(setup, model, setting)),
    }
    every = (how.numbers() for how in dict.fromkeys(samplings(setup, model, setting)))
    others = [numbers for numbers in every if numbers != inputs["sampling"]]
    if others:
        inputs["sampling of some kinds"] = others[0]
    if model.data is not None:
        inputs["data"] = rows_of(model.data).key
    if ev.kl_rows and reader is not None:
        source = reader.source
        inputs["kl"] = {"rows": ev.kl_rows, "teacher": TeacherPool(setup, source.elder).identity(source.teacher)}
    return Output("evaluations", "/".join(filter(None, (model.label, name))), inputs)


def evaluation_task(setup: Setup, model: Model, name: str) -> Task:
    """The task that does it: a student is asked together with those that it was trained with."""
    if model.student is None:
        return _evaluate(setup, (model,), name)
    return _of_students(setup, name)[evaluation_output(setup, model, name).key]


@memoized
def _of_students(setup: Setup, name: str) -> dict[str, Task]:
    setting, groups = eval_settings(setup)[name], dict[Hashable, list[Model]]()
    for student in distinct(setup.students, lambda student: evaluation_output(setup, Model(student), name).key):
        model, own = Model(student), student.settings
        system = _manner(setup, model, setting)["system"]
        alone = student_output(setup, student).key if own.adapter.method == "full" else None
        alike = task_of(setup, student).key, own.model, system, sampling_of(setup, model, setting), alone
        groups.setdefault(alike, []).append(model)
    parts = (part for group in groups.values() for part in split_evenly(group, ASKED_TOGETHER))
    tasks = (_evaluate(setup, tuple(part), name) for part in parts)
    return {output.key: task for task in tasks for output in task.outputs}


def _evaluate(setup: Setup, models: tuple[Model, ...], name: str) -> Evaluate:
    outputs = tuple(evaluation_output(setup, model, name) for model in models)
    parents: list[Task] = []
    for model in models:
        parents += TeacherPool(setup).tasks(model.teacher)
        if model.student is not None:
            parents.append(task_of(setup, model.student))
        if (reader := _reader(model, name)) is not None:
            parents += continued_parents(setup, reader)
    return Evaluate(outputs, distinct_tasks(parents), models, name)


def _served(setup: Setup, model: Model, setting: Setting) -> Served | None:
    """The model as the server has it, which knows whole models only; None where it is asked here."""
    student = model.student
    if setting.layer is not None:
        return None
    if student is not None:
        return served_student(
            setup, student.settings.model, student.settings.adapter.method, student_output(setup, student)
        )
    return served_teacher(setup, model.teacher) if model.adapter is None else served_adapter(setup, str(model.adapter))


def _student_key(setup: Setup, model: Model) -> str | None:
    if model.student is not None:
        return student_output(setup, model.student).key
    return None if model.adapter is None else adapter_key(model.adapter)


def _model_name(model: Model) -> str | None:
    return None if model.student is None else model.student.settings.model


def _checkpoint(setup: Setup, model: Model) -> Checkpoint:
    return setup.checkpoint(_model_name(model))


def samplings(setup: Setup, model: Model, setting: Setting) -> list[Sampling]:
    """How answers to each of the evaluation's tasks are drawn."""
    return [sampling_of(setup, model, setting, task.keeps_top_p) for task in eval_tasks(setup)]


def sampling_of(setup: Setup, model: Model, setting: Setting, keeps_top_p: bool = False) -> Sampling:
    """How answers are drawn, with a top-p that the recipe inherits or without."""
    name = _model_name(model)
    given = {"temperature": setting.temperature, "top_p": setting.top_p}
    plain = setup.sampling("temperature", name, evaluation=not keeps_top_p)
    return dataclasses.replace(plain, **{key: value for key, value in given.items() if value is not None})


def _manner(setup: Setup, model: Model, setting: Setting) -> dict[str, Any]:
    """What stands around the questions."""
    if model.student is not None:
        own = model.student.settings.asked_under
    else:
        students = setup.experiment.students if model.adapter is not None else None
        own = TeacherPool(setup).system(model.teacher) if students is None else students.system
    system = own if model.teacher != CONTROL or setting.system is None else setting.system
    return {
        "system": system,
        "fuse_system": setup.experiment.teachers.fuse_system and system is not None,
        "extra_bos": bool(setup.recipe.extra_bos),
    }


def _reader(model: Model, name: str) -> Student | None:
    """The student, if it is one and reads rows of its teacher too, which it does under the plain setting."""
    return model.student if name == PLAIN else None


@dataclass(frozen=True, eq=False)
class Evaluate(Task):
    """A model under a setting; or students, of one checkpoint and with adapters of one structure, that are asked together."""

    kind: ClassVar[str] = "evaluations"
    models: tuple[Model, ...]
    setting: str

    def make(self, context: Context, tick: Tick) -> None:
        setup, store = context.setup, context.store
        every = list(zip(self.models, self.outputs, strict=True))
        missing = [every[i] for i in on_main_process(lambda: store.missing(self.outputs))]
        lost = [
            model.student is not None and diverged(store, student_output(setup, model.student)) is not None
            for model, _ in missing
        ]
        for (_, output), is_lost in zip(missing, lost, strict=True):
            if is_lost:
                leave(store.open(output), [], [], {})
        missing = [each for each, is_lost in zip(missing, lost, strict=True) if not is_lost]
        asked = [(model, store.open(output)) for model, output in missing]
        if not asked:
            return
        setting, ev = eval_settings(setup)[self.setting], setup.experiment.evaluation
        drawn = samplings(setup, asked[0][0], setting)
        name = f" {self.setting}" if self.setting else ""
        # All of them, or none.
        served = [(output, own) for model, output in missing if (own := _served(setup, model, setting)) is not None]
        who = drawn_by(context, served[0][1] if served else None)
        for how in dict.fromkeys(drawn):
            context.progress.say(f"sampling, evaluation{name}{who}: {how.numbers()}")
        with server_with(context, served) if served else nullcontext((None, [])) as (server, names):
            evaluate(
                [artifact for _, artifact in asked],
                [self._load(context, model, setting) for model, _ in asked],
                _eval_tasks(setup, lambda: context.judge),
                drawn,
                samples=ev.samples,
                seed=ev.seed,
                max_new_tokens=ev.max_new_tokens,
                batch_size=context.rows_together(ev.batch_size, 256, _model_name(asked[0][0])),
                continued=[self._to_continue(context, model) for model, _ in asked],
                answers=None if server is None else functools.partial(server.answers, names),
                tick=tick,
            )

    def _to_continue(self, context: Context, model: Model) -> Continued:
        if model.data is not None:
            return Continued({LEARNED: rows_of(model.data).read(context.store)})
        reader = _reader(model, self.setting)
        return Continued() if reader is None else rows_continued(context, reader)

    def _load(self, context: Context, model: Model, setting: Setting) -> PromptedModel:
        lm, adapter = _weights(context, model)
        if setting.layer is not None:
            lm = lm.ending_at(setting.layer)
        return PromptedModel(lm, adapter, **_manner(context.setup, model, setting))

    def units(self, context: Context) -> int:
        questions = sum(len(task.questions) for task in eval_tasks(context.setup))
        missing = [output for output in self.outputs if not context.store.done(output)]
        return questions * context.setup.experiment.evaluation.samples * len(missing)

    def cost(self, setup: Setup, sizes: Sizes) -> Cost:
        """A question is read once, whatever the number of its answers; rows of the number task are read to their end."""
        ev, tasks, long = setup.experiment.evaluation, eval_tasks(setup), sizes.lengths
        questions = sum(len(task.questions) for task in tasks)
        new = sum(len(task.questions) * (task.max_new_tokens or ev.max_new_tokens) for task in tasks)
        rows = questions * ev.samples * len(self.models)
        asked = sizes.sampled(rows, long.question / ev.samples, new / questions, sizes.rows_together(ev.batch_size))
        readers = [reader for model in self.models if (reader := _reader(model, self.setting)) is not None]
        continued = sum(rows_read(setup, sizes, student) for student in readers)
        return dataclasses.replace(asked, then=sizes.read(continued, long.prompt, long.answer))

    def check(self, setup: Setup) -> None:
        eval_tasks(setup)
        for model in self.models:
            if model.student is not None:
                check_continued(setup, model.student)
        layer, config = eval_settings(setup)[self.setting].layer, _checkpoint(setup, self.models[0]).config
        if layer is not None and layer >= config.num_layers:
            raise UsageError(
                f"evaluation.settings.{self.setting}.layer: {layer} given; the model has {config.num_layers} layers"
            )


def _weights(context: Context, model: Model) -> tuple[LanguageModel, Adapter | None]:
    student = model.student
    if model.adapter is not None:
        lm = context.lm()
        return lm, load_adapter(model.adapter, lm.config)
    if student is None:
        teacher, lm = TeacherPool(context.setup).teacher(context, model.teacher), context.lm()
        return lm.with_params(teacher.weights(lm.params)), teacher.adapter
    lm, folder = context.lm(student.settings.model), context.store.path(student_output(context.setup, student))
    if student.settings.adapter.method != "full":
        return lm, load_adapter(folder, lm.config)
    sharding = context.layout.params_sharding(lm.config)
    return lm.with_params(load_params(folder, lm.config, context.setup.experiment.dtype, sharding)), None
