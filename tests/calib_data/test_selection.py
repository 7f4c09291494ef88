"""Selectors: exactly the points asked for, the same ones for the same seed, whatever order the pool came in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from ditc.calib_data.pool import Pool
from ditc.calib_data.selection import SELECTORS, SelectionOptions, check_selector, cluster_quotas, select_points
from ditc.calib_data.tap import TapSettings
from ditc.errors import InputError

LAW = settings(deadline=None)  # a busy machine stalls now and then

IMAGES, STEPS = 30, 12
ALL = sorted(SELECTORS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices on a busy machine: threads would spend their time waiting for each other."""
    with threadpool_limits(1):
        yield


def pool_of(images: int = IMAGES, steps: int = STEPS, seed: int = 0) -> Pool:
    rng = np.random.default_rng(seed)
    sample, step = np.divmod(np.arange(images * steps), steps)
    label = sample % 5
    x = rng.standard_normal((images * steps, 2, 3, 3)).astype(np.float32) + label[:, None, None, None]
    peaks = rng.lognormal(size=(images * steps, 6)).astype(np.float32)
    return Pool(x, sample, step, 999.0 - 10 * step, label, peaks)


def shuffled(pool: Pool, seed: int) -> Pool:
    return pool.take(np.random.default_rng(seed).permutation(len(pool)))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("points", [1, 7, 40, 120, IMAGES * STEPS])
def test_a_selector_gives_exactly_the_points_asked_for_each_once(name: str, points: int) -> None:
    chosen = select_points(name, pool_of(), SelectionOptions(points=points))
    origins = set(zip(chosen.sample.tolist(), chosen.step.tolist(), strict=True))
    assert len(chosen) == len(origins) == points
    assert chosen.weight.sum() == pytest.approx(points)


@pytest.mark.parametrize("name", ALL)
def test_a_selected_point_keeps_all_that_belongs_to_it(name: str) -> None:
    pool = pool_of()
    chosen = select_points(name, shuffled(pool, 3), SelectionOptions(points=40))
    rows = chosen.sample * STEPS + chosen.step
    np.testing.assert_array_equal(chosen.x, pool.x[rows])
    np.testing.assert_array_equal(chosen.t, pool.t[rows])
    np.testing.assert_array_equal(chosen.label, pool.label[rows])
    assert (np.diff(rows) > 0).all()


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_the_pool_does_not_matter(name: str) -> None:
    options = SelectionOptions(points=40, seed=5)
    expected = select_points(name, pool_of(), options).digest
    assert [select_points(name, shuffled(pool_of(), seed), options).digest for seed in range(4)] == [expected] * 4


@pytest.mark.parametrize("name", ALL)
def test_another_seed_gives_other_points(name: str) -> None:
    digests = {select_points(name, pool_of(), SelectionOptions(points=40, seed=seed)).digest for seed in range(4)}
    assert len(digests) == 4


@pytest.mark.parametrize("name", ALL)
def test_selecting_leaves_the_pool_as_it_was(name: str) -> None:
    pool = pool_of()
    select_points(name, pool, SelectionOptions(points=40))
    np.testing.assert_array_equal(pool.x, pool_of().x)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [1, 2])
def test_the_smallest_pools_are_selected_whole(name: str, size: int) -> None:
    chosen = select_points(name, pool_of(1, size), SelectionOptions(points=size))
    assert chosen.step.tolist() == list(range(size))


@pytest.mark.parametrize("name", ["kmeans", "tap", "tap-activations"])
def test_a_pool_of_equal_points_is_no_problem(name: str) -> None:
    pool = pool_of()
    peaks = np.zeros((len(pool), 6), np.float32)
    equal = Pool(np.ones_like(pool.x), pool.sample, pool.step, pool.t, pool.label, peaks)
    assert len(select_points(name, equal, SelectionOptions(points=80))) == 80


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_time_alone_and_looks_alone_are_valid_controls_with_more_clusters_than_steps(alpha: float) -> None:
    options = SelectionOptions(points=80, clusters=2 * STEPS, tap=TapSettings(alpha=alpha))
    assert len(select_points("tap", pool_of(), options)) == 80


