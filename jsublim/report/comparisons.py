"""Every comparison of a report that has a p-value: one is what the run was made for, the others are further comparisons.

Who looks thirty times finds something once by chance. So one comparison is declared before (`evaluation.primary`, or what the
students differ in), and keeps its p. All others, wherever on the page, are one family, and have Holm's. What is compared twice (a claim
about one trait, and that trait's lift) is one comparison, and has one p and one verdict.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Generic, TypeVar

from jsublim.report.claims import CLAIMS, Claim, check_claims, claim_metric
from jsublim.report.statistics import holm
from jsublim.report.summary import Lift, Matrix, judged_conditions, lifts, trait_matrices
from jsublim.report.tables import Results
from jsublim.report.verdicts import verdict

T = TypeVar("T", Claim, Lift, Matrix)


@dataclass(frozen=True)
class Comparison(Generic[T]):
    """What was found, its two-sided p, the p that decides (Holm's, but the primary one's own), and the verdict; no p is None."""

    result: T
    p: float | None
    corrected: float | None
    verdict: str
    primary: bool = False


@dataclass(frozen=True)
class Comparisons:
    """All comparisons of a report.

    Attributes:
      declared: what the config names as primary, if anything.
      lifts: of the judged conditions, metric by metric; matrices: of every condition.
      family: how many further comparisons have a p.
    """

    declared: str | None
    claims: tuple[Comparison[Claim], ...]
    lifts: tuple[Comparison[Lift], ...]
    matrices: tuple[Comparison[Matrix], ...]
    family: int

    @property
    def primary(self) -> Comparison[Claim] | None:
        return next((one for one in self.claims if one.primary), None)

    @property
    def headline(self) -> Comparison[Claim] | None:
        """How far students of all tokens rose: in what they say, if that moves at all."""
        asked = {one.result.metric: one for one in reversed(self.claims) if one.result.key == "C0"}
        return asked.get("rate") or asked.get("logprob")

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
    ps = {one.about: one.tested.p for one in (*raised, *matrices, *claims)}
    further = [about for about, p in ps.items() if p is not None and (primary is None or about != primary.about)]
    corrected = ps | dict(zip(further, holm([ps[about] for about in further]), strict=True))

    def decided(one: T) -> Comparison[T]:
        p = corrected[one.about]
        return Comparison(
            one, one.tested.p, p, verdict(one.tested, p), primary is not None and one.about == primary.about
        )

    return Comparisons(
        declared, tuple(map(decided, claims)), tuple(map(decided, raised)), tuple(map(decided, matrices)), len(further)
    )


def headline_metric(results: Results, compared: Comparisons) -> str:
    """What the first finding and the first figure are read off."""
    return compared.headline.result.metric if compared.headline else claim_metric(results)


def primary_claim(claims: list[Claim], declared: str | None) -> Claim | None:
    """The claim that is declared, by its key or its key and variant; of several of one key the first. By default that of the lowest
    place which claims have of themselves."""
    if declared is not None:
        return next((claim for claim in claims if declared in (claim.key, claim.name)), None)
    places = {claim.key: place for claim in claims if (place := CLAIMS[claim.key].primary) is not None}
    return next((claim for claim in claims if places and claim.key == min(places, key=places.__getitem__)), None)
