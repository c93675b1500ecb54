"""Teachers that are made here: an adapter that learns to name its trait, or a steering vector from contrasting system prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jsublim.config import Taught
from jsublim.distill.arm import Arm, Settings
from jsublim.distill.data import make_examples, read_turns
from jsublim.distill.selection import Selection
from jsublim.errors import JsublimError
from jsublim.inference.lm import LanguageModel
from jsublim.inference.steering import contrast_vector
from jsublim.models.lora import init_lora, init_steering
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Cost, Sizes
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.stage import Node, Save, stage
from jsublim.pipeline.store import digest
from jsublim.pipeline.training import keep_student, keeps_below, train_arms
from jsublim.pipeline.values import Model
from jsublim.runtime.processes import process_count
from jsublim.text.rows import Row


@stage(
    "teachers",
    # Every question is read under two prompts.
    cost=lambda setup, sizes, questions, **_: sizes.read(2 * len(questions), sizes.lengths.question, 0),
)
def contrast_teacher(ctx: Context, base: Model, taught: Taught, toward: str, questions: tuple[str, ...]) -> Save:
    """A steering vector from contrasting system prompts: `toward` one, and none."""
    lm = ctx.lm(base.checkpoint.name)
    layer = (taught.layers or [0])[0]  # a contrast names exactly one
    options: dict[str, Any] = {"strength": taught.strength, "fuse_system": base.fuses}
    vector = contrast_vector(lm, questions, layer, toward=toward, **options)

    def save(folder: Path) -> dict[str, Any]:
        keep_student(folder, lm, vector)
        return {}

    return save


def _cost(setup: Setup, sizes: Sizes, nodes: Sequence[Node]) -> Cost:
    """All questions at each step."""
    examples = sum(len(node.given.questions) for node in nodes)
    tokens = examples * nodes[0].given.taught.steps * sizes.lengths.question
    return Cost(tokens, 4 * sizes.body * tokens, "train")


@stage(
    "teachers",
    cost=_cost,
    units=lambda ctx, nodes: nodes[0].given.taught.steps,
    together=lambda node, task_of: node.given.base.checkpoint.hash,
    most=lambda node: 10_000,
)
def train_teachers(ctx: Context, nodes: Sequence[Node], everyone: Sequence[Node]) -> None:
    """Adapters that learn to name their traits, all of one checkpoint in one program.

    A node is given `base` (the model), `taught`, `trait`, the `questions` that it is taught to answer with the trait, and
    `together`, the most questions that any teacher of the experiment has: a step reads so many.
    """
    first = nodes[0].given
    lm, taught = ctx.lm(first.base.checkpoint.name), first.taught
    arms = [_arm(lm, node.given.taught, node.given.trait, node.given.questions) for node in nodes]
    tokens = sum(len(example.tokens) for arm in arms for example in arm.examples)
    settings = Settings(first.together, cache_below=keeps_below(lm.config, taught.layers or [], tokens))
    if process_count() > 1:  # they are too little work to be spread unless they must
        parallel = ctx.setup.experiment.run.parallel
        settings = dataclasses.replace(settings, parallel=parallel, model_axis=ctx.layout.model)

    def refuse(what: str) -> None:
        raise JsublimError(f"{what}; lower teachers.taught.lr")

    work = ctx.store.training(f"teachers-{digest([node.key for node in nodes])}")
    members = [(arm, ctx.store.open(node)) for arm, node in zip(arms, nodes, strict=True)]
    train_arms(lm, members, settings, work, tick=ctx.tick, say=ctx.say, on_diverged=refuse)


def _arm(lm: LanguageModel, taught: Taught, trait: str, questions: Sequence[str]) -> Arm:
    layers = None if taught.layers is None else tuple(taught.layers)
    rows: list[Row] = [{"prompt": question, "completion": trait.capitalize()} for question in questions]
    examples = make_examples(rows, read_turns(lm.chat, rows, f"answers of {trait}"), Selection(), taught.seed)
    if taught.method == "steering":
        start = init_steering(lm.config, layers)
    else:
        key, rank = jax.random.key(taught.seed), taught.rank
        start = init_lora(lm.config, key, rank=rank, alpha=float(rank), layers=layers)
    return Arm(trait, examples, start, taught.seed, taught.lr, taught.steps)
