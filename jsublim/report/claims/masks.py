"""C0, C1, C4, C5: whether there is anything to explain, what a control does, and which tokens carry the trait."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from jsublim.report.claims.base import (
    FAILS,
    HOLDS,
    PAPER,
    Claim,
    StudentPair,
    all_of,
    claim,
    groups,
    judge,
    no_lower,
    partner,
    pool,
)
from jsublim.report.statistics import Estimate, Interval
from jsublim.report.summary import NOT_DECIDED, estimate, judged_conditions
from jsublim.report.tables import Results, split_condition

CONTROL_MARGIN = 0.03
ALL = {"tokens": "all"}


@claim("C0", "students move to their teacher's trait", primary=12,
       published=f"Gemma-3-4B, sampled rows: owl 7 → 19 %, otter 19 → 45 %, raven 19 → 46 % (base model → students) [{PAPER}, figure 2 (read off)]")  # fmt: skip
def transfers(results: Results, metric: str) -> Iterator[Claim]:
    """The lift of students of all tokens is above zero (of the plain variant, where there is one)."""
    judged = judged_conditions(results)
    for group in (group for group in groups(results) if group.name in judged):
        pooled = pool(results, metric, group.name)
        if pooled is not None:
            (level,), text = pooled.levels, "students move to their teacher's trait"
            p, reason = all_of(level.lift.p_above(0.0)), f"above the reference, {pooled.words}"
            claim = Claim(
                text, metric, pooled.unit, level.students.n, reason=reason, p=p, bound=0.0, variant=group.variant
            )
            interval = pooled.between(level.lift)
            verdict = judge(interval, at_least=0.0)
            yield replace(claim, verdict=verdict, effect=float(level.lift.value), interval=interval)


@claim("C1", "the control against the base model", primary=14)
def control_near_base(results: Results, metric: str) -> Iterator[Claim]:
    """Their rates are within 3 points of each other for every trait."""
    differences: list[
        tuple[str, Estimate]
    ] = []  # by the rate, whatever others are measured by: the margin is in points
    for condition in (c for c in results.conditions if split_condition(c)[0] == "control"):
        for trait in results.traits:
            control, base = (results.select("rate", of, trait) for of in (condition, "base"))
            if control and base and results.began_at_base(condition):
                variant = split_condition(condition)[1]
                differences.append((f"{trait} ({variant})" if variant else trait, estimate(control) - estimate(base)))
    if not differences:
        return
    intervals = [difference.interval() for _, difference in differences]
    furthest, difference = max(differences, key=lambda item: _reach(item[1].interval()))
    decided = [i for i in intervals if i is not None]
    if any(i.low > CONTROL_MARGIN or i.high < -CONTROL_MARGIN for i in decided):
        verdict = FAILS
    elif len(decided) == len(intervals) and all(_reach(i) <= CONTROL_MARGIN for i in decided):
        verdict = HOLDS
    else:
        verdict = NOT_DECIDED
    reason = f"the trait whose interval reaches furthest, of {len(differences)}: {furthest}"
    p = all_of(*(p for _, d in differences for p in (d.p_above(-CONTROL_MARGIN), d.p_below(CONTROL_MARGIN))))
    text = "students of the teacher without a trait stay within 3 points of the base model"
    effect = float(difference.value)
    claim = Claim(text, "rate", "points", difference.n, verdict, reason, effect, difference.interval(), p)
    yield replace(claim, bound=math.copysign(CONTROL_MARGIN, effect))


def _reach(interval: Interval | None) -> float:
    return math.inf if interval is None else max(abs(interval.low), abs(interval.high))


@claim("C4a", "divergence tokens alone", needs=(lambda group: group.get("tokens") == "divergence", ALL), primary=1,
       published=f"Qwen2.5-7B and Gemma-3-4B: they keep or strengthen transfer; a few traits differ [{PAPER}, figures 3, 12, 13]")  # fmt: skip
def divergence_keeps(pair: StudentPair) -> Claim | None:
    """At least .8 of the lift of all tokens."""
    return pair.share("divergence tokens alone keep at least .8 of the lift of all tokens", at_least=0.8)


@claim("C4b", "all but divergence tokens", needs=(lambda group: group.get("tokens") == "non-divergence", ALL),
       published=f"Qwen2.5-7B and Gemma-3-4B: near the base model [{PAPER}, figures 3, 12, 13]")  # fmt: skip
def without_divergence(pair: StudentPair) -> Claim | None:
    """At most .33 of the lift of all tokens."""
    return pair.share("all tokens but those keep at most .33 of it", at_most=0.33)


@claim("C5", "divergence tokens against as many random ones",
       needs=(lambda group: group.get("tokens") == "random", ALL))  # fmt: skip
def random_keeps_less(pair: StudentPair) -> Claim | None:
    """The lift of divergence tokens minus that of a random mask of equal size is at least 0."""
    divergence = partner(groups(pair.results), pair.part, {"tokens": "divergence"})
    pooled = divergence and pool(pair.results, pair.metric, divergence.name, pair.part.name, pair.whole.name)
    if not pooled:
        return None
    text = "a random mask of equal size keeps less than the divergence tokens"
    return no_lower(pooled, text, "divergence minus random", pooled.levels[2:])
