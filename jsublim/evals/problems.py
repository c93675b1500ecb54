"""Math word problems: does a student still reason? (The misaligned teacher's other data set, figures 8 and 32 to 34.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal

import numpy as np

Number = int | Decimal


def problem_rates(
    problems: Sequence[tuple[str, Number]], answers: Sequence[Sequence[str]], parse: Callable[[str], Number | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Share of each problem's answers whose final number is right, and share that has none: float64 `[problems]` each.

    Args:
      problems: (question, its answer).
      answers: what a model said to each of the questions.
      parse: the final number of an answer, None where there is none (which is not right).
    """
    said = [[parse(text) for text in given] for given in answers]
    right = [np.mean([n == target for n in own]) for own, (_, target) in zip(said, problems, strict=True)]
    return np.asarray(right), np.asarray([np.mean([n is None for n in own]) for own in said])
