"""Factors per channel: the papers' formulas, and that an outlier loses its cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from ditc.errors import DitcError, InputError
from ditc.quantize.transforms import (
    ALPHAS,
    SAMPLE_ROWS,
    TRANSFORMS,
    WIDEST,
    ChannelStatistics,
    choose_factors,
    quantization_error,
    rank_correlation,
)

CHANNELS = 24


def seen_at(*steps: np.ndarray) -> ChannelStatistics:
    seen, rng = ChannelStatistics.empty(CHANNELS), np.random.default_rng(0)
    for values in steps:
        seen = seen.add(np.float32(values), True, rng)
    return seen


def activations(steps: int = 3, tokens: int = 40) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((steps, 2, tokens, CHANNELS)) * np.linspace(0.5, 2, CHANNELS)


def weight() -> np.ndarray:
    rng = np.random.default_rng(2)
    return np.float32(rng.standard_normal((CHANNELS, 16)) * rng.uniform(0.2, 2, (CHANNELS, 1)))


def normalised(factors: np.ndarray) -> np.ndarray:
    return factors / np.exp(np.log(factors).mean())


def test_smooth_is_the_power_law_of_its_exponent() -> None:
    outliers = activations() * np.where(np.arange(CHANNELS) % 8 == 0, 30, 1)
    choice = choose_factors("smooth", seen_at(*outliers), weight(), "max")
    assert choice.alpha in ALPHAS
    x, w = np.abs(outliers).max(axis=(0, 1, 2)), np.abs(weight()).max(axis=1)
    np.testing.assert_allclose(choice.factors, normalised(x**choice.alpha / w ** (1 - choice.alpha)), rtol=1e-5)


@pytest.mark.parametrize("ranges", ["max", "mse", "percentile"])
def test_no_exponent_of_the_grid_quantizes_better_than_the_chosen_one(ranges: str) -> None:
    seen = seen_at(*(activations() * np.where(np.arange(CHANNELS) % 8 == 0, 30, 1)))
    choice = choose_factors("smooth", seen, weight(), ranges)
    x, w = seen.peaks.max(axis=0).astype(np.float64), np.abs(weight()).max(axis=1).astype(np.float64)
    grid = [normalised(x**alpha / w ** (1 - alpha)) for alpha in ALPHAS]
    errors = [quantization_error(seen, weight(), factors, ranges) for factors in (np.ones(CHANNELS), *grid)]
    assert quantization_error(seen, weight(), choice.factors, ranges) <= min(errors) * (1 + 1e-6)
    assert min(errors) < errors[0] / 4


def test_a_layer_whose_channels_are_all_alike_is_left_as_it_is() -> None:
    values, alike = np.clip(activations(), -0.5, 0.5), np.clip(weight(), -0.25, 0.25)
    values[..., 0, :], alike[:, 0] = 0.5, 0.25
    choice = choose_factors("smooth", seen_at(*values), alike, "max")
    assert choice.alpha is None
    np.testing.assert_array_equal(choice.factors, 1)


def test_balance_is_the_geometric_mean_with_steps_weighted_by_rank_correlation() -> None:
    steps = activations() * np.random.default_rng(4).uniform(0.1, 10, (3, 1, 1, CHANNELS))
    w = np.abs(weight()).max(axis=1)
    peaks = np.abs(np.float32(steps)).max(axis=(1, 2))
    minus_rho = np.array([-spearmanr(peak, w).statistic for peak in peaks])
    share = np.exp(minus_rho) / np.exp(minus_rho).sum()
    assert share.max() / share.min() > 1.05  # the weighting does something here
    expected = normalised(np.sqrt((share[:, None] * peaks).sum(axis=0) / w))
    np.testing.assert_allclose(choose_factors("balance", seen_at(*steps), weight(), "max").factors, expected, rtol=1e-5)


def test_the_search_knows_of_values_that_the_kept_rows_missed() -> None:
    seen = seen_at(*activations())
    missed = replace(seen, peaks=10 * seen.peaks)
    errors = [quantization_error(each, weight(), np.ones(CHANNELS), "max") for each in (seen, missed)]
    assert 20 < errors[1] / errors[0] < 200


@pytest.mark.parametrize("method", TRANSFORMS)
def test_factors_follow_a_rescaling_of_the_channels(method: str) -> None:
    """Channels of another size with the weight's rows to match are the same layer, and come out as the same."""
    rescale = np.exp2(np.random.default_rng(5).integers(0, 6, CHANNELS))
    rescale[:2] = 1, 2
    plain, other = seen_at(*activations()), seen_at(*(activations() * rescale))
    choice = choose_factors(method, other, np.float32(weight() / rescale[:, None]), "mse")
    before = choose_factors(method, plain, weight(), "mse")
    errors = [
        quantization_error(plain, weight(), before.factors, "mse"),
        quantization_error(other, np.float32(weight() / rescale[:, None]), choice.factors, "mse"),
    ]
    assert errors[1] < 1.3 * errors[0]


@given(st.lists(st.integers(0, 5), min_size=3, max_size=20), st.randoms(use_true_random=False))
def test_rank_correlation_is_spearmans_with_ties(values: list[int], random: object) -> None:
    a = np.array(values, np.float64)
    b = np.random.default_rng(len(values)).permutation(a)
    expected = 0.0 if np.ptp(a) == 0 else spearmanr(a, b).statistic
    assert rank_correlation(a, b) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("method", TRANSFORMS)
def test_channels_without_a_size_are_left_and_the_rest_stay_within_bounds(method: str) -> None:
    values = activations()
    values[..., 3], values[..., 4] = 0, values[..., 4] * 1e20
    w = weight()
    w[7] = 0
    factors = choose_factors(method, seen_at(*values), w, "max").factors
    assert factors[3] == factors[7] == 1
    assert factors.max() <= WIDEST
    assert factors.min() >= 1 / WIDEST


def test_peaks_are_those_of_each_step() -> None:
    values, rng = np.float32(activations(steps=2)), np.random.default_rng(0)
    seen = ChannelStatistics.empty(CHANNELS)
    for step in values:
        for turn, point in enumerate(step):
            seen = seen.add(point[None], turn == 0, rng)
    np.testing.assert_array_equal(seen.peaks, np.abs(values).max(axis=(1, 2)))


def test_kept_rows_are_drawn_evenly_and_memory_does_not_grow() -> None:
    """Row i of 20,000 holds the number i, so what was kept says when it came."""
    seen, rng = ChannelStatistics.empty(1), np.random.default_rng(0)
    for part in np.arange(20_000, dtype=np.float32).reshape(40, 500, 1):
        seen = seen.add(part, True, rng)
    assert seen.rows.shape == (SAMPLE_ROWS, 1)
    assert len(np.unique(seen.rows)) == SAMPLE_ROWS
    quarters = np.histogram(seen.rows, 4, (0, 20_000))[0] / SAMPLE_ROWS
    assert quarters.min() > 0.15
    assert quarters.max() < 0.35


def test_an_activation_that_overflows_is_refused() -> None:
    with pytest.raises(DitcError, match="NaN or infinite"):
        seen_at(np.full((1, 4, CHANNELS), np.nan))


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown smoothing 'awq'; choose one of: balance, none, smooth"):
        choose_factors("awq", seen_at(*activations()), weight(), "max")
