"""Routers: which branches compute at a theta, how rows are merged, and what a policy of routers refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditc.errors import AdviceWarning, InputError
from ditc.policies import schedule_for, settled_policy, watching_of
from ditc.routers import Routers, computed_rows, merged_rows, reuses
from ditc.schedule import CacheSchedule
from tests.core.test_schedule import BRANCHES, FULL, SKIP, SPEC

LOGITS = st.integers(2, 9).flatmap(
    lambda steps: st.lists(st.lists(st.floats(-200, 200), min_size=4, max_size=4), min_size=steps, max_size=steps)
)
ROWS = st.lists(st.tuples(*[st.booleans()] * 5), max_size=14)


def routers_of(*rows: tuple[float, ...], branches: tuple[str, ...] | None = None) -> Routers:
    return Routers(tuple(rows), branches)


def routed(argument: str, routers: Routers, steps: int) -> CacheSchedule:
    return schedule_for(f"l2c:{argument}", SPEC, steps, None, lambda path: routers)


ODD, NOBODYS = (-9.0, 9.0, -9.0, 9.0), (9.0,) * 4


def test_a_branch_computes_where_its_score_lies_above_theta() -> None:
    """The sense of the released code, and of the penalty; the paper prints the other one."""
    last, third = (math.log(0.3 / 0.7), -9.0, -9.0, -9.0), ODD  # scores of 0.3, of about 0 and of about 1
    routers = routers_of(last, NOBODYS, third, NOBODYS)
    assert routed("r.pt:0.2", routers, 4).compute == (
        FULL,
        (False, True, False, True),
        FULL,
        (True, False, False, False),
    )
    assert routed("r.pt:0.4", routers, 4).compute == (FULL, (False, True, False, True), FULL, SKIP)


def test_the_first_router_of_a_file_is_that_of_the_last_step() -> None:
    """So with an odd number of steps the first two compute, and the pairs begin behind the first."""
    assert routed("r.pt", routers_of(ODD, NOBODYS, ODD, NOBODYS, ODD), 5).compute[:3] == (FULL, FULL, (False, True) * 2)
    assert reuses(5) == [2, 4]
    assert reuses(6) == [1, 3, 5]


@given(LOGITS)
def test_at_theta_0_all_computes_and_at_1_every_other_step_reuses(rows: list[list[float]]) -> None:
    routers, steps = routers_of(*map(tuple, rows)), len(rows)
    assert routed("r.pt:0", routers, steps) == schedule_for("none", SPEC, steps)
    one = routed("r.pt:1:1", routers, steps)
    assert one.compute == tuple(SKIP if step in reuses(steps) else FULL for step in range(steps))
    if steps % 2 == 0:
        assert one == schedule_for("fora:2", SPEC, steps)


@given(LOGITS, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_theta_computes_no_more(rows: list[list[float]], one: float, other: float) -> None:
    routers = routers_of(*map(tuple, rows))
    less, more = computed_rows(routers, max(one, other)), computed_rows(routers, min(one, other))
    assert all(a <= b for row, wider in zip(less, more, strict=True) for a, b in zip(row, wider, strict=True))


@given(ROWS, st.integers(1, 6))
def test_merged_rows_compute_what_was_asked_for_and_are_few(rows: list[tuple[bool, ...]], most: int) -> None:
    merged = merged_rows(rows, most)
    assert all(a <= b for row, wider in zip(rows, merged, strict=True) for a, b in zip(row, wider, strict=True))
    assert len({row for row in merged if not all(row)}) <= most
    assert all(after == row for row, after in zip(rows, merged, strict=True) if all(row))
    assert sum(map(sum, merged)) >= sum(map(sum, merged_rows(rows, most + 1)))
    if len({row for row in rows if not all(row)}) <= most:
        assert merged == tuple(rows)


def test_rows_are_merged_where_that_adds_the_fewest_branches() -> None:
    one, near, far = (True, False, False, False), (True, True, False, False), (False, False, True, True)
    assert merged_rows([one, near, far], 2) == (near, near, far)
    often = [one] * 5 + [near] + [far] * 2
    assert merged_rows(often, 2) == (
        *([one] * 5),
        FULL,
        far,
        far,
    )  # a whole row for one step costs 2, `near` for five 5


def test_what_merging_adds_is_said() -> None:
    rows = [(9.0, -9.0, -9.0, -9.0), NOBODYS, (-9.0, 9.0, -9.0, -9.0), NOBODYS]
    with pytest.warns(
        AdviceWarning, match=r"ask for 2 different rows, and 1 segments for them compute 12 branches, not 10"
    ):
        routed("r.pt:0.5:1", routers_of(*rows), 4)


def test_what_an_argument_leaves_open_is_spelled_out() -> None:
    assert settled_policy("l2c:a/r.pt") == "l2c:a/r.pt:0.1:4"
    assert settled_policy("l2c:r.pt:.25") == "l2c:r.pt:0.25:4"
    assert settled_policy("l2c:C:/r.pt:0.123456789:9") == "l2c:C:/r.pt:0.123456789:9"
    assert settled_policy("fora:3") == "fora:3"
    assert settled_policy("l2c.json") == "l2c.json"
    assert watching_of("l2c:r.json:0.1") is None


@pytest.mark.parametrize("argument", ["", ":", ":r.pt:1.1", ":r.pt:2", ":r.pt:0.1:0", ":r.pt:1e-400000:0"])
def test_l2c_needs_a_file_and_a_score(argument: str) -> None:
    for refuse in (settled_policy, lambda policy: schedule_for(policy, SPEC, 4, None, lambda path: routers_of())):
        with pytest.raises(InputError, match=r"policy l2c needs FILE\[:THETA\[:SEGMENTS\]\], .*l2c:routers\.pt:0\.1:4"):
            refuse(f"l2c{argument}")


def test_routers_of_other_steps_name_those_to_set() -> None:
    with pytest.raises(InputError, match=r"r\.pt has routers for 2 steps, the sampler takes 6; set --steps 2"):
        routed("r.pt", routers_of(ODD, ODD), 6)


@pytest.mark.parametrize(
    "routers",
    [routers_of((1.0,) * 3, (1.0,) * 3), routers_of(ODD, ODD, branches=("1.attn", *BRANCHES[1:]))],
)
def test_routers_of_another_model_are_refused(routers: Routers) -> None:
    with pytest.raises(
        InputError, match=r"r\.pt has routers for \d branches.*tiny has 4, 0\.attn, 0\.mlp, \.\.\.; train"
    ):
        routed("r.pt", routers, 2)


def test_routers_that_name_the_models_branches_are_taken() -> None:
    assert routed("r.pt", routers_of(ODD, ODD, branches=BRANCHES), 2).compute[1] == (False, True) * 2


def test_without_what_reads_the_file_it_is_refused() -> None:
    with pytest.raises(InputError, match="routers that torch wrote; compile a model with it"):
        schedule_for(f"l2c:{Path('r.pt')}", SPEC, 4)
