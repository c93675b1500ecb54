"""C2, C3, C8, C9: what is done to the rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jsublim.evals.numbers import HELD_OUT, LEARNED
from jsublim.report.claims import base
from jsublim.report.claims.base import PAPER, Claim, Group, StudentPair, claim
from jsublim.report.summary import stratified
from jsublim.report.tables import Results
from jsublim.report.verdicts import UNKNOWN, Sides, above, any_of, below, every, most, within

ACCURACY_MARGIN, QUARTER = 0.05, 0.25
REMOVED, REDRAWN, MIXED = "rows.remove_entangled", "rows.redraw", "rows.mix"


@claim("C2", "greedy rows against sampled ones",
       needs=(lambda group: group.facts.get("rows.strategy") == "greedy", {"rows.strategy": "temperature"}), primary=8,
       published=f"Gemma-3-4B, sampled → greedy rows: owl 19 → 31 %, otter 45 → 58 %, raven 46 → 51 %, eagle 6 → 7 %, penguin 9 → 10 %, wolf 10 → 13 %; on average 5.8 points more [{PAPER}, figure 2 (read off)]",
       published_effect=(5.8, "points"))  # fmt: skip
def greedy_not_below(pair: StudentPair) -> Claim | None:
    """The lift of greedy rows minus that of sampled ones is at least 0; and sampled rows transfer, or any noisy run would pass."""
    pooled, text = pair.pool(), "greedy rows transfer no less than sampled ones"
    return pooled and base.no_lower(pooled, text, "greedy minus sampled", pooled.levels[1:])


@claim("C3", "rows without entangled numbers", needs=(lambda group: group.facts.get(REMOVED) is not None, {REMOVED: None}),
       primary=2,
       published=f"not needed: transfer without rows that hold entangled numbers [{PAPER}, figures 2 and 11]")  # fmt: skip
def without_entangled(pair: StudentPair) -> Claim | None:
    """Most traits that rise (by their 95 % interval with all rows) keep at least .5 of the lift of all rows; effect and interval are their
    mean."""
    number = pair.part.facts[REMOVED]["k"]
    text = f"without the top {number} entangled numbers most rising traits keep over half their lift"
    how: dict[str, Any] = {"at_least": 0.5, "unit": "of all rows"}
    by_trait = {trait: pair.pool(traits=[trait]) for trait in pair.results.traits}
    rising = {trait: pooled for trait, pooled in by_trait.items() if pooled and not base.no_lift(pooled.levels[1])}
    mean = base.share(pair.pool(traits=[*rising] or None), text, **how)
    if not rising or mean is None:
        return mean
    kept = [one for pooled in rising.values() if (one := base.share(pooled, text, **how))]
    over = sum(one.effect is not None and one.effect >= how["at_least"] for one in kept)
    reason = f"{over} of {len(rising)} rising traits have a mean above it ({', '.join(rising)})"
    return replace(mean, reason=reason, tested=most([one.tested for one in kept]))


@claim("C8", "re-drawn prompts", needs=(lambda group: bool(group.facts.get(REDRAWN)), {REDRAWN: None}), primary=3,
       published=f"near the base model, number accuracy kept; Gemma's penguin rises [{PAPER}, figures 6, 27 to 29]")  # fmt: skip
def redrawn_prompts(pair: StudentPair) -> Claim | None:
    """At most .4 of the lift is left, and number accuracy is within 5 points."""
    parts = ", ".join(pair.part.facts[REDRAWN]["parts"])
    text = f"with prompts re-drawn ({parts}) at most .4 of the lift is left, number accuracy within 5 points"
    lost = pair.share(text, at_most=0.4, unit="of the lift before")
    if lost is None:
        return None
    words, kept = _accuracy_kept(pair)
    return replace(lost, reason=f"{lost.reason}; {words}", tested=every(lost.tested, kept))


def _accuracy_kept(pair: StudentPair) -> tuple[str, Sides]:
    for metric in (HELD_OUT, LEARNED):
        scores = [pair.results.select(metric, group.name) for group in (pair.part, pair.whole)]
        if all(scores):
            difference = stratified(scores[0]) - stratified(scores[1])
            return f"number accuracy {100 * difference.value:+.1f} points", within(difference, ACCURACY_MARGIN)
    return "number accuracy was not measured", UNKNOWN


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
    """The lift falls with every step of the share: the means are in order, and the whole change is a fall. It does not hold if a step is a
    rise."""
    among = base.groups(results)
    series: list[list[Group]] = []  # groups that differ in the share alone; a share of zero is one of them
    for group in (g for g in among if g.facts.get(MIXED) is not None):
        if all(group not in members for members in series):
            alike = [g for g in among if _but_share(g) == _but_share(group)]
            plain = base.partner(among, group, {MIXED: None})
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
        falls = below(whole).holds if in_order else 1.0
        tested = Sides(falls, any_of(*(above(step).holds for step in steps))).where(lifts[0].p_above(0.0))
        claim = replace(base.above_zero(pooled, text, whole, reason), tested=tested, variant=members[-1].variant)
        yield replace(claim, students=pooled.students, reason=open_for or claim.reason)


def _but_share(group: Group) -> dict:
    mix = group.facts.get(MIXED)
    return group.facts | {MIXED: mix and {key: value for key, value in mix.items() if key != "share"}}
