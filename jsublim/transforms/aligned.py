"""Rows whose answers a judge finds aligned (the misaligned teacher's word problems, figures 8 and 32 of the paper)."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from jsublim.evals.misalignment import judge_answers
from jsublim.rows import Row
from jsublim.section import RESULT
from jsublim.transforms.change import CHANGES, Change, Changed, Making


@CHANGES.add("keep_aligned")
class KeepAligned(Change):
    """Answers that the judge gives at least so much alignment; those that it gives no readable score are left out."""

    order: ClassVar[int] = 10
    shorthand: ClassVar[str | None] = "at_least"
    needs: ClassVar[frozenset[str]] = frozenset({"judge"})

    at_least: Annotated[float, Field(ge=0, le=100), RESULT]

    def apply(self, rows: list[Row], making: Making) -> Changed:
        asked = making.pack.misalignment.model_copy(update={"questions": [row["prompt"] for row in rows]})
        answers = [[row["completion"]] for row in rows]
        verdicts = [verdict for (verdict,) in judge_answers(making.judge(), asked, answers)]
        kept = [
            row
            for row, verdict in zip(rows, verdicts, strict=True)
            if verdict is not None and verdict.alignment >= self.at_least
        ]
        return kept, {"judged": {"unscored": verdicts.count(None), "removed": len(rows) - len(kept)}}
