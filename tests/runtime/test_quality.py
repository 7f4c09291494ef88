"""Quality measures: closed forms with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditc.runtime.quality import frechet_distance, psnr_db, relative_error

LAW = settings(deadline=None)  # a busy machine stalls now and then


def gaussian(mean: np.ndarray, covariance: np.ndarray, count: int = 500, seed: int = 0) -> np.ndarray:
    """Samples whose mean and covariance are exactly those asked for."""
    raw = np.random.default_rng(seed).standard_normal((count, len(mean)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    return mean + white @ np.linalg.cholesky(covariance).T


def random_covariance(seed: int, size: int = 4) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((size, size))
    return root @ root.T + 0.1 * np.eye(size)


def test_equal_sets_are_at_frechet_distance_zero() -> None:
    features = np.random.default_rng(0).standard_normal((100, 5))
    assert frechet_distance(features, features[::-1]) == pytest.approx(0, abs=1e-9)


@LAW
@given(st.integers(0, 1000), st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_a_shift_costs_its_squared_length(seed: int, shift: list[float]) -> None:
    covariance = random_covariance(seed)
    a, b = gaussian(np.zeros(4), covariance), gaussian(np.array(shift), covariance, seed=1)
    assert frechet_distance(a, b) == pytest.approx(np.square(shift).sum(), abs=1e-6)


def test_independent_features_differ_by_their_standard_deviations() -> None:
    a = gaussian(np.array([1.0, 0, 0]), np.diag([4.0, 1, 9]))
    b = gaussian(np.array([0.0, 0, 2]), np.diag([1.0, 25, 9]), seed=1)
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (1 - 5) ** 2, rel=1e-9)


@LAW
@given(st.integers(0, 1000))
def test_correlated_features_follow_the_matrix_formula(seed: int) -> None:
    ca, cb = random_covariance(seed), random_covariance(seed + 1)
    root = np.sqrt(np.linalg.eigvals(ca @ cb).real).sum()
    found = frechet_distance(gaussian(np.zeros(4), ca), gaussian(np.zeros(4), cb, seed=1))
    assert found == pytest.approx(np.trace(ca) + np.trace(cb) - 2 * root, rel=1e-6, abs=1e-6)


@LAW
@given(st.integers(0, 1000))
def test_the_frechet_distance_is_symmetric_and_ignores_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((30, 4)), 2 * rng.standard_normal((40, 4)) + 1
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(rng.permutation(b), a), rel=1e-9)


def test_fewer_samples_than_features_still_give_a_number() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 20)).astype(np.float32), rng.standard_normal((6, 20)).astype(np.float32)
    assert frechet_distance(a, b) > 0
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_psnr_of_a_constant_error_is_known() -> None:
    expected = np.zeros((3, 1, 4, 4), np.float32)
    found = expected + np.array([2.0, 0.2, 0.02], np.float32)[:, None, None, None]
    np.testing.assert_allclose(psnr_db(found, expected), [0, 20, 40], atol=1e-4)
    np.testing.assert_allclose(psnr_db(found, expected, peak=20), [20, 40, 60], atol=1e-4)


def test_psnr_is_per_image() -> None:
    expected = np.random.default_rng(0).standard_normal((4, 3, 8, 8))
    found = expected.copy()
    found[2] += 1
    values = psnr_db(found, expected)
    assert values.shape == (4,)
    assert values.argmin() == 2
    assert (values[[0, 1, 3]] > 100).all()
    assert np.isfinite(values).all()


def test_relative_error_is_the_length_of_the_gap_over_the_length_of_the_target() -> None:
    expected = np.array([3.0, 4.0])
    assert relative_error(np.array([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(expected, expected) == 0


def test_measures_do_not_overflow_in_half_precision() -> None:
    a = np.full((1, 100), 200, np.float16)
    assert relative_error(a, -a) == 2
    assert psnr_db(a, -a, peak=400)[0] == pytest.approx(0)
