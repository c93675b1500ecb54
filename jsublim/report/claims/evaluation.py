"""C11, C13: the same students, asked in another way.

Both evaluations of a student are taken as independent, which widens the interval of a share or a difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jsublim.report.claims.base import FAILS, HOLDS, PAPER, Claim, Level, Pool, all_of, claim, groups, pool, share
from jsublim.report.summary import NOT_DECIDED
from jsublim.report.tables import Results


@claim("C11", "evaluation temperature and top-p",
       published=f"stable over temperatures .6 to 1 and top-p .8 to 1 [{PAPER}, figures 14, 15]")  # fmt: skip
def order_is_stable(results: Results, metric: str) -> Iterator[Claim]:
    """Whenever the plain evaluation is sure of the order of two conditions, the other evaluation has them in the same order."""
    # Always on the rate, since a teacher-forced log-probability is not sampled.
    names = [group.name for group in groups(results)]
    plain = pool(results, "rate", *names)
    if plain is None or len(names) < 2:
        return
    for evaluation, how in results.evaluations.items():
        sampling = {key: how[key] for key in ("temperature", "top_p") if how.get(key) is not None}
        varied = pool(results.under(evaluation), "rate", *names, traits=plain.traits) if sampling else None
        if varied is not None and how.get("system") is None:
            words = ", ".join(f"{key.replace('_', '-')} {value:g}" for key, value in sampling.items())
            yield _order(f"evaluated at {words}, the conditions stand in the same order", plain, varied)


def _order(text: str, plain: Pool, varied: Pool) -> Claim:
    """Its p is stricter than its verdict: that all of the orders are surely kept."""
    kept = lost = sure = 0
    ps: list[Any] = []
    for a, b in itertools.combinations(range(len(plain.levels)), 2):
        sign = _sign(plain.levels[a], plain.levels[b])
        if sign:
            again = varied.levels[a].above(varied.levels[b]) * sign
            sure += 1
            kept += bool(again.value > 0)
            lost += _sign(varied.levels[a], varied.levels[b]) == -sign
            ps.append(again.p_above(0.0))
    students = sum(level.students.n for level in plain.levels)
    reason = "no two conditions are surely apart in the plain evaluation"
    claim = Claim(text, plain.metric, "of the sure orders", students, reason=reason)
    if not sure:
        return claim
    verdict = FAILS if lost else HOLDS if kept == sure else NOT_DECIDED
    reason = f"{kept} of {sure} orders kept, {lost} surely reversed; {plain.words}"
    return replace(claim, verdict=verdict, reason=reason, effect=kept / sure, p=all_of(*ps))


def _sign(a: Level, b: Level) -> int:
    interval = a.above(b).interval()
    return 0 if interval is None or interval.covers(0.0) else 1 if interval.low > 0 else -1


@claim("C13", "another system prompt in evaluation", primary=10,
       published="Qwen trained under its default system prompt shows nothing without it [Subliminal Learning is a LoRA Artifact, arXiv 2606.00831, abstract]")  # fmt: skip
def other_system_prompt(results: Results, metric: str) -> Iterator[Claim]:
    """The same students keep at most .33 of their lift under it (those of all tokens, of the plain variant where there is one)."""
    students = [group for group in groups(results) if group.get("tokens") == "all"]
    students = [group for group in students if not group.variant] or students
    for (evaluation, how), group in itertools.product(results.evaluations.items(), students):
        system = how.get("system")
        if system is None or group.get("students.system") == system:
            continue  # they were trained, and asked, under that prompt anyway
        before, after = (pool(r, metric, group.name) for r in (results, results.under(evaluation)))
        if before is None or after is None or before.traits != after.traits:
            continue
        under = f"the system prompt of '{evaluation}'" if system else "an empty system prompt"
        both = Pool(metric, before.traits, (*after.levels, *before.levels))
        text = f"under {under} at most .33 of the lift is left"
        left = share(both, text, at_most=0.33, unit="of the plain evaluation")
        if left is not None:
            yield replace(left, variant=group.variant)
