"""Clipping ranges: streaming loses nothing, and each method does what its name says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditc.errors import DitcError, InputError
from ditc.quantize.ranges import (
    BINS,
    RANGES,
    Histogram,
    clipping_range,
    entropy_range,
    max_range,
    mse_range,
    percentile_range,
)

LAW = settings(deadline=None)  # a busy machine stalls now and then

LEVELS = 127


def histogram_of(*batches: np.ndarray) -> Histogram:
    histogram = Histogram.empty()
    for batch in batches:
        histogram = histogram.add(batch.astype(np.float32))
    return histogram


def quantization_error(values: np.ndarray, limit: float) -> float:
    scale = limit / LEVELS
    return float(((np.clip(np.round(values / scale), -LEVELS, LEVELS) * scale - values) ** 2).sum())


@st.composite
def batches(draw: st.DrawFn) -> list[np.ndarray]:
    """Normal values whose magnitude differs from batch to batch by up to 60 doublings."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponents = draw(st.lists(st.floats(-30, 30), min_size=1, max_size=6))
    sizes = draw(st.lists(st.integers(0, 300), min_size=len(exponents), max_size=len(exponents)))
    pairs = zip(sizes, exponents, strict=True)
    drawn = [rng.standard_normal(size).astype(np.float32) * np.float32(2.0**exponent) for size, exponent in pairs]
    return [*drawn, rng.standard_normal(3).astype(np.float32)]


@LAW
@given(batches())
def test_streaming_keeps_every_value_and_the_exact_maximum(drawn: list[np.ndarray]) -> None:
    histogram = histogram_of(*drawn)
    everything = np.abs(np.concatenate(drawn))
    assert histogram.counts.sum() == len(everything)
    assert max_range(histogram) == everything.max()
    assert len(histogram.counts) == BINS


@LAW
@given(batches(), st.sampled_from([0.1, 0.5, 0.9, 0.99, 0.9999, 1.0]))
def test_a_streamed_percentile_is_the_exact_one_up_to_a_bin(drawn: list[np.ndarray], share: float) -> None:
    histogram = histogram_of(*drawn)
    everything = np.sort(np.abs(np.concatenate(drawn)))
    exact = everything[max(0, int(np.ceil(share * len(everything) - 1e-9)) - 1)]
    assert percentile_range(histogram, share=share) == pytest.approx(exact, abs=1.01 * histogram.bin_width)


@LAW
@given(batches())
def test_at_least_half_of_the_bins_lie_below_the_largest_value(drawn: list[np.ndarray]) -> None:
    histogram = histogram_of(*drawn)
    assert histogram.amax <= histogram.limit < 2 * histogram.amax


@LAW
@given(seed=st.integers(0, 10_000), doublings=st.lists(st.integers(-6, 6), min_size=1, max_size=5))
def test_streamed_counts_equal_one_shot_counts_but_for_values_on_an_edge(seed: int, doublings: list[int]) -> None:
    rng = np.random.default_rng(seed)
    parts = [np.append(rng.random(50), 1).astype(np.float32) * np.float32(2.0**d) for d in doublings]
    streamed, at_once = histogram_of(*parts), histogram_of(np.concatenate(parts))
    assert streamed.limit == at_once.limit
    assert np.abs(np.cumsum(streamed.counts - at_once.counts)).max() < len(doublings)


@LAW
@given(batches())
def test_histograms_of_parts_add_up_to_that_of_the_whole_in_any_order(drawn: list[np.ndarray]) -> None:
    whole = histogram_of(*drawn)
    forth, back = Histogram.empty(), Histogram.empty()
    for part in drawn:
        forth = forth.merged(histogram_of(part))
        back = histogram_of(part).merged(back)
    for merged in (forth, back):
        np.testing.assert_array_equal(merged.counts, whole.counts)
        assert (merged.limit, merged.amax) == (whole.limit, whole.amax)


