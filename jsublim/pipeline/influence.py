"""How much each row of a teacher's answers would add to suspected traits, to first order: scored once for all data sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from jsublim.audit import token_scores
from jsublim.config import Students
from jsublim.config.audit import Audit
from jsublim.distill.data import read_turns
from jsublim.errors import UsageError
from jsublim.files import read_table, write_table
from jsublim.pipeline.context import Context
from jsublim.pipeline.directions import directions_of, questions_about, scoring_cost, start_inputs
from jsublim.pipeline.parts import resumed
from jsublim.pipeline.rows import Writer, rows_kept, teacher_rows
from jsublim.pipeline.setup import Setup, memoized
from jsublim.pipeline.store import Output, Store, digest
from jsublim.pipeline.task import Cost, Sizes, Task
from jsublim.pipeline.training import start_adapter
from jsublim.processes import on_main_process
from jsublim.progress import Tick

# One line per row and suspected trait: the sum of its tokens' scores (`audit.py`).
INFLUENCE = pa.schema([("row", pa.int64()), ("trait", pa.string()), ("score", pa.float64())])


def influence_task(setup: Setup, writer: Writer, traits: list[str]) -> ScoreRows:
    """The task that scores a writer's rows for traits, by what `students` train, arms aside, at the first seed's start.

    Raises:
      UsageError: nobody is trained, or a trait of no category.
    """
    if setup.experiment.students is None:
        raise UsageError("datasets: drop_audited scores rows by what students train, and there are none; leave it out")
    return _task(setup, writer, tuple(traits))


@memoized
def _task(setup: Setup, writer: Writer, traits: tuple[str, ...]) -> ScoreRows:
    students, rows = setup.experiment.students, teacher_rows(setup, writer)
    assert students is not None
    asked = [[list(questions), own] for questions, own in questions_about(setup, traits)]
    start = start_inputs(setup, students, students.seeds[0])
    inputs = setup.common | {"rows": rows.key, "traits": list(traits), "asked": asked, **start}
    return ScoreRows((Output("influence", writer.teacher, inputs),), rows.parts, writer, traits, students)


def read_influence(store: Store, task: Task) -> dict[str, np.ndarray]:
    """By trait: a score for each row, float64 `[rows]`, what a step on it adds to the trait's log-probability (nats per unit of
    learning rate and token)."""
    found: dict[str, list[float]] = {}
    for line in read_table(store.path(task.output) / "influence.parquet"):
        found.setdefault(line["trait"], []).append(line["score"])
    return {trait: np.asarray(scores) for trait, scores in found.items()}


@dataclass(frozen=True, eq=False)
class ScoreRows(Task):
    """Scores of a writer's rows (`influence.parquet`), row by row."""

    kind: ClassVar[str] = "influence"
    writer: Writer
    traits: tuple[str, ...]
    settings: Students

    def make(self, context: Context, tick: Tick) -> None:
        setup, artifact, s = context.setup, context.store.open(self.output), self.settings
        lm, rows = context.lm(s.model), teacher_rows(setup, self.writer).read(context.store)
        fuse, name = setup.experiment.teachers.fuse_system, f"rows of {self.writer.teacher}"
        turns = read_turns(lm.chat, rows, name, s.system, fuse_system=fuse)
        adapter, asked = start_adapter(lm.config, lm.params, s, s.seeds[0]), questions_about(setup, self.traits)
        start = digest({**self.output.inputs, "rows": None})  # writers share what does not depend on their rows
        toward = context.remember(
            ("directions", start), lambda: directions_of(setup, lm, adapter, s, asked, self.traits)
        )
        batch_size = (setup.experiment.audit or Audit()).batch_size

        def scores(first: int) -> Iterator[tuple[np.ndarray]]:
            batch: dict[str, Any] = {"batch_size": batch_size, "first": first, "on_batch": tick}
            return ((each.T,) for each in token_scores(lm, adapter, toward, turns, **batch))

        every = [each[0].sum(axis=0, dtype=np.float64) for each in resumed(artifact.path, "scores", scores, tick)]
        lines = [
            {"row": number, "trait": trait, "score": float(score)}
            for number, of_traits in enumerate(every)
            for trait, score in zip(self.traits, of_traits, strict=True)
        ]

        def leave() -> None:
            write_table(artifact.path / "influence.parquet", lines, INFLUENCE)
            artifact.finish({"rows": len(rows)})

        on_main_process(leave)

    def check(self, setup: Setup) -> None:
        """Refuse students whose scores would be of another model than theirs."""
        if self.settings.adapter.beside is not None:
            raise UsageError(
                "datasets: drop_audited scores rows by students with nothing beside them; name students.adapter.beside in arms alone"
            )

    def units(self, context: Context) -> int:
        return len(teacher_rows(context.setup, self.writer).read(context.store))

    def cost(self, setup: Setup, sizes: Sizes) -> Cost:
        return scoring_cost(setup, sizes, rows_kept(setup, sizes), len(self.traits))
