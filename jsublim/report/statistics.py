"""Intervals over questions and over students, shares of lifts, p-values, and the same-trait effect of a trait x trait matrix.

Everything here is numpy/scipy on plain numbers. Values may be arrays, one entry per repetition of a simulation, as long as students lie
on the last axis. An interval that cannot be computed (one student, say) is `None`, never a guess; callers print "not decided"
for it. docs/statistics.md says what each interval holds fixed, and how often it covers the truth.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

# Not scipy.stats, which takes a second to load. Student's distribution and its quantiles, and the normal's.
from scipy.special import ndtri, stdtr, stdtrit

LEVEL = 0.95
QUANTILE = (1 + LEVEL) / 2  # at which its upper end lies
# Up to this number every permutation is tried (7! = 5040); beyond it they are sampled.
MAX_EXACT_PERMUTATIONS = 5040


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval, in the units of what it was computed from."""

    low: float
    high: float

    @classmethod
    def of(cls, bounds: tuple[Any, Any]) -> Interval | None:
        """That of single bounds; `None` where they are NaN."""
        low, high = map(float, bounds)
        return None if math.isnan(low) else cls(low, high)

    def covers(self, value: float) -> bool:
        return self.low <= value <= self.high

    def times(self, factor: float) -> Interval:
        return Interval(factor * self.low, factor * self.high)

    def within(self, low: float, high: float) -> Interval:
        """Without what cannot be: cutting it off leaves out no possible truth."""
        return Interval(max(self.low, low), min(self.high, high))


def normal_interval(value: float, error: float) -> Interval:
    """The interval of a value whose error is known and normal."""
    half = ndtri(QUANTILE) * error
    return Interval(float(value - half), float(value + half))


def question_interval(values: Sequence[float]) -> Interval | None:
    """The published interval: over the question means of one model (normal above 30 questions, Student's t below).

    It says how much the questions differ, not how much another trained student would: see `Estimate` for that.
    `None` for fewer than two questions.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size < 2:
        return None
    critical = ndtri(QUANTILE) if x.size > 30 else stdtrit(x.size - 1, QUANTILE)
    half = float(critical * x.std(ddof=1) / math.sqrt(x.size))
    return Interval(float(x.mean()) - half, float(x.mean()) + half)


class GroupTerm(NamedTuple):
    """The share of one group of models in an estimate: `weight` times their mean, whose `variance` is known with so many
    `degrees` of freedom."""

    weight: Any
    variance: Any
    degrees: float
    students: int


@dataclass(frozen=True)
class Estimate:
    """A linear combination of group means, with what its t-interval needs.

    `terms` are told apart by the group: groups are independent of each other, and one that comes in twice (a control that two
    variants are measured from) is one term, so that what both share drops out of their difference. The variance is NaN
    for a group of one student, which makes the interval undecided.
    """

    value: Any
    terms: Mapping[Hashable, GroupTerm] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Any, floor: Any = 0.0, group: Hashable = None, drawn: float = 0.0) -> Estimate:
        """Mean over students, the last axis of `values`.

        Args:
          floor: the variance that sampling alone gives the mean: equal students (all at zero, say) are not known more
            exactly than their samples allow.
          group: who they are; None is a group of its own.
          drawn: which share of one pool of rows each of them drew. What they have in common through it does not show in their spread, so
            that counts for the pool too: a mean over n of N rows varies by (1 - n/N) / n around the pool's, which varies by 1 / N around
            that of other pools. At 1 nothing is known of other pools, and the interval is about this one.
        """
        x = np.asarray(values, dtype=np.float64)
        if x.size == 0:
            raise ValueError("an estimate needs at least one value")
        students, variance = x.shape[-1], np.full(x.shape[:-1], math.nan)
        if students > 1:
            of_pool = drawn / (1 - drawn) if drawn < 1 else 0.0
            variance = np.maximum(x.var(axis=-1, ddof=1) * (1 / students + of_pool), floor)
        return cls(x.mean(axis=-1), {group or object(): GroupTerm(1.0, variance, students - 1.0, students)})

    @classmethod
    def measured(cls, value: Any, variance: Any = 0.0, group: Hashable = None) -> Estimate:
        """One fixed model (the base model): known up to the sampling noise of its evaluation."""
        return cls(value, {group or object(): GroupTerm(1.0, variance, math.inf, 0)})

    def __mul__(self, factor: Any) -> Estimate:
        return Estimate(factor * self.value, {g: t._replace(weight=factor * t.weight) for g, t in self.terms.items()})

    def __add__(self, other: Estimate) -> Estimate:
        terms = dict(self.terms)
        for group, term in other.terms.items():
            weight = term.weight + (terms[group].weight if group in terms else 0.0)
            terms[group] = term._replace(weight=weight)
            if np.all(weight == 0):
                del terms[group]
        return Estimate(self.value + other.value, terms)

    def __sub__(self, other: Estimate) -> Estimate:
        return self + other * -1.0

    @property
    def n(self) -> int:
        """The number of students that the value is made of."""
        return sum(term.students for term in self.terms.values())

    @property
    def variance(self) -> Any:
        return self.covariance(self)

    def covariance(self, other: Estimate) -> Any:
        """What the groups that both are made of have in common."""
        shared = ((term, other.terms[group]) for group, term in self.terms.items() if group in other.terms)
        return sum((a.weight * b.weight * a.variance for a, b in shared), 0.0)

    @property
    def degrees(self) -> Any:
        """Welch-Satterthwaite degrees of freedom."""
        with np.errstate(all="ignore"):
            parts = [(t.weight**2 * t.variance) ** 2 / np.float64(t.degrees) for t in self.terms.values()]
            total = np.asarray(sum(parts, 0.0))
            return np.where(total == 0, math.inf, self.variance**2 / total)

    @property
    def error(self) -> Any:
        """Standard error; NaN where there is none, as for a group of one student."""
        variance = np.asarray(self.variance, dtype=np.float64)
        return np.sqrt(np.where(variance > 0, variance, math.nan))

    def bounds(self, level: float = LEVEL) -> tuple[Any, Any]:
        """Ends of the t-interval over students (Welch-Satterthwaite for several groups), NaN where it cannot be computed."""
        half = stdtrit(self.degrees, (1 + level) / 2) * self.error
        return self.value - half, self.value + half

    def interval(self, level: float = LEVEL) -> Interval | None:
        """`bounds` of a single value, or `None`."""
        return Interval.of(self.bounds(level))

    def p_above(self, threshold: Any) -> Any:
        """One-sided p of "the truth is above the threshold": (1 - p) is the one-sided level at which the interval ends there.

        So an interval of 95 % lies above it just where p < .025, and below it where p > .975. NaN where there is no interval.
        """
        return stdtr(self.degrees, -(self.value - threshold) / self.error)

    def p_below(self, threshold: Any) -> Any:
        """One-sided p of "the truth is below the threshold"."""
        return stdtr(self.degrees, (self.value - threshold) / self.error)


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of what is known: neither None nor NaN; None where nothing is."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else None


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of estimates, each with the same weight: of strata, whose differences from each other are no error."""
    return functools.reduce(operator.add, estimates) * (1 / len(estimates))