def test_time_alone_picks_evenly_from_the_steps() -> None:
    options = SelectionOptions(points=4 * STEPS, clusters=STEPS, tap=TapSettings(alpha=0))
    chosen = select_points("tap", pool_of(), options)
    assert np.bincount(chosen.step, minlength=STEPS).tolist() == [4] * STEPS


@pytest.mark.parametrize(("points", "counts"), [(24, {2}), (120, {10}), (30, {2, 3})])
def test_uniform_time_takes_equally_many_points_from_each_step(points: int, counts: set[int]) -> None:
    chosen = select_points("uniform-time", pool_of(), SelectionOptions(points=points))
    assert set(np.bincount(chosen.step, minlength=STEPS).tolist()) == counts


def test_uniform_time_takes_all_of_a_short_step_and_shares_the_rest_out() -> None:
    pool = pool_of()
    short = pool.take(np.flatnonzero((pool.step > 0) | (pool.sample < 2)))
    chosen = select_points("uniform-time", short, SelectionOptions(points=2 + 11 * 5))
    assert np.bincount(chosen.step).tolist() == [2] + [5] * 11


@pytest.mark.parametrize(("steps", "counts"), [(None, [8] * 3), (STEPS, [8] * 3), (2 * STEPS, [12, 12])])
def test_time_groups_give_equally_many_points_of_any_of_their_steps(steps: int | None, counts: list[int]) -> None:
    options = SelectionOptions(points=24, steps=steps, time_groups=3)
    chosen = select_points("time-groups", pool_of(), options)
    groups = chosen.step * 3 // (steps or STEPS)
    assert np.bincount(groups).tolist() == counts
    assert len(np.unique(chosen.step[groups == 0])) > 1


def test_as_many_time_groups_as_steps_give_points_like_uniform_time() -> None:
    options = SelectionOptions(points=30, steps=STEPS, time_groups=STEPS)
    grouped, of_each = (select_points(name, pool_of(), options) for name in ("time-groups", "uniform-time"))
    assert grouped.digest == of_each.digest


def test_random_does_not_favour_any_step() -> None:
    counts = sum(
        np.bincount(select_points("random", pool_of(), SelectionOptions(points=60, seed=seed)).step, minlength=STEPS)
        for seed in range(100)
    )
    np.testing.assert_allclose(counts, 500, atol=100)


def test_kmeans_draws_from_every_group_of_looks() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(4), [200, 10, 10, 10])
    x = (10 * np.eye(4)[group] + 0.1 * rng.standard_normal((230, 4))).astype(np.float32).reshape(-1, 4, 1, 1)
    pool = Pool(x, np.arange(230), np.zeros(230, np.int64), np.zeros(230), group)
    chosen = select_points("kmeans", pool, SelectionOptions(points=16, clusters=4))
    assert np.bincount(chosen.label)[1:].tolist() == [3, 3, 3]


