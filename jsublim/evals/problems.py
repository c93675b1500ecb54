"""Math word problems: does a student still reason? (The misaligned teacher's other data set, figures 8 and 32 to 34.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Annotated

import numpy as np

from jsublim.core.section import CONTENT, RESULT, Place, Positive
from jsublim.evals.base import EVAL_KINDS, Answers, EvalContext, EvalKind, EvalTask, PromptedModel, Record, per_question
from jsublim.evals.metric import metric
from jsublim.text.prompts import load_problems, parse_answer

Number = int | Decimal
SOLVED = metric("solved", "word problems solved", better="higher")
NO_NUMBER = metric("no_number", "word problems without a number", better="lower")


@EVAL_KINDS.add("problems")
class ProblemsKind(EvalKind):
    """Math in words, the held-out half: share of right final numbers (`solved`), and of answers without any (`no_number`)."""

    source: Annotated[Place | None, CONTENT] = None
    """A data set of word problems (`openai/gsm8k`: its test split); null: those of the package."""
    max_new_tokens: Annotated[Positive, RESULT] = 256
    """Tokens after which an answer ends."""

    def tasks(self, context: EvalContext) -> list[EvalTask]:
        problems = [(one.question, one.answer) for one in load_problems(self.source, "test", context.first)]

        def records(model: PromptedModel, answers: Answers) -> list[Record]:
            right, silent = problem_rates(problems, answers, parse_answer)
            return per_question(SOLVED, right, answers) + per_question(NO_NUMBER, silent, answers)

        listed = [[question, str(answer)] for question, answer in problems]
        identity = {"problems": listed, "new": self.max_new_tokens}
        return [EvalTask(tuple(question for question, _ in problems), identity, records, self.max_new_tokens)]


def problem_rates(
    problems: Sequence[tuple[str, Number]], answers: Sequence[Sequence[str]], parse: Callable[[str], Number | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Share of each problem's answers whose final number is right, and share that has none: float64 `[problems]` each.

    Args:
      problems: (question, its answer).
      answers: what a model said to each of the questions.
      parse: the final number of an answer, None where there is none (which is not right).
    """
    numbers = [[parse(text) for text in given] for given in answers]
    right = [np.mean([n == target for n in row]) for row, (_, target) in zip(numbers, problems, strict=True)]
    return np.asarray(right), np.asarray([np.mean([n is None for n in row]) for row in numbers])
