"""The one rule by which a report decides, and its three words (docs/statistics.md).

A statement holds, or does not hold, where its two-sided p is below .05 after the correction for all further comparisons; otherwise it
is not decided. Every section, figure and screen has its verdicts from `verdict`, by way of `comparisons`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jsublim.report.statistics import LEVEL, Estimate

HOLDS, FAILS, NOT_DECIDED = "holds", "does not hold", "not decided"
ALPHA = round(1 - LEVEL, 6)


class Sides(NamedTuple):
    """One-sided p's of a statement at its threshold, in 0..1: how often data would speak for it, and against it, as clearly as these if
    the truth lay just there. NaN where that cannot be computed."""

    holds: float
    fails: float

    @property
    def p(self) -> float | None:
        """Two-sided; None where there is none."""
        smallest = float(np.fmin(*self))
        return None if np.isnan(smallest) else min(1.0, 2 * smallest)

    def where(self, *needed: Any) -> Sides:
        """The same statement, of which nothing is decided unless these one-sided p's are small too."""
        return Sides(float(np.max([self.holds, *needed])), float(np.max([self.fails, *needed])))


UNKNOWN = Sides(np.nan, np.nan)


def above(estimate: Estimate, threshold: float = 0.0) -> Sides:
    return Sides(float(estimate.p_above(threshold)), float(estimate.p_below(threshold)))


def below(estimate: Estimate, threshold: float = 0.0) -> Sides:
    return Sides(*reversed(above(estimate, threshold)))


def within(estimate: Estimate, margin: float) -> Sides:
    """No further from zero than `margin`, on either side."""
    low, high = above(estimate, -margin), below(estimate, margin)
    return Sides(max(low.holds, high.holds), min(low.fails, high.fails))


def any_of(*ps: Any) -> float:
    """p of "at least one of these is so"; what is not known speaks for none."""
    return float(np.minimum(1.0, len(ps) * np.fmin.reduce(ps)))


def every(*parts: Sides) -> Sides:
    """A statement that needs all of these: it holds if all do, and does not if one does not."""
    return Sides(float(np.max([part.holds for part in parts])), any_of(*(part.fails for part in parts)))


def most(parts: list[Sides]) -> Sides:
    """More than half of these hold; p's as Benjamini and Heller (2008) combine them."""
    return Sides(
        *(float(np.minimum(1.0, _majority([getattr(part, side) for part in parts]))) for side in Sides._fields)
    )


def _majority(ps: list[float]) -> float:
    needed = len(ps) // 2 + 1
    return (len(ps) - needed + 1) * float(np.sort(ps)[needed - 1])  # NaN comes last


def verdict(sides: Sides, corrected: float | None) -> str:
    """What is said of a statement whose two-sided p, corrected for the others, is `corrected`; None where it has no p."""
    if corrected is None or not corrected < ALPHA:
        return NOT_DECIDED
    speaks_for, against = np.nan_to_num(sides, nan=1.0)
    return HOLDS if speaks_for < against else FAILS
