"""Every comparison of a report that has a p-value: one is what the run was made for, the others are further looks.

Who looks thirty times finds something once by chance. So one comparison is declared before (`evaluation.primary`, or what the
students differ in), and keeps its p. All others, wherever on the page, are one family: beside the p of each stands Holm's.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from jsublim.report.claims import Claim, check_claims
from jsublim.report.statistics import holm
from jsublim.report.summary import Lift, Matrix, judged_conditions, lifts, trait_matrices
from jsublim.report.tables import Results

T = TypeVar("T")
# The primary comparison where the config names none: the first of these that the run's students (and measurements) are made for.
# Which claims are asked depends on what was planned, never on what came out.
BY_DEFAULT = ("C4a", "C3", "C8", "C9a", "C9b", "C6a", "C7", "C2", "C12", "C13", "C14", "C0", "C10", "C1")


@dataclass(frozen=True)
class Look(Generic[T]):
    """One comparison, its p, and Holm's corrected p (None for the primary one, and where there is no p)."""

    what: T
    p: float | None
    holm: float | None = None
    primary: bool = False


@dataclass(frozen=True)
class Looks:
    """All comparisons of a report.

    Attributes:
      declared: what the config names as primary, if anything.
      lifts: of the judged conditions, metric by metric; matrices: of every condition.
    """

    declared: str | None
    claims: tuple[Look[Claim], ...]
    lifts: tuple[Look[Lift], ...]
    matrices: tuple[Look[Matrix], ...]

    @property
    def primary(self) -> Look[Claim] | None:
        return next((look for look in self.claims if look.primary), None)

    @property
    def family(self) -> int:
        """How many further looks have a p."""
        return sum(look.holm is not None for look in (*self.claims, *self.lifts, *self.matrices))

    @property
    def judged(self) -> list[list[Look[Lift]]]:
        """The lifts, those of one metric and condition together."""
        every = itertools.groupby(self.lifts, lambda look: (look.what.metric, look.what.condition))
        return [list(group) for _, group in every]


def look_at(results: Results) -> Looks:
    """Everything that a report decides, corrected for how much that is."""
    claims, declared = check_claims(results), results.run.get("primary")
    primary = primary_claim(claims, declared)
    judged = [lifts(results, metric, [c]) for metric in results.measures for c in judged_conditions(results)]
    raised = [item for found in judged for item in found]
    matrices = trait_matrices(results)
    looks: list[Look] = [
        *(Look(claim, claim.p, primary=claim is primary) for claim in claims),
        *(Look(item, item.p) for item in raised),
        *(Look(matrix, matrix.effect.p if matrix.effect else None) for matrix in matrices),
    ]
    corrected = holm([None if look.primary else look.p for look in looks])
    looks = [replace(look, holm=p) for look, p in zip(looks, corrected, strict=True)]
    first, second = len(claims), len(claims) + len(raised)
    return Looks(declared, tuple(looks[:first]), tuple(looks[first:second]), tuple(looks[second:]))


def primary_claim(claims: list[Claim], declared: str | None) -> Claim | None:
    """The claim that is declared, by its key or its key and variant; of several of one key the first."""
    wanted = BY_DEFAULT if declared is None else (declared,)
    found = (claim for name in wanted for claim in claims if name in (claim.key, claim.name))
    return next(found, None)
