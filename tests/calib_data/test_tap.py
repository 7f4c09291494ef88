"""TAP: the formulas of the paper, what its clusters are good for, and what it costs at full size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from math import exp, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from ditc.calib_data.pool import Pool
from ditc.calib_data.selection import SelectionOptions, select_points
from ditc.calib_data.tap import CHUNK, TapSettings, affinity, spectral_embedding, tap_embedding
from ditc.errors import InputError

LAW = settings(deadline=None)  # a busy machine stalls now and then
SMALL_GROUPS, LARGE, SMALL = 8, 3000, 60


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices on a busy machine: threads would spend their time waiting for each other."""
    with threadpool_limits(1):
        yield


def cloud(count: int, seed: int, steps: int = 20, dimensions: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dimensions)).astype(np.float32), rng.integers(0, steps, count)


def embedding_of(points: np.ndarray, steps: np.ndarray, alpha: float) -> np.ndarray:
    return tap_embedding(points, steps, 6, TapSettings(alpha=alpha, share=0.2), np.random.default_rng(0))


def planted(seed: int) -> Pool:
    """One large group and several small ones, each with a direction and three steps of its own; `label` says which."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(SMALL_GROUPS + 1), [LARGE] + [SMALL] * SMALL_GROUPS)
    centres = np.linalg.qr(rng.standard_normal((64, SMALL_GROUPS + 1)))[0].T
    x = 3 * centres[group] + 0.1 * rng.standard_normal((len(group), 64))
    step = 5 * group + rng.integers(0, 3, len(group))
    return Pool(x.astype(np.float32).reshape(-1, 4, 4, 4), np.arange(len(group)), step, 1000.0 - step, group)


def missed_groups(selector: str, seed: int) -> int:
    chosen = select_points(selector, planted(seed), SelectionOptions(points=45, clusters=20, seed=seed))
    return SMALL_GROUPS + 1 - len(set(chosen.label.tolist()))


def aligned(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return actual * np.sign((actual * expected).sum(axis=0))


@LAW
@given(seed=st.integers(0, 10_000), alpha=st.floats(0, 1), tau=st.floats(0.1, 50))
def test_the_affinity_is_the_papers_with_negatives_at_zero(seed: int, alpha: float, tau: float) -> None:
    points, steps = cloud(9, seed)
    chosen = np.array([1, 4, 8])
    similarity = affinity(points, steps, chosen, TapSettings(alpha=alpha, tau=tau))
    for k in range(9):
        for place, h in enumerate(chosen):
            cosine = float(points[k] @ points[h]) / sqrt(float(points[k] @ points[k]) * float(points[h] @ points[h]))
            expected = alpha * cosine + (1 - alpha) * exp(-abs(int(steps[k]) - int(steps[h])) / tau)
            assert similarity[k, place] == pytest.approx(max(0, expected), abs=2e-6)


def test_the_affinity_does_not_depend_on_the_chunk_a_point_falls_into() -> None:
    points, steps = cloud(CHUNK + 50, 0)
    chosen, tail = np.array([3, CHUNK + 7]), slice(CHUNK - 50, CHUNK + 50)
    whole = affinity(points, steps, chosen, TapSettings())
    cosine = (
        points @ points[chosen].T / np.outer(np.linalg.norm(points, axis=1), np.linalg.norm(points[chosen], axis=1))
    )
    expected = 0.5 * cosine + 0.5 * np.exp(-np.abs(steps[:, None] - steps[chosen]))
    np.testing.assert_allclose(whole[tail], np.maximum(expected, 0)[tail], atol=2e-6)


def test_a_zero_point_is_like_nothing_but_its_neighbours_in_time() -> None:
    points, steps = cloud(5, 0)
    points[2] = 0
    similarity = affinity(points, steps, np.arange(5), TapSettings(alpha=0.5))
    np.testing.assert_allclose(similarity[2], 0.5 * np.exp(-np.abs(steps[2] - steps)), rtol=1e-5)


@pytest.mark.parametrize(("count", "columns"), [(40, 10), (CHUNK + 100, 12)])
def test_the_embedding_is_the_leading_left_singular_vectors(count: int, columns: int) -> None:
    rng = np.random.default_rng(2)
    similarity = rng.random((count, columns)) ** 4
    normalised = similarity / np.sqrt(np.outer(similarity.sum(axis=1), similarity.sum(axis=0)))
    left = np.linalg.svd(normalised, full_matrices=False)[0][:, :5]
    embedding = spectral_embedding(similarity.astype(np.float32), 5)
    assert embedding.shape == (count, 5)
    np.testing.assert_allclose(aligned(embedding, left), left, atol=2e-4 * np.abs(left).max())


def test_the_embedding_has_the_same_signs_every_time() -> None:
    similarity = np.random.default_rng(3).random((30, 8)).astype(np.float32)
    embedding = spectral_embedding(similarity.copy(), 4)
    largest = np.abs(embedding).argmax(axis=0)
    assert (embedding[largest, range(4)] > 0).all()
    np.testing.assert_array_equal(spectral_embedding(similarity.copy(), 4), embedding)


def test_looks_alone_ignore_the_steps() -> None:
    points, steps = cloud(200, 0)
    np.testing.assert_array_equal(embedding_of(points, steps, 1.0), embedding_of(points, steps[::-1], 1.0))


def test_time_alone_ignores_the_looks() -> None:
    points, steps = cloud(200, 0)
    np.testing.assert_array_equal(embedding_of(points, steps, 0.0), embedding_of(points[::-1], steps, 0.0))


def test_between_the_two_both_looks_and_time_count() -> None:
    points, steps = cloud(200, 0)
    both = embedding_of(points, steps, 0.5)
    assert np.abs(both - embedding_of(points, steps[::-1], 0.5)).max() > 0.1
    assert np.abs(both - embedding_of(points[::-1], steps, 0.5)).max() > 0.1


@LAW
@given(seed=st.integers(0, 10_000), alpha=st.sampled_from([0.0, 0.5, 1.0]))
def test_the_embedding_is_finite_whatever_the_signs_of_the_points(seed: int, alpha: float) -> None:
    points, steps = cloud(60, seed, dimensions=2)
    points[::2] = -points[1::2]
    points[5] = 0
    assert np.isfinite(embedding_of(points, steps, alpha)).all()


def test_a_point_that_is_opposite_to_every_other_one_gives_no_nan() -> None:
    points = np.ones((40, 3), np.float32)
    points[7] = -1
    embedding = embedding_of(points, np.zeros(40, np.int64), 1.0)
    assert np.isfinite(embedding).all()
    assert not embedding[7].any()


def test_the_rows_of_each_sub_sample_have_length_one() -> None:
    points, steps = cloud(200, 0)
    settings = TapSettings(subsamples=4, share=0.2)
    embedding = tap_embedding(points, steps, 6, settings, np.random.default_rng(0))
    assert embedding.shape == (200, 4 * 6)
    np.testing.assert_allclose(np.linalg.norm(embedding.reshape(200, 4, 6), axis=2), 1, rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_tap_covers_small_groups_that_random_points_miss(seed: int) -> None:
    assert missed_groups("tap", seed) == 0
    assert missed_groups("random", seed) > 0


def test_tap_covers_a_short_time_range_that_looks_like_all_the_rest() -> None:
    rng = np.random.default_rng(0)
    x = (1 + 0.3 * rng.standard_normal((1030, 4, 2, 2))).astype(np.float32)
    step = np.where(np.arange(1030) < 1000, rng.integers(0, 4, 1030), 40)
    pool = Pool(x, np.arange(1030), step, 1000.0 - step, np.zeros(1030, np.int64))
    options = SelectionOptions(points=24, clusters=8)
    assert (select_points("tap", pool, options).step == 40).sum() >= 3
    assert (select_points("random", pool, options).step == 40).sum() < 3


BAD_SETTINGS = [
    {"alpha": -0.1},
    {"alpha": 1.1},
    {"alpha": float("nan")},
    {"tau": 0},
    {"subsamples": 0},
    {"share": 0},
    {"share": 1.1},
]


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=str)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"TAP"):
        TapSettings(**settings)


FULL_SIZE = """
import json, resource, time
import numpy as np
from ditc.calib_data.pool import Pool
from ditc.calib_data.selection import SelectionOptions, select_points

