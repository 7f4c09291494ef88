"""Time groups of scales: as many as steps are the scales of each step, fewer are shared, and a bundle says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ditc.bundle import Bundle
from ditc.calibset import CalibSet
from ditc.compiler.calibrating import scales_of
from ditc.compiler.options import CompileOptions
from ditc.errors import InputError
from ditc.tables import SCALES_TABLE
from tests.conftest import BUNDLES, small_model

Compile = Callable[..., Bundle]


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    """Those of the small bundle with scales of each step, with enough points for a group of each."""
    return {**BUNDLES["per-step"], "points": 32, "select": "time-groups"}


def test_as_many_groups_as_steps_are_scales_of_each_step(
    settings: dict[str, Any], compiled_once: Compile, quick_options: CompileOptions
) -> None:
    changes = {"scales": "time-groups", "time_groups": quick_options.steps}
    grouped = compiled_once(small_model(), quick_options.model_copy(update=settings | changes))
    of_each = compiled_once(small_model(), quick_options.model_copy(update=settings | {"select": "uniform-time"}))
    assert grouped.manifest.settings["time_groups"] == quick_options.steps
    same = {name: file.sha256 for name, file in of_each.manifest.files.items() if not name.startswith("calib/")}
    assert {name: file.sha256 for name, file in grouped.manifest.files.items() if name in same} == same
    assert len(np.unique(grouped.tables()[SCALES_TABLE], axis=0)) == 3  # of fora:2, each with points enough
    assert scales_of(grouped).steps == scales_of(of_each).steps


def test_steps_of_a_group_share_scales_and_as_many_points_come_from_each(
    settings: dict[str, Any], compiled_once: Compile, quick_options: CompileOptions
) -> None:
    changes = {"policy": "none", "scales": "time-groups", "time_groups": 2}
    bundle = compiled_once(small_model(), quick_options.model_copy(update=settings | changes))
    rows = bundle.tables()[SCALES_TABLE]
    assert np.ptp(rows[:3], axis=0).max() == np.ptp(rows[3:], axis=0).max() == 0
    assert (rows[0] != rows[-1]).any()
    assert np.bincount(CalibSet.load(bundle.path / "calib" / "calib.npz").step // 3).tolist() == [16, 16]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"time_groups": 4}, r"--time-groups 4 is for .* found --scales static and --select tap; leave it out"),
        ({"time_groups": 0, "scales": "time-groups"}, "--time-groups must be at least 1, found 0"),
        ({"time_groups": 51, "scales": "time-groups"}, "--time-groups 51 are more than the 50 steps"),
        ({"scales": "time-groups", "precision": "fp32"}, "--scales time-groups is for activations in INT8"),
        ({"scales": "time-groups", "correct": "dec-quant"}, "leave one of them out"),
    ],
)
def test_what_groups_can_not_do_is_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        CompileOptions(**given)


@pytest.mark.parametrize("steps", [3, 50])
def test_ten_groups_are_the_default_where_there_are_ten_steps(steps: int) -> None:
    assert CompileOptions(steps=steps, select="time-groups").selection().time_groups == min(10, steps)
