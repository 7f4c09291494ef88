"""Quality measures: closed forms with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings

from ditc.runtime.closeness import cosine, psnr_db, relative_error, ssim, ssim_window, step_drift

LAW = settings(deadline=None)  # a busy machine stalls now and then


def test_psnr_of_a_constant_error_is_known() -> None:
    expected = np.zeros((3, 1, 4, 4), np.float32)
    seen = expected + np.array([2.0, 0.2, 0.02], np.float32)[:, None, None, None]
    np.testing.assert_allclose(psnr_db(seen, expected), [0, 20, 40], atol=1e-4)
    np.testing.assert_allclose(psnr_db(seen, expected, peak=20), [20, 40, 60], atol=1e-4)


def test_psnr_is_per_image() -> None:
    expected = np.random.default_rng(0).standard_normal((4, 3, 8, 8))
    seen = expected.copy()
    seen[2] += 1
    values = psnr_db(seen, expected)
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


def picture(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def test_ssim_of_constant_images_is_the_ratio_of_their_levels() -> None:
    """Without variance only the first factor is left: (2 a b + c1) / (a^2 + b^2 + c1), c1 = (0.01 * 2)^2 = 0.0004."""
    a, b = np.full((1, 1, 16, 16), 0.5), np.full((1, 1, 16, 16), 0.25)
    assert ssim(a, b)[0] == pytest.approx((0.25 + 0.0004) / (0.25 + 0.0625 + 0.0004))


def test_ssim_of_a_stripe_and_its_negative_is_worked_by_hand() -> None:
    """3 x 3 pixels, one window. Columns -1, 0, 1 weigh w, 1 - 2 w, w with w = e^(-1/4.5) / (1 + 2 e^(-1/4.5)).

    Both means are 0, both variances 2 w, the covariance is -2 w: (c2 - 4 w) / (c2 + 4 w) with c2 = (0.03 * 2)^2.
    """
    stripe = np.tile(np.array([-1.0, 0.0, 1.0]), (1, 1, 3, 1))
    near = np.exp(-1 / 4.5)
    w = near / (1 + 2 * near)
    assert ssim(stripe, -stripe)[0] == pytest.approx((0.0036 - 4 * w) / (0.0036 + 4 * w))
    assert ssim(stripe, stripe / 2)[0] == pytest.approx((2 * w + 0.0036) / (2 * w + w / 2 + 0.0036))


def test_ssim_is_the_formula_at_every_place_of_every_channel() -> None:
    a, b = picture(0, 2, 3, 13, 17), picture(1, 2, 3, 13, 17)
    kernel = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(kernel, kernel) / kernel.sum() ** 2
    for image in range(2):
        places = []
        for channel in range(3):
            for top in range(3):
                for left in range(7):
                    x, y = (p[image, channel, top : top + 11, left : left + 11].astype(np.float64) for p in (a, b))
                    mx, my = (window * x).sum(), (window * y).sum()
                    vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                    cov = (window * (x - mx) * (y - my)).sum()
                    top_half = (2 * mx * my + 0.0004) * (2 * cov + 0.0036)
                    places.append(top_half / ((mx**2 + my**2 + 0.0004) * (vx + vy + 0.0036)))
        assert ssim(a, b)[image] == pytest.approx(np.mean(places), rel=1e-9)


def test_equal_images_have_ssim_and_cosine_one() -> None:
    a = picture(0, 4, 3, 8, 8)
    np.testing.assert_array_equal(ssim(a, a), 1)
    np.testing.assert_allclose(cosine(a, a), 1, rtol=1e-12)


@pytest.mark.parametrize(("size", "side"), [((256, 256), 11), ((11, 40), 11), ((8, 8), 7), ((7, 20), 7), ((1, 9), 1)])
def test_the_window_is_the_largest_odd_one_up_to_eleven(size: tuple[int, int], side: int) -> None:
    assert ssim_window(*size) == side
    assert ssim(picture(0, 1, 1, *size), picture(0, 1, 1, *size))[0] == 1


def test_cosine_is_that_of_the_angle_and_ignores_contrast() -> None:
    a = np.array([3.0, 0, 0, 0]).reshape(1, 1, 2, 2)
    b = np.array([1.0, 1, 0, 0]).reshape(1, 1, 2, 2)
    assert cosine(a, b)[0] == pytest.approx(np.sqrt(0.5))
    assert cosine(b, -7 * b)[0] == pytest.approx(-1)
    assert cosine(a, 0 * a)[0] == 0


def test_step_drift_recovers_a_known_k_and_shift_of_every_step_and_channel() -> None:
    """x = m + K (x' - m) + shift has the variance K^2, and its mean moved by `shift`."""
    exact = [picture(step, 50, 2, 8, 8) for step in range(3)]
    k, shift = np.array([[1.0, 0.9], [1.3, 1.0], [0.5, 2.0]]), np.array([[0.0, 0.1], [-0.2, 0.0], [0.3, 0.3]])
    seen = []
    for step, x in enumerate(exact):
        mean = x.mean(axis=(0, 2, 3), keepdims=True)
        seen.append(mean + k[step].reshape(1, 2, 1, 1) * (x - mean) + shift[step].reshape(1, 2, 1, 1))
    drift = step_drift(seen, exact)
    np.testing.assert_allclose(drift.variance_drift, k**2 - 1, atol=1e-5)
    spread = [x.std(axis=(0, 2, 3)) for x in exact]
    np.testing.assert_allclose(drift.mean_drift, shift / spread, atol=1e-5)
    assert drift.relative_error[0] == pytest.approx(relative_error(seen[0], exact[0]))
    assert drift.images == 50


def test_a_trajectory_has_no_drift_from_itself_and_a_constant_channel_none_at_all() -> None:
    exact = picture(0, 5, 2, 4, 4)
    exact[:, 1] = 0.25
    seen = exact.copy()
    assert step_drift([seen], [exact]).variance_drift == ((0, 0),)
    seen[:, 1] = picture(1, 5, 4, 4)
    assert step_drift([seen], [exact]).variance_drift == ((0, 0),)
