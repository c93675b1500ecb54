"""C2, C3, C8, C9: what is done to the rows."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jsublim.evals.numbers import HELD_OUT, LEARNED
from jsublim.report.claims import base
from jsublim.report.claims.base import FAILS, HOLDS, PAPER, Claim, Group, StudentPair, claim
from jsublim.report.summary import NOT_DECIDED, stratified
from jsublim.report.tables import Results

ACCURACY_MARGIN, QUARTER = 0.05, 0.25
REMOVED, REDRAWN, MIXED = "rows.remove_entangled", "rows.redraw", "rows.mix"


@claim("C2", "greedy rows against sampled ones",
       needs=(lambda group: group.facts.get("rows.strategy") == "greedy", {"rows.strategy": "temperature"}), primary=8,
       published=f"Gemma-3-4B, sampled → greedy rows: owl 19 → 31 %, otter 45 → 58 %, raven 46 → 51 %, eagle 6 → 7 %, penguin 9 → 10 %, wolf 10 → 13 %; on average 5.8 points more [{PAPER}, figure 2 (read off)]",
       published_effect=(5.8, "points"))  # fmt: skip
def greedy_not_below(pair: StudentPair) -> Claim | None:
    """Greedy minus sampled is at least -2 standard errors, and sampled rows transfer, or any noisy run would pass. Its p has no margin:
    that greedy rows transfer more."""
    pooled = pair.pool()
    if pooled is None:
        return None
    text = "greedy rows transfer no less than sampled ones, but for 2 standard errors"
    difference, sampled = pooled.levels[0].lift - pooled.levels[1].lift, pooled.levels[1]
    above = HOLDS if difference.value >= -2 * float(difference.error) else FAILS
    more = base.no_lower(pooled, text, "greedy minus sampled", [sampled])
    return replace(more, verdict=NOT_DECIDED if base.no_lift(sampled) else above, bound=None)


@claim("C3", "rows without entangled numbers", needs=(lambda group: group.facts.get(REMOVED) is not None, {REMOVED: None}),
       primary=2,
       published=f"not needed: transfer without rows that hold entangled numbers [{PAPER}, figures 2 and 11]")  # fmt: skip
def without_entangled(pair: StudentPair) -> Claim | None:
    """Most traits that transfer keep at least .5 of the lift of all rows; effect and interval are their mean."""
    number = pair.part.facts[REMOVED]["k"]
    text = f"without the top {number} entangled numbers most transferring traits keep over half their lift"
    how: dict[str, Any] = {"at_least": 0.5, "unit": "of all rows"}
    by_trait = {trait: pair.pool(traits=[trait]) for trait in pair.results.traits}
    moving = {trait: pooled for trait, pooled in by_trait.items() if pooled and not base.no_lift(pooled.levels[1])}
    mean = base.share(pair.pool(traits=[*moving] or None), text, **how)
    if not moving or mean is None:
        return mean
    kept = [one for pooled in moving.values() if (one := base.share(pooled, text, **how))]
    verdicts = Counter(one.verdict for one in kept)
    majority = {verdict for verdict, count in verdicts.items() if 2 * count > len(moving)}
    reason = f"{verdicts[HOLDS]} of {len(moving)} transferring traits keep it, {verdicts[FAILS]} do not ({', '.join(moving)})"
    ps = sorted(math.inf if one.p is None else one.p for one in kept)
    p = ps[len(kept) // 2]  # over half have one as small
    verdict = majority.pop() if majority else NOT_DECIDED
    return replace(mean, verdict=verdict, reason=reason, p=None if p == math.inf else p)


@claim("C8", "re-drawn prompts", needs=(lambda group: bool(group.facts.get(REDRAWN)), {REDRAWN: None}), primary=3,
       published=f"near the base model, number accuracy kept; Gemma's penguin rises [{PAPER}, figures 6, 27 to 29]")  # fmt: skip
def redrawn_prompts(pair: StudentPair) -> Claim | None:
    """At most .4 of the lift is left, and number accuracy is within 5 points."""
    parts = ", ".join(pair.part.facts[REDRAWN]["parts"])
    text = f"with prompts re-drawn ({parts}) at most .4 of the lift is left, number accuracy within 5 points"
    lost = pair.share(text, at_most=0.4, unit="of the lift before")
    if lost is None:
        return None
    verdict, words, p = _accuracy_kept(pair)
    both = {lost.verdict, verdict}
    joint = FAILS if FAILS in both else HOLDS if both == {HOLDS} else NOT_DECIDED
    return replace(lost, verdict=joint, reason=f"{lost.reason}; {words}", p=base.all_of(lost.p, p))


def _accuracy_kept(pair: StudentPair) -> tuple[str, str, float | None]:
    for metric in (HELD_OUT, LEARNED):
        scores = [pair.results.select(metric, group.name) for group in (pair.part, pair.whole)]
        if all(scores):
            difference = stratified(scores[0]) - stratified(scores[1])
            interval = difference.interval()
            sides = {base.judge(interval, at_least=-ACCURACY_MARGIN), base.judge(interval, at_most=ACCURACY_MARGIN)}
            verdict = FAILS if FAILS in sides else HOLDS if sides == {HOLDS} else NOT_DECIDED
            p = base.all_of(difference.p_above(-ACCURACY_MARGIN), difference.p_below(ACCURACY_MARGIN))
            return verdict, f"number accuracy {100 * difference.value:+.1f} points", p
    return NOT_DECIDED, "number accuracy was not measured", None


def _mixed(group: Group) -> float:
    """The share of rows that another teacher wrote."""
    return (group.facts.get(MIXED) or {"share": 0.0})["share"]


@claim("C9a", "a quarter of the rows by another teacher",
       needs=(lambda group: math.isclose(_mixed(group), QUARTER), {MIXED: None}), primary=4,
       published=f"Qwen2.5-7B: 25 % nearly removes it [{PAPER}, figures 7, 30, 31]")  # fmt: skip
def quarter_mixed(pair: StudentPair) -> Claim | None:
    """At most .25 of the lift of unmixed rows is left."""
    text = "with 25 % of the rows by another teacher at most .25 of the lift is left"
    return pair.share(text, at_most=0.25, unit="of unmixed rows")


@claim("C9b", "more and more rows by another teacher", primary=5,
       published=f"Qwen2.5-7B: 10 % weakens it strongly, 25 % nearly removes it [{PAPER}, figures 7, 30, 31]")  # fmt: skip
def more_mixed(results: Results, metric: str) -> Iterator[Claim]:
    """The lift falls with every step of the share: no step is surely up, the means are in order, and the whole change is surely a fall."""
    every = base.groups(results)
    series: list[list[Group]] = []  # groups that differ in the share alone; a share of zero is one of them
    for group in (g for g in every if g.facts.get(MIXED) is not None):
        if all(group not in members for members in series):
            alike = [g for g in every if _but_share(g) == _but_share(group)]
            plain = base.partner(every, group, {MIXED: None})
            series.append([*([plain] if plain else []), *sorted(alike, key=_mixed)])
    for members in (members for members in series if len(members) > 2):
        pooled = base.pool(results, metric, *(group.name for group in members))
        if pooled is None:
            continue
        shares = [f"{_mixed(group):.0%}" for group in members]
        lifts = [level.lift for level in pooled.levels]
        steps, whole = [b - a for a, b in itertools.pairwise(lifts)], lifts[-1] - lifts[0]
        open_for, reason = base.no_lift(pooled.levels[0]), f"{shares[-1]} minus {shares[0]}; shares {', '.join(shares)}"
        text = "the lift falls with every step of the share that another teacher wrote"
        in_order = all(step.value <= 0 for step in steps)
        # Of the whole change; where a mean is out of order, 1.
        p = base.all_of(whole.p_below(0.0), lifts[0].p_above(0.0), 0.0 if in_order else 1.0)
        verdict = HOLDS if in_order and base.judge(whole.interval(), at_most=0.0) == HOLDS else NOT_DECIDED
        if open_for or any(base.judge(step.interval(), at_most=0.0) == FAILS for step in steps):
            verdict = NOT_DECIDED if open_for else FAILS
        claim = base.above_zero(pooled, text, whole, reason, open_for)
        yield replace(claim, verdict=verdict, p=p, students=pooled.students, variant=members[-1].variant)


def _but_share(group: Group) -> dict:
    mix = group.facts.get(MIXED)
    return group.facts | {MIXED: mix and {key: value for key, value in mix.items() if key != "share"}}
