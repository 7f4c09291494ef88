"""Steps that share activation scales, and the table that comes of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditc.quantize.midpoints import Range
from ditc.quantize.scale_binding import LEAST_POINTS, neighbouring_steps, steps_in_time_groups
from ditc.quantize.scales import Origin, scale_table

EVERY = np.ones(6, np.bool_)
FORA = np.array([True, False, False, True, False, False])


def groups(points: list[int], quantizes: np.ndarray = EVERY, least: int = 4) -> list[int]:
    return neighbouring_steps(np.array(points), quantizes, least).tolist()


def test_a_step_with_enough_points_is_alone() -> None:
    assert groups([4, 5, 9, 4, 7, 4]) == [0, 1, 2, 3, 4, 5]


def test_a_step_with_too_few_points_borrows_from_its_neighbours() -> None:
    assert groups([4, 1, 1, 2, 7, 4]) == [0, 1, 1, 1, 2, 3]


def test_what_is_left_over_at_the_end_joins_the_last_group() -> None:
    assert groups([4, 4, 4, 4, 4, 3]) == [0, 1, 2, 3, 4, 4]


def test_too_few_points_for_any_group_make_one() -> None:
    assert groups([1, 0, 1, 0, 0, 1]) == [0] * 6


def test_steps_that_reuse_need_no_scales_and_lend_their_points() -> None:
    assert groups([5, 0, 0, 6, 0, 0], FORA) == [0, 0, 0, 1, 1, 1]
    assert groups([2, 1, 1, 6, 0, 0], FORA) == [0, 0, 0, 1, 1, 1]
    assert groups([2, 1, 0, 6, 0, 0], FORA) == [0] * 6


def test_steps_before_the_first_that_quantizes_belong_to_it() -> None:
    assert groups([0, 0, 0, 5, 0, 6], np.array([False, False, False, True, False, True])) == [0, 0, 0, 0, 0, 1]


def test_time_groups_cut_the_steps_evenly() -> None:
    points = np.full(10, LEAST_POINTS)
    cut = steps_in_time_groups(points, np.ones(10, np.bool_), 4)
    assert cut.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]


def test_time_groups_begin_where_a_step_quantizes_and_have_enough_points() -> None:
    points = np.array([8, 0, 0, 8, 0, 0, 8, 0, 0, 3])
    quantizes = np.array([True, False, False] * 3 + [True])
    assert steps_in_time_groups(points, quantizes, 5).tolist() == [0] * 3 + [1] * 3 + [2] * 4
    assert steps_in_time_groups(points, quantizes, 2).tolist() == [0] * 6 + [1] * 4


STEPS = st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=60)


@given(STEPS)
def test_as_many_time_groups_as_steps_are_groups_of_each_step_and_one_is_all(steps: list[tuple[int, bool]]) -> None:
    points, quantizes = (np.array(column) for column in zip(*steps, strict=True))
    of_each = steps_in_time_groups(points, quantizes, len(steps))
    assert of_each.tolist() == neighbouring_steps(points, quantizes).tolist()
    assert steps_in_time_groups(points, quantizes, 1).tolist() == [0] * len(steps)


@given(STEPS, st.integers(1, 20))
def test_groups_are_runs_of_steps_with_enough_points(steps: list[tuple[int, bool]], least: int) -> None:
    points, quantizes = (np.array(column) for column in zip(*steps, strict=True))
    group_of = neighbouring_steps(points, quantizes, least)
    assert group_of[0] == 0
    assert set(np.diff(group_of)) <= {0, 1}
    assert all(quantizes[1:][np.diff(group_of) == 1])  # a group begins where scales are needed
    held = np.bincount(group_of, weights=points)
    assert len(held) == 1 or held.min() >= least


RANGES = [{"x": Range(-12.7, 12.7), "y": Range(-1, 1)}, {"x": Range(-25.4, 25.4), "y": Range(-1, 1)}]
READERS = {"x": ("a.to_q", "a.to_k"), "y": ("a.out",)}


def test_a_layer_has_the_scale_of_its_group_at_every_step() -> None:
    table = scale_table(RANGES, READERS, np.array([0, 0, 1]), Origin("max", "", "", "per-step"))
    assert table.steps["a.to_k"] == pytest.approx((0.1, 0.1, 0.2))
    assert table.scales["a.to_k"] == pytest.approx(0.2)
    assert table.columns == {"a.to_q": 0, "a.to_k": 0, "a.out": 1}
    np.testing.assert_allclose(table.magnitudes(), [[12.7, 1], [12.7, 1], [25.4, 1]], rtol=1e-6)


def test_static_scales_have_no_table() -> None:
    table = scale_table(RANGES[1:], READERS, np.zeros(3, np.int64), Origin("max", "", ""))
    assert table.scales["a.to_q"] == pytest.approx(0.2)
    assert table.bundle_tables() == {}


def test_a_layer_that_two_branches_share_takes_the_wider_range() -> None:
    ranges, readers = [{"x": Range(-1, 1), "y": Range(-5, 5)}], {"x": ("shared",), "y": ("shared", "own")}
    for binding in ("static", "per-step"):
        table = scale_table(ranges, readers, np.zeros(2, np.int64), Origin("max", "", "", binding))
        assert table.scales["shared"] == table.scales["own"] == pytest.approx(5 / 127)


def test_a_group_is_large_enough_by_default() -> None:
    points = np.full(6, LEAST_POINTS - 1)
    assert neighbouring_steps(points, EVERY).max() == 2
