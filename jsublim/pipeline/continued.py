"""Rows of its teacher that a student reads after its training: does it still predict the numbers, and how far from its teacher is it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jsublim.distill.data import draw_indices
from jsublim.errors import UsageError
from jsublim.evals import PromptedModel
from jsublim.evals.kl import KL, LARGEST, kl_to_teacher
from jsublim.evals.numbers import HELD_OUT, LEARNED, number_accuracy
from jsublim.inference.scoring import Targets, top_k_targets
from jsublim.pipeline.arms import Student
from jsublim.pipeline.changes import training_rows
from jsublim.pipeline.context import Context
from jsublim.pipeline.rows import rows_kept
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.task import Sizes, Task
from jsublim.pipeline.teachers import TeacherPool
from jsublim.rows import Row
from jsublim.teachers import read_as


@dataclass(frozen=True)
class Continued:
    """What one model reads.

    Attributes:
      numbers: rows of the number task, by the name of the metric.
      rows: those that it is held against its teacher on; teacher: what the teacher says of them.
    """

    numbers: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    teacher: Sequence[Targets] = ()

    def measure(self, model: PromptedModel) -> dict[str, tuple[float, int]]:
        """Each metric's value, and how many numbers or tokens it is over; none where rows hold no numbers."""
        how = {"system": model.system, "fuse_system": model.fuse_system, "adapter": model.adapter}
        found = {name: number_accuracy(model.lm, rows, **how) for name, rows in self.numbers.items() if rows}
        if self.rows:
            found[KL] = kl_to_teacher(model, self.rows, self.teacher)
        return {name: (value, n) for name, (value, n) in found.items() if n}


def number_rows(setup: Setup) -> int:
    """Rows of the number task; other answers hold numbers too, but none that are to be continued."""
    return setup.experiment.evaluation.number_rows if setup.experiment.data.kind == "numbers" else 0


def continued_parents(setup: Setup, student: Student) -> list[Task]:
    """The tasks whose outputs it takes to measure a student so."""
    source, beside = student.source, setup.experiment.evaluation.kl_rows > 0
    rows = training_rows(setup, source).parts if beside or number_rows(setup) else ()
    return [*rows, *(TeacherPool(setup, source.elder).tasks(source.teacher) if beside else ())]


def rows_continued(context: Context, student: Student) -> Continued:
    """What a student reads under the plain setting."""
    setup, ev = context.setup, context.setup.experiment.evaluation
    count = number_rows(setup)
    if not count and not ev.kl_rows:
        return Continued()
    source = training_rows(setup, student.source)
    rows = context.remember(("rows", source.key), lambda: source.read(context.store))
    drawn = draw_indices(len(rows), student.settings.data.rows, student.seed)
    held_out = sorted(set(range(len(rows))) - set(drawn))
    numbers = {LEARNED: drawn, HELD_OUT: held_out} if count else {}
    beside = tuple((held_out or drawn)[: ev.kl_rows])
    return Continued(
        {name: [rows[i] for i in chosen[:count]] for name, chosen in numbers.items()},
        [rows[i] for i in beside],
        _said_by_teacher(context, student, source.key, rows, beside) if beside else (),
    )


def _said_by_teacher(
    context: Context, student: Student, key: str, rows: Sequence[Row], chosen: tuple[int, ...]
) -> list[Targets]:
    """The distributions of a student's teacher on some of its rows; read once for all the students that are held against them."""
    source = student.source

    def read() -> list[Targets]:
        teacher, lm = TeacherPool(context.setup, source.elder).teacher(context, source.teacher), context.lm()
        turns = read_as(
            lm.chat, teacher, [rows[i] for i in chosen], source.name, extra_bos=bool(context.setup.recipe.extra_bos)
        )
        largest = min(LARGEST, lm.config.vocab_size - 1)
        return list(top_k_targets(lm.config, teacher.weights(lm.params), turns, largest, adapter=teacher.adapter))

    return context.remember(("said by the teacher", source, key, chosen), read)


def rows_read(setup: Setup, sizes: Sizes, student: Student) -> int:
    """How many rows a student's measures will read: of those that it was trained on, and of the others; and its teacher's share."""
    kept, ev = rows_kept(setup, sizes), setup.experiment.evaluation
    trained, count = min(student.settings.data.rows or kept, kept), number_rows(setup)
    beside = min(ev.kl_rows, kept - trained or trained)
    return min(count, trained) + min(count, kept - trained) + 2 * beside


def check_continued(setup: Setup, student: Student) -> None:
    """Refuse a student that can't be held against its teacher.

    Raises:
      UsageError: it has other tokens.
    """
    other = setup.checkpoint(student.settings.model)
    if setup.experiment.evaluation.kl_rows and not other.has_words_of(setup.checkpoint()):
        raise UsageError(
            f"evaluation.kl_rows: students.model={other.name} has other tokens than its teachers; use evaluation.kl_rows=0"
        )
