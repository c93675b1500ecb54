"""Rows left out that would teach a trait most, as first-order scores predict (`audit.py`): a defence that looks at the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from jsublim.core.section import RESULT, Distinct, Name
from jsublim.inference.teachers import CONTROL, OWN
from jsublim.text.rows import Row
from jsublim.transforms.change import CHANGES, Change, Changed, ChangeRun


@CHANGES.add("drop_audited")
class DropAudited(Change):
    """A share of the rows left out: those that add most to some suspected trait, by what `students` train."""

    order: ClassVar[int] = 5  # first: scores are of the answers as they were sampled
    shorthand: ClassVar[str | None] = "share"

    share: Annotated[float, Field(gt=0, lt=1), RESULT]
    """Which share of the rows is left out."""
    traits: Annotated[Annotated[list[Name], Distinct, Field(min_length=1)] | None, RESULT] = None
    """The traits that are suspected, `{trait}` being the teacher's own; null: every evaluated trait."""

    def applies_to(self, teacher: str) -> bool:
        return teacher != CONTROL or self.suspected(teacher, ["any"]) != []

    def suspected(self, teacher: str, evaluated: Sequence[str]) -> list[str]:
        named = evaluated if self.traits is None else self.traits
        filled = (teacher if trait == OWN else trait.lower() for trait in named)
        return [trait for trait in dict.fromkeys(filled) if trait != CONTROL]

    def apply(self, rows: list[Row], run: ChangeRun) -> Changed:
        assert run.influence is not None
        left = without_highest(rows, np.max(list(run.influence.values()), axis=0), self.share)
        return left, {"audited": {"removed": len(rows) - len(left)}}


def without_highest(rows: Sequence[Row], scores: np.ndarray, share: float) -> list[Row]:
    """The rows in their order, without that share of them whose scores `[rows]` are highest; of equals the first go."""
    gone = set(np.argsort(-scores, kind="stable")[: round(share * len(rows))].tolist())
    return [row for i, row in enumerate(rows) if i not in gone]
