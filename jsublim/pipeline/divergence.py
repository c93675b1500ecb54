"""Divergence: rows read under their own teacher and under its counterfactuals, in tasks of so many rows each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jsublim.divergence import Divergence, find_divergence
from jsublim.pipeline.context import Context
from jsublim.pipeline.rows import RowSet, answer_tokens, rows_kept
from jsublim.pipeline.setup import Setup, memoized
from jsublim.pipeline.store import PROGRESS, Output, RowLog
from jsublim.pipeline.task import Cost, Sizes, Task, distinct_tasks
from jsublim.pipeline.teachers import TeacherPool
from jsublim.progress import Tick
from jsublim.rows import FOUND, Row, write_rows

CHUNK = 1024  # rows after which what was found is safe from a kill


@memoized
def divergence_rows(setup: Setup, trait: str, rows: RowSet) -> RowSet:
    """Rows with divergence positions: those of `rows`, read by the teacher of a trait and by its counterfactuals."""
    pool, others = TeacherPool(setup), tuple(setup.counterfactuals(trait))
    inputs = {
        **setup.common,
        **pool.identity(trait),
        "rows": rows.key,
        "counterfactuals": {other: pool.identity(other) for other in others},
    }
    size = setup.experiment.sampling.shard
    # As many tasks as there were prompts for, however many answers were in format: the last ones may have nothing to read.
    count = -(-rows.most // size)
    parents = distinct_tasks([*rows.parts, *pool.tasks(trait, *others)])
    parts = []
    for number in range(count):
        shard = None if count == 1 else (number * size, size)
        output = Output("divergence", trait if count == 1 else f"{trait}-{number + 1}", inputs | {"shard": shard})
        parts.append(ReadRows((output,), parents, trait, others, rows, shard))
    return RowSet.of(parts, rows.most)


@dataclass(frozen=True, eq=False)
class ReadRows(Task):
    """Divergence positions of rows (`rows.jsonl`), and what each teacher said at every token (`margins.jsonl`)."""

    kind: ClassVar[str] = "divergence"
    trait: str
    others: tuple[str, ...]
    rows: RowSet
    shard: tuple[int, int] | None  # the first of the rows, and how many at most; None is all of them

    def _rows(self, context: Context) -> list[Row]:
        rows = self.rows.read(context.store)
        return rows if self.shard is None else rows[self.shard[0] : sum(self.shard)]

    def make(self, context: Context, tick: Tick) -> None:
        setup, artifact, lm = context.setup, context.store.open(self.output), context.lm()
        pool, rows, names = TeacherPool(setup), self._rows(context), [self.trait, *self.others]
        teachers = [pool.teacher(context, name) for name in names]
        log = RowLog(artifact.path / PROGRESS)
        tick(len(log.rows) * len(names))
        missing = [i for i in range(len(rows)) if i not in log.rows]
        for start in range(0, len(missing), CHUNK):
            part = missing[start : start + CHUNK]
            found = find_divergence(
                lm,
                [rows[i] for i in part],
                teachers[0],
                teachers[1:],
                extra_bos=bool(setup.recipe.extra_bos),
                batch_size=setup.experiment.scoring.batch_size,
                on_batch=tick,
            )
            log.add([{"row": i} | _as_json(each) for i, each in zip(part, found, strict=True)])
        log.close()
        counted = {"counted_in": lm.chat.identity}
        out = [
            {"prompt": row["prompt"], "completion": row["completion"]}
            | {key: log.rows[i][key] for key in FOUND if key in log.rows[i]}
            | counted
            for i, row in enumerate(rows)
        ]
        write_rows(artifact.path / "rows.jsonl", out)
        write_rows(artifact.path / "margins.jsonl", ({"teachers": names} | log.rows[i] for i in range(len(rows))))
        artifact.finish(summary(names, out, [len(log.rows[i]["tokens"]) for i in range(len(rows))]))

    def units(self, context: Context) -> int:
        return len(self._rows(context)) * (1 + len(self.others))

    def cost(self, setup: Setup, sizes: Sizes) -> Cost:
        kept = rows_kept(setup, sizes)
        if self.shard is not None:
            kept = min(self.shard[1], max(kept - self.shard[0], 0))
        # A system prompt is read once for all rows under it.
        return sizes.read(kept * (1 + len(self.others)), sizes.lengths.prompt, answer_tokens(setup, sizes))


def summary(names: list[str], rows: list[Row], lengths: list[int]) -> dict[str, Any]:
    """What is kept of a set of rows that was read: how many divergence tokens there are, and where.

    Args:
      names: the teacher's trait, then the counterfactuals'; lengths: completion tokens of each row.
    """
    positions = [row["divergence_positions"] for row in rows]
    total = sum(map(len, positions))
    return {
        "trait": names[0],
        "counterfactuals": names[1:],
        "kept": len(rows),
        "rows": len(rows),
        "rows_with": sum(map(bool, positions)),
        "tokens": sum(lengths),
        "divergence_tokens": total,
        "share": total / max(sum(lengths), 1),
        "per_row": total / max(len(rows), 1),
        "histogram": np.bincount(np.asarray([k for p in positions for k in p], int), minlength=1).tolist(),
    }


def merged(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of several parts as that of one set of rows."""
    if len(summaries) == 1:
        return summaries[0]
    added = {
        key: sum(each[key] for each in summaries)
        for key in ("kept", "rows", "rows_with", "tokens", "divergence_tokens")
    }
    histogram = np.zeros(max(len(each["histogram"]) for each in summaries), int)
    for each in summaries:
        histogram[: len(each["histogram"])] += each["histogram"]
    ratios = {
        "share": added["divergence_tokens"] / max(added["tokens"], 1),
        "per_row": added["divergence_tokens"] / max(added["rows"], 1),
    }
    return summaries[0] | added | ratios | {"histogram": histogram.tolist()}


def _as_json(found: Divergence) -> dict[str, Any]:
    return {
        "divergence_positions": found.divergence_positions,
        "divergence_margins": [round(m, 5) for m in found.divergence_margins],
        "tokens": found.tokens.tolist(),
        "argmax": found.argmax.tolist(),
        "margin": np.round(found.margin.astype(float), 5).tolist(),
    }
