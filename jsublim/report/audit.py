"""What the audit predicted, beside what the students then did.

A mean score is <grad mean log p(token), grad log p(trait)>: what one step of gradient descent would add to the trait's
log-probability, per unit of learning rate. Settings with other numbers of steps, other rates or another optimizer than SGD are
ranked, not measured, by it: hence a rank correlation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jsublim.report.comparisons import Comparisons
from jsublim.report.statistics import Interval, mean_of, normal_interval, same_trait_gamma
from jsublim.report.tables import Results, query, split_condition

LIKE = {"random": "all"}  # a random mask has the expectation of all tokens


@dataclass(frozen=True)
class Predicted:
    """Mean scores of one condition beyond those of the control's rows, by teacher (rows) and evaluated trait (columns).

    Attributes:
      score, error: `[teachers, traits]`, nats per unit of learning rate; the error is over rows, students held fixed.
      gamma: as of the trait matrix (docs/statistics.md), of `score`; None with fewer than two teachers.
    """

    condition: str
    teachers: tuple[str, ...]
    traits: tuple[str, ...]
    score: np.ndarray
    error: np.ndarray
    gamma: float | None
    top_divergence: float | None
    divergence_share: float | None

    def interval(self, teacher: str) -> Interval:
        """That of the teacher's own trait."""
        i, j = self.teachers.index(teacher), self.traits.index(teacher)
        return normal_interval(self.score[i, j], self.error[i, j])

    @property
    def own(self) -> tuple[float, float]:
        """The score of the teacher's own trait, mean over teachers, and half the widest of their intervals."""
        widths = (interval.high - interval.low for interval in map(self.interval, self.teachers))
        return float(np.mean(np.diag(self.score))), max(widths) / 2


def predicted(results: Results) -> list[Predicted]:
    """One entry per condition of the students."""
    # Means over draws; traits as columns of their own make one row of everything that was learned at once.
    sql = """
        with means as (
            select teacher, variant, tokens, trait, avg(score) as score, sqrt(sum(error * error)) / count(*) as error,
                   any_value(top_divergence) as top, any_value(divergence_share) as share
            from records group by all
        )
        select teacher, variant, tokens, map(list(trait order by trait), list(score order by trait)) as score,
               map(list(trait order by trait), list(error order by trait)) as error,
               any_value(top) as top, any_value(share) as share
        from means group by all
        """
    rows = query("audit.parquet", results.audit, sql)
    means = {(row["teacher"], row["variant"], row["tokens"]): row for row in rows}
    entries = (_of_condition(results, means, condition) for condition in results.mask_conditions)
    return [entry for entry in entries if entry is not None]


def _of_condition(results: Results, means: dict[tuple, dict[str, Any]], condition: str) -> Predicted | None:
    tokens, variant = split_condition(condition)
    keys = ((trait, (trait, variant, LIKE.get(tokens, tokens))) for trait in results.traits)
    taught = {trait: means[key] for trait, key in keys if key in means}
    control = means.get(("control", variant, "all")) or means.get(("control", "", "all"))
    if not taught or control is None:
        return None
    by_trait = [{key: dict(row[key]) for key in ("score", "error")} for row in (*taught.values(), control)]
    columns = tuple(dict.fromkeys([*taught, *by_trait[0]["score"]]))
    scores, errors = (np.asarray([[row[key][c] for c in columns] for row in by_trait]) for key in ("score", "error"))
    score, error = scores[:-1] - scores[-1], np.sqrt(errors[:-1] ** 2 + errors[-1] ** 2)
    gamma = float(same_trait_gamma(score)) if len(taught) > 1 else None
    shares = (mean_of(row[key] for row in taught.values()) for key in ("top", "share"))
    return Predicted(condition, tuple(taught), columns, score, error, gamma, *shares)


@dataclass(frozen=True)
class Agreement:
    """How the predicted gammas are ordered, beside the students'. `rho` and its two-sided `p` are Spearman's rank correlation over
    conditions, None with fewer than four; `pairs` are (condition, predicted, trained)."""

    rho: float | None
    p: float | None
    pairs: tuple[tuple[str, float, float], ...]


def agreement(foretold: Sequence[Predicted], compared: Comparisons) -> Agreement | None:
    """None where nothing was audited."""
    matrices = [one.result for one in compared.matrices]
    trained = {matrix.condition: matrix.effect.gamma for matrix in matrices if matrix.effect is not None}
    gammas = {one.condition: one.gamma for one in foretold if one.gamma is not None}
    pairs = tuple((name, gamma, trained[name]) for name, gamma in gammas.items() if name in trained)
    if len(pairs) < 4:
        return Agreement(None, None, pairs) if pairs else None
    from scipy.stats import spearmanr

    rho, p = np.asarray(spearmanr([x for _, x, _ in pairs], [y for _, _, y in pairs]))
    return Agreement(float(rho), float(p), pairs)
