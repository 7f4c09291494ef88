"""Precision and recall's manifolds against their definition, point by point."""

from __future__ import annotations

import numpy as np
import pytest

import ditc.quality.manifolds as manifolds
from ditc.errors import InputError
from ditc.quality.manifolds import K, coverage, neighbours


def points(seed: int, count: int, size: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, size))


def plain_radii(x: np.ndarray) -> np.ndarray:
    """Distance to the third nearest other point, one at a time."""
    return np.array([np.sort(np.linalg.norm(np.delete(x, i, axis=0) - x[i], axis=1))[K - 1] for i in range(len(x))])


def plain_cover(x: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    return np.array([(np.linalg.norm(centres - point, axis=1) <= radii).any() for point in x])


@pytest.fixture(params=[1 << 22, 100], ids=["one block", "many blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifolds, "BLOCK", request.param)


@pytest.mark.usefixtures("block")
def test_a_ball_reaches_to_the_third_nearest_other_point() -> None:
    x = points(0, 40)
    np.testing.assert_allclose(neighbours(x).radii(), plain_radii(x), rtol=1e-9)
    np.testing.assert_allclose(neighbours(x, K).radii(), plain_radii(x), rtol=1e-9)


@pytest.mark.usefixtures("block")
def test_a_point_is_covered_where_it_lies_in_any_ball() -> None:
    x, centres = points(0, 50), 0.7 * points(1, 40)
    near = neighbours(centres)
    expected = plain_cover(x, centres, plain_radii(centres))
    assert 0.2 < expected.mean() < 0.9
    np.testing.assert_array_equal(coverage(x, centres, near.reach).covered(near.radii()), expected)


@pytest.mark.parametrize("seed", range(5))
def test_a_resample_covers_what_its_points_written_out_would(seed: int) -> None:
    x, centres = points(0, 50), 0.7 * points(1, 60)
    counts = np.bincount(np.random.default_rng(seed).integers(0, 60, 60), minlength=60)
    written_out = np.repeat(centres, counts, axis=0)
    near = neighbours(centres)
    covered = coverage(x, centres, near.reach).covered(near.radii(counts))
    np.testing.assert_array_equal(covered, plain_cover(x, written_out, plain_radii(written_out)))


def test_copies_of_a_point_are_its_neighbours() -> None:
    x = np.arange(6.0)[:, None]
    counts = np.array([4, 2, 0, 1, 1, 1])
    np.testing.assert_allclose(neighbours(x).radii(counts), [0, 1, -1, 2, 3, 4])


def test_too_few_points_for_a_neighbourhood_are_refused() -> None:
    with pytest.raises(InputError, match="need more than 3 images, found 3"):
        neighbours(points(0, 3))