images, steps, shape = 1000, 50, (4, 32, 32)
rng = np.random.default_rng(0)
x = np.empty((images * steps, *shape), np.float32)
angle = np.linspace(0, np.pi / 2, steps, dtype=np.float32)[:, None, None, None]
for image in range(images):
    noise, clean = rng.standard_normal((2, *shape), dtype=np.float32)
    x[image * steps : (image + 1) * steps] = np.cos(angle) * noise + np.sin(angle) * np.cumsum(clean, axis=-1) / 4
sample, step = np.divmod(np.arange(len(x)), steps)
pool = Pool(x, sample, step, 1000.0 - 20 * step, sample % 10)
wall, cpu = time.perf_counter(), time.process_time()
chosen = select_points("tap", pool, SelectionOptions())
print(json.dumps({
    "points": len(chosen),
    "wall_seconds": time.perf_counter() - wall,
    "cpu_seconds": time.process_time() - cpu,
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""


@pytest.mark.slow
def test_800_of_50000_latents_take_under_two_gigabytes_and_two_minutes_of_cpu_time() -> None:
    """CPU time, so that the verdict does not depend on what else the machine does."""
    done = subprocess.run([sys.executable, "-c", FULL_SIZE], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["points"] == 800
    assert measured["peak_bytes"] < 2e9, measured
    assert measured["cpu_seconds"] < 120, measured
