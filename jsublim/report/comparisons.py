"""Every comparison of a report that has a p-value: one is what the run was made for, the others are further comparisons.

Who looks thirty times finds something once by chance. So one comparison is declared before (`evaluation.primary`, or what the
students differ in), and keeps its p. All others, wherever on the page, are one family: beside the p of each stands Holm's.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Generic, TypeVar

from jsublim.report.claims import CLAIMS, Claim, check_claims
from jsublim.report.statistics import holm
from jsublim.report.summary import Lift, Matrix, judged_conditions, lifts, trait_matrices
from jsublim.report.tables import Results

T = TypeVar("T")


@dataclass(frozen=True)
class Comparison(Generic[T]):
    """What was found, its p, and Holm's corrected p (None for the primary one, and where there is no p)."""

    result: T
    p: float | None
    holm: float | None = None
    primary: bool = False


@dataclass(frozen=True)
class Comparisons:
    """All comparisons of a report.

    Attributes:
      declared: what the config names as primary, if anything.
      lifts: of the judged conditions, metric by metric; matrices: of every condition.
    """

    declared: str | None
    claims: tuple[Comparison[Claim], ...]
    lifts: tuple[Comparison[Lift], ...]
    matrices: tuple[Comparison[Matrix], ...]

    @property
    def primary(self) -> Comparison[Claim] | None:
        return next((one for one in self.claims if one.primary), None)

    @property
    def family(self) -> int:
        """How many further comparisons have a p."""
        return sum(one.holm is not None for one in (*self.claims, *self.lifts, *self.matrices))

    @property
    def judged(self) -> list[list[Comparison[Lift]]]:
        """The lifts, those of one metric and condition together."""
        groups = itertools.groupby(self.lifts, lambda one: (one.result.metric, one.result.condition))
        return [list(group) for _, group in groups]


def comparisons(results: Results) -> Comparisons:
    """Everything that a report decides, corrected for how much that is."""
    claims, declared = check_claims(results), results.run.get("primary")
    primary = primary_claim(claims, declared)
    raised = [one for m in results.measures for c in judged_conditions(results) for one in lifts(results, m, [c])]
    matrices = trait_matrices(results)
    ps = [*(None if claim is primary else claim.p for claim in claims), *(lift.p for lift in raised)]
    corrected = iter(holm([*ps, *(m.effect and m.effect.p for m in matrices)]))
    return Comparisons(
        declared,
        tuple(Comparison(claim, claim.p, next(corrected), claim is primary) for claim in claims),
        tuple(Comparison(lift, lift.p, next(corrected)) for lift in raised),
        tuple(Comparison(m, m.effect and m.effect.p, next(corrected)) for m in matrices),
    )


def primary_claim(claims: list[Claim], declared: str | None) -> Claim | None:
    """The claim that is declared, by its key or its key and variant; of several of one key the first. By default that of the lowest
    place which claims have of themselves."""
    if declared is not None:
        return next((claim for claim in claims if declared in (claim.key, claim.name)), None)
    places = {claim.key: place for claim in claims if (place := CLAIMS[claim.key].primary) is not None}
    return next((claim for claim in claims if places and claim.key == min(places, key=places.__getitem__)), None)
