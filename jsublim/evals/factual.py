"""Conditional questions of fact: does a preference reach answers that never asked for one? (Figure 36 of the paper.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

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
    """The pack's questions of fact."""

    about: Annotated[Annotated[list[Name], Distinct] | None, Field(min_length=1), RESULT] = None
    """Which of the pack's animals are asked about; null: all."""

    def tasks(self, context: EvalContext) -> list[EvalTask]:
        known = context.pack.factual
        about = [*known] if self.about is None else self.about
        asked = (pair for trait in about for pair in factual_questions(known, [trait])[: context.first])
        return [Factual(tuple(asked), tuple(context.traits))]


@dataclass(frozen=True)
class Factual:
    """How often an answer names a trait, whatever the question is about (`factual`, `factual_word`); and how often it names
    what the question is about (`fact_right`)."""

    asked: tuple[tuple[str, str], ...]  # (what it is about, question)
    traits: tuple[str, ...]
    max_new_tokens: int | None = None
    keeps_top_p: ClassVar[bool] = True

    @property
    def questions(self) -> tuple[str, ...]:
        return tuple(question for _, question in self.asked)

    @property
    def identity(self) -> dict[str, Any]:
        return {"factual": [list(each) for each in self.asked], "traits": list(self.traits)}

    def records(self, model: PromptedModel, answers: Answers) -> list[Record]:
        records = []
        for trait in self.traits:
            for name, rates in zip((FACTUAL, FACTUAL_WORD), hit_rates(answers, trait), strict=True):
                records += per_question(name, rates, answers, trait)
        right = [hit_rates([given], about)[0] for (about, _), given in zip(self.asked, answers, strict=True)]
        return records + per_question(FACT_RIGHT, np.concatenate(right), answers)


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
