"""Every kind of student on one scale: the control is 0, students of all tokens are 1.

Lifts are pooled over traits as for claims (`claims/verdicts.py`); every student is measured from the control of its own variant.
"""

from __future__ import annotations

from dataclasses import dataclass

from jsublim.report.claims.base import claim_metric, no_lift, pool
from jsublim.report.statistics import Interval, share_interval
from jsublim.report.summary import judged_conditions, reference_condition, scores_for
from jsublim.report.tables import Results


@dataclass(frozen=True)
class Share:
    """One kind of student. `lift` is in nats, or a share of answers; `share` is the lift as a share of the yardstick's, and
    `seeds` the same of each seed, with the mean over traits. What cannot be said is None, or empty."""

    condition: str
    students: int
    lift: float
    lift_interval: Interval | None
    share: float | None
    interval: Interval | None
    seeds: dict[int, float]


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
        is_it, can = condition == judged[0], not open_for and both.traits == found.traits
        shares.append(
            Share(
                condition,
                both.levels[0].students.n,
                float(part.value),
                both.between(part),
                None if not can else 1.0 if is_it else float(part.value / of.value),
                share_interval(part, of) if can and not is_it else None,
                _by_seed(results, metric, condition, both.traits, float(whole.value)) if can else {},
            )
        )
    return Scale(metric, judged[0], found.traits, open_for, tuple(shares))


def _by_seed(results: Results, metric: str, condition: str, traits: tuple[str, ...], whole: float) -> dict[int, float]:
    """Each seed's lift, the mean over the traits, as a share of `whole`; seeds that lack a trait are left out."""
    lifts: dict[int, list[float]] = {}
    for trait in traits:
        zeros = results.select(metric, reference_condition(results, metric, trait, condition) or "", trait)
        zero = sum(s.mean for s in zeros) / len(zeros)
        for score in scores_for(results, metric, condition, trait):
            if score.seed is not None:
                lifts.setdefault(score.seed, []).append(score.mean - zero)
    return {seed: sum(values) / len(values) / whole for seed, values in lifts.items() if len(values) == len(traits)}
