"""Conditional factual questions: does a preference reach answers that never asked for one? (Figure 36 of the paper.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jsublim.errors import UsageError
from jsublim.evals.preference import hit_rates


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
