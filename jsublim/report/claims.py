"""The paper's claims that one run can check by program: C1, C4 and C5, with thresholds of our own.

Lifts are pooled over the teachers' traits, students being the independent units: a masked student belongs to one
trait, a control student is first averaged over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jsublim.report.statistics import Estimate, Interval, mean_estimate, ratio_interval
from jsublim.report.summary import NOT_DECIDED, estimate, reference_condition, sampling_variance, scores_for
from jsublim.report.tables import Results, Score

HOLDS, FAILS = "holds", "does not hold"
CONTROL_MARGIN = 0.03
DIVERGENCE_KEEPS = 0.8
WITHOUT_KEEPS = 0.33


@dataclass(frozen=True)
class Claim:
    """`effect` and `interval` are in `unit`; `reason` says in words what the verdict rests on."""

    key: str
    text: str
    metric: str
    effect: float | None
    interval: Interval | None
    unit: str
    students: int
    verdict: str
    reason: str


@dataclass(frozen=True)
class _Pool:
    """Mean levels over the pooled traits, each an independent group of students."""

    metric: str
    traits: tuple[str, ...]
    reference: Estimate
    levels: dict[str, Estimate]


def check_claims(results: Results) -> list[Claim]:
    """C1, C4 (both halves) and C5 on one run's results."""
    metric = claim_metric(results)
    text_with = "divergence tokens alone keep at least .8 of the lift of all tokens"
    text_without = "all tokens but those keep at most .33 of it"
    return [
        _control_near_base(results),
        _share(results, metric, "C4a", text_with, "divergence", at_least=DIVERGENCE_KEEPS),
        _share(results, metric, "C4b", text_without, "non-divergence", at_most=WITHOUT_KEEPS),
        _random_keeps_less(results, metric),
    ]


def claim_metric(results: Results) -> str:
    """The preference rate, unless it is zero for the base model and every student (or was not sampled): then the log-probability."""
    conditions = [c for c in results.conditions if c != "teacher"]
    rates = [s.mean for t in results.traits for c in conditions for s in scores_for(results, "rate", c, t)]
    at_floor = not any(rate > 0 for rate in rates)
    return "logprob" if at_floor and any(s.metric == "logprob" for s in results.scores) else "rate"


def _control_near_base(results: Results) -> Claim:
    text = "students of an unprompted teacher stay within 3 points of the base model"
    found: list[tuple[str, Estimate]] = []
    for trait in results.traits:
        control, base = results.select("rate", "control", trait), results.select("rate", "base", trait)
        if control and base:
            found.append((trait, estimate(control) - estimate(base)))
    if not found:
        return _missing("C1", text, "rate", "control students and the base model")
    intervals = [difference.interval() for _, difference in found]
    trait, furthest = max(found, key=lambda item: _reach(item[1].interval()))
    decided = [i for i in intervals if i is not None]
    if any(i.low > CONTROL_MARGIN or i.high < -CONTROL_MARGIN for i in decided):
        verdict = FAILS
    elif len(decided) == len(intervals) and all(i.low >= -CONTROL_MARGIN and i.high <= CONTROL_MARGIN for i in decided):
        verdict = HOLDS
    else:
        verdict = NOT_DECIDED
    reason = f"the trait whose interval reaches furthest, of {len(found)}: {trait}"
    return Claim("C1", text, "rate", furthest.value, furthest.interval(), "points", furthest.n, verdict, reason)


def _reach(interval: Interval | None) -> float:
    """How far an interval reaches from zero; one that cannot be computed reaches anywhere."""
    return math.inf if interval is None else max(abs(interval.low), abs(interval.high))


def _share(
    results: Results,
    metric: str,
    key: str,
    text: str,
    condition: str,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Claim:
    pool = _pool(results, metric, ("all", condition))
    if pool is None:
        return _missing(key, text, metric, f"students of `all` and `{condition}` and a reference")
    whole, part = pool.levels["all"], pool.levels[condition]
    students = whole.n + part.n
    undecided = _no_lift(pool, whole)
    if undecided:
        return Claim(key, text, metric, None, None, "of all tokens", students, NOT_DECIDED, undecided)
    # A share of a lift that is not above zero would be a meaningless number: it is only computed from here on.
    effect = (part.value - pool.reference.value) / (whole.value - pool.reference.value)
    interval = ratio_interval(part, whole, pool.reference)
    if interval is None:
        reason = "too few students to bound the share"
        return Claim(key, text, metric, effect, None, "of all tokens", students, NOT_DECIDED, reason)
    verdict = NOT_DECIDED
    if at_least is not None:
        verdict = HOLDS if interval.low >= at_least else FAILS if interval.high < at_least else NOT_DECIDED
    if at_most is not None:
        verdict = HOLDS if interval.high <= at_most else FAILS if interval.low > at_most else NOT_DECIDED
    return Claim(key, text, metric, effect, interval, "of all tokens", students, verdict, _pooled(pool))


def _random_keeps_less(results: Results, metric: str) -> Claim:
    text = "a random mask of equal budget keeps less than the divergence tokens"
    pool = _pool(results, metric, ("all", "divergence", "random"))
    if pool is None:
        return _missing("C5", text, metric, "students of `all`, `divergence` and `random` and a reference")
    difference = pool.levels["divergence"] - pool.levels["random"]
    interval = difference.interval()
    unit = "points" if metric != "logprob" else "nats"
    reason = _no_lift(pool, pool.levels["all"])
    if reason:
        verdict = NOT_DECIDED
    elif interval is None:
        verdict, reason = NOT_DECIDED, "one student gives no interval"
    else:
        verdict = HOLDS if interval.low > 0 else FAILS if interval.high < 0 else NOT_DECIDED
        reason = f"divergence minus random, {_pooled(pool)}"
    return Claim("C5", text, metric, difference.value, interval, unit, difference.n, verdict, reason)


def _pool(results: Results, metric: str, conditions: Sequence[str]) -> _Pool | None:
    traits = [
        t
        for t in results.traits
        if reference_condition(results, metric, t) and all(scores_for(results, metric, c, t) for c in conditions)
    ]
    if not traits:
        return None
    levels = {c: mean_estimate([estimate(scores_for(results, metric, c, t)) for t in traits]) for c in conditions}
    references = [reference_condition(results, metric, t) or "" for t in traits]
    if set(references) == {"control"}:
        reference = _over_traits([results.select(metric, "control", t) for t in traits])
    else:
        zeros = zip(traits, references, strict=True)
        reference = mean_estimate([estimate(results.select(metric, r, t)) for t, r in zeros])
    return _Pool(metric, tuple(traits), reference, levels)


def _over_traits(by_trait: list[list[Score]]) -> Estimate:
    """Control students averaged over traits first: one student's numbers on several traits are not independent."""
    values: dict[str, list[float]] = {}
    for scores in by_trait:
        for score in scores:
            values.setdefault(score.arm, []).append(score.mean)
    floor = sampling_variance([score for scores in by_trait for score in scores])
    return Estimate.of([sum(v) / len(v) for v in values.values()], floor)


def _no_lift(pool: _Pool, whole: Estimate) -> str:
    """Why there is nothing to take a share of, or the empty string."""
    interval = (whole - pool.reference).interval()
    if interval is None:
        return "one student gives no interval"
    return "" if interval.low > 0 else "no transfer with all tokens: its lift is not above zero"


def _pooled(pool: _Pool) -> str:
    return f"mean of {', '.join(pool.traits)}"


def _missing(key: str, text: str, metric: str, what: str) -> Claim:
    return Claim(key, text, metric, None, None, "", 0, NOT_DECIDED, f"this run has no {what}")
