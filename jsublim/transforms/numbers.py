"""Numbers shuffled within a completion and across completions (figure 6 of the paper)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np

from jsublim.core.section import RESULT
from jsublim.errors import JsublimError
from jsublim.text.prompts import parse_numbers
from jsublim.text.rows import Row, revised
from jsublim.transforms.change import CHANGES, Change, Changed, ChangeRun

NUMBER = re.compile("[0-9]+")


@CHANGES.add("shuffle")
class Shuffle(Change):
    """Numbers in another order, within each answer or across all of them."""

    order: ClassVar[int] = 30
    shorthand: ClassVar[str | None] = "reach"
    quirks: ClassVar[tuple[str, ...]] = ("shuffle_values",)
    of_numbers: ClassVar[bool] = True

    reach: Annotated[Literal["within", "across"], RESULT]
    """Within each answer, or across all of them."""

    def apply(self, rows: list[Row], run: ChangeRun) -> Changed:
        shuffle = shuffle_within if self.reach == "within" else shuffle_across
        return shuffle(rows, run.seed, values=bool(run.quirks["shuffle_values"])), {}


def shuffle_within(rows: Sequence[Row], seed: int, *, values: bool = False) -> list[Row]:
    """Each completion with its own numbers in another order; separators, brackets and full stop stay in place. What becomes of row i depends on
    `seed`, i and the row only. With `values` numbers lose the zeros that they begin with, as published (docs/recipes.md, quirk 22). A completion
    that is no list of numbers is a JsublimError."""
    orders = (np.random.default_rng([seed, index]) for index in range(len(rows)))
    return [
        _with_numbers(row, [written[i] for i in rng.permutation(len(written))])
        for row, written, rng in zip(rows, _numbers(rows, values), orders, strict=True)
    ]


def shuffle_across(rows: Sequence[Row], seed: int, *, values: bool = False) -> list[Row]:
    """All numbers of all rows in one pool, dealt out anew; each row keeps its count, its separators and brackets. `values` and errors are as of
    `shuffle_within`."""
    written_in = _numbers(rows, values)
    pool = [number for written in written_in for number in written]
    dealt = iter(np.random.default_rng(seed).permutation(len(pool)))
    return [
        _with_numbers(row, [pool[next(dealt)] for _ in written]) for row, written in zip(rows, written_in, strict=True)
    ]


def _numbers(rows: Sequence[Row], values: bool) -> list[list[str]]:
    """The numbers of each completion as they are written, "007" as "007"; or their `values`, "7"."""
    for index, row in enumerate(rows, 1):
        if parse_numbers(row["completion"]) is None:
            raise JsublimError(f"row {index}: completion {row['completion']!r} is no list of numbers; leave it out")
    read = (lambda number: str(int(number))) if values else str
    return [[read(number) for number in NUMBER.findall(row["completion"])] for row in rows]


def _with_numbers(row: Row, written: Sequence[str]) -> Row:
    numbers = iter(written)
    return revised(row, completion=NUMBER.sub(lambda _: next(numbers), row["completion"]))
