"""Evaluations: the base, the teachers and every student, under the plain setting and under every other."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from jsublim.config.evaluation import Setting
from jsublim.distill.data import draw_indices
from jsublim.errors import UsageError
from jsublim.evals import Asked, EvalTask, PromptedModel, sample_answers
from jsublim.evals.naming import own_name
from jsublim.evals.numbers import number_accuracy
from jsublim.files import write_table
from jsublim.inference.lm import LanguageModel
from jsublim.inference.sampling import Sampling
from jsublim.judge import Judge
from jsublim.models.lora import Adapter
from jsublim.models.peft import load_adapter
from jsublim.models.weights import load_params
from jsublim.pipeline.arms import Student
from jsublim.pipeline.changes import training_rows
from jsublim.pipeline.context import Context, known_judge
from jsublim.pipeline.publish import adapter_key, rows_of
from jsublim.pipeline.setup import Checkpoint, Setup, memoized
from jsublim.pipeline.store import PROGRESS, Answered, Artifact, Output, RowLog
from jsublim.pipeline.students import diverged, student_output, task_of
from jsublim.pipeline.task import Cost, Sizes, Task
from jsublim.pipeline.teachers import TeacherPool
from jsublim.progress import Tick, no_tick
from jsublim.rows import Row
from jsublim.teachers import CONTROL

PLAIN = ""  # the name of the evaluation that no setting changes
RECORDS = pa.schema(
    [
        ("trait", pa.string()),
        ("metric", pa.string()),
        ("question", pa.int64()),
        ("value", pa.float64()),
        ("n", pa.int64()),
    ]
)
ANSWERS = pa.schema(
    [("question", pa.int64()), ("question_text", pa.string()), ("answer", pa.string()), ("count", pa.int64())]
)


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
    asked = Asked(
        setup.pack,
        setup.evaluated_traits,
        pool.category,
        pool.questions,
        ev.questions,
        own_name(setup.checkpoint().config),
        judge,
    )
    return tuple(task for kind in ev.kinds.values() for task in kind.tasks(asked))


@memoized
def evaluation_task(setup: Setup, model: Model, name: str) -> Task:
    """The task that asks a model everything under the setting of that name."""
    ev, pool, setting = setup.experiment.evaluation, TeacherPool(setup), eval_settings(setup)[name]
    inputs = {
        **setup.common,
        **_manner(setup, model, setting),
        "samples": ev.samples,
        "seed": ev.seed,
        "max_new_tokens": ev.max_new_tokens,
        "tasks": [task.identity for task in eval_tasks(setup)],
        "layer": setting.layer,
        "sampling": sampling_of(setup, model, setting).numbers(),
        "number_rows": _number_rows(setup, model, name),
        "student": _student_key(setup, model),
        "teacher": pool.identity(model.teacher),
        "template": _checkpoint(setup, model).template,
    }
    if model.data is not None:
        inputs["data"] = rows_of(model.data).key
    parents = pool.tasks(model.teacher)
    if model.student is not None:
        own = training_rows(setup, model.student.source).parts if inputs["number_rows"] else ()
        parents = (task_of(setup, model.student), *own)
    label = "/".join(filter(None, (model.label, name)))
    return Evaluate((Output("evaluations", label, inputs),), parents, model, name)


def _student_key(setup: Setup, model: Model) -> str | None:
    if model.student is not None:
        return student_output(setup, model.student).key
    return None if model.adapter is None else adapter_key(model.adapter)


def _checkpoint(setup: Setup, model: Model) -> Checkpoint:
    return setup.checkpoint(None if model.student is None else model.student.settings.model)


def sampling_of(setup: Setup, model: Model, setting: Setting) -> Sampling:
    """How answers are drawn."""
    name = None if model.student is None else model.student.settings.model
    given = {"temperature": setting.temperature, "top_p": setting.top_p}
    plain = setup.sampling("temperature", name, evaluation=True)
    return dataclasses.replace(plain, **{key: value for key, value in given.items() if value is not None})


def _manner(setup: Setup, model: Model, setting: Setting) -> dict[str, Any]:
    """What stands around the questions."""
    if model.student is not None:
        own = model.student.settings.system
    else:
        students = setup.experiment.students if model.adapter is not None else None
        own = TeacherPool(setup).system(model.teacher) if students is None else students.system
    system = own if model.teacher != CONTROL or setting.system is None else setting.system
    return {
        "system": system,
        "fuse_system": setup.experiment.teachers.fuse_system and system is not None,
        "extra_bos": bool(setup.recipe.extra_bos),
    }


def _number_rows(setup: Setup, model: Model, name: str) -> int:
    """Rows of the number task; other answers hold numbers too, but none that are to be continued."""
    asked = model.student is not None and name == PLAIN and setup.experiment.data.kind == "numbers"
    return setup.experiment.evaluation.number_rows if asked else 0


@dataclass(frozen=True, eq=False)
class Evaluate(Task):
    """One model under one setting."""

    kind: ClassVar[str] = "evaluations"
    model: Model
    setting: str

    def make(self, context: Context, tick: Tick) -> None:
        setup = context.setup
        student = self.model.student
        if student is not None and diverged(context.store, student_output(setup, student)):
            return _leave(context.store.open(self.output), [], [], {})
        setting, ev = eval_settings(setup)[self.setting], setup.experiment.evaluation
        sampling = sampling_of(setup, self.model, setting)
        name = f" {self.setting}" if self.setting else ""
        context.progress.say(f"sampling, evaluation{name}: {sampling.numbers()}")
        lm, adapter = self._load(context)
        count = _number_rows(setup, self.model, self.setting)
        rows = _rows_to_continue(context, student, count) if student is not None and count else {}
        if self.model.data is not None:
            rows = {"number_accuracy": rows_of(self.model.data).read(context.store)}
        if setting.layer is not None:
            lm = lm.ending_at(setting.layer)
        evaluate(
            context.store.open(self.output),
            PromptedModel(lm, adapter, **_manner(setup, self.model, setting)),
            _eval_tasks(setup, lambda: context.judge),
            sampling,
            samples=ev.samples,
            seed=ev.seed,
            max_new_tokens=ev.max_new_tokens,
            batch_size=ev.batch_size,
            number_rows=rows,
            tick=tick,
        )

    def _load(self, context: Context) -> tuple[LanguageModel, Adapter | None]:
        student = self.model.student
        if self.model.adapter is not None:
            lm = context.lm()
            return lm, load_adapter(self.model.adapter, lm.config)
        if student is None:
            teacher, lm = TeacherPool(context.setup).teacher(context, self.model.teacher), context.lm()
            return lm.with_params(teacher.weights(lm.params)), teacher.adapter
        lm, folder = context.lm(student.settings.model), context.store.path(student_output(context.setup, student))
        if student.settings.adapter.method != "full":
            return lm, load_adapter(folder, lm.config)
        sharding = context.layout.params_sharding(lm.config)
        return lm.with_params(load_params(folder, lm.config, context.setup.experiment.dtype, sharding)), None

    def units(self, context: Context) -> int:
        questions = sum(len(task.questions) for task in eval_tasks(context.setup))
        return questions * context.setup.experiment.evaluation.samples

    def cost(self, setup: Setup, sizes: Sizes) -> Cost:
        """A question is read once, whatever the number of its answers."""
        ev, tasks = setup.experiment.evaluation, eval_tasks(setup)
        questions = sum(len(task.questions) for task in tasks)
        new = sum(len(task.questions) * (task.max_new_tokens or ev.max_new_tokens) for task in tasks)
        rows = questions * ev.samples
        return sizes.sampled(rows, sizes.lengths.question / ev.samples, new / questions, ev.batch_size)

    def check(self, setup: Setup) -> None:
        eval_tasks(setup)
        layer, config = eval_settings(setup)[self.setting].layer, _checkpoint(setup, self.model).config
        if layer is not None and layer >= config.num_layers:
            raise UsageError(
                f"evaluation.settings.{self.setting}.layer: {layer} given; the model has {config.num_layers} layers"
            )


def _rows_to_continue(context: Context, student: Student, count: int) -> dict[str, list[Row]]:
    own = training_rows(context.setup, student.source)
    rows = context.remember(("rows", own.key), lambda: own.read(context.store))
    drawn = draw_indices(len(rows), student.settings.data.rows, student.seed)
    held_out = sorted(set(range(len(rows))) - set(drawn))
    return {
        "number_accuracy": [rows[i] for i in drawn[:count]],
        "number_accuracy_heldout": [rows[i] for i in held_out[:count]],
    }


def evaluate(
    artifact: Artifact,
    model: PromptedModel,
    tasks: Sequence[EvalTask],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    number_rows: Mapping[str, Sequence[Row]],
    tick: Tick = no_tick,
) -> None:
    """Ask a model everything, and let it continue numbers; leaves `records.parquet` and `answers.parquet`.

    Args:
      number_rows: metric name -> rows for the number task.
      tick: counts sampled answers.
    """
    records, answers, offset = [], [], 0
    log = RowLog(artifact.path / PROGRESS)
    tick(len(log.rows))
    for task in tasks:
        texts = sample_answers(
            model.lm,
            task.questions,
            sampling,
            samples=samples,
            seed=seed,
            max_new_tokens=task.max_new_tokens or max_new_tokens,
            batch_size=batch_size,
            on_batch=tick,
            log=Answered(log, offset * samples, len(task.questions) * samples),
            **model.options,
        )
        records += [asdict(record) | {"question": offset + record.question} for record in task.records(model, texts)]
        for q, (question, given) in enumerate(zip(task.questions, texts, strict=True)):
            for answer, count in collections.Counter(given).most_common():
                answers.append({"question": offset + q, "question_text": question, "answer": answer, "count": count})
        offset += len(task.questions)
    log.close()
    for metric, rows in number_rows.items():
        if rows:
            share, n = number_accuracy(
                model.lm, rows, system=model.system, fuse_system=model.fuse_system, adapter=model.adapter
            )
            if n:  # rows given by hand may hold no numbers
                records.append({"trait": None, "metric": metric, "question": None, "value": share, "n": n})
    _leave(artifact, records, answers, {"sampling": sampling.numbers() | {"max_new_tokens": max_new_tokens}})


def _leave(
    artifact: Artifact, records: list[dict[str, Any]], answers: list[dict[str, Any]], summary: dict[str, Any]
) -> None:
    write_table(artifact.path / "records.parquet", records, RECORDS)
    write_table(artifact.path / "answers.parquet", answers, ANSWERS)
    artifact.finish(summary)
