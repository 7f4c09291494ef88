"""Numbers of a reuse: a planted drift is recovered, extrapolation is exact on a line, what is equal is held."""

from __future__ import annotations

import numpy as np
import pytest

from ditc.approximators import APPROXIMATORS
from ditc.passes import program_from_schedule
from ditc.runtime.approximation import Moments, first_rows, fitted_rows, holding_rows
from ditc.schedule import CacheSchedule

FITS = sorted(name for name, row in APPROXIMATORS.items() if row.fit is not None)
CHANNELS = 3
IMAGES = 8
SLOPES, SHIFTS = np.array([0.8, 1.0, 1.3]), np.array([0.1, 0.0, -0.4])


def features(seed: int) -> np.ndarray:
    """(images, tokens, channels) about a mean that is not zero."""
    drawn = np.random.default_rng(seed).standard_normal((IMAGES, 16, CHANNELS))
    return (drawn + np.array([2, 0, -1])).astype(np.float32)


def moments_of(seen: np.ndarray, exact: np.ndarray) -> Moments:
    return Moments.empty(2, CHANNELS).add(seen, exact)


def test_a_planted_affine_drift_is_recovered() -> None:
    seen = features(0)
    rows = fitted_rows("affine", moments_of(seen, seen * SLOPES + SHIFTS), IMAGES, prior_images=0)
    np.testing.assert_allclose(rows, [SLOPES, SHIFTS], atol=1e-4)


def test_affine_is_the_least_squares_line() -> None:
    seen = features(0)
    exact = 0.7 * seen + features(1)
    rows = fitted_rows("affine", moments_of(seen, exact), IMAGES, prior_images=0)
    for channel in range(CHANNELS):
        line = np.polyfit(seen[..., channel].ravel(), exact[..., channel].ravel(), 1)
        np.testing.assert_allclose(rows[:, channel], line, rtol=1e-4)


def test_variance_gives_the_exact_spread_and_keeps_the_mean() -> None:
    seen, exact = features(0), 1.7 * features(1) + 5
    scale, shift = fitted_rows("variance", moments_of(seen, exact), IMAGES, prior_images=0)
    corrected = scale * seen + shift
    np.testing.assert_allclose(corrected.std(axis=(0, 1)), exact.std(axis=(0, 1)), rtol=1e-4)
    np.testing.assert_allclose(corrected.mean(axis=(0, 1)), seen.mean(axis=(0, 1)), atol=1e-4)


def test_affine_has_the_least_error_of_all_lines_with_further_pairs_of_what_was_seen() -> None:
    """Squared errors over the images, and as if some more had been exact: that is minimised."""
    seen, prior = features(0), 3.0
    moments = moments_of(seen, 0.7 * seen + features(1))
    rows = fitted_rows("affine", moments, IMAGES, prior_images=prior)
    least = affine_error(rows, moments, prior)
    rng = np.random.default_rng(2)
    for _ in range(50):
        other = (rows + 0.02 * rng.standard_normal(rows.shape)).astype(np.float32)
        assert (affine_error(other, moments, prior) > least - 1e-7).all()


def affine_error(rows: np.ndarray, moments: Moments, prior: float, images: int = IMAGES) -> np.ndarray:
    """Mean squared error of a S + b, (channels,), beside pairs that are equal: as many images as the prior counts."""
    a, b = rows.astype(np.float64)
    (mean, target), squares = moments.means, moments.products / moments.count
    error = a**2 * squares[0, 0] + b**2 + squares[1, 1] + 2 * (a * b * mean - a * squares[0, 1] - b * target)
    of_equal_pairs = (a - 1) ** 2 * squares[0, 0] + b**2 + 2 * (a - 1) * b * mean
    return np.asarray((images * error + prior * of_equal_pairs) / (images + prior))


@pytest.mark.parametrize("method", FITS)
def test_equal_features_are_held(method: str) -> None:
    rows = fitted_rows(method, moments_of(features(0), features(0)), IMAGES)
    np.testing.assert_allclose(rows, holding_rows(1, 2, CHANNELS)[0], atol=1e-6)


@pytest.mark.parametrize("prior", [0, 8, 1e9])
def test_the_prior_draws_towards_holding_as_that_many_exact_pairs_would(prior: float) -> None:
    seen = features(0)
    share = IMAGES / (IMAGES + prior)
    rows = fitted_rows("affine", moments_of(seen, seen * SLOPES + SHIFTS), IMAGES, prior)
    np.testing.assert_allclose(rows, [1 + share * (SLOPES - 1), share * SHIFTS], atol=1e-4)


@pytest.mark.parametrize("method", FITS)
def test_a_constant_channel_is_held(method: str) -> None:
    seen, exact = features(0), 3 * features(1)
    seen[..., 1] = 0.25
    rows = fitted_rows(method, moments_of(seen, exact), IMAGES)
    assert rows[:, 1].tolist() == [1, 0]
    assert np.isfinite(rows).all()


def test_moments_of_parts_are_those_of_the_whole() -> None:
    seen, exact = features(0), features(1)
    parts = Moments.empty(2, CHANNELS)
    for part in (slice(0, 3), slice(3, 4), slice(4, None)):
        parts = parts.add(seen[part], exact[part])
    whole = moments_of(seen, exact)
    np.testing.assert_allclose(parts.means, whole.means, rtol=1e-9)
    np.testing.assert_allclose(parts.spreads, whole.spreads, rtol=1e-9)
    np.testing.assert_allclose(whole.spreads[0, 0], np.var(seen.astype(np.float64), axis=(0, 1)), rtol=1e-9)


def test_extrapolation_is_exact_for_what_changes_linearly_in_t() -> None:
    """Uneven timesteps and intervals; in the first interval nothing lies before, so it holds."""
    computes, t = [1, 0, 1, 0, 0, 1, 0], [900.0, 850.0, 700.0, 640.0, 500.0, 450.0, 100.0]
    schedule = CacheSchedule(compute=tuple((bool(mark),) * 2 for mark in computes), reuse="taylor")
    program = program_from_schedule(schedule, t, ["a", "b"], caches="sums")
    table = first_rows(program, CHANNELS)
    assert table is not None
    assert table.shape == (7, 2, CHANNELS)
    for step, near, before in ((3, 2, 0), (4, 2, 0), (6, 5, 2)):
        line = [0.3 * t[place] - 5 for place in (near, before, step)]
        np.testing.assert_allclose(table[step][0] * line[0] + table[step][1] * line[1], line[2], rtol=1e-5)
    assert table[1].tolist() == holding_rows(1, 2, CHANNELS)[0].tolist()


def test_a_program_that_only_holds_takes_no_numbers() -> None:
    schedule = CacheSchedule(compute=((True,), (False,)))
    assert first_rows(program_from_schedule(schedule, [2, 1], ["a"], caches="sums"), CHANNELS) is None
