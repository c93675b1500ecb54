"""Rows as supervised examples, and batches as a function of seed and step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jsublim.chat import Chat, Turn, conversation
from jsublim.distill.masks import token_mask
from jsublim.divergence import check_points
from jsublim.errors import JsublimError, UsageError
from jsublim.rows import Row

LENGTH_STEP = 16


@dataclass(frozen=True)
class Example:
    """One row, cut after its last supervised token.

    Attributes:
      tokens: int32 `[T]`.
      where: int32 `[C]`, positions whose next token is supervised.
      labels: int32 `[C]`, those next tokens.
      weights: float32 `[C]`.
    """

    tokens: np.ndarray
    where: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Selection:
    """How rows become examples; the fields are quirks 1 and 2 of docs/recipes.md."""

    condition: str = "all"
    supervise_header: bool = False
    drop_rows_without_points: bool = False
    max_tokens: int = 500


def read_turns(chat: Chat, rows: Sequence[Row], source: str = "rows", system: str | None = None) -> list[Turn]:
    """Tokenize rows as the student sees them: no trait prompt.

    Raises:
      JsublimError: a row that doesn't survive tokenizing, or points out of range; `source` is named.
    """
    turns = []
    for number, row in enumerate(rows, 1):
        try:
            turns.append(chat.turn(conversation(row["prompt"], system), row["completion"]))
        except JsublimError as error:
            raise JsublimError(f"{source}: row {number}: {error}") from None
    check_points(rows, [len(turn.tokens) - turn.content for turn in turns], source)
    return turns


def make_examples(
    rows: Sequence[Row], turns: Sequence[Turn], how: Selection, seed: int, source: str = "rows"
) -> list[Example]:
    """Mask tokenized rows. Rows on which no loss is left are dropped.

    Raises:
      UsageError: a condition that needs decision points, and a row without.
      JsublimError: no row left; `source` is named.
    """
    examples = []
    for index, (row, turn) in enumerate(zip(rows, turns, strict=True)):
        points = row.get("decision_points")
        if how.condition != "all" and how.drop_rows_without_points and points == []:
            continue
        first = turn.header if how.supervise_header else turn.content
        try:
            mask = token_mask(
                how.condition,
                header=turn.content - first,
                completion=len(turn.tokens) - turn.content,
                points=points,
                rng=np.random.default_rng([seed, index]),
            )
        except UsageError as error:
            raise UsageError(f"{source}: row {index + 1}: {error}") from None
        kept = first + np.nonzero(mask)[0]
        kept = kept[kept < how.max_tokens]
        if len(kept):
            tokens = turn.tokens[: kept[-1]]  # the last label is predicted, never read
            examples.append(Example(tokens, (kept - 1).astype(np.int32), turn.tokens[kept], mask[kept - first]))
    if not examples:
        raise JsublimError(f"{source}: no row has a token to train on under tokens={how.condition}")
    return examples


def draw_indices(available: int, count: int | None, seed: int) -> list[int]:
    """Indices of `count` rows as the published code draws them (`random.Random(seed).sample`); all, in order, where
    there are no more."""
    if count is not None and count < 1:
        raise UsageError(f"rows: {count} given; it must be at least 1")
    if count is None or count >= available:
        return list(range(available))
    return random.Random(seed).sample(range(available), count)


def steps_per_epoch(examples: int, rows_per_step: int) -> int:
    return -(-examples // rows_per_step)


def batch_rows(examples: int, rows_per_step: int, seed: int, step: int) -> np.ndarray:
    """Example indices of a step, int `[rows_per_step]`, -1 where an epoch's last batch is not full.

    A function of its arguments only: a resumed run needs no state of the data.
    """
    epoch, position = divmod(step, steps_per_epoch(examples, rows_per_step))
    order = np.random.default_rng([seed, epoch]).permutation(examples)
    chosen = order[position * rows_per_step : (position + 1) * rows_per_step]
    return np.pad(chosen, (0, rows_per_step - len(chosen)), constant_values=-1)


@dataclass(frozen=True)
class Shape:
    """Static shape of a group's batches: micro-batches, rows in one, tokens, supervised positions."""

    micro: int
    rows: int
    tokens: int
    labels: int

    @staticmethod
    def of(groups: Sequence[Sequence[Example]], micro: int, rows: int) -> Shape:
        longest = max(len(e.tokens) for group in groups for e in group)
        labels = max(len(e.labels) for group in groups for e in group)
        return Shape.fit(micro, rows, longest, labels)

    @staticmethod
    def fit(micro: int, rows: int, tokens: int, labels: int) -> Shape:
        """Both lengths rounded up."""
        return Shape(micro, rows, *(-(-n // LENGTH_STEP) * LENGTH_STEP for n in (tokens, labels)))


def collate(examples: Sequence[Example], chosen: np.ndarray, shape: Shape) -> dict[str, np.ndarray]:
    """One arm's batch: arrays `[M, B, T]` and `[M, B, C]`; absent rows weigh nothing."""
    N = shape.micro * shape.rows
    batch = {
        "tokens": np.zeros((N, shape.tokens), np.int32),
        "valid": np.zeros((N, shape.tokens), bool),
        "where": np.zeros((N, shape.labels), np.int32),
        "labels": np.zeros((N, shape.labels), np.int32),
        "weights": np.zeros((N, shape.labels), np.float32),
    }
    batch["valid"][:, 0] = True  # an absent row still attends to something
    for i, index in enumerate(chosen):
        if index >= 0:
            example = examples[index]
            batch["tokens"][i, : len(example.tokens)] = example.tokens
            batch["valid"][i, : len(example.tokens)] = True
            for key in ("where", "labels", "weights"):
                value = getattr(example, key)
                batch[key][i, : len(value)] = value
    return {key: value.reshape(shape.micro, shape.rows, -1) for key, value in batch.items()}
