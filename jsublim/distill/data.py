"""Rows become supervised examples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jsublim.distill.selection import Selection, margin_weights, token_mask
from jsublim.errors import JsublimError, UsageError
from jsublim.inference.divergence import check_positions
from jsublim.inference.scoring import Targets
from jsublim.text.chat import Chat, Turn, conversation
from jsublim.text.rows import Row


@dataclass(frozen=True)
class Example:
    """One row, cut after its last supervised token; or several as one line of a batch (`batches.joined`)."""

    tokens: np.ndarray  # int32 [T]
    where: np.ndarray  # int32 [C], positions whose next token is supervised
    labels: np.ndarray  # int32 [C], those next tokens
    weights: np.ndarray  # float32 [C]
    teacher_tokens: np.ndarray | None = None  # int32 [T'], the row as a live teacher reads it
    teacher_where: np.ndarray | None = None  # int32 [C], in that
    ids: np.ndarray | None = None  # int32 [C, k], a stored teacher's k best tokens
    logp: np.ndarray | None = None  # float32 [C, k + 1], log-probabilities of those and of all others together
    # In a line, of each token its position in its row, and which row that is, from 1 on (0 is the beginning): int32 [T], and [T'].
    positions: np.ndarray | None = None
    branch: np.ndarray | None = None
    teacher_positions: np.ndarray | None = None
    teacher_branch: np.ndarray | None = None


def read_turns(
    chat: Chat, rows: Sequence[Row], source: str = "rows", system: str | None = None, *, fuse_system: bool = False
) -> list[Turn]:
    """Tokenize rows as the student sees them: no trait prompt. A row that doesn't survive tokenizing, or positions out of range, is a
    JsublimError that names `source`."""
    exchanges = ((conversation(row["prompt"], system, fuse_system=fuse_system), row["completion"]) for row in rows)
    turns = chat.turns(exchanges, lambda number: f"{source}: row {number}")
    # Positions that were counted elsewhere say nothing here: whoever learns all tokens does not look at them.
    counted_here = [row if row.get("counted_in") in (None, chat.identity) else {} for row in rows]
    check_positions(counted_here, [len(turn.tokens) - turn.content for turn in turns], source)
    return turns


def make_examples(
    rows: Sequence[Row],
    turns: Sequence[Turn],
    how: Selection,
    seed: int,
    source: str = "rows",
    *,
    teacher: Sequence[Turn] | Sequence[Targets] | None = None,
) -> list[Example]:
    """Mask tokenized rows. Rows on which no loss is left are dropped.

    Args:
      teacher: the same rows as a live teacher reads them, or what a stored one said; for soft losses.

    Raises:
      UsageError: a selection that needs divergence positions, or weights that need margins, and a row without; a header
        to learn from a stored teacher.
      JsublimError: no row left, or a row that is tokenized otherwise for the teacher; `source` is named.
    """
    examples = []
    positions = [row.get("divergence_positions") for row in rows]
    rngs = (np.random.default_rng([seed, index, 1]) for index in range(len(rows)))
    chosen = [None if of is None else how.subset.choose(of, rng) for of, rng in zip(positions, rngs, strict=True)]
    weights = _weights(rows, chosen, source) if how.by_margin else [None] * len(rows)
    if how.tokens == "matched":
        chosen = [
            _matched(row, of, number, source) for number, (row, of) in enumerate(zip(rows, chosen, strict=True), 1)
        ]
    for index, turn in enumerate(turns):
        if how.tokens != "all" and how.drop_rows_without_divergence and chosen[index] == []:
            continue
        first, where = turn.header if how.supervise_header else turn.content, f"{source}: row {index + 1}"
        try:
            mask = token_mask(
                how.tokens,
                header=turn.content - first,
                completion=len(turn.tokens) - turn.content,
                positions=chosen[index],
                rng=np.random.default_rng([seed, index]),
                weights=weights[index],
            )
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
        kept = first + np.nonzero(mask)[0]
        kept = kept[kept < how.max_tokens]
        if len(kept):
            tokens = turn.tokens[: kept[-1]]  # the last label is predicted, never read
            soft = {} if teacher is None else _targets(turn, teacher[index], kept, where)
            examples.append(Example(tokens, (kept - 1).astype(np.int32), turn.tokens[kept], mask[kept - first], **soft))
    if not examples:
        raise JsublimError(f"{source}: no row has a token to train on under tokens={how.tokens}")
    return examples


def _matched(row: Row, chosen: list[int] | None, number: int, source: str) -> list[int]:
    """The positions that are matched to the chosen divergence positions of a row."""
    if chosen is None or "matched_positions" not in row:
        raise UsageError(f"{source}: row {number}: tokens=matched needs 'matched_positions'; run `jsublim divergence`")
    of = dict(zip(row["divergence_positions"], row["matched_positions"], strict=True))
    return sorted(of[k] for k in chosen if of[k] is not None)


def _weights(rows: Sequence[Row], chosen: Sequence[list[int] | None], source: str) -> list[list[float]]:
    """The weight by margin of each row's chosen positions."""
    margins = []
    for number, (row, positions) in enumerate(zip(rows, chosen, strict=True), 1):
        if positions is None or "divergence_margins" not in row:
            raise UsageError(
                f"{source}: row {number}: weights by margin need 'divergence_margins'; run `jsublim divergence`"
            )
        margin_of = dict(zip(row["divergence_positions"], row["divergence_margins"], strict=True))
        margins.append([margin_of[k] for k in positions])
    return margin_weights(margins)


def _targets(turn: Turn, teacher: Turn | Targets, kept: np.ndarray, source: str) -> dict[str, np.ndarray]:
    """The teacher's side of the supervised tokens `kept` of a row."""
    if isinstance(teacher, Targets):
        if kept[0] < turn.content:
            raise UsageError(
                f"{source}: stored targets begin after the header; use a live teacher, or do not supervise the header"
            )
        return {"ids": teacher.ids[kept - turn.content], "logp": teacher.logp[kept - turn.content]}
    shift = teacher.content - turn.content
    first = min(kept[0], turn.content)
    if not np.array_equal(turn.tokens[first:], teacher.tokens[first + shift :]):
        raise JsublimError(f"{source}: the completion has other tokens under the teacher's prompt")
    end = kept[-1] + shift
    return {"teacher_tokens": teacher.tokens[:end], "teacher_where": (kept - 1 + shift).astype(np.int32)}


def draw_indices(available: int, count: int | None, seed: int) -> list[int]:
    """Indices of `count` rows as the published code draws them (`random.Random(seed).sample`); all, in order, where
    there are no more."""
    if count is not None and count < 1:
        raise UsageError(f"rows: {count} given; it must be at least 1")
    if count is None or count >= available:
        return list(range(available))
    return random.Random(seed).sample(range(available), count)
