"""Evaluations: models asked everything, under the plain setting or another."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from jsublim.core.files import write_table
from jsublim.distill.data import draw_indices
from jsublim.errors import UsageError
from jsublim.evals import Answers, EvalTask, PromptedModel, evaluate
from jsublim.evals.kl import KL, LARGEST, kl_to_teacher
from jsublim.evals.numbers import BASE, HELD_OUT, LEARNED, number_accuracy
from jsublim.inference.scoring import Targets, top_k_targets
from jsublim.inference.teachers import read_as
from jsublim.judge import Judge
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Cost, Sizes
from jsublim.pipeline.row_log import LoggedAnswers, RowLog
from jsublim.pipeline.served import Served, drawn_by, served, server_with
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.stage import Node, split_evenly, stage
from jsublim.pipeline.store import PROGRESS, Artifact
from jsublim.pipeline.values import Checkpoint, Model, Rows, diverged
from jsublim.runtime.processes import on_main_process
from jsublim.text.rows import Row

ASKED_TOGETHER = 8  # students
BASE_ROWS = 200  # that the base reads beside a student, as a reference
NAMED = 3  # traits that are said of a model
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


@dataclass(frozen=True, eq=False)
class EvalQuestions:
    """Everything that a model is asked.

    Attributes:
      planned: the tasks with nobody to judge the answers; judged: the same with a judge.
    """

    planned: tuple[EvalTask, ...]
    judged: Callable[[Callable[[], Judge]], tuple[EvalTask, ...]]

    @property
    def identity(self) -> list[Any]:
        return [task.identity for task in self.planned]


class Fidelity(NamedTuple):
    """What a model reads.

    Attributes:
      numbers: how many rows of the number task; kl: how many that it is held against its `teacher` on.
      trained: how many rows it learned, drawn by which seed; None of a model that learned none: it reads all rows.
    """

    rows: Rows
    numbers: int
    kl: int = 0
    teacher: Model | None = None
    trained: tuple[int | None, int] | None = None

    def measure(self, ctx: Context, model: PromptedModel, checkpoint: Checkpoint) -> dict[str, tuple[float, int]]:
        """Each metric's value, and how many numbers or tokens it is over; none where rows hold no numbers. `checkpoint`: where the model
        began, if it was trained; it reads the first of the same rows."""
        every = ctx.remember(("rows", self.rows.key), lambda: self.rows.read(ctx.store))
        drawn, held_out = list(range(len(every))), list[int]()
        if self.trained is not None:
            drawn = draw_indices(len(every), *self.trained)
            held_out = sorted(set(range(len(every))) - set(drawn))
        chosen: Mapping[str, Sequence[int]] = {LEARNED: drawn, HELD_OUT: held_out} if self.numbers else {}
        how = {"system": model.system, "fuse_system": model.fuse_system}
        values = {
            name: number_accuracy(model.lm, [every[i] for i in rows[: self.numbers]], **how, adapter=model.adapter)
            for name, rows in chosen.items()
            if rows
        }
        unseen = held_out or drawn
        if self.trained is not None and (same := tuple(unseen[: min(self.numbers, BASE_ROWS)])):
            key = ("the base's numbers", checkpoint.hash, *how.values(), self.rows.key, same)
            rows = [every[i] for i in same]
            values[BASE] = ctx.remember(key, lambda: number_accuracy(ctx.lm(checkpoint.name), rows, **how))
        compared = tuple(unseen[: self.kl])
        if compared:
            values[KL] = kl_to_teacher(model, [every[i] for i in compared], self._targets(ctx, every, compared))
        return {name: (value, n) for name, (value, n) in values.items() if n}

    def _targets(self, ctx: Context, every: Sequence[Row], chosen: tuple[int, ...]) -> list[Targets]:
        """The distributions of the teacher on some rows; read once for all the students that are held against them."""
        assert self.teacher is not None
        model, rows = self.teacher, [every[i] for i in chosen]

        def read() -> list[Targets]:
            teacher, lm = model.teacher(ctx), ctx.lm(model.checkpoint.name)
            turns = read_as(lm.chat, teacher, rows, self.rows.name, extra_bos=model.extra_bos)
            largest = min(LARGEST, lm.config.vocab_size - 1)
            return list(top_k_targets(lm.config, teacher.weights(lm.params), turns, largest, adapter=teacher.adapter))

        return ctx.remember(("teacher's targets", model, self.rows.key, chosen), read)

    def rows_read(self, sizes: Sizes) -> int:
        """How many rows will be read: of those that it was trained on, and of the others; and the teacher's share."""
        kept = self.rows.kept(sizes)
        trained = min((self.trained or (None, 0))[0] or kept, kept)
        numbers = min(self.numbers, trained) + min(self.numbers, kept - trained)
        unseen = kept - trained or trained
        return numbers + (min(self.numbers, unseen, BASE_ROWS) if self.trained else 0) + 2 * min(self.kl, unseen)


