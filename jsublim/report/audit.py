"""What the audit predicted, beside what the students then did.

A mean score is <grad mean log p(token), grad log p(trait)>: what one step of gradient descent would add to the trait's
log-probability, per unit of learning rate. Settings with other numbers of steps, other rates or another optimizer than SGD are
ranked, not measured, by it: hence a rank correlation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from jsublim.report.comparisons import Comparisons
from jsublim.report.statistics import Interval, normal_interval, same_trait_gamma
from jsublim.report.tables import Results, query, split_condition

SOURCE = "audit.parquet"  # in errors
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


def predicted(results: Results) -> list[Predicted]:
    """One entry per condition of the students."""
    means = _means(results)
    every = (_of_condition(results, means, condition) for condition in results.mask_conditions)
    return [each for each in every if each is not None]


@dataclass(frozen=True)
class Agreement:
    """How the predicted gammas are ordered, beside the students'. `rho` and its two-sided `p` are Spearman's rank correlation over
    conditions, None with fewer than four; `pairs` are (condition, predicted, trained)."""

    rho: float | None
    p: float | None
    pairs: tuple[tuple[str, float, float], ...]


def agreement(every: Sequence[Predicted], compared: Comparisons) -> Agreement | None:
    """None where nothing was audited."""
    matrices = [one.result for one in compared.matrices]
    trained = {matrix.condition: matrix.effect.gamma for matrix in matrices if matrix.effect is not None}
    predicted = {each.condition: each.gamma for each in every if each.gamma is not None}
    pairs = tuple((name, gamma, trained[name]) for name, gamma in predicted.items() if name in trained)
    if len(pairs) < 4:
        return Agreement(None, None, pairs) if pairs else None
    rho, p = np.asarray(stats.spearmanr([x for _, x, _ in pairs], [y for _, _, y in pairs]))
    return Agreement(float(rho), float(p), pairs)


def _means(results: Results) -> dict[tuple, dict[str, Any]]:
    """(teacher, variant, tokens) -> scores by trait, errors, and the shares of divergence tokens; a mean over draws."""
    sql = """
        select teacher, variant, tokens, trait, avg(score), sqrt(sum(error * error)) / count(*),
               any_value(top_divergence), any_value(divergence_share)
        from found group by all
        """
    means: dict[tuple, dict[str, Any]] = {}
    for teacher, variant, tokens, trait, score, error, top, share in query(SOURCE, results.audit, sql):
        own = means.setdefault((teacher, variant, tokens), {"score": {}, "error": {}, "top": top, "share": share})
        own["score"][trait], own["error"][trait] = score, error
    return means


def _of_condition(results: Results, means: dict[tuple, dict[str, Any]], condition: str) -> Predicted | None:
    tokens, variant = split_condition(condition)
    tokens = LIKE.get(tokens, tokens)
    control = means.get(("control", variant, "all")) or means.get(("control", "", "all"))
    own = {t: means[t, variant, tokens] for t in results.traits if (t, variant, tokens) in means}
    if not own or control is None:
        return None
    columns = tuple(dict.fromkeys([*own, *next(iter(own.values()))["score"]]))
    zero, noise = (np.asarray([control[key][t] for t in columns]) for key in ("score", "error"))
    score, error = (
        np.asarray([[means[key][c] for c in columns] for means in own.values()]) for key in ("score", "error")
    )
    score, error = score - zero, np.sqrt(error**2 + noise**2)
    gamma = float(same_trait_gamma(score)) if len(own) > 1 else None
    shares = (_mean([each[key] for each in own.values()]) for key in ("top", "share"))
    return Predicted(condition, tuple(own), columns, score, error, gamma, *shares)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else None