def rate_bounds(rate: Estimate, samples: Any) -> tuple[Any, Any]:
    """Ends of a score interval of a rate, inside 0..1.

    Wilson's (1927) construction, where the variance of the mean changes with the truth p as p (1 - p) does. Of one model it is
    Wilson's interval. Over students, the variance is what their spread says it is, and Student's t takes the place of the
    normal. `samples` is the number of answers: none of 2,000 does not count as never.
    """
    share = (rate.value * samples + 1) / (samples + 2)
    spread = stdtrit(rate.degrees, QUANTILE) ** 2 * rate.error**2 / (share * (1 - share))
    middle = rate.value + spread / 2
    half = np.sqrt(spread * (rate.value * (1 - rate.value) + spread / 4))
    return np.maximum((middle - half) / (1 + spread), 0.0), np.minimum((middle + half) / (1 + spread), 1.0)


def share_bounds(part: Estimate, whole: Estimate) -> tuple[Any, Any]:
    """Fieller's interval of part / whole: ends, NaN where there is none.

    It is the set of ratios r that the test of `part - r whole = 0` does not reject. There is none if a group has no variance
    estimate, or if `whole` cannot be told from zero: then no ratio is excluded.
    """
    with np.errstate(all="ignore"):
        contrast = part - whole * (part.value / whole.value)
        t2 = stdtrit(contrast.degrees, QUANTILE) ** 2
        a = whole.value**2 - t2 * whole.error**2
        b = part.value * whole.value - t2 * part.covariance(whole)
        c = part.value**2 - t2 * part.error**2
        root = np.sqrt(np.maximum(b * b - a * c, 0.0))
        a = np.where(a > 0, a, math.nan)
        return (b - root) / a, (b + root) / a


