"""The arms of an ablation side by side: what is left of the transfer, and what the number task and other prompts say."""

from __future__ import annotations

from dataclasses import dataclass

from jsublim.evals.kl import KL
from jsublim.evals.numbers import HELD_OUT, LEARNED
from jsublim.report.claims.base import pool
from jsublim.report.comparisons import Comparisons
from jsublim.report.shares import Scale, Share
from jsublim.report.statistics import Interval
from jsublim.report.summary import Matrix, over_models, stratified
from jsublim.report.tables import Results, split_condition

ACCURACY = (HELD_OUT, LEARNED)  # the first that was measured


@dataclass(frozen=True)
class Measured:
    """A mean over students (and traits) with its interval over students."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Line:
    """One kind of student; None is what was not measured.

    Attributes:
      kl: from their teacher, in nats per token; accuracy: on number rows that it did not learn, or on its own where no others were left; under: its lift under each setting of the evaluation, by name.
    """

    condition: str
    matrix: Matrix | None
    share: Share
    kl: Measured | None
    accuracy: Measured | None
    under: dict[str, Measured | None]


def board(results: Results, compared: Comparisons, scale: Scale | None) -> list[Line]:
    """A line for each kind of student; none where there are no arms to compare."""
    if scale is None or len({split_condition(share.condition)[1] for share in scale.shares}) < 2:
        return []
    matrices = {one.result.condition: one.result for one in compared.matrices}
    return [
        Line(
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
    if found is None:
        return None
    lift = found.levels[0].lift
    return Measured(float(lift.value), found.between(lift))
