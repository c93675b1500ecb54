"""C0: whether there is anything to explain."""

from __future__ import annotations

from jsublim.report.claims.groups import groups
from jsublim.report.claims.verdicts import Claim, all_of, judge, named, pool
from jsublim.report.summary import judged_conditions
from jsublim.report.tables import Results


def transfers(results: Results, metric: str) -> list[Claim]:
    """Students of all tokens, of the plain variant where there is one: is their lift above zero?"""
    claims, judged = [], judged_conditions(results)
    for group in (group for group in groups(results) if group.name in judged):
        found = pool(results, metric, group.name)
        if found is None:
            continue
        lift, text = found.levels[0].lift, named("students move to their teacher's trait", group)
        interval, effect, p = found.between(lift), float(lift.value), all_of(lift.p_above(0.0))
        verdict, reason = judge(interval, at_least=0.0), f"above the reference, {found.words}"
        students, variant = found.levels[0].students.n, group.variant
        claims.append(
            Claim("C0", text, metric, effect, interval, found.unit, students, verdict, reason, p, variant, 0.0)
        )
    return claims
