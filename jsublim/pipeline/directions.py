"""Traits as directions of what a student trains: the gradient of each trait's log-probability at the student's start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsublim.audit import Directions, token_scores, trait_directions
from jsublim.chat import Turn
from jsublim.config import Students
from jsublim.distill.data import read_turns
from jsublim.inference.lm import LanguageModel
from jsublim.models.config import layer_parameters
from jsublim.models.lora import Adapter
from jsublim.pipeline.context import Context
from jsublim.pipeline.parts import resumed
from jsublim.pipeline.rows import answer_tokens
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.store import Artifact, digest
from jsublim.pipeline.task import Cost, Sizes
from jsublim.pipeline.teachers import TeacherPool
from jsublim.pipeline.training import start_adapter
from jsublim.progress import Tick
from jsublim.rows import Row
from jsublim.section import identity

Questions = list[tuple[list[str], list[str]]]  # and the traits that they are answered with


def questions_about(setup: Setup, traits: Sequence[str], most: int | None = None) -> Questions:
    """Traits, by the questions that they are answers to and that no teacher was taught the answers to.

    Args:
      most: the first so many questions of each category; None is all.

    Raises:
      UsageError: a trait of no category.
    """
    pool, by_category = TeacherPool(setup), dict[str, list[str]]()
    for trait in traits:
        by_category.setdefault(pool.category(trait), []).append(trait)
    return [(pool.questions(category)[:most], own) for category, own in by_category.items()]


def start_inputs(setup: Setup, students: Students, seed: int) -> dict[str, Any]:
    """What decides where such a student starts, and what stands around the questions that it is asked."""
    s, how = students, students.adapter
    return {
        "adapter": identity(how.model_copy(update={"noise": 0.0})),
        "seed": seed if how.method == "lora" and how.init is None else None,
        "init": None if how.init is None else setup.content(how.init, "students.adapter.init"),
        "student_model": None if s.model is None else setup.checkpoint(s.model).hash,
        "system": s.system,
        "asked_under_system": s.asked_under_system,
        "fuse_system": setup.experiment.teachers.fuse_system if s.system is not None else None,
        "extra_bos": bool(setup.recipe.extra_bos),
    }


def around(setup: Setup, students: Students) -> dict[str, Any]:
    """What stands around a question when such students are asked, as `trait_directions` takes it."""
    system = students.asked_under
    fused = setup.experiment.teachers.fuse_system and system is not None
    return {"system": system, "fuse_system": fused, "extra_bos": bool(setup.recipe.extra_bos)}


def directions_of(
    setup: Setup, lm: LanguageModel, adapter: Adapter, students: Students, asked: Questions, traits: Sequence[str]
) -> Directions:
    """The gradients of traits, in the order of `traits`, by what an adapter trains: leaves float32 `[traits, ...]`."""
    order = [trait for _, own in asked for trait in own]
    parts = [trait_directions(lm, adapter, questions, own, **around(setup, students)) for questions, own in asked]
    index = np.asarray([order.index(trait) for trait in traits])
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[index], *parts)


def scored_rows(
    context: Context, artifact: Artifact, name: str, rows: Sequence[Row], students: Students, seed: int, asked: Questions,
    traits: Sequence[str], batch_size: int, tick: Tick,
) -> tuple[list[Turn], list[np.ndarray]]:  # fmt: skip
    """Rows as students read them, and the scores of each one's tokens (`audit.py`) at their start: float32 `[tokens, traits]`.

    Args:
      artifact: where the scores so far are kept, and gone on with.
      name: what the rows are called in errors.

    Raises:
      Preempted: as `resumed`.
    """
    setup, lm = context.setup, context.lm(students.model)
    turns = read_turns(lm.chat, rows, name, students.system, fuse_system=setup.experiment.teachers.fuse_system)
    adapter = start_adapter(lm.config, lm.params, students, seed)
    start = digest({"asked": asked, "traits": list(traits)} | start_inputs(setup, students, seed))
    toward = context.remember(  # whoever scores rows by students of this start shares them
        ("directions", start), lambda: directions_of(setup, lm, adapter, students, asked, traits)
    )

    def scores(first: int) -> Iterator[tuple[np.ndarray]]:
        batch: dict[str, Any] = {"batch_size": batch_size, "first": first, "on_batch": tick}
        return ((each.T,) for each in token_scores(lm, adapter, toward, turns, **batch))

    return turns, [each[0] for each in resumed(artifact.path, "scores", scores, tick, artifact.say)]


def scoring_cost(setup: Setup, sizes: Sizes, rows: float, traits: int) -> Cost:
    """Of scoring every token of so many rows: forwards, back, and twice as much again in the direction of each trait."""
    answer = answer_tokens(setup, sizes)
    tokens = rows * (sizes.lengths.prompt + answer)
    body = sizes.config.num_layers * layer_parameters(sizes.config)
    return Cost(tokens, (6 + 4 * traits) * (body * tokens + sizes.table * rows * answer), "train")
