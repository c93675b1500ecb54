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


def test_share_interval_inverts_the_contrast_test() -> None:
    rng = np.random.default_rng(0)
    part, whole, zero = (st.Estimate.of(rng.normal(m, 0.02, 6)) for m in (0.3, 0.35, 0.05))
    found = st.Interval.of(st.share_bounds(part - zero, whole - zero))
    assert found is not None
    ratio = (part.value - zero.value) / (whole.value - zero.value)
    assert found.low < ratio < found.high
    critical = stats.t.ppf(0.975, (part - whole * ratio - zero * (1 - ratio)).degrees)
    for edge, p in ((found.low, 0.025), (found.high, 0.975)):
        contrast = part - whole * edge - zero * (1 - edge)
        assert abs(contrast.value) == pytest.approx(critical * math.sqrt(contrast.variance))
        assert st.share_p_above(part - zero, whole - zero, edge) == pytest.approx(p)
    # Nothing to take a share of: the whole is not separated from the reference.
    assert st.Interval.of(st.share_bounds(part - zero, zero - zero)) is None


def test_what_two_share_is_counted_once() -> None:
    rng = np.random.default_rng(2)
    first, second, zero = (rng.normal(m, 0.1, 5) for m in (0.3, 0.4, 0.1))
    control, again = (st.Estimate.of(zero, group="control") for _ in range(2))
    a, b = st.Estimate.of(first) - control, st.Estimate.of(second) - again
    np.testing.assert_allclose((a - b).bounds(), (st.Estimate.of(first) - st.Estimate.of(second)).bounds())
    assert (a - b).n == 10 and a.covariance(b) == pytest.approx(control.variance)
    apart = st.Estimate.of(second) - st.Estimate.of(zero)
    assert (a - apart).variance > (a - b).variance and a.covariance(apart) == 0


@pytest.mark.parametrize("threshold", [-0.1, 0.2, 0.31, 0.9])
def test_p_is_the_interval_inverted(threshold: float) -> None:
    found = st.Estimate.of([0.2, 0.26, 0.31, 0.22]) - st.Estimate.of([0.01, -0.02, 0.0])
    p = float(found.p_above(threshold))
    assert p == pytest.approx(1 - float(found.p_below(threshold)))
    edge = found.interval(level=abs(1 - 2 * p))
    assert edge is not None and min(abs(edge.low - threshold), abs(edge.high - threshold)) < 1e-9
    assert np.isnan(st.Estimate.of([0.4]).p_above(threshold))


@pytest.mark.parametrize(("hits", "samples"), [(0, 20), (1, 20), (7, 50), (50, 50), (3, 2000)])
def test_one_models_interval_is_wilsons(hits: int, samples: int) -> None:
    """But for the smoothing of the variance, by one hit and one miss."""
    share = (hits + 1) / (samples + 2)
    found = st.Interval.of(st.rate_bounds(st.Estimate.measured(hits / samples, share * (1 - share) / samples), samples))
    wilson = stats.binomtest(hits, samples).proportion_ci(method="wilson")
    assert found is not None and (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=1e-12)


def test_an_interval_of_a_rate_stays_inside_and_one_that_is_far_from_the_ends_is_students_t() -> None:
    for values in ([0.0, 0.0], [1.0, 1.0], [0.0, 0.1], [0.02, 0.9], [0.0, 0.0, 1.0]):
        found = st.Interval.of(st.rate_bounds(st.Estimate.of(values, floor=1e-6), 1000))
        assert found is not None and 0 <= found.low <= np.mean(values) <= found.high <= 1
        assert found.low < found.high
    near = [0.5, 0.501, 0.502, 0.4995]
    found, t = st.Interval.of(st.rate_bounds(st.Estimate.of(near), 10**9)), st.Estimate.of(near).interval()
    assert found is not None and t is not None
    assert (found.low, found.high) == pytest.approx((t.low, t.high), abs=1e-5)
    assert st.Interval.of(st.rate_bounds(st.Estimate.of([0.4]), 100)) is None


def test_holm_steps_down() -> None:
    assert st.holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert st.holm([0.5, 0.9]) == [1.0, 1.0] and st.holm([None]) == [None]


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
    labellings = list(itertools.permutations(range(shape[0])))  # of the taught columns
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


