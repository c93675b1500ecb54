"""C2, C3, C8, C9: what is done to the rows."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from jsublim.report.claims.groups import Group, comparisons, groups, partner
from jsublim.report.claims.verdicts import FAILS, HOLDS, Claim, all_of, judge, named, no_lift, pool, share
from jsublim.report.statistics import Estimate
from jsublim.report.summary import NOT_DECIDED, stratified
from jsublim.report.tables import Results

ENTANGLED_KEEP, REDRAWN_KEEPS, ACCURACY_MARGIN, QUARTER, QUARTER_KEEPS = 0.5, 0.4, 0.05, 0.25, 0.25


def greedy_not_below(results: Results, metric: str) -> list[Claim]:
    """The claim's own margin is two standard errors, so any noisy run would pass; sampled rows must transfer too. Its p has no
    margin: that greedy rows transfer more."""
    claims = []
    is_greedy, sampled_rows = lambda g: g.get("rows.strategy") == "greedy", {"rows.strategy": "temperature"}
    for greedy, sampled in comparisons(results, is_greedy, sampled_rows):
        found = pool(results, metric, greedy.name, sampled.name)
        if found is None:
            continue
        difference = found.levels[0].above(found.levels[1])
        error = float(difference.error)
        reason = no_lift(found.levels[1])
        verdict = NOT_DECIDED if reason else HOLDS if difference.value >= -2 * error else FAILS
        text = named("greedy rows transfer no less than sampled ones, but for 2 standard errors", greedy)
        reason = reason or f"greedy minus sampled, {found.words}"
        p = all_of(difference.p_above(0.0), found.levels[1].lift.p_above(0.0))
        claims.append(
            Claim(
                "C2", text, metric, float(difference.value), found.between(difference), found.unit, difference.n, verdict,
                reason, p, greedy.variant,
            )
        )  # fmt: skip
    return claims


def without_entangled(results: Results, metric: str) -> list[Claim]:
    """The verdict counts traits that transfer with all rows; effect and interval are their mean."""
    claims = []
    removed = "rows.remove_entangled"
    asked = comparisons(results, lambda g: g.get(removed) is not None, {removed: None})
    for part, whole in asked:
        number = part.get(removed)["k"]
        text = f"without the top {number} entangled numbers most transferring traits keep over half their lift"
        by_trait = {t: pool(results, metric, part.name, whole.name, traits=[t]) for t in results.traits}
        moving = {t: found for t, found in by_trait.items() if found and not no_lift(found.levels[1])}
        if not moving:
            found = pool(results, metric, part.name, whole.name)
            claims += share(found, "C3", text, part, at_least=ENTANGLED_KEEP, unit="of all rows")
            continue
        kept = [share(found, "C3", text, part, at_least=ENTANGLED_KEEP)[0] for found in moving.values()]
        verdicts = Counter(claim.verdict for claim in kept)
        majority = {verdict for verdict, count in verdicts.items() if 2 * count > len(moving)}
        together = pool(results, metric, part.name, whole.name, traits=[*moving])
        (mean,) = share(together, "C3", text, part, at_least=ENTANGLED_KEEP, unit="of all rows")
        reason = f"{verdicts[HOLDS]} of {len(moving)} transferring traits keep it, {verdicts[FAILS]} do not ({', '.join(moving)})"
        verdict = majority.pop() if majority else NOT_DECIDED
        most = sorted(math.inf if claim.p is None else claim.p for claim in kept)[len(kept) // 2]
        p = None if most == math.inf else most  # over half of them have one as small
        claims.append(replace(mean, verdict=verdict, reason=reason, p=p))
    return claims


def redrawn_prompts(results: Results, metric: str) -> list[Claim]:
    """Two things must hold: the trait is mostly gone, and the number task is done as well as before."""
    claims = []
    for part, whole in comparisons(results, lambda group: bool(group.get("rows.redraw")), {"rows.redraw": None}):
        parts = ", ".join(part.get("rows.redraw")["parts"])
        text = f"with prompts re-drawn ({parts}) at most .4 of the lift is left, number accuracy within 5 points"
        found = pool(results, metric, part.name, whole.name)
        verdict, words, p = _accuracy_kept(results, part, whole)
        for claim in share(found, "C8", text, part, at_most=REDRAWN_KEEPS, unit="of the lift before"):
            both = {claim.verdict, verdict}
            joint = FAILS if FAILS in both else HOLDS if both == {HOLDS} else NOT_DECIDED
            claims.append(replace(claim, verdict=joint, reason=f"{claim.reason}; {words}", p=all_of(claim.p, p)))
    return claims


def _accuracy_kept(results: Results, part: Group, whole: Group) -> tuple[str, str, float | None]:
    for metric in ("number_accuracy_heldout", "number_accuracy"):
        scores = [results.select(metric, group.name) for group in (part, whole)]
        if all(scores):
            difference = stratified(scores[0]) - stratified(scores[1])
            interval = difference.interval()
            sides = {judge(interval, at_least=-ACCURACY_MARGIN), judge(interval, at_most=ACCURACY_MARGIN)}
            verdict = FAILS if FAILS in sides else HOLDS if sides == {HOLDS} else NOT_DECIDED
            p = all_of(difference.p_above(-ACCURACY_MARGIN), difference.p_below(ACCURACY_MARGIN))
            return verdict, f"number accuracy {100 * difference.value:+.1f} points", p
    return NOT_DECIDED, "number accuracy was not measured", None


def mixed_teachers(results: Results, metric: str) -> list[Claim]:
    """A series consists of the groups that differ only in the share of rows that another teacher wrote; a share of zero is one
    of them."""
    every = groups(results)
    series: list[list[Group]] = []
    for group in (g for g in every if g.get("rows.mix") is not None):
        if all(group not in members for members in series):
            alike = [g for g in every if _but_share(g) == _but_share(group)]
            plain = partner(every, group, {"rows.mix": None})
            series.append([*([plain] if plain else []), *sorted(alike, key=lambda g: g.get("rows.mix")["share"])])
    return [
        claim
        for members in series
        for claim in (*_quarter(results, metric, members), *_falls(results, metric, members))
    ]


def _but_share(group: Group) -> dict:
    mix = group.get("rows.mix")
    return group.facts | {"rows.mix": mix and {key: value for key, value in mix.items() if key != "share"}}


def _quarter(results: Results, metric: str, members: list[Group]) -> list[Claim]:
    plain, claims = members[0], []
    for group in members[1:] if plain.get("rows.mix") is None else []:
        if math.isclose(group.get("rows.mix")["share"], QUARTER):
            text = "with 25 % of the rows by another teacher at most .25 of the lift is left"
            found = pool(results, metric, group.name, plain.name)
            claims += share(found, "C9a", text, group, at_most=QUARTER_KEEPS, unit="of unmixed rows")
    return claims


def _falls(results: Results, metric: str, members: list[Group]) -> list[Claim]:
    """Monotone: no step is surely up, the means are in order, and the whole change is surely a fall. Its p is that of the whole
    change; where a mean is out of order, 1."""
    found = pool(results, metric, *(group.name for group in members)) if len(members) > 2 else None
    if found is None:
        return []
    shares = ["{:.0%}".format((group.get("rows.mix") or {"share": 0.0})["share"]) for group in members]
    steps = [b.above(a) for a, b in zip(found.levels, found.levels[1:], strict=False)]
    whole = found.levels[-1].above(found.levels[0])
    reason = no_lift(found.levels[0])
    verdict = NOT_DECIDED if reason else _falling(steps, whole)
    text = named("the lift falls with every step of the share that another teacher wrote", members[-1])
    reason = reason or f"{shares[-1]} minus {shares[0]}; shares {', '.join(shares)}, {found.words}"
    students, effect = sum(level.students.n for level in found.levels), float(whole.value)
    p = all_of(whole.p_below(0.0), found.levels[0].lift.p_above(0.0), 0.0 if _in_order(steps) else 1.0)
    interval, variant = found.between(whole), members[-1].variant
    return [Claim("C9b", text, metric, effect, interval, found.unit, students, verdict, reason, p, variant, 0.0)]


def _falling(steps: list[Estimate], whole: Estimate) -> str:
    if any(judge(step.interval(), at_most=0.0) == FAILS for step in steps):
        return FAILS
    return HOLDS if _in_order(steps) and judge(whole.interval(), at_most=0.0) == HOLDS else NOT_DECIDED


def _in_order(steps: list[Estimate]) -> bool:
    return all(step.value <= 0 for step in steps)
