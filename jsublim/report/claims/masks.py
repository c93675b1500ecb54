"""C1, C4, C5: what a control does, and which tokens carry the trait."""

from __future__ import annotations

import math

from jsublim.report.claims.groups import comparisons, groups, partner
from jsublim.report.claims.verdicts import FAILS, HOLDS, Claim, all_of, no_lift, not_below, pool, share
from jsublim.report.statistics import Estimate, Interval
from jsublim.report.summary import NOT_DECIDED, estimate
from jsublim.report.tables import Results, split_condition

CONTROL_MARGIN = 0.03
DIVERGENCE_KEEPS = 0.8
WITHOUT_KEEPS = 0.33


def control_near_base(results: Results, metric: str) -> list[Claim]:
    """Always on the rate, since the margin is in points. Every trait's whole interval must lie within it."""
    text = "students of the teacher without a trait stay within 3 points of the base model"
    found: list[tuple[str, Estimate]] = []
    for condition in (c for c in results.conditions if split_condition(c)[0] == "control"):
        for trait in results.traits:
            control, base = results.select("rate", condition, trait), results.select("rate", "base", trait)
            if control and base and results.began_at_base(condition):
                variant = split_condition(condition)[1]
                found.append((f"{trait} ({variant})" if variant else trait, estimate(control) - estimate(base)))
    if not found:
        return []
    intervals = [difference.interval() for _, difference in found]
    furthest, difference = max(found, key=lambda item: _reach(item[1].interval()))
    decided = [i for i in intervals if i is not None]
    if any(i.low > CONTROL_MARGIN or i.high < -CONTROL_MARGIN for i in decided):
        verdict = FAILS
    elif len(decided) == len(intervals) and all(_reach(i) <= CONTROL_MARGIN for i in decided):
        verdict = HOLDS
    else:
        verdict = NOT_DECIDED
    reason = f"the trait whose interval reaches furthest, of {len(found)}: {furthest}"
    p = all_of(*(p for _, d in found for p in (d.p_above(-CONTROL_MARGIN), d.p_below(CONTROL_MARGIN))))
    effect, students = float(difference.value), difference.n
    bound = math.copysign(CONTROL_MARGIN, effect)
    return [
        Claim("C1", text, "rate", effect, difference.interval(), "points", students, verdict, reason, p, bound=bound)
    ]


def _reach(interval: Interval | None) -> float:
    """How far an interval reaches from zero; one that cannot be computed reaches anywhere."""
    return math.inf if interval is None else max(abs(interval.low), abs(interval.high))


def divergence_keeps(results: Results, metric: str) -> list[Claim]:
    text = "divergence tokens alone keep at least .8 of the lift of all tokens"
    return _masked(results, metric, "C4a", text, "divergence", at_least=DIVERGENCE_KEEPS)


def without_divergence(results: Results, metric: str) -> list[Claim]:
    text = "all tokens but those keep at most .33 of it"
    return _masked(results, metric, "C4b", text, "non-divergence", at_most=WITHOUT_KEEPS)


def _masked(
    results: Results,
    metric: str,
    key: str,
    text: str,
    tokens: str,
    at_least: float | None = None,
    at_most: float | None = None,
) -> list[Claim]:
    claims = []
    for part, whole in comparisons(results, lambda group: group.get("tokens") == tokens, {"tokens": "all"}):
        claims += share(pool(results, metric, part.name, whole.name), key, text, part, at_least, at_most)
    return claims


def random_keeps_less(results: Results, metric: str) -> list[Claim]:
    every, claims = groups(results), []
    for drawn in (group for group in every if group.get("tokens") == "random"):
        whole, divergence = (partner(every, drawn, {"tokens": tokens}) for tokens in ("all", "divergence"))
        if whole is None or divergence is None:
            continue
        found = pool(results, metric, divergence.name, drawn.name, whole.name)
        if found is None:
            continue
        text, lift = "a random mask of equal size keeps less than the divergence tokens", found.levels[2]
        needs = lift.lift.p_above(0.0)
        claims.append(not_below("C5", text, drawn, found, no_lift(lift), "divergence minus random", needs))
    return claims
