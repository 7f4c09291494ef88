"""Distributions of features against known ones: Gaussians in closed form, planted faults, coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditc.errors import InputError
from ditc.quality.distributions import (
    Comparison,
    Generated,
    MeasuredSet,
    RealSet,
    compare_sets,
    distribution_values,
    frechet_distance,
    measure_set,
)

ROUNDS = 120
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
    distance = frechet_distance(gaussian(np.zeros(4), ca), gaussian(np.zeros(4), cb, seed=1))
    assert distance == pytest.approx(np.trace(ca) + np.trace(cb) - 2 * root, rel=1e-6, abs=1e-6)


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


def test_a_resample_measures_what_its_images_written_out_would() -> None:
    rng = np.random.default_rng(0)
    real, features = RealSet(rng.standard_normal((50, 4))), rng.standard_normal((30, 4)) + 0.3
    counts = np.bincount(rng.integers(0, 30, 30), minlength=30)
    written_out = np.repeat(features, counts, axis=0)
    assert real.frechet_distance(features, counts) == pytest.approx(real.frechet_distance(written_out))


def modes(counts: list[int], seed: int, spread: float = 0.3) -> np.ndarray:
    """Images in clusters at the corners of a large square, so many in each."""
    centres = 10 * np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    rng = np.random.default_rng(seed)
    return np.concatenate([centres[i] + spread * rng.standard_normal((n, 2)) for i, n in enumerate(counts)])


def test_a_dropped_mode_costs_recall_and_no_precision() -> None:
    real = RealSet(modes([100] * 4, seed=0))
    whole = distribution_values(Generated(modes([100] * 4, seed=1)), real)
    dropped = distribution_values(Generated(modes([200, 100, 100, 0], seed=1)), real)
    assert whole.recall > 0.9
    assert dropped.recall < 0.75
    assert dropped.precision == pytest.approx(whole.precision, abs=0.05)
    assert dropped.frechet_distance > whole.frechet_distance + 1


def test_garbage_costs_precision_and_no_recall() -> None:
    """40 of 440 images far from everything, close together: their balls hold no real image."""
    real, good = RealSet(modes([100] * 4, seed=0)), modes([100] * 4, seed=1)
    garbage = 40 + 0.1 * np.random.default_rng(2).standard_normal((40, 2))
    clean, dirty = (distribution_values(Generated(x), real) for x in (good, np.concatenate([good, garbage])))
    assert dirty.precision == pytest.approx(clean.precision * 400 / 440)
    assert dirty.recall == clean.recall > 0.9


def compared(ours: Generated, exact: Generated, real: RealSet, rounds: int = 20, seed: int = 0) -> Comparison:
    ours_set, exact_set = (measure_set(side, real, rounds=rounds, seed=seed) for side in (ours, exact))
    return compare_sets(ours_set, exact_set)


def test_a_compared_set_has_the_values_of_the_set_alone() -> None:
    rng = np.random.default_rng(0)
    real = RealSet(rng.standard_normal((60, 3)))
    exact = rng.standard_normal((40, 3))
    sides = [Generated(x, rng.random(40) < 0.9) for x in (0.8 * exact, exact)]
    comparison = compared(*sides, real)
    for side, alone in zip((comparison.ours, comparison.exact), sides, strict=True):
        for name, value in distribution_values(alone, real):
            assert getattr(side, name).value == pytest.approx(value)
    for name in ("frechet_distance", "precision", "recall", "class_consistency"):
        gap = getattr(comparison.ours, name).value - getattr(comparison.exact, name).value
        assert getattr(comparison.difference, name).value == pytest.approx(gap)


def test_equal_sides_differ_by_nothing_in_every_resample() -> None:
    rng = np.random.default_rng(0)
    side = Generated(rng.standard_normal((40, 3)), np.ones(40, bool))
    difference = compared(side, side, RealSet(rng.standard_normal((60, 3)))).difference
    for estimate in (difference.frechet_distance, difference.recall):
        assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)
    assert difference.precision.value == 0
    assert difference.precision.low < 0 < difference.precision.high  # 40 images can't rule out a few in a hundred


def test_without_a_classifier_there_is_no_class_consistency() -> None:
    rng = np.random.default_rng(0)
    sides = (Generated(rng.standard_normal((20, 2))) for _ in range(2))
    comparison = compared(*sides, RealSet(rng.standard_normal((20, 2))))
    assert comparison.ours.class_consistency is None
    assert comparison.difference.class_consistency is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": 8}, r"expected pairs, measured alike; found .* \(9, 20, 0\) and \(8, 20, 0\)"),
        ({"rounds": 5}, r"\(9, 20, 0\) and \(9, 5, 0\)"),
        ({"seed": 1}, r"\(9, 20, 0\) and \(9, 20, 1\)"),
        ({"real": 1}, "held against the same real images"),
    ],
)
def test_sets_that_are_no_pairs_are_not_compared(changed: dict[str, int], message: str) -> None:
    def measured(images: int = 9, rounds: int = 20, seed: int = 0, real: int = 0) -> MeasuredSet:
        reals = RealSet(np.random.default_rng(real).random((9, 2)))
        features = np.random.default_rng(7).random((images, 2))
        return measure_set(Generated(features), reals, rounds=rounds, seed=seed)

    with pytest.raises(InputError, match=message):
        compare_sets(measured(), measured(**changed))


def test_features_of_another_kind_or_broken_ones_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match=r"features, \(2,\) per image, found \(3,\)"):
        measure_set(Generated(rng.random((9, 3))), RealSet(rng.random((9, 2))))
    with pytest.raises(InputError, match="NaN or infinity"):
        Generated(np.full((9, 2), np.nan))
    with pytest.raises(InputError, match="9 images, but classes of 8"):
        Generated(rng.random((9, 2)), np.ones(8, bool))


SIZE, IMAGES, SIMULATIONS = 8, 150, 120


def drawn(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(bundle, FP): pairs that differ by a shift, a shrinkage and an error of their own."""
    exact = rng.standard_normal((IMAGES, SIZE))
    return 0.9 * exact + 0.1 + 0.1 * rng.standard_normal((IMAGES, SIZE)), exact + 0.2


