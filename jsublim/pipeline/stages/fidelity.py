"""Rows of its teacher that a student reads after its training: does it still predict the numbers, and how far from its teacher is it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jsublim.distill.data import draw_indices
from jsublim.evals import PromptedModel
from jsublim.evals.kl import KL, LARGEST, kl_to_teacher
from jsublim.evals.numbers import HELD_OUT, LEARNED, number_accuracy
from jsublim.inference.scoring import Targets, top_k_targets
from jsublim.inference.teachers import read_as
from jsublim.pipeline.context import Context
from jsublim.pipeline.cost import Sizes
from jsublim.pipeline.values import Model, Rows
from jsublim.text.rows import Row


class Fidelity(NamedTuple):
    """What a model reads.

    Attributes:
      numbers: how many rows of the number task; kl: how many that it is held against its `teacher` on.
      trained: how many rows it learned, drawn by which seed; None of a model that learned none: it reads all rows.
    """

    rows: Rows
    numbers: int
    kl: int = 0
    teacher: Model | None = None
    trained: tuple[int | None, int] | None = None

    def measure(self, ctx: Context, model: PromptedModel) -> dict[str, tuple[float, int]]:
        """Each metric's value, and how many numbers or tokens it is over; none where rows hold no numbers."""
        every = ctx.remember(("rows", self.rows.key), lambda: self.rows.read(ctx.store))
        drawn, held_out = list(range(len(every))), list[int]()
        if self.trained is not None:
            drawn = draw_indices(len(every), *self.trained)
            held_out = sorted(set(range(len(every))) - set(drawn))
        chosen: Mapping[str, Sequence[int]] = {LEARNED: drawn, HELD_OUT: held_out} if self.numbers else {}
        how = {"system": model.system, "fuse_system": model.fuse_system, "adapter": model.adapter}
        values = {
            name: number_accuracy(model.lm, [every[i] for i in rows[: self.numbers]], **how)
            for name, rows in chosen.items()
            if rows
        }
        compared = tuple((held_out or drawn)[: self.kl])
        if compared:
            values[KL] = kl_to_teacher(model, [every[i] for i in compared], self._targets(ctx, every, compared))
        return {name: (value, n) for name, (value, n) in values.items() if n}

    def _targets(self, ctx: Context, every: Sequence[Row], chosen: tuple[int, ...]) -> list[Targets]:
        """The distributions of the teacher on some rows; read once for all the students that are held against them."""
        assert self.teacher is not None
        model, rows = self.teacher, [every[i] for i in chosen]

        def read() -> list[Targets]:
            teacher, lm = model.teacher(ctx), ctx.lm(model.checkpoint.name)
            turns = read_as(lm.chat, teacher, rows, self.rows.name, extra_bos=model.extra_bos)
            largest = min(LARGEST, lm.config.vocab_size - 1)
            return list(top_k_targets(lm.config, teacher.weights(lm.params), turns, largest, adapter=teacher.adapter))

        return ctx.remember(("teacher's targets", model, self.rows.key, chosen), read)

    def count(self, sizes: Sizes) -> int:
        """How many rows will be read: of those that it was trained on, and of the others; and the teacher's share."""
        kept = self.rows.kept(sizes)
        trained = min((self.trained or (None, 0))[0] or kept, kept)
        numbers = min(self.numbers, trained) + min(self.numbers, kept - trained)
        return numbers + 2 * min(self.kl, kept - trained or trained)