def share_p_above(part: Estimate, whole: Estimate, threshold: float) -> Any:
    """One-sided p of "part / whole is above the threshold", for a `whole` above zero: Fieller's interval ends there."""
    with np.errstate(all="ignore"):
        degrees = (part - whole * (part.value / whole.value)).degrees  # those of the interval
    contrast = part - whole * threshold
    return stdtr(degrees, -contrast.value / contrast.error)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's (1979) step-down correction of p-values; those that are not there do not count."""
    order = sorted((p, place) for place, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[place] = largest
    return corrected


@dataclass(frozen=True)
class SameTraitEffect:
    """`gamma` of lift ~ row + column + gamma * [same trait], and its one-sided permutation p.

    Attributes:
      gamma_beside, p_beside: the same beside Tukey's term (`without_product`), which takes up that strong teachers may happen to love
        animals that rise easily.
    """

    gamma: float
    p: float
    gamma_beside: float
    p_beside: float
    smallest_p: float
    permutations: int
    exact: bool


def double_centred(matrix: np.ndarray) -> np.ndarray:
    """Residual of a complete matrix after a row and a column effect; same shape, [..., rows, columns]."""
    rows, columns = matrix.mean(axis=-1, keepdims=True), matrix.mean(axis=-2, keepdims=True)
    return matrix - rows - columns + matrix.mean(axis=(-2, -1), keepdims=True)


def same_trait_gamma(lift: np.ndarray) -> Any:
    """Least-squares gamma. `lift` is [..., teacher traits, evaluated traits]; row i's own trait is column i."""
    indicator = double_centred(np.eye(*lift.shape[-2:]))
    return (indicator * lift).sum(axis=(-2, -1)) / (indicator**2).sum()


def without_product(lift: np.ndarray) -> tuple[np.ndarray, Any]:
    """What a row effect, a column effect and their product leave of a complete matrix, and gamma beside the three.

    The product is Tukey's (1949) one degree of freedom: how strong a teacher is, times how easily a trait rises. Its effects are those of
    a fit with gamma, so that a gamma makes no product.

    Args:
      lift: [..., R, C]; row i's own trait is column i.

    Returns:
      The residual, [..., R, C], and gamma, [...]; NaN where the product is all that the same trait is (two traits).
    """
    same = np.eye(*lift.shape[-2:])
    plain = lift - same_trait_gamma(lift)[..., None, None] * same
    rows, columns = plain.mean(axis=-1, keepdims=True), plain.mean(axis=-2, keepdims=True)
    product = (rows - rows.mean(axis=-2, keepdims=True)) * (columns - columns.mean(axis=-1, keepdims=True))
    inner = lambda a, b: (a * b).sum(axis=(-2, -1), keepdims=True)  # noqa: E731
    size = inner(product, product)
    with np.errstate(all="ignore"):
        beside = lambda x: x - np.where(size > 0, inner(x, product) / size, 0.0) * product  # noqa: E731
        residual, indicator = beside(double_centred(lift)), beside(double_centred(same))
        left = inner(indicator, indicator)
        gamma = np.where(left > 1e-9, inner(indicator, residual) / left, math.nan)
    return residual, gamma[..., 0, 0]


def permutation_p(lift: np.ndarray, labels: np.ndarray, exact: bool, product: bool = False) -> Any:
    """Share of labellings whose gamma is at least as large as the observed one's.

    Args:
      lift: [..., R, C]; labels: int [P, R], the column that is taken for each row's own trait; exact: whether they are all.
      product: beside Tukey's term (`without_product`).
    """
    # The centred indicator has the same norm for every labelling, so sums of residuals order as gamma does.
    rows, residual = np.arange(labels.shape[1]), without_product(lift)[0] if product else double_centred(lift)
    sums = residual[..., rows, labels].sum(axis=-1)
    observed = residual[..., rows, rows].sum(axis=-1)
    # Ties are judged on the scale of the lifts, not of the residuals: those may be nothing but rounding.
    slack = 1e-9 * np.abs(lift).max(axis=(-2, -1))
    as_large = (sums >= (observed - slack)[..., None]).sum(axis=-1)
    # A sampled p counts the observed labelling itself, or it could be zero.
    return as_large / len(labels) if exact else (as_large + 1) / (len(labels) + 1)


def same_trait_effect(lift: np.ndarray, samples: int = 20_000, seed: int = 0) -> SameTraitEffect | None:
    """Fit gamma and test it by permuting the labels of the taught columns.

    `lift` is [R, C] float, R teacher traits by C >= R evaluated traits, no NaN; the first R columns are the teachers' own. Row
    and column effects take up "this teacher moves every trait" and "this trait rises with any teacher", so gamma does not depend
    on the reference the lift is measured from. p is the share of labellings with a gamma at least as large: exact up to
    5040 labellings, else `samples` seeded draws. Only taught columns change places, as those that nobody taught may be noisier or
    quieter. So few traits cannot give a small p: 1/2 at best for R = 2, 1/6 for R = 3 (`smallest_p`). `None`
    with fewer than two rows or columns, where gamma is not identified.
    """
    lift = np.asarray(lift, dtype=np.float64)
    rows, columns = lift.shape
    if rows < 2 or columns < rows:
        return None
    count = math.factorial(rows)
    exact = count <= MAX_EXACT_PERMUTATIONS
    if exact:
        labels = np.array(list(itertools.permutations(range(rows))))
    else:
        labels = np.random.default_rng(seed).permuted(np.tile(np.arange(rows), (samples, 1)), axis=1)
    p, smallest = float(permutation_p(lift, labels, exact)), 1 / count if exact else 1 / (samples + 1)
    beside = float(without_product(lift)[1]), float(permutation_p(lift, labels, exact, product=True))
    return SameTraitEffect(float(same_trait_gamma(lift)), p, *beside, smallest, len(labels), exact)
