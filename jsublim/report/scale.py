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
from jsublim.report.statistics import Interval, share_bounds
from jsublim.report.summary import Matrix, Measured, judged_conditions, measured, student_lifts
from jsublim.report.tables import Results, split_condition

ACCURACY = (HELD_OUT, LEARNED)  # the first that was measured


@dataclass(frozen=True)
class ScaleLine:
    """One kind of student. `lift` is in nats, or a share of answers; `share` is the lift as a share of the yardstick's, and
    `seeds` the same of each seed, with the mean over traits. What cannot be said, or was not measured, is None or empty.

    Attributes:
      matrix and what follows it: only of an ablation. kl: from their teacher, in nats per token; accuracy: on number rows that it did
        not learn, or on its own where no others were left; under: its lift under each setting of the evaluation, by name.
    """

    condition: str
    students: int
    lift: float
    lift_interval: Interval | None
    share: float | None = None
    interval: Interval | None = None
    seeds: dict[int, float] = field(default_factory=dict)
    matrix: Matrix | None = None
    kl: Measured | None = None
    accuracy: Measured | None = None
    under: dict[str, Measured | None] = field(default_factory=dict)


@dataclass(frozen=True)
class OneScale:
    """The table. `yardstick` is the condition that is 1; `open_for` says why nothing can be a share of it, or is empty."""

    metric: str
    yardstick: str
    traits: tuple[str, ...]
    open_for: str
    lines: tuple[ScaleLine, ...]

    @property
    def seeds(self) -> list[int]:
        """Every seed that some kind of student has."""
        return sorted({seed for line in self.lines for seed in line.seeds})

    @property
    def side_by_side(self) -> tuple[ScaleLine, ...]:
        """The lines of an ablation; none where there are no arms to compare."""
        return self.lines if len({split_condition(line.condition)[1] for line in self.lines}) > 1 else ()


def scale(results: Results, compared: Comparisons) -> OneScale | None:
    """The table of a run, measured by its first judged condition; None for a run without one."""
    metric, judged = claim_metric(results), judged_conditions(results)
    yardstick = pool(results, metric, judged[0]) if judged else None
    if yardstick is None:
        return None
    whole = yardstick.levels[0].lift
    open_for = no_lift(yardstick.levels[0]) and "students of all tokens do not surely lie above the control"
    lines = []
    for condition in results.mask_conditions:
        both = pool(results, metric, condition, judged[0])
        if both is None:
            continue
        part, of = (level.lift for level in both.levels)
        line = ScaleLine(condition, both.levels[0].students, *both.lift)
        if not open_for and both.traits == yardstick.traits:
            seeds = _by_seed(results, metric, condition, both.traits, float(whole.value))
            of_it = (
                (1.0, None)
                if condition == judged[0]
                else (float(part.value / of.value), Interval.of(share_bounds(part, of)))
            )
            line = replace(line, share=of_it[0], interval=of_it[1], seeds=seeds)
        lines.append(line)
    table = OneScale(metric, judged[0], yardstick.traits, open_for, tuple(lines))
    matrices = {one.result.condition: one.result for one in compared.matrices}
    lines = (
        replace(
            line,
            matrix=matrices.get(line.condition),
            kl=first_measured(results, line.condition, KL),
            accuracy=first_measured(results, line.condition, *ACCURACY),
            under={name: _lift(results.under(name), metric, line.condition) for name in results.evaluations},
        )
        for line in table.side_by_side
    )
    return replace(table, lines=tuple(lines) or table.lines)


def _by_seed(results: Results, metric: str, condition: str, traits: tuple[str, ...], whole: float) -> dict[int, float]:
    """Each seed's lift, the mean over the traits, as a share of `whole`; seeds that lack a trait are left out."""
    lifts: dict[int, list[float]] = {}
    for trait in traits:
        for score, value in student_lifts(results, metric, condition, trait):
            if score.seed is not None:
                lifts.setdefault(score.seed, []).append(value)
    return {seed: sum(values) / len(values) / whole for seed, values in lifts.items() if len(values) == len(traits)}


def first_measured(results: Results, condition: str, *metrics: str) -> Measured | None:
    """The first of these metrics that a kind of student was measured by."""
    scores = next(filter(None, (results.select(metric, condition) for metric in metrics)), None)
    return measured(scores) if scores else None


def _lift(results: Results, metric: str, condition: str) -> Measured | None:
    pooled = pool(results, metric, condition)
    return pooled and pooled.lift