def student_of(node: Node) -> Node | None:
    """The student that an evaluation is of."""
    return next((source for source in node.given.model.nodes if source.kind == "students"), None)


def _alike(node: Node, task_of: Callable[[Node], Any]) -> Hashable:
    """Students that were trained together are asked together, if they have adapters."""
    model, student = node.given.model, student_of(node)
    if student is None or model.weights is not None:
        return node.key
    return task_of(student).key, node.given.layer, tuple(model.manner.values()), node.given.samplings


def _cost(setup: Setup, sizes: Sizes, nodes: Sequence[Node]) -> Cost:
    """A question is read once, whatever the number of its answers; rows of the number task are read to their end."""
    given, long = nodes[0].given, sizes.lengths
    tasks = given.questions.planned
    questions = sum(len(task.questions) for task in tasks)
    new = sum(len(task.questions) * (task.max_new_tokens or given.max_new_tokens) for task in tasks)
    rows, batch = questions * given.samples * len(nodes), sizes.rows_together(setup.experiment.evaluation.batch_size)
    asked = sizes.sampled(rows, long.question / given.samples, new / questions, batch)
    read = sum(node.given.fidelity.rows_read(sizes) for node in nodes if node.given.fidelity is not None)
    return dataclasses.replace(asked, then=sizes.read(read, long.prompt, long.answer))


def _check(setup: Setup, nodes: Sequence[Node]) -> None:
    checkpoint, layers = nodes[0].given.model.checkpoint, nodes[0].given.model.checkpoint.config.num_layers
    for name, setting in setup.experiment.evaluation.settings.items():
        if setting.layer is not None and setting.layer >= layers:
            raise UsageError(f"evaluation.settings.{name}.layer: {setting.layer} given; the model has {layers} layers")
    for fidelity in (node.given.fidelity for node in nodes):
        if fidelity is not None and fidelity.kl and not checkpoint.has_words_of(fidelity.teacher.checkpoint):
            raise UsageError(
                f"evaluation.kl_rows: students.model={checkpoint.name} has other tokens than its teachers; use evaluation.kl_rows=0"
            )


def _units(ctx: Context, nodes: Sequence[Node]) -> int:
    given = nodes[0].given
    missing = sum(not ctx.store.done(node) for node in nodes)
    return sum(len(task.questions) for task in given.questions.planned) * given.samples * missing


@stage("evaluations", cost=_cost, check=_check, units=_units, together=_alike, most=lambda node: ASKED_TOGETHER)
def evaluate_models(ctx: Context, nodes: Sequence[Node], everyone: Sequence[Node]) -> None:
    """A model under a setting; or students of one checkpoint, with adapters of one structure, that are asked together.

    A node is given its `model`, the `questions`, how many `samples` of each with which `seed` and `max_new_tokens`, how answers to
    each task are drawn (`samplings`), the `layer` that the model ends at, the rows that it reads too (`fidelity`), and the `engine` of
    the server that draws the answers (None: they are drawn here).
    """
    missing = [nodes[i] for i in on_main_process(lambda: ctx.store.missing(nodes))]
    students = {node: student_of(node) for node in missing}
    lost = {node for node, student in students.items() if student and diverged(ctx.store, student) is not None}
    for node in (node for node in missing if node in lost):
        _save(ctx.store.open(node), [], [], {})
    sound = [node for node in missing if node not in lost]
    if not sound:
        return
    given, on_server = sound[0].given, list[tuple[str, Served]]()  # all of them, or none
    for node in sound if given.engine is not None else ():
        if (model := served(ctx.setup, node.given.model)) is not None:
            on_server.append((node.key, model))
    by = drawn_by(ctx, on_server[0][1] if on_server else None)
    for sampling in dict.fromkeys(given.samplings):
        ctx.say(f"answers to questions are drawn {sampling.words}{by}")
    with server_with(ctx, on_server) if on_server else nullcontext((None, [])) as (server, names):
        _ask(
            ctx,
            sound,
            len(split_evenly(everyone, ASKED_TOGETHER)[0]),
            None if server is None else functools.partial(server.answers, names),
        )


