"""Students: who can be trained together, and the training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jsublim.config import Students
from jsublim.config.students import StudentAdapter
from jsublim.distill.arm import Arm, Settings
from jsublim.distill.batches import Shape, packed
from jsublim.distill.cost import training_flops
from jsublim.distill.data import read_turns
from jsublim.distill.loggers import Logs, check_loggers
from jsublim.distill.memory import arms_that_fit, rows_at_once
from jsublim.distill.metrics import last_loss
from jsublim.distill.projection import orthonormal
from jsublim.errors import UsageError
from jsublim.inference.batching import PREFIX_STEP, shared_beginning
from jsublim.inference.scoring import answers_only
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import abstract_params
from jsublim.models.lora import Adapter, Trainable
from jsublim.models.parallel import Layout, device_bytes
from jsublim.models.peft import load_adapter
from jsublim.pipeline.arms import total_steps
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Cost, Sizes
from jsublim.pipeline.setup import Checkpoint, Setup
from jsublim.pipeline.stage import Node, Task, content, split_evenly, stage
from jsublim.pipeline.stages.starts import directions_of
from jsublim.pipeline.stages.targets import read_targets, teacher_turns
from jsublim.pipeline.store import Store, digest
from jsublim.pipeline.training import (
    Drawn,
    TrainingData,
    caches_below,
    check_start,
    draw,
    in_pieces,
    loss_of,
    make_arm,
    program_of,
    settings_of,
    shape_of,
    start_adapter,
    train_arms,
)
from jsublim.pipeline.values import Folder, Model, Rows, adapter_of
from jsublim.runtime.processes import on_main_process
from jsublim.text.chat import Turn

MOST_TOGETHER = 16  # students of a task, where how many fit decides: a task is one machine's, and others wait for work


class Lesson(NamedTuple):
    """What a student learns from.

    Attributes:
      tokens: which tokens of the rows; teacher: who says what of them, in a soft loss; targets: where that is stored, if it is.
    """

    rows: Rows
    tokens: str
    teacher: Model | None = None
    targets: Node | None = None


@functools.lru_cache(maxsize=256)  # a graph has hundreds of students, and few kinds of them
def _start_and_structure(config: ModelConfig, dtype: str, adapter: str) -> tuple[Adapter, Hashable]:
    how = Students(adapter=StudentAdapter.model_validate_json(adapter))
    start = jax.eval_shape(lambda params: start_adapter(config, params, how, 0), abstract_params(config, dtype))
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda start: start.with_rank(1), start))
    return start, (str(structure), tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves))


def abstract_start(checkpoint: Checkpoint, dtype: str, students: Students) -> Adapter:
    """Shapes of what a student trains."""
    return _start_and_structure(checkpoint.config, dtype, students.adapter.model_dump_json())[0]


def program_of_student(node: Node, task_of: Callable[[Node], Task] | None = None) -> Hashable:
    """The program that a student is trained by: static arguments of the step, the structure of what is trained (ranks are padded to the
    largest, so they are left out), and what a batch consists of."""
    given, s = node.given, node.given.settings
    config, dtype, frozen = given.start.checkpoint.config, given.start.model.common["dtype"], given.frozen_adapter
    return (
        given.start.checkpoint.hash,
        s.system,
        program_of(s, given.recipe["loss_per"]),
        (s.data.batch_size, s.data.accumulate, s.data.max_tokens, s.data.on_policy, s.loss.top_k),
        caches_below(config, s),
        _start_and_structure(config, dtype, s.adapter.model_dump_json())[1],
        bool(given.projected),
        frozen.name if isinstance(frozen, Folder) else frozen and frozen.kind,  # adapters of one structure
        s.fork is not None,
    )


def _most(node: Node) -> int:
    most = node.given.settings.runtime.arms_per_program
    return MOST_TOGETHER if most == "auto" else most


def _cost(setup: Setup, sizes: Sizes, nodes: Sequence[Node]) -> Cost:
    given, s = nodes[0].given, nodes[0].given.settings
    kept, answer, long = given.lessons[0].rows.kept(sizes), given.lessons[0].rows.answer(sizes), sizes.lengths
    flops = training_flops(
        sizes.config,
        abstract_start(given.start.checkpoint, given.start.model.common["dtype"], s),
        loss_of(s),
        tokens=long.prompt + answer,
        supervised=answer,
        teacher_tokens=(long.prompt + long.system + answer) if s.loss.live else 0,
        stored=not s.loss.live,
        cached=caches_below(sizes.config, s),
    )
    settings = (node.given.settings for node in nodes)
    rows = sum(total_steps(m, min(m.data.rows or kept, kept)) for m in settings) * s.data.batch_size * s.data.accumulate
    return Cost(rows * (long.prompt + answer), rows * flops, "train", rows=rows)


def _check(setup: Setup, nodes: Sequence[Node]) -> None:
    check_loggers(setup.experiment.run.loggers)
    for given in {repr(node.given.settings): node.given for node in nodes}.values():
        _check_settings(setup, given, any(node.given.lessons[0].tokens != "all" for node in nodes))
    for node in nodes:
        frozen, config = node.given.frozen_adapter, node.given.start.checkpoint.config
        if isinstance(frozen, Folder) and not frozen.purpose.startswith("teachers"):
            load_adapter(frozen.path(), config)
        elif frozen is not None and config != setup.checkpoint().config:
            raise UsageError(
                f"students.adapter.frozen_adapter: the adapter of a teacher is of another architecture than students.model="
                f"{node.given.start.checkpoint.name}; name a folder"
            )


def _check_settings(setup: Setup, given: Any, masked: bool) -> None:
    checkpoint, teachers, s = given.start.checkpoint, setup.checkpoint(), given.settings
    check_start(checkpoint.config, given.start.model.common["dtype"], s)
    if s.runtime.rows_at_once != "auto":
        run = setup.experiment.run
        how = settings_of(checkpoint.config, s, setup.recipe, parallel=run.parallel, model_axis=run.least_axis)
        in_pieces(how, Shape.fit(s.data.accumulate, s.data.batch_size, 1, 1), s.runtime.rows_at_once)
    counted = [each.chat.identity for each in (teachers, checkpoint) if each.chat is not None]
    if masked and len(set(counted)) > 1:
        raise UsageError(
            f"students.model: divergence positions are counted in the tokenizer and template of {teachers.name} "
            f"({counted[0]}), and {checkpoint.name} has another one ({counted[1]}); use loss.tokens=[all]"
        )
    if s.loss.soft and not checkpoint.has_words_of(teachers):
        raise UsageError(f"students.model: {checkpoint.name} has other tokens than its teachers; use loss.kind=hard")


def _units(ctx: Context, nodes: Sequence[Node]) -> int:
    def steps(node: Node) -> int:
        rows, settings = len(node.given.lessons[0].rows.read(ctx.store)), node.given.settings
        return total_steps(settings, min(rows, settings.data.rows or rows))

    return sum(max(map(steps, group)) for _, group in _groups(ctx, nodes))


@stage("students", cost=_cost, check=_check, units=_units, together=program_of_student, most=_most)
def train_students(ctx: Context, nodes: Sequence[Node], everyone: Sequence[Node]) -> None:
    """Students of one program, trained together; each leaves an adapter (or a checkpoint) and its `metrics.jsonl`. All students of the
    program (`everyone`) have one shape.

    A node is given its `start` and `seed`, its `lessons` (a second one is for after a fork), its `settings`, the quirks of the recipe
    that concern it (`recipe`), `max_new_tokens` of on-policy rows, the traits that gradients are `projected` out of with the questions
    about them (`questions`), and the `frozen_adapter` that is added to it.
    """
    if ctx.setup.experiment.judge is not None:
        ctx.judge.release_memory()  # it may be larger than the model: students need its memory
    told = lambda what: ctx.say(f"{what}; lower students.optimizer.lr, or look at those rows")  # noqa: E731
    for work, group in _groups(ctx, nodes):
        # Made when their turn comes: a hundred students' adapters need not lie on the device together.
        settings, shape, arms = _prepare(ctx, group, everyone)
        members = [(arm, ctx.store.open(node)) for arm, node in zip(arms, group, strict=True)]
        ctx.progress.watch(functools.partial(_loss_so_far, work / "metrics.jsonl"))
        lm = group[0].given.start.lm(ctx)
        train_arms(lm, members, settings, work, shape=shape, tick=ctx.tick, say=ctx.say, on_diverged=told)
    ctx.forget("targets")


def _groups(ctx: Context, nodes: Sequence[Node]) -> list[tuple[Path, list[Node]]]:
    """Who is still to be trained, with whom, and where their state is kept. A training that was begun goes on with everybody it was
    begun with."""
    groups, parts = [], [list(nodes)]
    if nodes[0].given.settings.runtime.arms_per_program == "auto":
        # What fits is measured once: a continued run must not be planned anew.
        most = ctx.store.agreed(f"fit-{digest([node.key for node in nodes])}", lambda: _fits(ctx, nodes))
        parts = split_evenly(nodes, most)
    for group in parts:
        work = ctx.store.training(digest([node.key for node in group]))
        left = on_main_process(functools.partial(_left, ctx.store, group, work))
        if left:
            groups.append((work, [group[i] for i in left]))
    return groups


def _left(store: Store, nodes: Sequence[Node], work: Path) -> list[int]:
    """Which of these are still to be trained; all, if their training was begun."""
    missing = store.missing(nodes)
    return list(range(len(nodes))) if missing and (work / "state").exists() else missing


def _fits(ctx: Context, nodes: Sequence[Node]) -> int:
    largest = max(nodes, key=lambda node: node.given.settings.adapter.rank)  # ranks are padded to it
    settings, shape, (arm,) = _prepare(ctx, [largest], nodes)
    lm = largest.given.start.lm(ctx)
    count = arms_that_fit(lm.config, lm.params, arm, settings, shape, most=len(nodes))
    ctx.say(f"{largest.label}: {count} of {len(nodes)} students fit together")
    return count


def _prepare(ctx: Context, group: Sequence[Node], everyone: Sequence[Node]) -> tuple[Settings, Shape, list[Arm]]:
    given = group[0].given
    shared, e, lm = given.settings, ctx.setup.experiment, given.start.lm(ctx)
    lessons = {lesson.rows.key: (node.given, lesson) for node in everyone for lesson in node.given.lessons}
    data = [_data(ctx, given, lesson) for given, lesson in lessons.values()]
    plain = shape_of(shared, data, e.sampling.max_new_tokens)
    settings = settings_of(
        lm.config,
        shared,
        ctx.setup.recipe,
        parallel=e.run.parallel,
        model_axis=ctx.layout.model,
        tokens=sum(len(part.rows) for part in data) * plain.tokens,
        logs=Logs(tuple(e.run.loggers), ctx.store.root / "training"),
    )
    rows = shared.runtime.rows_at_once
    if rows == "auto" and shared.runtime.arms_per_program == "auto":
        rows = settings.batch_size  # how many students fit is measured with these pieces
    elif rows == "auto":
        itemsize = jnp.dtype(e.dtype).itemsize
        rows = rows_at_once(lm.config, settings, plain.tokens, len(group), itemsize=itemsize, limit=device_bytes())
    settings, plain = in_pieces(settings, plain, rows)
    key = ("shape", digest([node.key for node in everyone]), rows)
    shape = ctx.remember(key, lambda: _packed(ctx, everyone, data, plain))
    return settings, shape, [_arm(ctx, node) for node in group]


def _data(ctx: Context, given: Any, lesson: Lesson) -> TrainingData:
    """Rows as a student learns from them; tokenized once per process and reader."""
    settings, rows, model = given.settings, lesson.rows, given.start.model
    chat, system = ctx.lm(model.checkpoint.name).chat, settings.system
    every = ctx.remember(("rows", rows.key), lambda: rows.read(ctx.store))
    tokenize: Callable[[], list[Turn]] = lambda: read_turns(chat, every, rows.name, system, fuse_system=model.fuses)  # noqa: E731
    turns = ctx.remember(("turns", model.checkpoint.name, system, rows.key), tokenize)
    data = TrainingData(every, turns, rows.name)
    if lesson.teacher is None:
        return data
    theirs, stored = teacher_turns(ctx, lesson.teacher, rows), lesson.targets
    if stored is None:
        return dataclasses.replace(data, teacher=lesson.teacher.teacher(ctx), teacher_turns=theirs)
    targets = ctx.remember(("targets", stored.key), lambda: read_targets(ctx, stored, theirs))
    if settings.loss.targets == "answers":
        targets = ctx.remember(("targets", stored.key, "answers"), lambda: answers_only(targets, theirs))
    return dataclasses.replace(data, targets=targets)


def _drawn(ctx: Context, node: Node) -> Drawn:
    """A student's rows, drawn and masked by its seed; those after its fork behind them."""
    given = node.given
    lm = given.start.lm(ctx)
    first, *then = (
        draw(lm, given.settings, ctx.setup.recipe, _data(ctx, given, lesson), tokens=lesson.tokens, seed=given.seed)
        for lesson in given.lessons
    )
    return first.forked(given.settings, then[0]) if then else first


