"""How much each row of a teacher's answers would add to suspected traits, to first order: scored once for all data sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from jsublim.config import Students
from jsublim.config.audit import Audit
from jsublim.errors import UsageError
from jsublim.files import read_table, write_table
from jsublim.pipeline.context import Context
from jsublim.pipeline.directions import questions_about, scored_rows, scoring_cost, start_inputs
from jsublim.pipeline.rows import Writer, rows_kept, teacher_rows
from jsublim.pipeline.setup import Setup, memoized
from jsublim.pipeline.store import Output, Store
from jsublim.pipeline.task import Cost, Sizes, Task
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
    about = {"rows": rows.key, "traits": list(traits), "asked": questions_about(setup, traits)}
    inputs = setup.common | about | start_inputs(setup, students, students.seeds[0])
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
        rows, name = teacher_rows(setup, self.writer).read(context.store), f"rows of {self.writer.teacher}"
        batch_size = (setup.experiment.audit or Audit()).batch_size
        about = questions_about(setup, self.traits), self.traits, batch_size, tick
        _, found = scored_rows(context, artifact, name, rows, s, s.seeds[0], *about)
        lines = [
            {"row": number, "trait": trait, "score": float(score)}
            for number, each in enumerate(found)
            for trait, score in zip(self.traits, each.sum(axis=0, dtype=np.float64), strict=True)
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
