"""Compensation: estimators recover what was planted, and K = 1 changes nothing (law 4)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditc.errors import InputError
from ditc.runtime.compensation import ESTIMATORS, ClosedLoopFit, TableCompensation, estimate_k
from ditc.runtime.executor import Correction

LAW = settings(deadline=None)  # a busy machine stalls now and then

ALL = sorted(ESTIMATORS)
CHANNELS = 3
STEPS = 5


def normal(seed: int, count: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, CHANNELS, 6, 6)).astype(np.float32)


def per_channel(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None, None]


@LAW
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), step=st.integers(0, STEPS - 1))
def test_a_table_of_ones_changes_no_bit(seed: int, scale: float, step: int) -> None:
    x = normal(seed) * np.float32(scale)
    table = TableCompensation(k=np.ones((STEPS, CHANNELS)), mu=np.full((STEPS, CHANNELS), 0.3))
    assert table(step, x).tobytes() == x.tobytes()


def test_a_table_scales_each_channel_about_its_mean_at_its_step() -> None:
    k, mu = np.array([[1.0, 1, 1], [2, 0.5, 1]]), np.array([[9.0, 9, 9], [1, -1, 0]])
    x = normal(0)
    scaled = TableCompensation(k=k, mu=mu)(1, x)
    expected = [1 + 2 * (x[:, 0] - 1), -1 + 0.5 * (x[:, 1] + 1), x[:, 2]]
    np.testing.assert_allclose(scaled, np.stack(expected, axis=1), rtol=1e-5, atol=1e-6)
    assert scaled.dtype == np.float32


def test_compensating_leaves_its_input_alone() -> None:
    x = normal(0)
    TableCompensation(k=np.full((1, CHANNELS), 2.0), mu=np.zeros((1, CHANNELS)))(0, x)
    np.testing.assert_array_equal(x, normal(0))


def test_a_bundle_without_a_table_has_no_compensation() -> None:
    assert TableCompensation.from_tables({"sampler.t": np.zeros(3)}) is None


def test_a_bundle_with_a_table_has_that_compensation() -> None:
    k, mu = np.full((2, CHANNELS), 1.5), np.full((2, CHANNELS), 0.5)
    compensation = TableCompensation.from_tables({"compensation.k": k, "compensation.mu": mu, "sampler.t": k})
    assert compensation is not None
    np.testing.assert_array_equal(compensation.k, k)
    np.testing.assert_array_equal(compensation.mu, mu)


@LAW
@given(st.lists(st.floats(0.1, 10), min_size=CHANNELS, max_size=CHANNELS), st.floats(-3, 3))
def test_std_and_lsq_recover_a_known_k_exactly(ks: list[float], shift: float) -> None:
    seen = normal(0).astype(np.float64) + shift
    mean = seen.mean(axis=(0, 2, 3), keepdims=True)
    exact = mean + per_channel(*ks) * (seen - mean)
    for method in ("std", "lsq"):
        k, mu = estimate_k(method, exact, seen, 0)
        np.testing.assert_allclose(k, np.float32(ks), rtol=1e-9)
        np.testing.assert_allclose(mu, mean.ravel(), rtol=1e-9)


def test_the_mean_is_that_of_the_compiled_samples() -> None:
    _, mu = estimate_k("std", normal(0) + 7, normal(1) + per_channel(1, 2, 3), 4)
    np.testing.assert_allclose(mu, [1, 2, 3], atol=0.3)


def test_lsq_is_the_slope_of_the_regression_line() -> None:
    seen = normal(0)
    exact = 0.7 * seen + 0.5 * normal(1) + 2
    k, _ = estimate_k("lsq", exact, seen, 0)
    expected = [np.polyfit(seen[:, c].ravel(), exact[:, c].ravel(), 1)[0] for c in range(CHANNELS)]
    np.testing.assert_allclose(k, expected, rtol=1e-5)


def test_under_independent_error_lsq_shrinks_and_std_matches_the_variance() -> None:
    exact = normal(0, 200)
    seen = exact + normal(1, 200)
    np.testing.assert_allclose(estimate_k("lsq", exact, seen, 0)[0], 1 / 2, rtol=0.03)
    np.testing.assert_allclose(estimate_k("std", exact, seen, 0)[0], 1 / np.sqrt(2), rtol=0.03)


@LAW
@given(st.integers(0, 1000), st.floats(1e-6, 1), st.integers(0, 60))
def test_paper_stays_bounded_where_samples_are_near_zero(seed: int, near: float, zeros: int) -> None:
    exact = normal(seed)
    exact[..., 0] *= np.float32(near)
    exact.reshape(-1)[:zeros] = 0
    k, _ = estimate_k("paper", exact, exact + 0.1 * normal(seed + 1), 0)
    assert np.isfinite(k).all()
    assert (np.abs(k) < 3).all()


def test_paper_is_equation_12_where_no_sample_is_near_zero() -> None:
    exact = np.sign(normal(0)) * (1 + np.abs(normal(1)))
    seen = exact + 0.1 * normal(2)
    mu = seen.mean(axis=(0, 2, 3), keepdims=True)
    top = ((exact - mu) * (seen - mu) + (seen - mu) / exact).sum(axis=(0, 2, 3))
    bottom = ((seen - mu) ** 2 + (seen - mu) ** 2 / exact**2).sum(axis=(0, 2, 3))
    np.testing.assert_allclose(estimate_k("paper", exact, seen, 0)[0], top / bottom, rtol=1e-4)


@pytest.mark.parametrize("method", ALL)
def test_equal_samples_need_no_compensation(method: str) -> None:
    x = normal(0)
    x -= x.mean(axis=(0, 2, 3), keepdims=True)
    np.testing.assert_allclose(estimate_k(method, x, x, 0)[0], 1, atol=1e-6 if method != "paper" else 0.02)


@pytest.mark.parametrize("prior", [0, 4, 8, 1e9])
def test_the_prior_draws_k_towards_one_as_that_many_pairs_would(prior: float) -> None:
    seen = normal(0, count=8)
    k, _ = estimate_k("std", 3 * seen, seen, prior)
    np.testing.assert_allclose(k, (8 * 3 + prior) / (8 + prior), rtol=1e-6)


@pytest.mark.parametrize("method", ALL)
def test_a_constant_channel_keeps_k_at_one(method: str) -> None:
    exact, seen = 2 * normal(0), normal(0)
    seen[:, 1] = 0.25
    k, mu = estimate_k(method, exact, seen, 0)
    assert k[1] == 1
    assert mu[1] == 0.25
    assert (k[[0, 2]] > 1.2).all()


@pytest.mark.parametrize("method", ALL)
def test_a_trajectory_that_is_zero_everywhere_stays_finite(method: str) -> None:
    assert np.isfinite(estimate_k(method, 0 * normal(0), normal(1), 4)[0]).all()


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown compensation 'var'; choose one of: lsq, none, paper, std"):
        estimate_k("var", normal(0), normal(1), 4)


GAINS = np.linspace(0.7, 1.3, STEPS * CHANNELS).reshape(STEPS, CHANNELS)
ERRORS = np.array([[1.2, 0.9, 1.0], [0.8, 1.1, 1.5], [1.1, 1.1, 0.5], [1.0, 0.7, 0.9], [0.6, 2.0, 1.3]])


def linear_walk(x: np.ndarray, errors: np.ndarray, correction: Correction | None = None) -> list[np.ndarray]:
    """The samples after each step, which multiplies each channel by its gain and by an error of its own."""
    samples = []
    for step in range(STEPS):
        x = (x * per_channel(*(GAINS[step] * errors[step]))).astype(np.float32)
        x = x if correction is None else correction(step, x)
        samples.append(x)
    return samples


def exact_walk(x: np.ndarray) -> list[np.ndarray]:
    return linear_walk(x, np.ones_like(ERRORS))


def fitted(x: np.ndarray, errors: np.ndarray, method: str, prior_samples: float) -> ClosedLoopFit:
    """A fit that has been walked with."""
    correction = ClosedLoopFit(exact_walk(x), method, prior_samples)
    linear_walk(x, errors, correction)
    return correction


def test_a_closed_loop_fit_recovers_the_error_of_each_single_step() -> None:
    table = fitted(normal(0), ERRORS, "std", 0).table
    np.testing.assert_allclose(table.k, 1 / ERRORS, rtol=1e-4)


def test_a_fit_corrects_as_its_table_will() -> None:
    x, correction = normal(0), ClosedLoopFit(exact_walk(normal(0)), "lsq")
    on_the_way = linear_walk(x, ERRORS, correction)
    assert all(map(np.array_equal, linear_walk(x, ERRORS, correction.table), on_the_way))
    assert not np.array_equal(on_the_way[-1], linear_walk(x, ERRORS)[-1])


def test_a_run_with_the_fitted_table_has_the_variance_of_the_exact_one() -> None:
    x = normal(0)
    table = fitted(x, ERRORS, "std", 0).table
    for compensated, exact in zip(linear_walk(x, ERRORS, table), exact_walk(x), strict=True):
        np.testing.assert_allclose(compensated.std(axis=(0, 2, 3)), exact.std(axis=(0, 2, 3)), rtol=1e-4)


def test_a_fit_of_an_exact_program_finds_ones() -> None:
    table = fitted(normal(0), np.ones_like(ERRORS), "lsq", 4).table
    assert table.k.shape == table.mu.shape == (STEPS, CHANNELS)
    np.testing.assert_allclose(table.k, 1, atol=1e-6)