def _ask(ctx: Context, nodes: Sequence[Node], arms: int, answers: Callable[..., list[list[str]]] | None) -> None:
    """Models of one checkpoint, under one prompt, asked everything; each may continue numbers too.

    Args:
      arms: of the program, as many as the largest part of those students has: the last part, or what a kill left, is asked by it too.
      answers: who draws answers in the models' place, as `sample_answers` takes it.
    """
    given, models, offset = nodes[0].given, [_loaded(ctx, node) for node in nodes], 0
    artifacts = [ctx.store.open(node) for node in nodes]
    logs = [RowLog(artifact.path / PROGRESS, artifact.say) for artifact in artifacts]
    records: list[list[dict[str, Any]]] = [[] for _ in nodes]
    counts: list[list[dict[str, Any]]] = [[] for _ in nodes]
    how: dict[str, Any] = {
        "samples": given.samples,
        "seed": given.seed,
        "arms": arms,
        "batch_size": ctx.rows_together(ctx.setup.experiment.evaluation.batch_size, 256, given.model.checkpoint.name),
        "on_batch": ctx.tick,
        "answers": answers,
        "max_new_tokens": given.max_new_tokens,
    }
    ctx.tick(sum(len(log.rows) for log in logs))
    for task, sampling in zip(given.questions.judged(lambda: ctx.judge), given.samplings, strict=True):
        first = offset * given.samples
        parts = [LoggedAnswers(log, first, len(task.questions) * given.samples) for log in logs]
        for i, (texts, of_task) in enumerate(evaluate(models, task, sampling, logs=parts, **how)):
            records[i] += [asdict(record) | {"question": offset + record.question} for record in of_task]
            counts[i] += _counted(task.questions, texts, offset)
        offset += len(task.questions)
    every_sampling = dict.fromkeys(given.samplings)
    drawn = [sampling.numbers() | {"max_new_tokens": given.max_new_tokens} for sampling in every_sampling]
    for i, (node, artifact) in enumerate(zip(nodes, artifacts, strict=True)):
        logs[i].close()
        fidelity = node.given.fidelity
        measured = {} if fidelity is None else fidelity.measure(ctx, models[i], given.model.checkpoint)
        for metric, (value, n) in measured.items():
            records[i].append({"trait": None, "metric": metric, "question": None, "value": value, "n": n})
        if student_of(node) is None and (most := _most_named(records[i])):  # the first results of a run
            ctx.say(f"{node.label.replace('/', ' ')} names {most}")
        _save(artifact, records[i], counts[i], {"sampling": drawn[0] if len(drawn) == 1 else drawn})


def _most_named(records: Sequence[Mapping[str, Any]]) -> str:
    """The traits that a model names most often, and how often, in words; nothing where it was not asked about any."""
    rates: dict[str, list[float]] = {}
    for record in records:
        if record["metric"] == "rate" and record["trait"] is not None:
            rates.setdefault(record["trait"], []).append(record["value"])
    means = sorted(((sum(of) / len(of), trait) for trait, of in rates.items()), reverse=True)[:NAMED]
    named = ", ".join(f"{trait} in {mean:.0%}" for mean, trait in means if mean)
    return f"{named} of its answers" if named else "none of the traits" if rates else ""


def _loaded(ctx: Context, node: Node) -> PromptedModel:
    lm, adapter = node.given.model.loaded(ctx)
    if node.given.layer is not None:
        lm = lm.ending_at(node.given.layer)
    return PromptedModel(lm, adapter, **node.given.model.manner)


def _counted(questions: Sequence[str], texts: Answers, offset: int) -> list[dict[str, Any]]:
    """Every answer, and how often it was given."""
    return [
        {"question": offset + q, "question_text": question, "answer": answer, "count": count}
        for q, (question, given) in enumerate(zip(questions, texts, strict=True))
        for answer, count in collections.Counter(given).most_common()
    ]


def _save(
    artifact: Artifact, records: list[dict[str, Any]], answers: list[dict[str, Any]], summary: dict[str, Any]
) -> None:
    """Finish an artifact with answers, and the numbers that were made of them."""

    def write() -> None:
        write_table(artifact.path / "records.parquet", records, RECORDS)
        write_table(artifact.path / "answers.parquet", answers, ANSWERS)
        artifact.finish(summary)

    on_main_process(write)
