"""Every kind of student with its lift, and those of one arm on one scale, on which the control is 0 and students of all tokens are 1;
and, of an ablation, what the number task and other prompts say of each.

Lifts are pooled over traits as for claims (`claims/base.py`); every student is measured from the control of its own variant. Students of
two arms differ in more than their tokens, so the lift of one is never a share of the other's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from jsublim.evals.kl import KL
from jsublim.evals.numbers import HELD_OUT, LEARNED
from jsublim.report.claims.base import claim_metric, no_lift, pool
from jsublim.report.comparisons import Comparisons
from jsublim.report.statistics import Interval, share_bounds
from jsublim.report.summary import Matrix, Measured, measured, student_lifts
from jsublim.report.tables import SEPARATOR, Results, split_condition

ACCURACY = (HELD_OUT, LEARNED)  # the first that was measured


@dataclass(frozen=True)
class ScaleLine:
    """One kind of student. `lift` is in nats, or a share of answers; `share` is the lift as a share of that of all tokens in the same
    arm, and `seeds` the same of each seed, with the mean over traits. What cannot be said, or was not measured, is None or empty.

    Attributes:
      open_for: why its arm has no shares, though it has students of all tokens.
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
    open_for: str = ""
    matrix: Matrix | None = None
    kl: Measured | None = None
    accuracy: Measured | None = None
    under: dict[str, Measured | None] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        return split_condition(self.condition)[1]


@dataclass(frozen=True)
class OneScale:
    """The table, arm by arm."""

    metric: str
    traits: tuple[str, ...]
    lines: tuple[ScaleLine, ...]

    @property
    def seeds(self) -> list[int]:
        """Every seed that some kind of student has."""
        return sorted({seed for line in self.lines for seed in line.seeds})

    @property
    def side_by_side(self) -> tuple[ScaleLine, ...]:
        """The lines of an ablation; none where there are no arms to compare."""
        return self.lines if len({line.variant for line in self.lines}) > 1 else ()


def scale(results: Results, compared: Comparisons) -> OneScale | None:
    """The table of a run; None for a run whose students cannot be measured from anything."""
    metric = claim_metric(results)
    lines = tuple(filter(None, (_line(results, metric, condition) for condition in results.mask_conditions)))
    if not lines:
        return None
    table = OneScale(metric, tuple(results.traits), lines)
    matrices = {one.result.condition: one.result for one in compared.matrices}
    ablation = (
        replace(
            line,
            matrix=matrices.get(line.condition),
            kl=first_measured(results, line.condition, KL),
            accuracy=first_measured(results, line.condition, *ACCURACY),
            under={name: _lift(results.under(name), metric, line.condition) for name in results.evaluations},
        )
        for line in table.side_by_side
    )
    return replace(table, lines=tuple(ablation) or lines)


def _line(results: Results, metric: str, condition: str) -> ScaleLine | None:
    own = pool(results, metric, condition)
    if own is None:
        return None
    line = ScaleLine(condition, own.levels[0].students, *own.lift)
    yardstick = SEPARATOR.join(filter(None, ("all", line.variant)))
    both = pool(results, metric, condition, yardstick)
    if both is None or both.traits != own.traits:
        return line
    if open_for := no_lift(both.levels[1]):
        return replace(line, open_for=open_for)
    part, whole = (level.lift for level in both.levels)
    seeds = _by_seed(results, metric, condition, own.traits, float(whole.value))
    if condition == yardstick:
        return replace(line, share=1.0, seeds=seeds)
    share, interval = float(part.value / whole.value), Interval.of(share_bounds(part, whole))
    return replace(line, share=share, interval=interval, seeds=seeds)


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
