"""From lifts to verdicts: what every claim is made of.

Lifts are pooled over the teachers' traits, students being the independent units: a student of a biased teacher belongs
to one trait, a control student is first averaged over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jsublim.report.claims.groups import Group
from jsublim.report.statistics import Estimate, Interval, mean_estimate, share_interval, share_p_above
from jsublim.report.summary import (
    NOT_DECIDED,
    difference_interval,
    estimate,
    group_of,
    reference_condition,
    sampling_variance,
    scores_for,
)
from jsublim.report.tables import Results, Score, split_condition

HOLDS, FAILS = "holds", "does not hold"


@dataclass(frozen=True)
class Claim:
    """`effect` and `interval` are in `unit` (a unit that begins with "of" is a share of something); `reason` says in words
    what the verdict rests on. `p` is one-sided, for the claim, at its threshold: with the interval it is inverted from, a claim
    whose whole interval holds has p < .025, one whose whole interval fails p > .975. `variant` names the students that
    it was read off, if they have a name. `bound` is the threshold that the effect is held against, where it is one number."""

    key: str
    text: str
    metric: str
    effect: float | None
    interval: Interval | None
    unit: str
    students: int
    verdict: str
    reason: str
    p: float | None = None
    variant: str = ""
    bound: float | None = None

    @property
    def name(self) -> str:
        return f"{self.key} {self.variant}".strip()


@dataclass(frozen=True)
class Level:
    """Mean over the pooled traits of a group's students, and how far it lies above the models that it is measured from."""

    students: Estimate
    lift: Estimate

    def above(self, other: Level) -> Estimate:
        """How much higher this lift is; a reference that both share drops out."""
        return self.lift - other.lift


@dataclass(frozen=True)
class Pool:
    """Levels of several groups over the traits that all of them were evaluated on."""

    metric: str
    traits: tuple[str, ...]
    levels: tuple[Level, ...]

    @property
    def unit(self) -> str:
        return "nats" if self.metric == "logprob" else "points"

    @property
    def words(self) -> str:
        return f"mean of {', '.join(self.traits)}"

    def between(self, difference: Estimate) -> Interval | None:
        """Interval of a difference of levels."""
        return difference_interval(difference, self.metric)


def claim_metric(results: Results) -> str:
    """The preference rate. The log-probability of a tiny model, and where the rate is zero for the base model and every
    student (or was not sampled)."""
    conditions = [c for c in results.conditions if c != "teacher"]
    rates = [s.mean for t in results.traits for c in conditions for s in scores_for(results, "rate", c, t)]
    open_to_it = results.measures[0] == "logprob" or not any(rate > 0 for rate in rates)
    return "logprob" if open_to_it and any(s.metric == "logprob" for s in results.scores) else "rate"


def pool(results: Results, metric: str, *names: str, traits: Sequence[str] | None = None) -> Pool | None:
    """Levels of the conditions `names`, or `None` if no trait has them all and a reference for each."""
    shared = tuple(
        t
        for t in (results.traits if traits is None else traits)
        if all(scores_for(results, metric, c, t) and reference_condition(results, metric, t, c) for c in names)
    )
    if not shared:
        return None
    return Pool(metric, shared, tuple(_level(results, metric, name, shared) for name in names))


def _level(results: Results, metric: str, condition: str, traits: tuple[str, ...]) -> Level:
    students = mean_estimate([estimate(scores_for(results, metric, condition, t)) for t in traits])
    references = [reference_condition(results, metric, t, condition) or "" for t in traits]
    zeros = [results.select(metric, r, t) for r, t in zip(references, traits, strict=True)]
    one_control = len(set(references)) == 1 and split_condition(references[0])[0] == "control"
    reference = _over_traits(zeros) if one_control else mean_estimate([estimate(zero) for zero in zeros])
    return Level(students, students - reference)


def _over_traits(by_trait: list[list[Score]]) -> Estimate:
    """Control students averaged over traits first: one student's numbers on several traits are not independent."""
    values: dict[str, list[float]] = {}
    every = [score for scores in by_trait for score in scores]
    for score in every:
        values.setdefault(score.arm, []).append(score.mean)
    return Estimate.of([sum(v) / len(v) for v in values.values()], sampling_variance(every), group_of(every))


def no_lift(whole: Level) -> str:
    """Why there is nothing to compare with, or the empty string."""
    interval = whole.lift.interval()
    if interval is None:
        return "one student gives no interval"
    return "" if interval.low > 0 else "no transfer to compare with: its lift is not above zero"


def judge(interval: Interval | None, at_least: float | None = None, at_most: float | None = None) -> str:
    """Whether a whole interval lies on the right side of a bound, on the wrong side, or on both."""
    if interval is None:
        return NOT_DECIDED
    if at_least is not None:
        return HOLDS if interval.low >= at_least else FAILS if interval.high < at_least else NOT_DECIDED
    assert at_most is not None
    return HOLDS if interval.high <= at_most else FAILS if interval.low > at_most else NOT_DECIDED


def all_of(*ps: Any) -> float | None:
    """p of a claim that needs several things: the largest of theirs. None where one cannot be computed."""
    largest = max((math.nan if p is None else float(p) for p in ps), key=lambda p: math.inf if math.isnan(p) else p)
    return None if math.isnan(largest) else largest


def share(
    found: Pool | None,
    key: str,
    text: str,
    of: Group,
    at_least: float | None = None,
    at_most: float | None = None,
    unit: str = "of all tokens",
) -> list[Claim]:
    """The lift of the pool's first group (`of`) as a share of its second's, held against a bound. It needs a lift to take a
    share of."""
    if found is None:
        return []
    (part, whole), text, bound = found.levels, named(text, of), at_least if at_most is None else at_most
    students = part.students.n + whole.students.n
    above = share_p_above(part.lift, whole.lift, (at_least or 0.0) if at_most is None else at_most)
    p = all_of(above if at_most is None else 1 - above, whole.lift.p_above(0.0))
    if reason := no_lift(whole):
        # A share of a lift that is not above zero would be a meaningless number.
        return [Claim(key, text, found.metric, None, None, unit, students, NOT_DECIDED, reason, p, of.variant, bound)]
    interval = share_interval(part.lift, whole.lift)
    effect = float(part.lift.value / whole.lift.value)
    reason = found.words if interval else "too few students to bound the share"
    verdict = judge(interval, at_least, at_most)
    return [Claim(key, text, found.metric, effect, interval, unit, students, verdict, reason, p, of.variant, bound)]


def not_below(key: str, text: str, of: Group, found: Pool, open_for: str, what: str, needs: Any) -> Claim:
    """The lift of the pool's first group (`of`) held against its second's: no lower.

    Args:
      open_for: why nothing can be decided, or empty; needs: p of that not being so.
    """
    difference = found.levels[0].above(found.levels[1])
    interval = found.between(difference)
    verdict = NOT_DECIDED if open_for else judge(interval, at_least=0.0)
    reason, p = open_for or f"{what}, {found.words}", all_of(difference.p_above(0.0), needs)
    effect, students = float(difference.value), difference.n
    text = named(text, of)
    return Claim(key, text, found.metric, effect, interval, found.unit, students, verdict, reason, p, of.variant, 0.0)


def named(text: str, group: Group) -> str:
    """A claim's text with the variant it was read off, if that has a name."""
    return f"{text} ({group.variant})" if group.variant else text
