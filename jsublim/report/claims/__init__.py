"""The claims that a run can check by program, with thresholds of our own: `check_claims`.

A claim compares students that differ in the one thing it asks about (`groups.py`), by lifts pooled over the teachers' traits
(`verdicts.py`); a claim is not asked of a run without such students.
"""

from __future__ import annotations

from jsublim.report.claims import data, evaluation, layers, masks, training, transfer
from jsublim.report.claims.verdicts import FAILS, HOLDS, Claim, claim_metric
from jsublim.report.tables import Results

__all__ = ["FAILS", "HOLDS", "QUESTIONS", "Claim", "check_claims", "not_asked"]

# What each claim is about, and the functions that check it, in the order of the report.
QUESTIONS = {
    "C0": "students move to their teacher's trait",
    "C1": "the control is near the base model",
    "C2": "greedy rows against sampled ones",
    "C3": "rows without entangled numbers",
    "C4": "divergence tokens alone, and all but those",
    "C5": "a random mask of equal size",
    "C6": "one layer trained alone",
    "C7": "the first third of the layers frozen",
    "C8": "re-drawn prompts",
    "C9": "rows of another teacher mixed in",
    "C10": "where attribution lies",
    "C11": "evaluation temperature and top-p",
    "C12": "another initialisation",
    "C13": "another system prompt in evaluation",
    "C14": "soft targets against hard ones",
}
_CHECKS = (
    transfer.transfers,
    masks.control_near_base,
    data.greedy_not_below,
    data.without_entangled,
    masks.divergence_keeps,
    masks.without_divergence,
    masks.random_keeps_less,
    layers.one_layer,
    layers.first_third_frozen,
    data.redrawn_prompts,
    data.mixed_teachers,
    layers.attribution_early,
    evaluation.order_is_stable,
    training.other_initialisation,
    evaluation.other_system_prompt,
    training.soft_not_below,
)


def check_claims(results: Results) -> list[Claim]:
    """Every claim that the run has students (or measurements) for; a claim comes once for each comparison it can be read off."""
    metric = claim_metric(results)
    return [claim for check in _CHECKS for claim in check(results, metric)]


def not_asked(claims: list[Claim]) -> list[str]:
    """The claims that a run says nothing about, in words."""
    asked = {claim.key.rstrip("ab") for claim in claims}
    return [f"{key} ({what})" for key, what in QUESTIONS.items() if key not in asked]