def test_intervals_of_the_frechet_distance_hold_what_they_say() -> None:
    """The real set is a standard Gaussian by its moments, so the distances of endless images are known.

    |shift|^2 + sum (deviation - 1)^2. Of 120 intervals at 95 % the share that holds the truth has a standard error
    of 2 %; 87 % is four below. Plain percentiles of the same replicates hold it in hardly any, since
    150 images alone make a distance of about 0.2.
    """
    rng = np.random.default_rng(0)
    real = RealSet(rng.standard_normal((20, SIZE)))
    real.mean, real.root, real.trace = np.zeros(SIZE), np.eye(SIZE), float(SIZE)  # the moments, not a sample's
    bundle = SIZE * 0.1**2 + SIZE * (np.sqrt(0.81 + 0.01) - 1) ** 2
    truth = {"ours": bundle, "exact": SIZE * 0.2**2, "difference": bundle - SIZE * 0.2**2}
    held: dict[str, list[bool]] = {name: [] for name in (*truth, "plain")}
    for seed in range(SIMULATIONS):
        sides = (Generated(features) for features in drawn(rng))
        comparison = compared(*sides, real, ROUNDS, seed)
        for name, value in truth.items():
            estimate = getattr(comparison, name).frechet_distance
            held[name].append(estimate.low <= value + estimate.bias <= estimate.high)
        plain = comparison.exact.frechet_distance
        held["plain"].append(plain.low + plain.bias <= truth["exact"] <= plain.high + plain.bias)
    shares = {name: np.mean(hits) for name, hits in held.items()}
    assert min(shares[name] for name in truth) > 0.87, shares
    assert shares["plain"] < 0.2, shares


def test_intervals_of_recall_hold_the_recall_of_as_many_images() -> None:
    """The expected recall of so many images comes from 400 other draws; the tolerance is that of the test above."""
    rng = np.random.default_rng(1)
    count = 60
    real = RealSet(rng.standard_normal((80, 3)))

    def sides() -> list[Generated]:
        exact = rng.standard_normal((count, 3))
        return [Generated(0.6 * exact), Generated(exact)]

    others = [[distribution_values(side, real).recall for side in sides()] for _ in range(400)]
    ours, exact = np.mean(others, axis=0)
    held = []
    for seed in range(SIMULATIONS):
        comparison = compared(*sides(), real, ROUNDS, seed)
        pairs = (comparison.ours.recall, ours), (comparison.difference.recall, ours - exact)
        held.append([estimate.low <= value <= estimate.high for estimate, value in pairs])
    assert np.mean(held, axis=0).min() > 0.87, np.mean(held, axis=0)
