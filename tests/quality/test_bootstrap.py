"""The bootstrap and the intervals of shares: known answers, and coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from ditc.errors import InputError
from ditc.quality.bootstrap import bootstrapped, estimates, resamples, share, share_difference

SIMULATIONS = 400


def test_a_resample_draws_as_many_images_as_there_are() -> None:
    drawn = list(resamples(50, 20, seed=0))
    assert len(drawn) == 20
    assert {int(counts.sum()) for counts in drawn} == {50}
    assert 0.5 < np.mean(np.stack(drawn) > 0) < 0.75  # a share 1 - 1/e of the images is in each
    np.testing.assert_array_equal(drawn, list(resamples(50, 20, seed=0)))
    assert not np.array_equal(drawn, list(resamples(50, 20, seed=1)))


def test_the_interval_of_a_mean_is_two_standard_errors_to_each_side() -> None:
    values = np.random.default_rng(0).standard_normal((400, 1)) + 5
    (estimate,) = estimates(values.mean(axis=0), bootstrapped(lambda counts: counts @ values / 400, 400, 4000, seed=0))
    half = 1.96 * values.std() / 20
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == (
        pytest.approx(estimate.value - half, abs=0.01),
        pytest.approx(estimate.value + half, abs=0.01),
    )
    assert abs(estimate.bias) < 0.005


def test_an_interval_lies_around_the_value_even_where_replicates_are_biased() -> None:
    replicates = np.random.default_rng(0).normal(7, 1, (10_000, 1))
    (estimate,) = estimates(np.array([5.0]), replicates)
    np.testing.assert_allclose([estimate.low, estimate.high], [5 - 1.96, 5 + 1.96], atol=0.1)
    assert estimate.bias == pytest.approx(2, abs=0.05)
    assert estimate.corrected == pytest.approx(3, abs=0.05)


def test_intervals_of_a_skewed_mean_hold_it() -> None:
    """Of 400 intervals at 95 % the share that holds the truth has a standard error of 1.1 %; 90 % is four below."""
    rng, held = np.random.default_rng(0), 0
    for seed in range(SIMULATIONS):
        values = rng.exponential(1.0, (80, 1))
        reps = bootstrapped(lambda counts, x=values: counts @ x / 80, 80, 200, seed)
        (estimate,) = estimates(values.mean(axis=0), reps)
        held += estimate.low <= 1 <= estimate.high
    assert held / SIMULATIONS > 0.90


def test_a_share_of_all_or_none_still_has_an_interval() -> None:
    """Wilson's bound at 0 of n is z^2 / (n + z^2): 1.96^2 / (100 + 1.96^2) = 0.037."""
    none, every = share(np.zeros(100, bool)), share(np.ones(100, bool))
    assert (none.value, none.low, none.high) == (0, 0, pytest.approx(0.0370, abs=1e-4))
    assert (every.value, every.low, every.high) == (1, pytest.approx(0.9630, abs=1e-4), 1)


def test_a_share_has_wilsons_interval() -> None:
    """81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I)."""
    estimate = share(np.arange(263) < 81)
    assert (estimate.low, estimate.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))


def test_pairs_that_agree_say_no_more_than_their_number_allows() -> None:
    """No image differs in 98: 1.96 * sqrt(1) / 100."""
    same = np.arange(98) < 90
    difference = share_difference(same, same)
    assert difference.value == 0
    assert -difference.low == difference.high == pytest.approx(0.0196, abs=1e-4)


def test_intervals_of_a_difference_of_shares_hold_it() -> None:
    """One image in 50 is lost, one in 200 gained: -0.015. Tolerance as above."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(SIMULATIONS):
        exact = rng.random(200) < 0.9
        change = rng.random(200)
        ours = np.where(change < 0.02 / 0.9, exact & False, np.where(change > 1 - 0.005 / 0.1, True, exact))
        estimate = share_difference(ours, exact)
        held += estimate.low <= -0.015 <= estimate.high
    assert held / SIMULATIONS > 0.90


def test_pairing_makes_the_difference_sharper_than_two_sides_apart() -> None:
    exact = np.random.default_rng(0).random(500) < 0.8
    ours = exact.copy()
    ours[np.flatnonzero(exact)[:5]] = False
    paired, apart = share_difference(ours, exact), share(exact)
    assert paired.value == pytest.approx(-0.01)
    assert paired.high - paired.low < (apart.high - apart.low) / 2


def test_one_image_or_one_round_is_refused() -> None:
    for n, rounds in ((1, 10), (10, 1)):
        with pytest.raises(InputError, match="at least 2 images and 2 rounds"):
            list(resamples(n, rounds, 0))
