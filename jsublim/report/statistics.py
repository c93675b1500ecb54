"""Intervals over questions and over students, ratios of lifts, and the same-trait effect of a trait x trait matrix.

Everything here is pure numpy/scipy on plain numbers. An interval that cannot be computed (one student, say) is `None`,
never a guess; callers print "not decided" for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
# Up to this number every permutation is tried (7! = 5040); beyond it they are sampled.
MAX_EXACT_PERMUTATIONS = 5040


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval, in the units of what it was computed from."""

    low: float
    high: float

    def covers(self, value: float) -> bool:
        return self.low <= value <= self.high


def question_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """The published interval: over the question means of one model (normal above 30 questions, Student's t below).

    It says how much the questions differ, not how much another trained student would: see `Estimate` for that.
    `None` for fewer than two questions.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size < 2:
        return None
    quantile = (1 + level) / 2
    critical = stats.norm.ppf(quantile) if x.size > 30 else stats.t.ppf(quantile, x.size - 1)
    half = float(critical * x.std(ddof=1) / math.sqrt(x.size))
    return Interval(float(x.mean()) - half, float(x.mean()) + half)


@dataclass(frozen=True)
class Estimate:
    """A linear combination of independent group means, with what its t-interval needs.

    `terms` holds (variance of the mean, degrees of freedom) of each group; the variance is NaN for a group of one
    student, which makes the interval undecided. `n` is the number of students that the value is made of.
    """

    value: float
    terms: tuple[tuple[float, float], ...] = ()
    n: int = 0

    @classmethod
    def of(cls, values: Sequence[float], floor: float = 0.0) -> Estimate:
        """Mean over students. `floor` is the variance that sampling alone gives the mean: equal students (all at zero,
        say) are not known more exactly than their samples allow."""
        x = np.asarray(values, dtype=np.float64)
        if x.size == 0:
            raise ValueError("an estimate needs at least one value")
        variance = max(float(x.var(ddof=1)) / x.size, floor) if x.size > 1 else math.nan
        return cls(float(x.mean()), ((variance, x.size - 1.0),), int(x.size))

    @classmethod
    def measured(cls, value: float, variance: float = 0.0) -> Estimate:
        """One fixed model (the base model): known up to the sampling noise of its evaluation."""
        return cls(value, ((variance, math.inf),), 0)

    def __mul__(self, factor: float) -> Estimate:
        terms = tuple((factor**2 * v, df) for v, df in self.terms) if factor else ()
        return Estimate(factor * self.value, terms, self.n)

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.value + other.value, self.terms + other.terms, self.n + other.n)

    def __sub__(self, other: Estimate) -> Estimate:
        return self + other * -1.0

    @property
    def variance(self) -> float:
        return math.fsum(v for v, _ in self.terms)

    @property
    def degrees(self) -> float:
        """Welch-Satterthwaite degrees of freedom."""
        denominator = math.fsum(v**2 / df for v, df in self.terms if df > 0)
        return self.variance**2 / denominator if denominator > 0 else math.inf

    def interval(self, level: float = LEVEL) -> Interval | None:
        """t-interval over students (Welch-Satterthwaite for several groups), or `None` if it cannot be computed."""
        if not self.variance > 0:  # also NaN: a group of one student
            return None
        half = float(stats.t.ppf((1 + level) / 2, self.degrees)) * math.sqrt(self.variance)
        return Interval(self.value - half, self.value + half)


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent estimates, each with the same weight."""
    total = estimates[0]
    for estimate in estimates[1:]:
        total = total + estimate
    return total * (1 / len(estimates))


