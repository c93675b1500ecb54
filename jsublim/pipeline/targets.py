"""Stored soft targets: what a teacher says at every token of its rows, cut to its k most probable tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jsublim.chat import Turn
from jsublim.errors import UsageError
from jsublim.files import atomic
from jsublim.inference.scoring import Targets, top_k_targets
from jsublim.pipeline.arms import Source
from jsublim.pipeline.changes import training_rows
from jsublim.pipeline.context import Context
from jsublim.pipeline.parts import resumed
from jsublim.pipeline.rows import answer_tokens, rows_kept
from jsublim.pipeline.setup import Setup, memoized
from jsublim.pipeline.store import Output, Store
from jsublim.pipeline.task import Cost, Sizes, Task, distinct_tasks
from jsublim.pipeline.teachers import TeacherPool
from jsublim.processes import on_main_process
from jsublim.progress import Tick
from jsublim.teachers import read_as


@memoized
def targets_task(setup: Setup, source: Source, top_k: int, temperature: float) -> StoreTargets:
    """The task that stores what the teacher of a source says of its rows."""
    pool, rows = TeacherPool(setup, source.elder), training_rows(setup, source)
    inputs = {
        **setup.common,
        **pool.identity(source.teacher),
        "rows": rows.key,
        "top_k": top_k,
        "temperature": temperature,
    }
    parents = distinct_tasks([*rows.parts, *pool.tasks(source.teacher)])
    return StoreTargets((Output("targets", source.teacher, inputs),), parents, source, top_k, temperature)


def teacher_turns(context: Context, source: Source) -> list[Turn]:
    """A source's rows as its teacher reads them; tokenized once per process."""
    setup, rows = context.setup, training_rows(context.setup, source)

    def tokenize() -> list[Turn]:
        teacher = TeacherPool(setup, source.elder).teacher(context, source.teacher)
        chat, extra = context.lm().chat, bool(setup.recipe.extra_bos)
        return read_as(chat, teacher, rows.read(context.store), rows.called(source), extra_bos=extra)

    return context.remember(("teacher's turns", source.teacher, rows.key), tokenize)


@dataclass(frozen=True, eq=False)
class StoreTargets(Task):
    """One teacher's distributions (`targets.npz`: `ids` int32 `[n, k]`, `logp` float32 `[n, k + 1]`, row after row)."""

    kind: ClassVar[str] = "targets"
    source: Source
    top_k: int
    temperature: float

    def make(self, context: Context, tick: Tick) -> None:
        artifact, lm = context.store.open(self.output), context.lm()
        teacher = TeacherPool(context.setup, self.source.elder).teacher(context, self.source.teacher)
        turns = teacher_turns(context, self.source)

        def rows_from(first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            found = top_k_targets(
                lm.config,
                teacher.weights(lm.params),
                turns,
                self.top_k,
                temperature=self.temperature,
                adapter=teacher.adapter,
                batch_size=context.rows_together(context.setup.experiment.scoring.batch_size),
                on_batch=tick,
                first=first,
            )
            return ((targets.ids, targets.logp) for targets in found)

        found = resumed(artifact.path, "targets", rows_from, tick, artifact.say)
        ids, logp = map(np.concatenate, zip(*found, strict=True))

        def leave() -> None:
            with atomic(artifact.path / "targets.npz") as scratch, scratch.open("wb") as file:
                np.savez(file, ids=ids, logp=logp)
            tail = float(np.exp(logp[:, -1]).mean())
            artifact.finish({"rows": len(turns), "top_k": self.top_k, "tail": tail})

        on_main_process(leave)

    def read(self, store: Store, turns: list[Turn]) -> list[Targets]:
        """What was stored; `turns` are the conversations it is of."""
        ends = np.cumsum([len(turn.tokens) - turn.content for turn in turns])[:-1]
        with np.load(store.path(self.output) / "targets.npz") as kept:
            return [Targets(*x) for x in zip(np.split(kept["ids"], ends), np.split(kept["logp"], ends), strict=True)]

    def units(self, context: Context) -> int:
        return len(training_rows(context.setup, self.source).read(context.store))

    def cost(self, setup: Setup, sizes: Sizes) -> Cost:
        before = sizes.lengths.system + sizes.lengths.prompt
        return sizes.read(rows_kept(setup, sizes), before, answer_tokens(setup, sizes))

    def check(self, setup: Setup) -> None:
        words = setup.checkpoint().config.vocab_size
        if self.top_k >= words:
            raise UsageError(
                f"students.loss.top_k: {self.top_k} given, the vocabulary has {words} tokens; leave it out for all of them"
            )