def test_what_layers_read_decides_where_looks_say_nothing() -> None:
    """Four groups of points that look alike; at those of three, one layer each reads larger magnitudes."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(4), [200, 10, 10, 10])
    x = rng.standard_normal((230, 4, 1, 1)).astype(np.float32)
    peaks = (8.0 ** np.eye(4)[group] * rng.lognormal(sigma=0.02, size=(230, 4))).astype(np.float32)
    step = np.zeros(230, np.int64)
    pool = Pool(x, np.arange(230), step, step.astype(np.float64), group, peaks)
    options = SelectionOptions(points=16, clusters=4, tap=TapSettings(alpha=1, share=0.5))
    by_peaks, by_looks = (
        np.bincount(select_points(name, pool, options).label, minlength=4)[1:] for name in ("tap-activations", "tap")
    )
    assert by_peaks.tolist() == [3, 3, 3]
    assert by_looks.sum() < 6


def test_the_scale_of_a_layer_says_nothing() -> None:
    pool, options = pool_of(), SelectionOptions(points=40)
    assert pool.peaks is not None
    scaled = replace(pool, peaks=pool.peaks * np.float32([1, 2, 1 / 64, 1024, 8, 1 / 4]))
    expected = select_points("tap-activations", pool, options)
    assert select_points("tap-activations", scaled, options).digest == expected.digest


def test_without_what_layers_read_the_selector_says_so() -> None:
    pool = pool_of()
    blind = Pool(pool.x, pool.sample, pool.step, pool.t, pool.label)
    with pytest.raises(InputError, match="nothing was recorded of what linear layers read"):
        select_points("tap-activations", blind, SelectionOptions(points=40))


def test_peaks_stay_with_their_points() -> None:
    pool = pool_of()
    seen = {(int(s), int(i)): np.array([100 * s + i]) for s, i in zip(pool.sample, pool.step, strict=True)}
    mixed = shuffled(pool.with_peaks(seen), 1)
    for each in (mixed, mixed.ordered()):
        assert each.peaks is not None
        assert each.peaks[:, 0].tolist() == (100 * each.sample + each.step).tolist()


def test_an_unknown_selector_lists_the_known_ones() -> None:
    known = "kmeans, random, tap, tap-activations, time-groups, uniform-time"
    with pytest.raises(InputError, match=f"unknown selector 'tapp'; choose one of: {known}"):
        select_points("tapp", pool_of(), SelectionOptions(points=4))
    with pytest.raises(InputError, match=r"unknown selector 'tapp'"):
        check_selector("tapp")


@pytest.mark.parametrize("name", ALL)
def test_a_pool_with_too_few_points_says_what_to_change(name: str) -> None:
    with pytest.raises(InputError, match=r"pool has 12 points, fewer than the 13 .*--pool.*--points"):
        select_points(name, pool_of(1), SelectionOptions(points=13))


@pytest.mark.parametrize(("points", "clusters"), [(0, None), (-5, None), (10, 0), (10, 11)])
def test_options_that_cannot_be_met_are_refused_at_birth(points: int, clusters: int | None) -> None:
    with pytest.raises(InputError, match=r"found -?\d+"):
        SelectionOptions(points=points, clusters=clusters)


def test_the_paper_has_one_cluster_for_eight_points() -> None:
    assert SelectionOptions().points == 800
    assert SelectionOptions().cluster_count == 100
    assert SelectionOptions(points=3).cluster_count == 1
    assert SelectionOptions(clusters=7).cluster_count == 7


SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=40).map(lambda sizes: np.array(sizes, np.int64))


@LAW
@given(sizes=SIZES, share=st.floats(0, 1), least=st.integers(0, 6), extra=st.integers(0, 12))
def test_quotas_add_up_and_no_cluster_gives_more_than_it_has(
    sizes: np.ndarray, share: float, least: int, extra: int
) -> None:
    points = max(1, round(share * int(sizes.sum())))
    quotas = cluster_quotas(sizes, points, least, least + extra)
    assert quotas.sum() == points
    assert (quotas >= 0).all()
    assert (quotas <= sizes).all()


@LAW
@given(sizes=SIZES, share=st.floats(0, 1), least=st.integers(0, 6), extra=st.integers(0, 12))
def test_quotas_keep_their_bounds_wherever_that_is_possible(
    sizes: np.ndarray, share: float, least: int, extra: int
) -> None:
    low, high = np.minimum(sizes, least), np.minimum(sizes, least + extra)
    points = int(low.sum() + round(share * int((high - low).sum())))
    assume(points > 0)
    quotas = cluster_quotas(sizes, points, least, least + extra)
    assert (quotas >= low).all()
    assert (quotas <= high).all()


@LAW
@given(sizes=SIZES, share=st.floats(0, 1), least=st.integers(0, 6), extra=st.integers(0, 12))
def test_the_upper_bound_yields_before_the_lower_one(sizes: np.ndarray, share: float, least: int, extra: int) -> None:
    points = max(1, round(share * int(sizes.sum())))
    low, high = np.minimum(sizes, least), np.minimum(sizes, least + extra)
    quotas = cluster_quotas(sizes, points, least, least + extra)
    if points > high.sum():
        assert (quotas >= low).all()
    if points < low.sum():
        assert (quotas <= high).all()


@LAW
@given(sizes=SIZES, share=st.floats(0, 1))
def test_unbounded_quotas_follow_the_sizes(sizes: np.ndarray, share: float) -> None:
    points = max(1, round(share * int(sizes.sum())))
    quotas = cluster_quotas(sizes, points, 0, int(sizes.max()))
    assert np.abs(quotas - sizes * points / sizes.sum()).max() <= max(1.0, len(sizes) / 2)
    order = np.argsort(sizes)
    assert (np.diff(quotas[order]) >= -1).all()