@pytest.mark.parametrize("method", sorted(RANGES))
def test_zeros_before_or_after_change_nothing_but_the_count_of_zeros(method: str) -> None:
    values, zeros = np.random.default_rng(0).standard_normal(5000), np.zeros(40)
    before, after = histogram_of(zeros, values), histogram_of(values, zeros)
    np.testing.assert_array_equal(before.counts, after.counts)
    assert clipping_range(method, before) == clipping_range(method, after)
    assert before.counts.sum() == 5040


def test_adding_leaves_the_values_and_the_old_histogram_alone() -> None:
    values = np.array([-3, 1, 2], np.float32)
    first = histogram_of(values)
    counts = first.counts.copy()
    first.add(values * 10)
    np.testing.assert_array_equal(first.counts, counts)
    np.testing.assert_array_equal(values, [-3, 1, 2])


def test_a_batch_without_values_adds_nothing() -> None:
    histogram = histogram_of(np.zeros((0, 4)), np.ones(3), np.zeros((2, 0)))
    assert histogram.counts.sum() == 3
    assert histogram.amax == 1


def test_sign_and_shape_do_not_matter() -> None:
    values = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)
    np.testing.assert_array_equal(histogram_of(values).counts, histogram_of(-values.transpose(2, 0, 1)).counts)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(DitcError, match=r"NaN or infinite"):
        histogram_of(np.ones(3), np.array([1, bad, 2]))


@pytest.mark.parametrize("largest", [1e-45, 1e-40, 1e-36, 1e-30, 1e38])
def test_the_smallest_and_the_largest_floats_are_counted(largest: float) -> None:
    values = np.float32(largest) * np.array([0, 1, 1], np.float32)
    histogram = histogram_of(values)
    assert histogram.counts.sum() == 3
    assert clipping_range("max", histogram) == np.float32(largest)


@settings(LAW, max_examples=40)
@given(batches(), st.sampled_from(sorted(RANGES)))
def test_a_range_is_positive_and_never_past_the_largest_value(drawn: list[np.ndarray], method: str) -> None:
    histogram = histogram_of(*drawn)
    assert 0 < clipping_range(method, histogram) <= histogram.amax


@settings(LAW, max_examples=40)
@given(seed=st.integers(0, 1000), factor=st.integers(-20, 20), method=st.sampled_from(sorted(RANGES)))
def test_a_range_scales_with_the_values(seed: int, factor: int, method: str) -> None:
    values = np.random.default_rng(seed).laplace(size=3000).astype(np.float32)
    scaled = clipping_range(method, histogram_of(values * np.float32(2.0**factor)))
    assert scaled == pytest.approx(2.0**factor * clipping_range(method, histogram_of(values)), rel=1e-6)


def test_the_percentile_drops_one_value_in_ten_thousand() -> None:
    values = np.append(np.linspace(0, 1, 99_999), 1000)
    assert clipping_range("percentile", histogram_of(values)) == pytest.approx(1, abs=0.5)
    assert clipping_range("max", histogram_of(values)) == 1000


@LAW
@given(batches())
def test_unit_gradients_give_the_mse_range_bit_for_bit(drawn: list[np.ndarray]) -> None:
    counted, weighed = histogram_of(*drawn), Histogram.empty()
    for batch in drawn:
        weighed = weighed.add(batch.astype(np.float32), np.ones(batch.shape))
    np.testing.assert_array_equal(weighed.counts, counted.counts)
    assert clipping_range("fisher", weighed) == clipping_range("mse", counted)


@LAW
@given(seed=st.integers(0, 10_000), tail=st.sampled_from(["normal", "laplace", "outlier"]))
def test_the_fisher_range_is_the_best_of_a_brute_force_search_with_weights(seed: int, tail: str) -> None:
    rng = np.random.default_rng(seed)
    values = rng.laplace(size=400) if tail == "laplace" else rng.standard_normal(400)
    values = (np.append(values, 60) if tail == "outlier" else values).astype(np.float32)
    weights = rng.standard_normal(len(values)) ** 2

    def error(limit: float) -> float:
        scale = limit / LEVELS
        return float((weights * (np.clip(np.round(values / scale), -LEVELS, LEVELS) * scale - values) ** 2).sum())

    amax = float(np.abs(values).max())
    best = min(error(shrink * amax) for shrink in np.linspace(0.01, 1, 100))
    assert error(clipping_range("fisher", Histogram.empty().add(values, weights))) <= 1.1 * best


