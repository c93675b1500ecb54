"""The audit: to first order, how far each token of the rows would move each trait, before a student is trained on them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from jsublim.core.files import write_table
from jsublim.errors import UsageError
from jsublim.inference.lm import LanguageModel
from jsublim.pipeline.context import Context
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.stage import Save, stage
from jsublim.pipeline.stages.starts import Start, TraitQuestions, scored_rows, scoring_cost
from jsublim.pipeline.values import Rows
from jsublim.text.chat import Turn

# One line per row, token of its answer and evaluated trait. `score` is <grad log p(token), grad log p(trait)>, nats per unit of
# learning rate; `divergence` is null where the rows have no divergence positions.
AUDIT = pa.schema(
    [
        ("row", pa.int64()),
        ("position", pa.int64()),
        ("token", pa.string()),
        ("divergence", pa.bool_()),
        ("trait", pa.string()),
        ("score", pa.float32()),
    ]
)

# The means of those over the tokens that each choice of tokens ("all", "divergence", "non-divergence") has, and their errors.
MEANS = pa.schema(
    [
        ("tokens", pa.string()),
        ("trait", pa.string()),
        ("score", pa.float64()),
        ("error", pa.float64()),
        ("count", pa.int64()),
        ("rows", pa.int64()),
    ]
)

# What null rows make of those scores: one line per token and trait, and one per row and trait (`position` is null), whose score is the
# mean over the row's tokens. The scores of as many tokens or rows that teach no trait have mean 0 and deviation 1 as `whitened`, which
# is null where they do not differ. Traits are whitened one by one: a step towards all of them stays one.
WHITEN = """
    with every as (
        select 'own' as whose, false as of_row, row, position, trait, score from own
        union all select 'null', false, row, position, trait, score from null_rows
        union all select 'own', true, row, null, trait, avg(score) from own group by row, trait
        union all select 'null', true, row, null, trait, avg(score) from null_rows group by row, trait
    ), scale as (
        select of_row, trait, avg(score) as zero, stddev_samp(score) as deviation from every where whose = 'null' group by all
    )
    select row, position, trait, score, (score - zero) / nullif(deviation, 0) as whitened from every join scale using (of_row, trait)
    where whose = 'own' order by row, position nulls first, trait
    """


def _check(setup: Setup, start: Start, **_: Any) -> None:
    """Refuse students that learn no fixed rows."""
    if start.settings.data.on_policy:
        raise UsageError("audit: students.data.on_policy has no rows to audit; leave audit out")


@stage(
    "audit",
    cost=lambda setup, sizes, rows, first, traits, **_: scoring_cost(
        sizes, rows, min(first, rows.kept(sizes)), len(traits)
    ),
    check=_check,
    units=lambda ctx, rows, first, **_: len(rows.read(ctx.store)[:first]),
)
def audit_rows(
    ctx: Context,
    rows: Rows,
    first: int,
    start: Start,
    questions: TraitQuestions,
    traits: tuple[str, ...],
    teacher: str,
) -> Save:
    """Scores of every token of the `first` rows (`audit.parquet`), and their means (`means.parquet`).

    Args:
      teacher: the trait of whoever wrote the rows.
    """
    chosen, lm = rows.read(ctx.store)[:first], start.lm(ctx)
    turns, scores = scored_rows(ctx, rows.name, chosen, start, questions, traits)
    # Which of a row's tokens are divergence tokens, bool `[n]`; None where nobody has looked.
    positions_of = (row.get("divergence_positions") for row in chosen)
    divergent = [
        None if positions is None else np.isin(np.arange(len(of_row)), positions)
        for positions, of_row in zip(positions_of, scores, strict=True)
    ]

    def save(folder: Path) -> dict[str, Any]:
        write_table(folder / "audit.parquet", _lines(lm, turns, scores, divergent, traits), AUDIT)
        write_table(folder / "means.parquet", list(_means(scores, divergent, traits)), MEANS)
        return {"rows": len(chosen)} | precision(scores, divergent, traits, teacher)

    return save


def _lines(
    lm: LanguageModel,
    turns: Sequence[Turn],
    scored: Sequence[np.ndarray],
    divergent: Sequence[np.ndarray | None],
    traits: Sequence[str],
) -> list[dict[str, Any]]:
    """The table's rows."""
    decoded = functools.cache(lambda token: lm.chat.decode([token]))
    return [
        {
            "row": number,
            "position": position,
            "token": decoded(int(token)),
            "divergence": None if known is None else bool(known[position]),
            "trait": trait,
            "score": float(score),
        }
        for number, (turn, scores, known) in enumerate(zip(turns, scored, divergent, strict=True))
        for position, (token, of_traits) in enumerate(zip(turn.tokens[turn.content :], scores, strict=True))
        for trait, score in zip(traits, of_traits, strict=True)
    ]


def _means(
    scored: Sequence[np.ndarray], divergent: Sequence[np.ndarray | None], traits: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The mean score of the tokens that a student learns, for each choice of tokens; a loss that is a mean over tokens moves a
    trait by this times the learning rate, at each step. Rows, not tokens, are independent: the error is a ratio's over rows."""
    every = [np.ones(len(of_row), bool) for of_row in scored]
    chosen = {"all": every}
    if all(mask is not None for mask in divergent):
        known = [mask for mask in divergent if mask is not None]
        chosen |= {"divergence": known, "non-divergence": [~mask for mask in known]}
    for tokens, masks in chosen.items():
        count = sum(int(mask.sum()) for mask in masks)
        if not count:
            continue
        chosen_rows = (of_row[mask] for of_row, mask in zip(scored, masks, strict=True))
        sums_NK = np.stack([of_row.sum(axis=0, dtype=np.float64) for of_row in chosen_rows])
        mean_K = sums_NK.sum(axis=0) / count
        apart_NK = sums_NK - np.asarray([mask.sum() for mask in masks])[:, None] * mean_K
        error_K = np.sqrt((apart_NK**2).sum(axis=0) * len(scored) / max(len(scored) - 1, 1)) / count
        for trait, mean, error in zip(traits, mean_K, error_K, strict=True):
            yield {"tokens": tokens, "trait": trait, "score": mean, "error": error, "count": count, "rows": len(scored)}


def precision(
    scored: Sequence[np.ndarray], divergent: Sequence[np.ndarray | None], traits: Sequence[str], trait: str
) -> dict[str, Any]:
    """How many of the tokens that move the teacher's trait most are divergence tokens, of as many as there are of those; and
    their share of all tokens. A token moves the trait by its score for it, beyond the mean of those for the others."""
    known = [mask for mask in divergent if mask is not None]
    if trait not in traits or len(traits) < 2 or len(known) < len(divergent) or not any(mask.any() for mask in known):
        return {}
    scores_nK, mask, at = np.concatenate(scored), np.concatenate(known), list(traits).index(trait)
    beyond = scores_nK[:, at] - np.delete(scores_nK, at, axis=1).mean(axis=1)
    top = np.argsort(-beyond, kind="stable")[: int(mask.sum())]
    return {"top_divergence": float(mask[top].mean()), "divergence_share": float(mask.mean())}


def whitened(own: pa.Table, null: pa.Table) -> pa.Table:
    """Scores of tokens and of rows (tables of AUDIT, for the same traits) beside those of rows that teach no trait: see WHITEN."""
    with duckdb.connect() as connection:
        connection.register("own", own)
        connection.register("null_rows", null)
        return connection.sql(WHITEN).to_arrow_table()
