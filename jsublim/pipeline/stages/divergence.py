"""Divergence: rows read under their own teacher and under its counterfactuals."""

from __future__ import annotations

from typing import Any

import numpy as np

from jsublim.distill.data import read_turns
from jsublim.inference.divergence import ReadFrom, find_divergence, kinds_of
from jsublim.inference.scoring import Scored
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Cost, Sizes
from jsublim.pipeline.parts import resumed
from jsublim.pipeline.readings import write_readings
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.stage import Save, stage
from jsublim.pipeline.values import Model, Rows
from jsublim.text.rows import Row, write_rows

COUNTS = ("kept", "rows", "rows_with", "tokens", "divergence_tokens")


def _own(ctx: Context, rows: Rows, shard: tuple[int, int] | None) -> list[Row]:
    every = rows.read(ctx.store)
    return every if shard is None else every[shard[0] : sum(shard)]


def _cost(
    setup: Setup, sizes: Sizes, rows: Rows, others: tuple[Model, ...], shard: tuple[int, int] | None, **_: Any
) -> Cost:
    kept = rows.kept(sizes) if shard is None else min(shard[1], max(rows.kept(sizes) - shard[0], 0))
    # A system prompt is read once for all rows under it.
    return sizes.read(kept * (1 + len(others)), sizes.lengths.prompt, rows.answer(sizes))


@stage(
    "divergence",
    cost=_cost,
    units=lambda ctx, rows, others, shard, **_: len(_own(ctx, rows, shard)) * (1 + len(others)),
)
def mark_divergence(
    ctx: Context, rows: Rows, teacher: Model, others: tuple[Model, ...], shard: tuple[int, int] | None
) -> Save:
    """Rows with their divergence positions (`rows.jsonl`), and what each teacher said at every token (`readings.parquet`).

    Args:
      shard: the first row that is read, and how many; None: all.
    """
    lm, chosen = ctx.lm(teacher.checkpoint.name), _own(ctx, rows, shard)
    names = [model.name for model in (teacher, *others)]

    def keep(number: int, read: ReadFrom) -> list[Scored]:
        """What an earlier call had read under a teacher, and the rest."""
        rows_from = lambda first: ((s.argmax, s.margin, s.logprob, s.entropy) for s in read(first))  # noqa: E731
        arrays = resumed(ctx.artifact.path, f"reading{number}", rows_from, ctx.tick, ctx.say)
        return [Scored(*of_row) for of_row in arrays]

    read = find_divergence(
        lm,
        chosen,
        teacher.teacher(ctx),
        [other.teacher(ctx) for other in others],
        extra_bos=teacher.extra_bos,
        batch_size=ctx.scoring_batch,
        on_batch=ctx.tick,
        keep=keep,
    )
    turns = read_turns(lm.chat, chosen, rows.name)
    marked = [
        {
            "prompt": row["prompt"],
            "completion": row["completion"],
            "divergence_positions": of_row.divergence_positions,
            "divergence_margins": [round(margin, 5) for margin in of_row.divergence_margins],
            "matched_positions": of_row.matched_positions(kinds_of(lm.chat, turn)),
            "counted_in": lm.chat.identity,
        }
        for row, turn, of_row in zip(chosen, turns, read, strict=True)
    ]

    def save(folder: Any) -> dict[str, Any]:
        write_rows(folder / "rows.jsonl", marked)
        fields = ("divergence_positions", "tokens", "argmax", "margin")
        readings = ({"teachers": names} | {name: getattr(of_row, name) for name in fields} for of_row in read)
        write_readings(folder / "readings.parquet", readings)
        return _summary(names, marked, sum(len(of_row.tokens) for of_row in read))

    return save


def _summary(names: list[str], rows: list[Row], tokens: int) -> dict[str, Any]:
    """How many divergence tokens there are, and where. `names` are the teacher's and the counterfactuals'."""
    positions = [row["divergence_positions"] for row in rows]
    histogram = np.bincount(np.asarray([k for of_row in positions for k in of_row], int), minlength=1)
    counts = {"kept": len(rows), "rows": len(rows), "rows_with": sum(map(bool, positions)), "tokens": tokens}
    counts["divergence_tokens"] = sum(map(len, positions))
    read_under = {"trait": names[0], "counterfactuals": names[1:]}
    return read_under | counts | _ratios(counts) | {"histogram": histogram.tolist()}


def _ratios(counts: dict[str, Any]) -> dict[str, float]:
    divergent = counts["divergence_tokens"]
    return {"share": divergent / max(counts["tokens"], 1), "per_row": divergent / max(counts["rows"], 1)}


def merged(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of several parts as that of one set of rows."""
    counts = {key: sum(part[key] for part in summaries) for key in COUNTS}
    histogram = np.zeros(max(len(part["histogram"]) for part in summaries), int)
    for part in summaries:
        histogram[: len(part["histogram"])] += part["histogram"]
    return summaries[0] | counts | _ratios(counts) | {"histogram": histogram.tolist()}
