"""Steps that share activation scales, and the table that comes of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditc.quantize.midpoints import Range
from ditc.quantize.scale_binding import LEAST_POINTS, neighbouring_steps, one_group
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


def test_static_scales_have_one_group() -> None:
    assert one_group(np.arange(6), EVERY).tolist() == [0] * 6


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
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