def test_values_that_weigh_nothing_may_clip() -> None:
    values = np.append(np.random.default_rng(0).standard_normal(1000), 60).astype(np.float32)
    weights = np.append(np.ones(1000), 0)
    assert (
        clipping_range("fisher", Histogram.empty().add(values, weights))
        < 5
        < clipping_range("mse", histogram_of(values))
    )
    assert clipping_range("fisher", Histogram.empty().add(values, 0 * weights)) == 60


@LAW
@given(seed=st.integers(0, 10_000), tail=st.sampled_from(["normal", "laplace", "outlier"]))
def test_the_mse_range_is_the_best_of_a_brute_force_search(seed: int, tail: str) -> None:
    rng = np.random.default_rng(seed)
    values = rng.laplace(size=400) if tail == "laplace" else rng.standard_normal(400)
    values = (np.append(values, 60) if tail == "outlier" else values).astype(np.float32)
    limit = mse_range(histogram_of(values))
    amax = float(np.abs(values).max())
    best = min(quantization_error(values, shrink * amax) for shrink in np.linspace(0.01, 1, 100))
    assert quantization_error(values, limit) <= 1.1 * best


def test_the_mse_range_weighs_an_outlier_against_the_rounding_of_the_bulk() -> None:
    bulk = np.random.default_rng(0).standard_normal(100_000)
    # the least (60 - r)^2 + n (r / 127)^2 / 12
    assert mse_range(histogram_of(np.append(bulk, 60))) == pytest.approx(60 / (1 + 1e5 / (12 * LEVELS**2)), abs=1.2)


def test_the_mse_range_keeps_an_integer_grid_whole() -> None:
    assert mse_range(histogram_of(np.arange(-127, 128).repeat(20))) == 127


def test_the_entropy_range_clips_a_far_outlier_of_a_gaussian() -> None:
    bulk = np.random.default_rng(0).standard_normal(100_000)
    limit = entropy_range(histogram_of(np.append(bulk, 100)))
    assert 2.5 < limit < 10


def test_the_entropy_range_keeps_uniform_values() -> None:
    values = np.random.default_rng(0).uniform(-2, 2, 100_000)
    assert entropy_range(histogram_of(values)) > 0.95 * 2


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_the_entropy_range_does_not_depend_on_how_many_values_are_zero(share: float) -> None:
    bulk = np.random.default_rng(0).standard_normal(50_000)
    zeros = np.zeros(int(len(bulk) * share / (1 - share)))
    assert entropy_range(histogram_of(np.append(bulk, zeros))) == pytest.approx(
        entropy_range(histogram_of(bulk)), rel=0.02
    )


def test_few_levels_are_kept_whole_by_entropy() -> None:
    assert entropy_range(histogram_of(np.array([5.0]))) == 5
    assert entropy_range(histogram_of(np.array([0.0, 0.0, 5.0]))) == 5


@pytest.mark.parametrize("method", sorted(RANGES))
@pytest.mark.parametrize("values", [np.zeros(10), np.zeros(0)])
def test_a_tensor_that_was_always_zero_gets_one(method: str, values: np.ndarray) -> None:
    assert clipping_range(method, histogram_of(values)) == 1


@pytest.mark.parametrize("values", [np.ones(3), np.zeros(3)])
def test_an_unknown_method_lists_the_known_ones(values: np.ndarray) -> None:
    with pytest.raises(
        InputError, match=r"unknown range method 'p99'; choose one of: entropy, fisher, max, mse, percentile"
    ):
        clipping_range("p99", histogram_of(values))
