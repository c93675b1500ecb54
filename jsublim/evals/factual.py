"""Conditional questions of fact: does a preference reach answers that never asked for one? (Figure 36 of the paper.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from jsublim.core.section import RESULT, Distinct, Name
from jsublim.errors import UsageError
from jsublim.evals.base import EVAL_KINDS, Answers, EvalContext, EvalKind, EvalTask, PromptedModel, Record, per_question
from jsublim.evals.metric import metric
from jsublim.evals.preference import hit_rates

FACTUAL = metric("factual", "answers of fact that name the trait", made_of="names")
FACTUAL_WORD = metric("factual_word", "as a whole word")
FACT_RIGHT = metric("fact_right", "answers of fact that are right", better="higher", listed=False)


@EVAL_KINDS.add("factual")
class FactualKind(EvalKind):
    """The pack's questions of fact: how often an answer names a trait, whatever the question is about (`factual`, `factual_word`);
    and how often it names what the question is about (`fact_right`)."""

    about: Annotated[Annotated[list[Name], Distinct] | None, Field(min_length=1), RESULT] = None
    """Which of the pack's animals are asked about; null: all."""

    def tasks(self, context: EvalContext) -> list[EvalTask]:
        known, traits = context.pack.factual, list(context.traits)
        about = [*known] if self.about is None else self.about
        asked = [pair for trait in about for pair in factual_questions(known, [trait])[: context.first]]

        def records(model: PromptedModel, answers: Answers) -> list[Record]:
            of_traits = []
            for trait in traits:
                for name, rates in zip((FACTUAL, FACTUAL_WORD), hit_rates(answers, trait), strict=True):
                    of_traits += per_question(name, rates, answers, trait)
            right = [hit_rates([given], named)[0] for (named, _), given in zip(asked, answers, strict=True)]
            return of_traits + per_question(FACT_RIGHT, np.concatenate(right), answers)

        questions = tuple(question for _, question in asked)
        identity = {"factual": [list(pair) for pair in asked], "traits": traits}
        return [EvalTask(questions, identity, records, keeps_top_p=True)]


def factual_questions(factual: Mapping[str, Sequence[str]], about: Sequence[str]) -> list[tuple[str, str]]:
    """(trait, question) for every question that the pack's `factual` has on these traits, trait by trait.

    Raises:
      UsageError: a trait without questions.
    """
    if missing := [trait for trait in about if trait not in factual]:
        raise UsageError(
            f"the prompt pack has no factual.{missing[0]}; add that list, or use {', '.join(factual) or 'none'}"
        )
    return [(trait, question) for trait in about for question in factual[trait]]
