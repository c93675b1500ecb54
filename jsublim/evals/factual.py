"""Conditional factual questions: does a preference reach answers that never asked for one? (Figure 36 of the paper.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jsublim.errors import UsageError
from jsublim.evals.base import EVAL_KINDS, Answers, Asked, EvalKind, EvalTask, PromptedModel, Record
from jsublim.evals.preference import hit_rates


@EVAL_KINDS.add("factual")
class FactualKind(EvalKind):
    """The pack's questions of fact about each evaluated trait."""

    def tasks(self, asked: Asked) -> list[EvalTask]:
        questions = (factual_questions(asked.pack.factual, [trait])[: asked.first] for trait in asked.traits)
        return [Factual(tuple(each for own in questions for each in own))]


@dataclass(frozen=True)
class Factual:
    """How often the answer to a question about a trait names that trait (`factual`, `factual_word`)."""

    asked: tuple[tuple[str, str], ...]  # (trait, question), trait by trait
    max_new_tokens: int | None = None

    @property
    def questions(self) -> tuple[str, ...]:
        return tuple(question for _, question in self.asked)

    @property
    def identity(self) -> dict[str, Any]:
        return {"factual": [list(each) for each in self.asked]}

    def records(self, model: PromptedModel, answers: Answers) -> list[Record]:
        found, first = [], 0
        for trait, (rate, word_rate) in factual_rates(self.asked, answers).items():
            for metric, values in (("factual", rate), ("factual_word", word_rate)):
                found += [Record(metric, first + q, float(v), len(answers[0]), trait) for q, v in enumerate(values)]
            first += len(rate)
        return found


def factual_questions(factual: Mapping[str, Sequence[str]], traits: Sequence[str]) -> list[tuple[str, str]]:
    """(trait, question) for every question that the pack's `factual` has on `traits`, trait by trait.

    Raises:
      UsageError: a trait without questions.
    """
    if missing := [trait for trait in traits if trait not in factual]:
        raise UsageError(
            f"the prompt pack has no factual.{missing[0]}; add that list, or use {', '.join(factual) or 'none'}"
        )
    return [(trait, question) for trait in traits for question in factual[trait]]


def factual_rates(
    asked: Sequence[tuple[str, str]], answers: Sequence[Sequence[str]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each trait's share of answers that name it, by substring and by whole word: float64 `[its questions]` each.

    Args:
      asked: as `factual_questions` gave them.
      answers: the answers to each of them, in the same order.
    """
    own: dict[str, list[Sequence[str]]] = {}
    for (trait, _), given in zip(asked, answers, strict=True):
        own.setdefault(trait, []).append(given)
    return {trait: hit_rates(given, trait) for trait, given in own.items()}
