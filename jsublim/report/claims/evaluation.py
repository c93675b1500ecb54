"""C11, C13: the same students, asked in another way.

Both evaluations of a student are taken as independent, which widens the interval of a share or a difference.
"""

from __future__ import annotations

import itertools
from typing import Any

from jsublim.report.claims.groups import Group, groups
from jsublim.report.claims.verdicts import FAILS, HOLDS, Claim, Level, Pool, all_of, pool, share
from jsublim.report.statistics import Interval
from jsublim.report.summary import NOT_DECIDED
from jsublim.report.tables import Results

SYSTEM_KEEPS = 0.33


def order_is_stable(results: Results, metric: str) -> list[Claim]:
    """Of each two groups whose order the plain evaluation is sure of: do they stand in that order again? Always on
    the rate, since a teacher-forced log-probability is not sampled. Its p is stricter than its verdict: that all of them are
    surely in that order."""
    names = [group.name for group in groups(results)]
    plain, claims = pool(results, "rate", *names), []
    if plain is None or len(names) < 2:
        return []
    for evaluation, how in results.evaluations.items():
        sampling = {key: how[key] for key in ("temperature", "top_p") if how.get(key) is not None}
        found = pool(results.under(evaluation), "rate", *names, traits=plain.traits) if sampling else None
        if found is None or how.get("system") is not None:
            continue
        words = ", ".join(f"{key.replace('_', '-')} {value:g}" for key, value in sampling.items())
        claims.append(_order(f"evaluated at {words}, the conditions stand in the same order", plain, found))
    return claims


def _order(text: str, plain: Pool, varied: Pool) -> Claim:
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
    if not sure:
        reason = "no two conditions are surely apart in the plain evaluation"
        return Claim("C11", text, plain.metric, None, None, "of the sure orders", students, NOT_DECIDED, reason)
    verdict = FAILS if lost else HOLDS if kept == sure else NOT_DECIDED
    reason = f"{kept} of {sure} orders kept, {lost} surely reversed; {plain.words}"
    p, unit = all_of(*ps), "of the sure orders"
    return Claim("C11", text, plain.metric, kept / sure, None, unit, students, verdict, reason, p)


def _sign(a: Level, b: Level) -> int:
    interval: Interval | None = a.above(b).interval()
    return 0 if interval is None or interval.covers(0.0) else 1 if interval.low > 0 else -1


def other_system_prompt(results: Results, metric: str) -> list[Claim]:
    """Students that learn all tokens: those of the plain variant, or of every variant where none is plain."""
    claims = []
    asked = [name for name, how in results.evaluations.items() if how.get("system") is not None]
    for evaluation, group in itertools.product(asked, _plain(results)):
        if group.get("students.system") == results.evaluations[evaluation]["system"]:
            continue  # it was trained, and asked, under that prompt anyway
        before, after = (pool(r, metric, group.name) for r in (results, results.under(evaluation)))
        if before is None or after is None or before.traits != after.traits:
            continue
        system = results.evaluations[evaluation]["system"]
        under = f"the system prompt of '{evaluation}'" if system else "an empty system prompt"
        text = f"under {under} at most .33 of the lift is left"
        both = Pool(metric, before.traits, (after.levels[0], before.levels[0]))
        claims += share(both, "C13", text, group, at_most=SYSTEM_KEEPS, unit="of the plain evaluation")
    return claims


def _plain(results: Results) -> list[Group]:
    found = [group for group in groups(results) if group.get("tokens") == "all"]
    return [group for group in found if not group.variant] or found
