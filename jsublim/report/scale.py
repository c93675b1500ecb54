"""Every kind of student on one scale, on which the control is 0 and students of all tokens are 1; and, of an ablation, what the number
task and other prompts say of each.

Lifts are pooled over traits as for claims (`claims/base.py`); every student is measured from the control of its own variant.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from jsublim.evals.kl import KL
from jsublim.evals.numbers import HELD_OUT, LEARNED
from jsublim.report.claims.base import claim_metric, no_lift, pool
from jsublim.report.comparisons import Comparisons
from jsublim.report.statistics import Interval, share_interval
from jsublim.report.summary import Matrix, Measured, judged_conditions, over_models, stratified, student_lifts
from jsublim.report.tables import Results, split_condition

ACCURACY = (HELD_OUT, LEARNED)  # the first that was measured


@dataclass(frozen=True)
class Share:
    """One kind of student. `lift` is in nats, or a share of answers; `share` is the lift as a share of the yardstick's, and
    `seeds` the same of each seed, with the mean over traits. What cannot be said is None, or empty."""

    condition: str
    students: int
    lift: float
    lift_interval: Interval | None
    share: float | None = None
    interval: Interval | None = None
    seeds: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """The table. `yardstick` is the condition that is 1; `open_for` says why nothing can be a share of it, or is empty."""

    metric: str
    yardstick: str
    traits: tuple[str, ...]
    open_for: str
    shares: tuple[Share, ...]

    @property
    def seeds(self) -> list[int]:
        """Every seed that some kind of student has."""
        return sorted({seed for share in self.shares for seed in share.seeds})


def scale(results: Results) -> Scale | None:
    """The table of a run, measured by its first judged condition; None for a run without one."""
    metric, judged = claim_metric(results), judged_conditions(results)
    found = pool(results, metric, judged[0]) if judged else None
    if found is None:
        return None
    whole = found.levels[0].lift
    open_for = no_lift(found.levels[0]) and "students of all tokens do not surely lie above the control"
    shares = []
    for condition in results.mask_conditions:
        both = pool(results, metric, condition, judged[0])
        if both is None:
            continue
        part, of = (level.lift for level in both.levels)
        share = Share(condition, both.levels[0].students.n, float(part.value), both.between(part))
        if not open_for and both.traits == found.traits:
            seeds = _by_seed(results, metric, condition, both.traits, float(whole.value))
            of_it = (1.0, None) if condition == judged[0] else (float(part.value / of.value), share_interval(part, of))
            share = replace(share, share=of_it[0], interval=of_it[1], seeds=seeds)
        shares.append(share)
    return Scale(metric, judged[0], found.traits, open_for, tuple(shares))


def _by_seed(results: Results, metric: str, condition: str, traits: tuple[str, ...], whole: float) -> dict[int, float]:
    """Each seed's lift, the mean over the traits, as a share of `whole`; seeds that lack a trait are left out."""
    lifts: dict[int, list[float]] = {}
    for score, value in (each for trait in traits for each in student_lifts(results, metric, condition, trait)):
        if score.seed is not None:
            lifts.setdefault(score.seed, []).append(value)
    return {seed: sum(values) / len(values) / whole for seed, values in lifts.items() if len(values) == len(traits)}


@dataclass(frozen=True)
class ArmSummary:
    """One kind of student beside the others; None is what was not measured.

    Attributes:
      kl: from their teacher, in nats per token; accuracy: on number rows that it did not learn, or on its own where no others were
        left; under: its lift under each setting of the evaluation, by name.
    """

    condition: str
    matrix: Matrix | None
    share: Share
    kl: Measured | None
    accuracy: Measured | None
    under: dict[str, Measured | None]


def side_by_side(results: Results, compared: Comparisons, scale: Scale | None) -> list[ArmSummary]:
    """One entry for each kind of student; none where there are no arms to compare."""
    if scale is None or len({split_condition(share.condition)[1] for share in scale.shares}) < 2:
        return []
    matrices = {one.result.condition: one.result for one in compared.matrices}
    return [
        ArmSummary(
            share.condition,
            matrices.get(share.condition),
            share,
            measured(results, share.condition, KL),
            measured(results, share.condition, *ACCURACY),
            {name: _lift(results.under(name), scale.metric, share.condition) for name in results.evaluations},
        )
        for share in scale.shares
    ]


def measured(results: Results, condition: str, *metrics: str) -> Measured | None:
    """The first of these metrics that a kind of student was measured by."""
    scores = next((found for metric in metrics if (found := results.select(metric, condition))), None)
    return Measured(float(stratified(scores).value), over_models(scores)) if scores else None


def _lift(results: Results, metric: str, condition: str) -> Measured | None:
    found = pool(results, metric, condition)
    return found and Measured(float(found.levels[0].lift.value), found.between(found.levels[0].lift))
