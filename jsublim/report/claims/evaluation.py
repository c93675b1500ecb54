"""C10, C11, C13: attribution, and the same students asked in another way.

Both evaluations of a student are taken as independent, which widens the interval of a share or a difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from jsublim.report.attribution import early_share
from jsublim.report.claims import base
from jsublim.report.claims.base import PAPER, Claim, Pool, claim
from jsublim.report.statistics import Estimate, mean_estimate
from jsublim.report.tables import Results
from jsublim.report.verdicts import above, every

MOST = 0.5  # of the attribution


@claim("C10", "where attribution lies", primary=13,
       published=f"Qwen2.5-7B and Gemma-3-4B: early layers, at the first mention of the trait [{PAPER}, figures 4, 22 to 26]")  # fmt: skip
def attribution_early(results: Results, metric: str) -> Iterator[Claim]:
    """Noising, residual stream, first third of the layers: at least .5 of the absolute attribution lies at the trait's first mention.
    The interval is over rows, not students: attribution is about teachers."""
    by_trait: dict[str, list[float]] = {}
    for row in early_share(results.attribution) if results.attribution is not None else ():
        if row.direction == "noising":
            by_trait.setdefault(row.trait, []).append(row.of_early)
    if not by_trait:
        return
    mean = mean_estimate([Estimate.of(shares) for shares in by_trait.values()])
    interval = mean.interval()
    interval = interval and interval.within(0.0, 1.0)
    text = "in the first third of the layers most of the attribution lies at the trait"
    reason = f"over {mean.n} rows of {', '.join(by_trait)}, not over students"
    yield Claim(
        text, "attribution", "of the attribution", 0, reason, float(mean.value), interval, above(mean, MOST), MOST
    )


@claim("C11", "evaluation temperature and top-p",
       published=f"stable over temperatures .6 to 1 and top-p .8 to 1 [{PAPER}, figures 14, 15]")  # fmt: skip
def order_is_stable(results: Results, metric: str) -> Iterator[Claim]:
    """Wherever the 95 % interval of the plain evaluation tells two conditions apart, the other evaluation has them in the same order."""
    # Always on the rate, since a teacher-forced log-probability is not sampled.
    names = [group.name for group in base.groups(results)]
    plain = base.pool(results, "rate", *names)
    if plain is None or len(names) < 2:
        return
    for evaluation, how in results.evaluations.items():
        sampling = {key: how[key] for key in ("temperature", "top_p") if how.get(key) is not None}
        varied = base.pool(results.under(evaluation), "rate", *names, traits=plain.traits) if sampling else None
        if varied is not None and how.get("system") is None:
            words = ", ".join(f"{key.replace('_', '-')} {value:g}" for key, value in sampling.items())
            text = f"evaluated at {words}, the conditions stand in the same order"
            yield replace(_order(text, plain, varied), which=evaluation)


def _order(text: str, plain: Pool, varied: Pool) -> Claim:
    lifts = [[level.lift for level in pooled.levels] for pooled in (plain, varied)]
    gaps = [[a - b for a, b in itertools.combinations(of_pool, 2)] for of_pool in lifts]
    orders = [gap * sign for before, gap in zip(*gaps, strict=True) if (sign := _sign(before))]
    if not orders:
        reason = "the plain evaluation tells no two conditions apart"
        return Claim(text, plain.metric, "of the orders", plain.students, reason)
    kept, tested = sum(bool(gap.value > 0) for gap in orders), every(*map(above, orders))
    reason = f"{kept} of {len(orders)} orders kept; {plain.words}"
    return Claim(text, plain.metric, "of the orders", plain.students, reason, kept / len(orders), tested=tested)


def _sign(gap: Estimate) -> int:
    """The sign of a difference whose interval leaves zero out, else 0."""
    interval = gap.interval()
    return 0 if interval is None or interval.covers(0.0) else 1 if interval.low > 0 else -1


@claim("C13", "another system prompt in evaluation", primary=10,
       published="Qwen trained under its default system prompt shows nothing without it [Subliminal Learning is a LoRA Artifact, arXiv 2606.00831, abstract]")  # fmt: skip
def other_system_prompt(results: Results, metric: str) -> Iterator[Claim]:
    """The same students keep at most .33 of their lift under it (those of all tokens, of the plain variant where there is one)."""
    students = [group for group in base.groups(results) if group.facts.get("tokens") == "all"]
    students = [group for group in students if not group.variant] or students
    for (evaluation, how), group in itertools.product(results.evaluations.items(), students):
        system = how.get("system")
        if system is None or group.facts.get("students.system") == system:
            continue  # they were trained, and asked, under that prompt anyway
        before, after = (base.pool(r, metric, group.name) for r in (results, results.under(evaluation)))
        if before is None or after is None or before.traits != after.traits:
            continue
        under = f"the system prompt of '{evaluation}'" if system else "an empty system prompt"
        both = Pool(metric, before.traits, (*after.levels, *before.levels))
        text = f"under {under} at most .33 of the lift is left"
        left = base.share(both, text, at_most=0.33, unit="of the plain evaluation")
        if left is not None:
            yield replace(left, variant=group.variant, which=evaluation)
