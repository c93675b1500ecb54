"""C12, C14: which network learns, and by which loss."""

from __future__ import annotations

from jsublim.report.claims.base import CLOUD, FAILS, HOLDS, PAPER, Claim, StudentPair, all_of, claim, judge, no_lower
from jsublim.report.statistics import Estimate
from jsublim.report.summary import NOT_DECIDED, trait_matrix

_HARD = {
    "students.loss.kind": "hard",
    "students.loss.temperature": 1.0,
    "students.loss.top_k": None,
    "students.loss.targets": "vocabulary",
    "students.data.on_policy": False,
}


@claim("C12", "another initialisation",
       needs=(lambda group: group.get("students.model") is not None, {"students.model": None}), primary=9,
       published=f"no transfer between models that start from different weights [{CLOUD}, abstract]")  # fmt: skip
def other_initialisation(pair: StudentPair) -> Claim | None:
    """γ of the trait matrix is surely smaller than that of the teacher's own initialisation, which is surely above 0. If γ is above 0
    both over seeds and over relabellings, the claim does not hold; if it is over seeds, and there are too few teachers to relabel
    (two or three), it is not decided."""
    # Always on the log-probability: another checkpoint has another base, which gamma doesn't depend on. All seeds share their
    # teachers, so what these few do to a few traits can look sure over seeds: hence labels too. Without a gamma of the own
    # initialisation above zero, a run too small to see anything would pass.
    other, own = (trait_matrix(pair.results, condition=group.name) for group in (pair.part, pair.whole))
    if other is None or own is None or other.effect is None or own.effect is None:
        return None
    by_labels = None if other.effect.smallest_p > 0.05 else other.effect.p <= 0.05
    verdict, p = no_gamma(other.over_seeds, own.over_seeds, by_labels)
    text = "students of another initialisation do not move towards their teacher's trait"
    reason = f"γ over seeds; over labels p = {other.effect.p:.2g}; of the teacher's own initialisation {own.effect.gamma:+.2f} nats"
    students = sum(len(matrix.seed_gammas) * len(matrix.teachers) for matrix in (other, own))
    return Claim(text, "logprob", "nats", students, verdict, reason, other.effect.gamma, other.gamma_interval, p)


def no_gamma(other: Estimate | None, own: Estimate | None, by_labels: bool | None) -> tuple[str, float | None]:
    """The verdict, and p of gamma being smaller than a gamma above zero. `by_labels` is None where labels cannot tell."""
    if other is None or own is None:
        return NOT_DECIDED, None
    less = own - other
    p = all_of(less.p_above(0.0), own.p_above(0.0))
    if judge(other.interval(), at_most=0.0) == FAILS and by_labels is not False:
        return FAILS if by_labels else NOT_DECIDED, p
    sure = judge(less.interval(), at_least=0.0) == judge(own.interval(), at_least=0.0) == HOLDS
    return HOLDS if sure else NOT_DECIDED, p


@claim("C14", "soft targets against hard ones",
       needs=(lambda group: group.get("students.loss.kind") == "forward-kl", _HARD), primary=11,
       published=f"expected of whole distributions, surprising of sampled tokens [{PAPER}, abstract]")  # fmt: skip
def soft_not_below(pair: StudentPair) -> Claim | None:
    """The lift by forward KL minus that by tokens is at least 0; one of the two is above zero, or "no less" would say nothing."""
    pooled = pair.pool()
    text = "forward KL to the teacher transfers no less than its tokens"
    return pooled and no_lower(pooled, text, "soft minus hard", pooled.levels)
