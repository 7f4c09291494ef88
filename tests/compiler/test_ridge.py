"""Least squares under a ridge: what it is drawn to, what it recovers, and what its strength is chosen on."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditc.approximators import APPROXIMATORS
from ditc.compiler.ridge import STRENGTHS, chosen_weights, ridge_weights, squared_error

CHANNELS, SAMPLES = 4, 200
PRIOR = np.array([1.5, -0.5, 0.0])
TIMES = [12.0, 17.0, 19.0]  # of sums, the latest first; forecast at 10


def samples(seed: int, noise: float = 0.0) -> np.ndarray:
    """(sums + 1, samples, channels), the exact one first: parabolas in t with coefficients of their own, and noise."""
    rng = np.random.default_rng(seed)
    places = (np.array([10.0, *TIMES]) - 10) / 5
    sums = np.tensordot(np.vander(places, 3), rng.standard_normal((3, SAMPLES, CHANNELS)), 1)
    return np.asarray(sums + noise * rng.standard_normal(sums.shape))


def gram_of(sums: np.ndarray) -> np.ndarray:
    return np.einsum("inc,jnc->ijc", sums, sums) / sums.shape[1]


def test_an_infinite_strength_is_the_prior_bit_for_bit() -> None:
    weights = ridge_weights(gram_of(samples(0, 1.0)), PRIOR, inf)
    assert weights.tolist() == np.repeat(PRIOR[:, None], CHANNELS, axis=1).tolist()


@given(st.integers(0, 100), st.floats(1e-6, 10))
def test_a_finite_one_is_least_squares_with_the_prior_as_further_samples(seed: int, strength: float) -> None:
    sums = samples(seed, 1.0)
    weights = ridge_weights(gram_of(sums), PRIOR, strength)
    for channel in range(CHANNELS):
        exact, *seen = sums[:, :, channel]
        size = np.mean(np.square(seen))
        further = np.sqrt(strength * size * SAMPLES)
        rows = np.concatenate([np.stack(seen, axis=1), further * np.eye(3)])
        expected = np.linalg.lstsq(rows, np.concatenate([exact, further * PRIOR]), rcond=None)[0]
        np.testing.assert_allclose(weights[:, channel], expected, rtol=1e-6, atol=1e-8)


def test_weights_of_what_is_a_parabola_are_recovered() -> None:
    weights, strength = chosen_weights(gram_of(samples(0)), gram_of(samples(1)), PRIOR)
    polynomial = APPROXIMATORS["taylor:2"].weights
    assert polynomial is not None
    assert strength == STRENGTHS[-1]
    np.testing.assert_allclose(weights, np.repeat([polynomial(10.0, TIMES)], CHANNELS, axis=0).T, atol=1e-4)


def test_the_strength_is_chosen_on_what_was_not_fitted() -> None:
    """Few samples fit any noise, and the prior is what is right of the others."""
    rng = np.random.default_rng(0)
    seen, others = rng.standard_normal((2, 3, 4, CHANNELS))
    fitted = gram_of(np.concatenate([rng.standard_normal((1, 4, CHANNELS)), seen]))
    held_out = gram_of(np.concatenate([np.tensordot(PRIOR, others, 1)[None], others]))
    weights, strength = chosen_weights(fitted, held_out, PRIOR)
    assert strength == inf
    assert squared_error(held_out, weights) == pytest.approx(0, abs=1e-12)
    assert chosen_weights(fitted, fitted, PRIOR)[1] == STRENGTHS[-1]


@given(st.integers(0, 100), st.floats(0, 3))
def test_on_held_out_noise_it_is_never_worse_than_the_prior(seed: int, noise: float) -> None:
    fitted, held_out = gram_of(samples(seed, noise)), gram_of(samples(seed + 1000, noise))
    weights, _ = chosen_weights(fitted, held_out, PRIOR)
    assert squared_error(held_out, weights) <= squared_error(held_out, ridge_weights(fitted, PRIOR, inf))


def test_the_error_is_that_of_the_forecast() -> None:
    sums = samples(0, 1.0)
    weights = np.random.default_rng(1).standard_normal((3, CHANNELS))
    off = sums[0] - np.einsum("jc,jnc->nc", weights, sums[1:])
    assert squared_error(gram_of(sums), weights) == pytest.approx(np.square(off).sum() / np.square(sums[0]).sum())


def test_a_channel_without_sums_keeps_the_prior() -> None:
    sums = samples(0, 1.0)
    sums[:, :, 2] = 0
    for strength in STRENGTHS:
        weights = ridge_weights(gram_of(sums), PRIOR, strength)
        assert weights[:, 2].tolist() == PRIOR.tolist()
        assert np.isfinite(weights).all()
