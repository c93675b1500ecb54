"""C12, C14: which network learns, and by which loss."""

from __future__ import annotations

from jsublim.report.claims.groups import comparisons
from jsublim.report.claims.verdicts import FAILS, HOLDS, Claim, all_of, judge, named, no_lift, not_below, pool
from jsublim.report.statistics import Estimate
from jsublim.report.summary import NOT_DECIDED, trait_matrix
from jsublim.report.tables import Results

_HARD = {
    "students.loss.kind": "hard",
    "students.loss.temperature": 1.0,
    "students.loss.top_k": None,
    "students.loss.targets": "vocabulary",
    "students.data.on_policy": False,
}


def other_initialisation(results: Results, metric: str) -> list[Claim]:
    """By gamma, always on the log-probability: another checkpoint has another base, which gamma doesn't depend on.

    It fails if gamma is above zero over seeds and over relabellings too: all seeds share their teachers, so what these few
    teachers do to a few traits can look sure over seeds. With too few teachers to relabel it is open then. It holds if it does not fail
    and gamma is surely smaller than that of the teacher's own initialisation, which is surely above zero; without that, a run
    too small to see anything would pass.
    """
    claims = []
    model = "students.model"
    for part, whole in comparisons(results, lambda group: group.get(model) is not None, {model: None}):
        other, own = (trait_matrix(results, condition=group.name) for group in (part, whole))
        if other is None or own is None or other.effect is None or own.effect is None:
            continue
        students = len(other.seed_gammas) * len(other.teachers) + len(own.seed_gammas) * len(own.teachers)
        reason = (
            f"γ over seeds; over labels p = {other.effect.p:.2g}; of the teacher's own initialisation "
            f"{own.effect.gamma:+.2f} nats"
        )
        by_labels = None if other.effect.smallest_p > 0.05 else other.effect.p <= 0.05
        verdict, p = _no_gamma(other.over_seeds, own.over_seeds, by_labels)
        text = named("students of another initialisation do not move towards their teacher's trait", part)
        gamma, interval = other.effect.gamma, other.gamma_interval
        claims.append(
            Claim("C12", text, "logprob", gamma, interval, "nats", students, verdict, reason, p, part.variant)
        )
    return claims


def _no_gamma(other: Estimate | None, own: Estimate | None, by_labels: bool | None) -> tuple[str, float | None]:
    """The verdict, and p of gamma being smaller than a gamma above zero. `by_labels` is None where labels cannot tell."""
    if other is None or own is None:
        return NOT_DECIDED, None
    less = own - other
    p = all_of(less.p_above(0.0), own.p_above(0.0))
    if judge(other.interval(), at_most=0.0) == FAILS and by_labels is not False:
        return FAILS if by_labels else NOT_DECIDED, p
    sure = judge(less.interval(), at_least=0.0) == judge(own.interval(), at_least=0.0) == HOLDS
    return HOLDS if sure else NOT_DECIDED, p


def soft_not_below(results: Results, metric: str) -> list[Claim]:
    claims = []
    for soft, hard in comparisons(results, lambda group: group.get("students.loss.kind") == "forward-kl", _HARD):
        found = pool(results, metric, soft.name, hard.name)
        if found is None:
            continue
        # Where neither transfers, "no less" says nothing.
        reason = no_lift(found.levels[0]) and no_lift(found.levels[1])
        needs = min(level.lift.p_above(0.0) for level in found.levels)
        text = "forward KL to the teacher transfers no less than its tokens"
        claims.append(not_below("C14", text, soft, found, reason, "soft minus hard", needs))
    return claims