def test_beside_a_product_of_row_and_column_effects_gamma_is_that_of_least_squares() -> None:
    rng = np.random.default_rng(8)
    rows, columns = rng.normal(size=(5, 1)), rng.normal(size=(1, 7))
    noise, same = 0.02 * rng.normal(size=(5, 7)), np.eye(5, 7)
    lift = (1 + rows) * (1 + columns) + 0.5 * same + noise
    found = st.same_trait_effect(lift)
    assert found is not None and found.gamma_beside == pytest.approx(0.5, abs=0.05)
    assert abs(found.gamma - 0.5) > 2 * abs(found.gamma_beside - 0.5)  # without the term, strong teachers are in it
    # Tukey's term by hand: the product of effects of the fit with gamma, one more column of the design.
    plain = lift - found.gamma * same
    product = (plain.mean(1, keepdims=True) - plain.mean()) * (plain.mean(0, keepdims=True) - plain.mean())
    places = itertools.product(range(5), range(7))
    design = [
        [float(i == r) for r in range(5)] + [float(j == c) for c in range(7)] + [product[i, j], same[i, j]]
        for i, j in places
    ]
    assert found.gamma_beside == pytest.approx(np.linalg.lstsq(np.array(design), lift.ravel(), rcond=None)[0][-1])


def test_what_a_product_explains_is_no_same_trait_effect() -> None:
    strength = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = st.same_trait_effect(
        np.outer(strength, strength)
    )  # each teacher loves what rises as easily as it is strong
    assert found is not None and found.p == pytest.approx(1 / 120) and found.gamma > 0.5
    assert found.p_beside > 0.05
    two = st.same_trait_effect(np.array([[2.0, 0.5], [0.1, 1.0]]))
    assert two is not None and np.isnan(two.gamma_beside) and two.p_beside == 1.0


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.95])
@pytest.mark.parametrize("students", [2, 5])
def test_an_interval_is_wider_the_more_of_the_pool_was_drawn(share: float, students: int) -> None:
    x = np.random.default_rng(students).normal(size=students)
    plain, wider = st.Estimate.of(x), st.Estimate.of(x, drawn=share)
    assert wider.value == plain.value and wider.degrees == plain.degrees
    assert wider.variance == pytest.approx(plain.variance * (1 + students * share / (1 - share)))
    assert st.Estimate.of(x, drawn=1.0).variance == plain.variance  # about this pool alone


def test_sampled_p_is_seeded_and_near_exact() -> None:
    lift = np.random.default_rng(5).normal(size=(8, 8)) + 0.5 * np.eye(8)
    first, second = st.same_trait_effect(lift, seed=1), st.same_trait_effect(lift, seed=1)
    assert first == second and first is not None and not first.exact
    sums = st.double_centred(lift)[np.arange(8), np.array(list(itertools.permutations(range(8))))].sum(axis=1)
    exact = np.mean(sums >= sums[0] - 1e-9)
    assert first.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000) + 1e-4)


def test_a_sampled_p_counts_the_observed_labelling_and_is_never_zero() -> None:
    """Davison and Hinkley (1997), section 4.2: (1 + as large) / (1 + drawn)."""
    lift = np.random.default_rng(6).normal(size=(8, 8))
    strong, samples = lift + 100 * np.eye(8), 50
    found = st.same_trait_effect(strong, samples=samples)
    assert found is not None and found.p == found.smallest_p == 1 / (samples + 1)
    weak = st.same_trait_effect(lift, samples=samples, seed=2)
    assert weak is not None
    labels = np.random.default_rng(2).permuted(np.tile(np.arange(8), (samples, 1)), axis=1)
    sums = st.double_centred(lift)[np.arange(8), labels].sum(axis=1)
    as_large = int((sums >= np.trace(st.double_centred(lift)) - 1e-9).sum())
    assert 0 < as_large < samples and weak.p == pytest.approx((1 + as_large) / (1 + samples), abs=1e-12)


def test_one_trait_has_no_gamma() -> None:
    assert st.same_trait_effect(np.ones((1, 1))) is None
    assert st.same_trait_effect(np.ones((1, 4))) is None
