"""Divergence: rows read under their own teacher and under its counterfactuals, in tasks of so many rows each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jsublim.divergence import Divergence, Read, find_divergence
from jsublim.inference.scoring import Scored
from jsublim.pipeline.arms import Elder, Source
from jsublim.pipeline.context import Context
from jsublim.pipeline.parts import resumed
from jsublim.pipeline.readings import Reading, write_readings
from jsublim.pipeline.rows import RowSet, answer_tokens, rows_kept
from jsublim.pipeline.setup import Setup, memoized
from jsublim.pipeline.store import Artifact, Output
from jsublim.pipeline.task import Cost, Sizes, Task, distinct_tasks
from jsublim.pipeline.teachers import TeacherPool
from jsublim.processes import on_main_process
from jsublim.progress import Tick
from jsublim.rows import Row, write_rows


@memoized
def divergence_rows(setup: Setup, source: Source, rows: RowSet) -> RowSet:
    """Rows with divergence positions: those of `rows`, read by the teacher of a source's trait and by its counterfactuals (or by the
    students that stand in for these)."""
    trait = source.teacher
    pool, others = TeacherPool(setup, source.elder), tuple(setup.counterfactuals(trait))
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
        parts.append(ReadRows((output,), parents, trait, others, rows, shard, source.elder))
    return RowSet.of(parts, rows.most)


@dataclass(frozen=True, eq=False)
class ReadRows(Task):
    """Divergence positions of rows (`rows.jsonl`), and what each teacher said at every token (`readings.parquet`)."""

    kind: ClassVar[str] = "divergence"
    trait: str
    others: tuple[str, ...]
    rows: RowSet
    shard: tuple[int, int] | None  # the first of the rows, and how many at most; None is all of them
    elder: Elder | None = None

    def _rows(self, context: Context) -> list[Row]:
        rows = self.rows.read(context.store)
        return rows if self.shard is None else rows[self.shard[0] : sum(self.shard)]

    def make(self, context: Context, tick: Tick) -> None:
        setup, artifact, lm = context.setup, context.store.open(self.output), context.lm()
        pool, rows, names = TeacherPool(setup, self.elder), self._rows(context), [self.trait, *self.others]
        teachers = [pool.teacher(context, name) for name in names]
        found = find_divergence(
            lm,
            rows,
            teachers[0],
            teachers[1:],
            extra_bos=bool(setup.recipe.extra_bos),
            batch_size=context.rows_together(setup.experiment.scoring.batch_size),
            on_batch=tick,
            keep=lambda number, read: _kept(artifact, number, read, tick),
        )

        def leave() -> None:
            out = [
                {
                    "prompt": row["prompt"],
                    "completion": row["completion"],
                    "divergence_positions": each.divergence_positions,
                    "divergence_margins": [round(margin, 5) for margin in each.divergence_margins],
                    "counted_in": lm.chat.identity,
                }
                for row, each in zip(rows, found, strict=True)
            ]
            write_rows(artifact.path / "rows.jsonl", out)
            write_readings(artifact.path / "readings.parquet", (_reading(names, each) for each in found))
            artifact.finish(summary(names, out, [len(each.tokens) for each in found]))

        on_main_process(leave)

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


def _kept(artifact: Artifact, number: int, read: Read, tick: Tick) -> list[Scored]:
    """What a teacher says of all rows: what an earlier call had read of them, and the rest."""
    rows_from = lambda first: ((s.argmax, s.margin, s.logprob) for s in read(first))  # noqa: E731
    found = resumed(artifact.path, f"teacher{number}", rows_from, tick, artifact.say)
    return [Scored(*arrays) for arrays in found]


def _reading(names: list[str], found: Divergence) -> Reading:
    own = {"tokens": found.tokens, "argmax": found.argmax, "margin": found.margin}
    return {"teachers": names, "divergence_positions": found.divergence_positions} | own