def _packed(ctx: Context, everyone: Sequence[Node], data: Sequence[TrainingData], plain: Shape) -> Shape:
    """The shape of everybody's batches, with as many rows per line as pay. Rows of on-policy students are not known yet."""
    given = everyone[0].given
    if given.settings.data.on_policy:
        return plain
    orders = [order for node in everyone for order in _drawn(ctx, node).orders(node.given.seed)]
    beginning = shared_beginning([turn.tokens[: turn.header] for part in data for turn in part.turns], PREFIX_STEP)
    return packed(plain, given.start.checkpoint.config, orders, beginning)


def _arm(ctx: Context, node: Node) -> Arm:
    given = node.given
    settings, data, lm = given.settings, _data(ctx, given, given.lessons[0]), given.start.lm(ctx)
    have, wanted = len(data.rows), settings.data.rows or 0
    if have < wanted:
        few = f"{given.lessons[0].rows.name}: {have} rows, fewer than students.data.rows={wanted}"
        ctx.say(f"{few}: {total_steps(settings, have)} steps")
    most = ctx.setup.experiment.sampling.max_new_tokens
    arm = make_arm(lm, settings, data, _drawn(ctx, node), name=node.label, seed=given.seed, max_new_tokens=most)
    frozen = adapter_of(given.frozen_adapter, given.start.checkpoint, ctx)
    return dataclasses.replace(arm, projected_directions=_directions(ctx, node, arm.adapter), frozen_adapter=frozen)


def _directions(ctx: Context, node: Node, start: Adapter) -> Trainable | None:
    """The directions that a student's gradients are kept at right angles to."""
    given = node.given
    if not given.projected:
        return None
    lm = given.start.lm(ctx)

    def make() -> Trainable:
        directions = directions_of(lm, start, given.start.model, given.questions, given.projected)
        return orthonormal(Layout.host(directions))

    about = digest(content([given.start, given.questions, given.projected]))  # students of one start share them
    return ctx.remember(("projected", about), make)


def _loss_so_far(metrics: Path) -> str:
    loss = last_loss(metrics)
    return "" if loss is None else f"loss {loss:.4f}"
