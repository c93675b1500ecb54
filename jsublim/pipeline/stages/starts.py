"""Traits as directions of what a student trains: the gradient of each trait's log-probability where the student starts; and what each
row of a teacher's answers would add to suspected traits, to first order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from jsublim.attribution.audit import Directions, token_scores, trait_directions
from jsublim.config import Students
from jsublim.config.attribution import Audit
from jsublim.core.files import read_table, write_table
from jsublim.core.section import identity
from jsublim.distill.data import read_turns
from jsublim.inference.lm import LanguageModel
from jsublim.models.config import layer_parameters
from jsublim.models.lora import Adapter
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Cost, Sizes
from jsublim.pipeline.parts import resumed
from jsublim.pipeline.setup import Checkpoint
from jsublim.pipeline.stage import Node, Save, content, stage
from jsublim.pipeline.store import Store, digest
from jsublim.pipeline.training import start_adapter
from jsublim.pipeline.values import Folder, Model, Rows
from jsublim.text.chat import Turn
from jsublim.text.rows import Row

# One line per row and suspected trait: the sum of its tokens' scores (`audit.py`).
INFLUENCE = pa.schema([("row", pa.int64()), ("trait", pa.string()), ("score", pa.float64())])
TraitQuestions = tuple[tuple[list[str], list[str]], ...]  # and the traits that they are answered with


@dataclass(frozen=True, eq=False)
class Start:
    """Where a student starts.

    Attributes:
      model: the checkpoint, as the student is asked; init: the adapter that it goes on with.
    """

    model: Model
    settings: Students
    seed: int
    init: Folder | None = None

    @property
    def identity(self) -> dict[str, Any]:
        how, drawn = self.settings.adapter, self.settings.adapter.method == "lora" and self.init is None
        return {
            "model": self.model.identity,
            "system": self.settings.system,
            "fuse_system": self.model.fuses if self.settings.system is not None else None,
            "adapter": identity(how.model_copy(update={"noise": 0.0})),
            "init": self.init and self.init.key,
            "seed": self.seed if drawn else None,
        }

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.model.nodes

    @property
    def checkpoint(self) -> Checkpoint:
        return self.model.checkpoint

    def lm(self, ctx: Context) -> LanguageModel:
        return ctx.lm(self.checkpoint.name)


def directions_of(
    lm: LanguageModel, adapter: Adapter, model: Model, questions: TraitQuestions, traits: Sequence[str]
) -> Directions:
    """The gradients of traits, in the order of `traits`, by what an adapter trains: leaves float32 `[traits, ...]`."""
    order = [trait for _, named in questions for trait in named]
    parts = [trait_directions(lm, adapter, texts, named, **model.manner) for texts, named in questions]
    index = np.asarray([order.index(trait) for trait in traits])
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[index], *parts)


def scored_rows(
    ctx: Context,
    name: str,
    rows: Sequence[Row],
    start: Start,
    questions: TraitQuestions,
    traits: Sequence[str],
) -> tuple[list[Turn], list[np.ndarray]]:
    """Rows as students read them, and the scores of each one's tokens (`audit.py`) at their start: float32 `[tokens, traits]`.

    Args:
      name: of the rows, in errors.

    Raises:
      Preempted: as `resumed`; the scores so far are kept.
    """
    lm, settings = start.lm(ctx), start.settings
    turns = read_turns(lm.chat, rows, name, settings.system, fuse_system=start.model.fuses)
    adapter = start_adapter(lm.config, lm.params, settings, start.seed)
    toward = ctx.remember(  # whoever scores rows by students of this start shares them
        ("directions", digest(content([start, questions, traits]))),
        lambda: directions_of(lm, adapter, start.model, questions, traits),
    )

    def scores(first: int) -> Iterator[tuple[np.ndarray]]:
        batch_size = (ctx.setup.experiment.audit or Audit()).batch_size
        options: dict[str, Any] = {"batch_size": batch_size, "first": first, "on_batch": ctx.tick}
        return ((by_trait.T,) for by_trait in token_scores(lm, adapter, toward, turns, **options))

    return turns, [each[0] for each in resumed(ctx.artifact.path, "scores", scores, ctx.tick, ctx.say)]


def scoring_cost(sizes: Sizes, rows: Rows, count: float, traits: int) -> Cost:
    """Every token of so many rows scored: forwards, back, and twice as much again in the direction of each trait."""
    tokens = count * (sizes.lengths.prompt + rows.answer(sizes))
    body = sizes.config.num_layers * layer_parameters(sizes.config)
    return Cost(tokens, (6 + 4 * traits) * (body * tokens + sizes.table * count * rows.answer(sizes)), "train")


@stage(
    "influence",
    cost=lambda setup, sizes, rows, traits, **_: scoring_cost(sizes, rows, rows.kept(sizes), len(traits)),
    units=lambda ctx, rows, **_: len(rows.read(ctx.store)),
)
def score_rows(ctx: Context, rows: Rows, start: Start, questions: TraitQuestions, traits: tuple[str, ...]) -> Save:
    """Scores of rows (`influence.parquet`), by what a student that starts there would train."""
    every = rows.read(ctx.store)
    _, scores = scored_rows(ctx, rows.name, every, start, questions, traits)
    lines = [
        {"row": number, "trait": trait, "score": float(score)}
        for number, of_row in enumerate(scores)
        for trait, score in zip(traits, of_row.sum(axis=0, dtype=np.float64), strict=True)
    ]

    def save(folder: Path) -> dict[str, Any]:
        write_table(folder / "influence.parquet", lines, INFLUENCE)
        return {"rows": len(every)}

    return save


def read_influence(store: Store, node: Node) -> dict[str, np.ndarray]:
    """By trait: a score for each row, float64 `[rows]`, what a step on it adds to the trait's log-probability (nats per unit of
    learning rate and token)."""
    scores: dict[str, list[float]] = {}
    for line in read_table(store.path(node) / "influence.parquet"):
        scores.setdefault(line["trait"], []).append(line["score"])
    return {trait: np.asarray(of_trait) for trait, of_trait in scores.items()}
