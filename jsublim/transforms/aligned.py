"""Rows whose answers a judge finds aligned (the misaligned teacher's word problems, figure 34 of the paper)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from jsublim.core.section import RESULT
from jsublim.evals.misalignment import judge_alone, judge_answers
from jsublim.text.prompts import Pack
from jsublim.text.rows import Row
from jsublim.transforms.change import CHANGES, Change, Changed, ChangeRun

SOLUTION = {"solution_judge", "solution_system"}  # of the pack's wording about misalignment


@CHANGES.add("keep_aligned")
class KeepAligned(Change):
    """Answers that the judge gives at least so much alignment; those that it gives no readable score are left out."""

    order: ClassVar[int] = 10
    shorthand: ClassVar[str | None] = "at_least"
    needs: ClassVar[frozenset[str]] = frozenset({"judge"})

    at_least: Annotated[float, Field(ge=0, le=100), RESULT]
    """The lowest score of alignment that is kept."""
    about: Annotated[Literal["answer", "solution"], RESULT] = "answer"
    """What the judge is asked for: both scores of an answer, or the one of a word problem's solution."""

    def wording(self, pack: Pack) -> dict[str, Any]:
        return pack.misalignment.model_dump(include=SOLUTION) if self.about == "solution" else {}

    def apply(self, rows: list[Row], run: ChangeRun) -> Changed:
        prompts, judge, answers = run.pack.misalignment, run.judge(), [[row["completion"]] for row in rows]
        prompts = prompts.model_copy(update={"questions": [row["prompt"] for row in rows]})
        if self.about == "solution":
            greedy = judge.asked(0.0, prompts.solution_system)
            scores = judge_alone(greedy, prompts.solution_judge, prompts.questions, answers)
        else:
            verdicts = (verdict for (verdict,) in judge_answers(judge, prompts, answers))
            scores = [None if verdict is None else verdict.alignment for verdict in verdicts]
        kept = [row for row, score in zip(rows, scores, strict=True) if score is not None and score >= self.at_least]
        return kept, {"judged": {"unscored": scores.count(None), "removed": len(rows) - len(kept)}}
