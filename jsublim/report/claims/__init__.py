"""The claims that a run can check by program, with thresholds of our own.

Each is a function under `@claim` (`base.py`) in one of these files, which says all there is to say of it. It compares students that
differ in the one thing it asks about (`pairs`), by lifts pooled over the teachers' traits; a claim is not asked of a run
without such students.
"""

from __future__ import annotations

from collections.abc import Iterable

from jsublim.report.claims import data, evaluation, training
from jsublim.report.claims.base import CLAIMS, Claim, claim_metric
from jsublim.report.tables import Results

__all__ = ["CLAIMS", "Claim", "check_claims", "claim_metric", "data", "evaluation", "not_asked", "training"]


def check_claims(results: Results) -> list[Claim]:
    """Every claim that the run has students (or measurements) for; a claim comes once for each comparison it can be read off."""
    metric = claim_metric(results)
    return [claim for question in CLAIMS.values() for claim in question.answers(results, metric)]


def not_asked(claims: Iterable[Claim]) -> list[str]:
    """The claims that a run says nothing about, in words."""
    asked = {claim.key for claim in claims}
    return [f"{key} ({claim.question})" for key, claim in CLAIMS.items() if key not in asked]