def ratio_interval(
    part: Estimate,
    whole: Estimate,
    reference: Estimate,
    part_reference: Estimate | None = None,
    level: float = LEVEL,
) -> Interval | None:
    """Fieller's interval of (part - reference) / (whole - reference): independent groups, one reference for both or,
    with `part_reference`, one each.

    It is the set of ratios r that the test of `(part - reference) - r (whole - reference) = 0` does not reject. `None`
    if a group has no variance estimate, or if `whole - reference` cannot be told from zero: then no ratio is excluded.
    """
    numerator, denominator = part - (part_reference or reference), whole - reference
    if not (numerator.variance > 0 and denominator.variance > 0):
        return None
    ratio = numerator.value / denominator.value if denominator.value else math.inf
    if not math.isfinite(ratio):
        return None
    contrast = numerator - denominator * ratio
    if part_reference is None:
        contrast = part - whole * ratio - reference * (1 - ratio)
    t2 = float(stats.t.ppf((1 + level) / 2, contrast.degrees)) ** 2
    a = denominator.value**2 - t2 * denominator.variance
    if a <= 0:
        return None
    covariance = reference.variance if part_reference is None else 0.0
    b = numerator.value * denominator.value - t2 * covariance
    c = numerator.value**2 - t2 * numerator.variance
    root = math.sqrt(max(b * b - a * c, 0.0))
    return Interval((b - root) / a, (b + root) / a)


@dataclass(frozen=True)
class SameTraitEffect:
    """`gamma` of lift ~ row + column + gamma * [same trait], and its one-sided permutation p."""

    gamma: float
    p: float
    smallest_p: float
    permutations: int
    exact: bool


def double_centred(matrix: np.ndarray) -> np.ndarray:
    """Residual of a complete matrix after a row and a column effect; same shape."""
    rows, columns = matrix.mean(axis=1, keepdims=True), matrix.mean(axis=0, keepdims=True)
    return matrix - rows - columns + matrix.mean()


def same_trait_gamma(lift: np.ndarray, same: Sequence[int]) -> float:
    """Least-squares gamma. `lift` is [teacher traits, evaluated traits]; `same[i]` is the column of row i's own trait."""
    indicator = np.zeros(lift.shape)
    indicator[np.arange(len(same)), list(same)] = 1.0
    indicator = double_centred(indicator)
    return float((indicator * lift).sum() / (indicator**2).sum())


def same_trait_effect(
    lift: np.ndarray, same: Sequence[int] | None = None, samples: int = 20_000, seed: int = 0
) -> SameTraitEffect | None:
    """Fit gamma and test it by permuting the column labels.

    `lift` is [R, C] float, R teacher traits by C >= R evaluated traits, no NaN; `same` defaults to the diagonal. Row and
    column effects take up "this teacher moves every trait" and "this trait rises with any teacher", so gamma does not
    depend on the reference the lift is measured from. p is the share of labellings with a gamma at least as large:
    exact up to 5040 labellings, else `samples` seeded draws. With few traits p cannot be small: 1/2 at best for
    K = 2, 1/6 for K = 3 (`smallest_p`). `None` with fewer than two rows or columns, where gamma is not identified.
    """
    lift = np.asarray(lift, dtype=np.float64)
    rows, columns = lift.shape
    if rows < 2 or columns < rows:
        return None
    own = np.arange(rows) if same is None else np.asarray(same)
    count = math.perm(columns, rows)
    exact = count <= MAX_EXACT_PERMUTATIONS
    if exact:
        labels = np.array(list(itertools.permutations(range(columns), rows)))
    else:
        rng = np.random.default_rng(seed)
        labels = rng.permuted(np.tile(np.arange(columns), (samples, 1)), axis=1)[:, :rows]
    # The centred indicator has the same norm for every labelling, so sums of residuals order as gamma does.
    residual = double_centred(lift)
    sums = residual[np.arange(rows), labels].sum(axis=1)
    observed = residual[np.arange(rows), own].sum()
    # Ties are judged on the scale of the lifts, not of the residuals: those may be nothing but rounding.
    as_large = int((sums >= observed - 1e-9 * np.abs(lift).max()).sum())
    # A sampled p counts the observed labelling itself, or it could be zero.
    p = as_large / count if exact else (as_large + 1) / (samples + 1)
    tried = count if exact else samples
    smallest = 1 / count if exact else 1 / (samples + 1)
    return SameTraitEffect(same_trait_gamma(lift, own.tolist()), p, smallest, tried, exact)
