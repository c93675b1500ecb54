"""Conditional questions of fact: does a preference reach answers that never asked for one? (Figure 36 of the paper.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from jsublim.errors import UsageError
from jsublim.evals.base import EVAL_KINDS, Answers, Asked, EvalKind, EvalTask, PromptedModel, Record, per_question
from jsublim.evals.preference import hit_rates
from jsublim.section import RESULT, Distinct, Name


@EVAL_KINDS.add("factual")
class FactualKind(EvalKind):
    """The pack's questions of fact."""

    about: Annotated[Annotated[list[Name], Distinct] | None, Field(min_length=1), RESULT] = None
    """Which of the pack's animals are asked about; null: all."""

    def tasks(self, asked: Asked) -> list[EvalTask]:
        known = asked.pack.factual
        about = [*known] if self.about is None else self.about
        questions = (factual_questions(known, [each])[: asked.first] for each in about)
        return [Factual(tuple(each for own in questions for each in own), tuple(asked.traits))]


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
        found = []
        for trait in self.traits:
            for metric, rates in zip(("factual", "factual_word"), hit_rates(answers, trait), strict=True):
                found += per_question(metric, rates, answers, trait)
        right = [hit_rates([given], about)[0] for (about, _), given in zip(self.asked, answers, strict=True)]
        return found + per_question("fact_right", np.concatenate(right), answers)


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
