"""Evaluations: models asked everything, under the plain setting or another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from jsublim.errors import UsageError
from jsublim.evals import EvalTask, PromptedModel
from jsublim.judge import Judge
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Cost, Sizes
from jsublim.pipeline.served import drawn_by, server_with
from jsublim.pipeline.stage import Node, stage
from jsublim.pipeline.stages.asking import evaluate, save_answers
from jsublim.pipeline.store import Store
from jsublim.pipeline.values import diverged
from jsublim.runtime.processes import on_main_process

ASKED_TOGETHER = 8  # students


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


def student_of(node: Node) -> Node | None:
    """The student that an evaluation is of."""
    return next((each for each in node.given.model.nodes if each.kind == "students"), None)


def _alike(node: Node, task_of: Callable[[Node], Any]) -> Hashable:
    """Students that were trained together are asked together, if they have adapters."""
    model, student = node.given.model, student_of(node)
    if student is None or model.weights is not None:
        return node.key
    return task_of(student).key, node.given.setting, tuple(model.manner.values()), node.given.samplings


def _cost(sizes: Sizes, nodes: Sequence[Node]) -> Cost:
    """A question is read once, whatever the number of its answers; rows of the number task are read to their end."""
    given, long = nodes[0].given, sizes.lengths
    tasks = given.questions.planned
    questions = sum(len(task.questions) for task in tasks)
    new = sum(len(task.questions) * (task.max_new_tokens or given.max_new_tokens) for task in tasks)
    rows, batch = questions * given.samples * len(nodes), sizes.rows_together(given.batch_size)
    asked = sizes.sampled(rows, long.question / given.samples, new / questions, batch)
    read = sum(node.given.fidelity.count(sizes) for node in nodes if node.given.fidelity is not None)
    return dataclasses.replace(asked, then=sizes.read(read, long.prompt, long.answer))


def _check(nodes: Sequence[Node]) -> None:
    given = nodes[0].given
    checkpoint, layer = given.model.checkpoint, given.layer
    if layer is not None and layer >= checkpoint.config.num_layers:
        raise UsageError(
            f"evaluation.settings.{given.setting}.layer: {layer} given; the model has {checkpoint.config.num_layers} layers"
        )
    for fidelity in (node.given.fidelity for node in nodes):
        if fidelity is not None and fidelity.kl and not checkpoint.has_words_of(fidelity.teacher.checkpoint):
            raise UsageError(
                f"evaluation.kl_rows: students.model={checkpoint.name} has other tokens than its teachers; use evaluation.kl_rows=0"
            )


def _missing(store: Store, nodes: Sequence[Node]) -> list[Node]:
    return [nodes[i] for i in on_main_process(lambda: store.missing(nodes))]


def _units(ctx: Context, nodes: Sequence[Node]) -> int:
    given = nodes[0].given
    missing = sum(not ctx.store.done(node) for node in nodes)
    return sum(len(task.questions) for task in given.questions.planned) * given.samples * missing


@stage(
    "evaluations",
    cost=_cost,
    check=_check,
    units=_units,
    together=_alike,
    most=lambda node: ASKED_TOGETHER,
    runtime=("setting", "served", "batch_size"),
)
def evaluate_models(ctx: Context, nodes: Sequence[Node], everyone: Sequence[Node]) -> None:
    """A model under a setting; or students of one checkpoint, with adapters of one structure, that are asked together.

    A node is given its `model`, the `questions`, how many `samples` of each with which `seed` and `max_new_tokens`, how answers to
    each task are drawn (`samplings`), the `layer` that the model ends at, the rows that it reads too (`fidelity`), the `engine` of the
    server that draws the answers; and the `setting`'s name, the model as that server has it (`served`), and a `batch_size`.
    """
    missing = _missing(ctx.store, nodes)
    lost = [(student := student_of(node)) is not None and diverged(ctx.store, student) is not None for node in missing]
    for node in (node for node, is_lost in zip(missing, lost, strict=True) if is_lost):
        save_answers(ctx.store.open(node), [], [], {})
    asked = [node for node, is_lost in zip(missing, lost, strict=True) if not is_lost]
    if not asked:
        return
    given = asked[0].given
    served = [(node.key, node.given.served) for node in asked if node.given.served is not None]  # all of them, or none
    name, who = f" {given.setting}" if given.setting else "", drawn_by(ctx, given.served)
    for how in dict.fromkeys(given.samplings):
        ctx.say(f"sampling, evaluation{name}{who}: {how.numbers()}")
    with server_with(ctx, served) if served else nullcontext((None, [])) as (server, names):
        models = [_loaded(ctx, node) for node in asked]
        evaluate(
            [ctx.store.open(node) for node in asked],
            models,
            given.questions.judged(lambda: ctx.judge),
            given.samplings,
            samples=given.samples,
            seed=given.seed,
            max_new_tokens=given.max_new_tokens,
            batch_size=ctx.rows_together(given.batch_size, 256, given.model.checkpoint.name),
            measures=[node.given.fidelity and functools.partial(node.given.fidelity.measure, ctx) for node in asked],
            answers=None if server is None else functools.partial(server.answers, names),
            tick=ctx.tick,
        )


def _loaded(ctx: Context, node: Node) -> PromptedModel:
    lm, adapter = node.given.model.loaded(ctx)
    if node.given.layer is not None:
        lm = lm.ending_at(node.given.layer)
    return PromptedModel(lm, adapter, **node.given.model.manner)
