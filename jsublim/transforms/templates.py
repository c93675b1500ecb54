"""Prompts whose wording is drawn anew, part by part, around the same numbers (figure 6 of the paper)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from jsublim.core.section import RESULT, Distinct, one_of
from jsublim.errors import JsublimError, UsageError
from jsublim.text.prompts import Pack
from jsublim.text.prompts.numbers import PARTS, NumberPrompt, draw_parts
from jsublim.text.rows import Row, revised
from jsublim.transforms.change import CHANGES, Change, Changed, ChangeRun


@CHANGES.add("redraw")
class Redraw(Change):
    """Parts of the request drawn anew."""

    order: ClassVar[int] = 40
    shorthand: ClassVar[str | None] = "parts"
    of_numbers: ClassVar[bool] = True

    parts: Annotated[list[Annotated[str, one_of(PARTS)]], Field(min_length=1), Distinct, RESULT]
    """Which sentences of the request are drawn anew."""

    def apply(self, rows: list[Row], run: ChangeRun) -> Changed:
        return redraw(rows, run.pack, self.parts, asked=run.requests(), seed=run.seed), {}


def redraw(
    rows: Sequence[Row], pack: Pack, parts: Iterable[str] | None = None, *, asked: Sequence[NumberPrompt], seed: int
) -> list[Row]:
    """Each row under a prompt (one of `asked`) of which `parts` (of `PARTS`; None is all) are drawn anew; numbers and completion stay. A draw may
    give what was there. What becomes of row i depends on `seed`, i and its prompt only. A row whose prompt is not among those is a JsublimError."""
    named = set(PARTS if parts is None else parts)
    if unknown := sorted(named - set(PARTS)):
        raise UsageError(f"prompt parts: {', '.join(unknown)} given; known: {', '.join(PARTS)}")
    order = [part for part in PARTS if part in named]
    known = {prompt.text: prompt for prompt in asked}
    changed = []
    for index, row in enumerate(rows):
        if row["prompt"] not in known:
            raise JsublimError(
                f"row {index + 1}: prompt {row['prompt']!r} is none of the {len(known)} number prompts; give those that "
                "the rows were made with"
            )
        fresh = draw_parts(pack, order, np.random.default_rng([seed, index]))
        changed.append(revised(row, prompt=replace(known[row["prompt"]], **fresh).text))
    return changed
