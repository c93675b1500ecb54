"""Statistics against closed forms, scipy and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

import jsublim.report.statistics as st


@pytest.mark.parametrize("size", [2, 5, 30, 31, 50])
def test_question_interval_is_scipys(size: int) -> None:
    x = np.random.default_rng(size).uniform(size=size)
    se = stats.sem(x)
    law = stats.norm(x.mean(), se) if size > 30 else stats.t(size - 1, x.mean(), se)
    found = st.question_interval(x)
    assert found is not None
    assert (found.low, found.high) == pytest.approx(law.interval(0.95))
    assert st.question_interval(x[:1]) is None


def test_student_interval_is_scipys_t() -> None:
    x = [0.2, 0.26, 0.31, 0.22]
    found = st.Estimate.of(x).interval()
    assert found is not None
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 3, np.mean(x), stats.sem(x)))


def test_difference_is_welchs() -> None:
    a, b = [0.3, 0.35, 0.41], [0.1, 0.08, 0.14, 0.11, 0.02]
    found = (st.Estimate.of(a) - st.Estimate.of(b)).interval()
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_one_student_gives_no_interval() -> None:
    assert st.Estimate.of([0.4]).interval() is None
    assert (st.Estimate.of([0.4]) - st.Estimate.of([0.1, 0.2])).interval() is None
    assert st.Estimate.of([0.0, 0.0]).interval() is None
    floored = st.Estimate.of([0.0, 0.0], floor=1e-6).interval()
    assert floored is not None and floored.high > 0


def test_ratio_interval_inverts_the_contrast_test() -> None:
    rng = np.random.default_rng(0)
    part, whole, zero = (st.Estimate.of(rng.normal(m, 0.02, 6)) for m in (0.3, 0.35, 0.05))
    found = st.ratio_interval(part, whole, zero)
    assert found is not None
    ratio = (part.value - zero.value) / (whole.value - zero.value)
    assert found.low < ratio < found.high
    critical = stats.t.ppf(0.975, (part - whole * ratio - zero * (1 - ratio)).degrees)
    for edge in (found.low, found.high):
        contrast = part - whole * edge - zero * (1 - edge)
        assert abs(contrast.value) == pytest.approx(critical * math.sqrt(contrast.variance))
    # Nothing to take a share of: the whole is not separated from the reference.
    assert st.ratio_interval(part, zero, zero) is None


def test_ratio_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        part, whole, zero = (st.Estimate.of(rng.normal(m, 0.03, 5)) for m in (0.2, 0.35, 0.05))
        found = st.ratio_interval(part, whole, zero)
        hits += found is not None and found.covers(0.5)
    assert 0.92 <= hits / 400 <= 0.99


def least_squares_gamma(lift: np.ndarray, same: tuple[int, ...]) -> float:
    """gamma by an explicit design matrix: rows, columns, [same]."""
    rows, columns = lift.shape
    design = []
    for i, j in itertools.product(range(rows), range(columns)):
        design.append([float(i == r) for r in range(rows)] + [float(j == c) for c in range(columns)])
        design[-1].append(float(same[i] == j))
    return float(np.linalg.lstsq(np.array(design), lift.ravel(), rcond=None)[0][-1])


@pytest.mark.parametrize("shape", [(2, 2), (3, 3), (4, 4), (3, 5)])
def test_gamma_and_p_equal_brute_force(shape: tuple[int, int]) -> None:
    lift = np.random.default_rng(sum(shape)).normal(size=shape) + 0.7 * np.eye(*shape)
    found = st.same_trait_effect(lift)
    labellings = list(itertools.permutations(range(shape[1]), shape[0]))
    gammas = [least_squares_gamma(lift, labels) for labels in labellings]
    assert found is not None and found.exact and found.permutations == len(labellings)
    assert found.gamma == pytest.approx(gammas[0])
    assert found.p == pytest.approx(np.mean([g >= gammas[0] - 1e-9 for g in gammas]))
    assert found.smallest_p == pytest.approx(1 / len(labellings))


def test_gamma_is_recovered_and_blind_to_row_and_column_effects() -> None:
    rng = np.random.default_rng(3)
    lift = 1.25 * np.eye(5) + rng.normal(size=(5, 1)) + rng.normal(size=(1, 5))
    found = st.same_trait_effect(lift)
    assert found is not None
    assert found.gamma == pytest.approx(1.25)
    assert found.p == pytest.approx(1 / 120)
    only_rows_and_columns = st.same_trait_effect(lift - 1.25 * np.eye(5))
    assert only_rows_and_columns is not None
    assert only_rows_and_columns.gamma == pytest.approx(0, abs=1e-12) and only_rows_and_columns.p == 1.0


def test_permutation_p_is_uniform_under_null() -> None:
    rng = np.random.default_rng(11)
    results = [st.same_trait_effect(rng.normal(size=(5, 5))) for _ in range(500)]
    p = np.array([r.p for r in results if r])
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.02 <= np.mean(p <= 0.05) <= 0.09


def test_sampled_p_is_seeded_and_near_exact() -> None:
    lift = np.random.default_rng(5).normal(size=(8, 8)) + 0.5 * np.eye(8)
    first, second = st.same_trait_effect(lift, seed=1), st.same_trait_effect(lift, seed=1)
    assert first == second and first is not None and not first.exact
    sums = st.double_centred(lift)[np.arange(8), np.array(list(itertools.permutations(range(8))))].sum(axis=1)
    exact = np.mean(sums >= sums[0] - 1e-9)
    assert first.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000) + 1e-4)


def test_one_trait_has_no_gamma() -> None:
    assert st.same_trait_effect(np.ones((1, 1))) is None
    assert st.same_trait_effect(np.ones((1, 4))) is None
