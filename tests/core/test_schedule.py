"""Schedules: what each policy makes, and what is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditc.errors import InputError
from ditc.policies import POLICIES, Policy, Watching, policy_forms, schedule_for, watching_of
from ditc.schedule import CacheSchedule
from ditc.spec import ModelSpec
from ditc.step_statistics import StepStatistics

LAW = settings(deadline=None)  # a busy machine stalls now and then

BRANCHES = ("0.attn", "0.mlp", "1.attn", "1.mlp")
SPEC = ModelSpec(
    name="tiny",
    family="dit",
    in_channels=1,
    height=8,
    width=8,
    num_classes=10,
    cfg_channels=1,
    branches=BRANCHES,
    branch_shape=(16, 8),
    parameters=0,
)
FULL, SKIP = (True,) * 4, (False,) * 4


def write_schedule(folder: Path, rows: object) -> str:
    path = folder / "schedule.json"
    path.write_text(json.dumps({"compute": rows}))
    return str(path)


def test_none_computes_every_branch_at_every_step() -> None:
    schedule = schedule_for("none", SPEC, 5)
    assert schedule.compute == (FULL,) * 5
    assert schedule.computed_fraction == 1


def test_fora_computes_every_nth_step_and_reuses_all_in_between() -> None:
    assert schedule_for("fora:3", SPEC, 7).compute == (FULL, SKIP, SKIP, FULL, SKIP, SKIP, FULL)


@LAW
@given(interval=st.integers(1, 20), steps=st.integers(2, 60))
def test_fora_starts_with_a_computed_step_and_never_waits_longer_than_its_interval(interval: int, steps: int) -> None:
    schedule = schedule_for(f"fora:{interval}", SPEC, steps)
    computed = [index for index, row in enumerate(schedule.compute) if row == FULL]
    assert schedule.steps == steps
    assert computed == list(range(0, steps, interval))
    assert schedule.computed_fraction == pytest.approx(len(computed) / steps)


def test_fora_of_one_is_no_reuse() -> None:
    assert schedule_for("fora:1", SPEC, 6) == schedule_for("none", SPEC, 6)


@pytest.mark.parametrize("policy", ["fora:0", "fora:-1", "fora:two", "fora:2.5", "fora:", "fora", "fora: 3", "fora:²"])
def test_fora_needs_a_whole_interval_of_at_least_one(policy: str) -> None:
    with pytest.raises(InputError, match=r"interval N >= 1, found .*--policy fora:3"):
        schedule_for(policy, SPEC, 10)


def test_a_window_computes_the_first_and_last_steps_and_every_nth_between() -> None:
    computed = [row == FULL for row in schedule_for("window:3:2:2", SPEC, 12).compute]
    assert computed == [True, True, False, False, True, False, False, True, False, False, True, True]


@LAW
@given(interval=st.integers(1, 8), first=st.integers(0, 20), last=st.integers(0, 20), steps=st.integers(2, 40))
def test_a_window_never_waits_longer_than_its_interval(interval: int, first: int, last: int, steps: int) -> None:
    schedule = schedule_for(f"window:{interval}:{first}:{last}", SPEC, steps)
    computed = [index for index, row in enumerate(schedule.compute) if row == FULL]
    assert {*range(min(max(first, 1), steps)), *range(max(0, steps - last), steps)} <= set(computed)
    assert max((b - a for a, b in zip(computed, [*computed[1:], steps], strict=True)), default=0) <= interval


def test_a_window_without_edges_is_fora() -> None:
    assert schedule_for("window:3:1:0", SPEC, 20) == schedule_for("fora:3", SPEC, 20)


@pytest.mark.parametrize(
    "policy", ["window", "window:3", "window:3:2", "window:0:2:2", "window:3:-1:2", "window:3:a:2"]
)
def test_a_window_needs_three_numbers(policy: str) -> None:
    with pytest.raises(InputError, match=r"policy window needs N:FIRST:LAST"):
        schedule_for(policy, SPEC, 10)


def test_none_refuses_an_argument() -> None:
    with pytest.raises(InputError, match=r"takes no argument, found '3'"):
        schedule_for("none:3", SPEC, 10)


def test_an_unknown_policy_lists_the_known_ones() -> None:
    with pytest.raises(
        InputError, match=r"unknown policy 'forra:3'; choose one of: FILE\.json, dps, fora, l2c, none, smoothcache"
    ):
        schedule_for("forra:3", SPEC, 10)


@pytest.mark.parametrize("policy", ["none", "fora:2"])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_trajectory_of_fewer_than_two_steps_is_refused(policy: str, steps: int) -> None:
    with pytest.raises(InputError, match=rf"at least 2 steps, found {steps}"):
        schedule_for(policy, SPEC, steps)


def test_a_schedule_file_is_taken_row_by_row(tmp_path: Path) -> None:
    rows = [[True, True, True, True], [False, True, False, True], [False, False, False, False]]
    schedule = schedule_for(write_schedule(tmp_path, rows), SPEC, 3)
    assert [list(row) for row in schedule.compute] == rows
    assert schedule.computed_fraction == 0.5


def test_a_schedule_file_of_another_length_names_the_steps_to_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has 2 rows, the sampler takes 5 steps; set --steps 2"):
        schedule_for(write_schedule(tmp_path, [[True] * 4] * 2), SPEC, 5)


@pytest.mark.parametrize("width", [0, 3, 5])
def test_a_schedule_row_of_another_width_is_refused(tmp_path: Path, width: int) -> None:
    with pytest.raises(InputError, match=rf"row 1 has {width} entries; tiny has 4 branches"):
        schedule_for(write_schedule(tmp_path, [[True] * 4, [True] * width]), SPEC, 2)


def test_a_schedule_that_skips_in_row_zero_names_the_branch(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"step 0 has nothing to reuse, yet the schedule skips 1\.attn"):
        schedule_for(write_schedule(tmp_path, [[True, True, False, True], [True] * 4]), SPEC, 2)


@pytest.mark.parametrize(
    "text", ["{", "", "[]", '{"compute": 3}', '{"rows": []}', '{"compute": [], "extra": 1}', "\udcff"]
)
def test_a_broken_schedule_file_says_what_was_expected(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"broken\.json is not a schedule .*expected") as refused:
        schedule_for(str(path), SPEC, 2)
    assert "\n" not in str(refused.value)


def test_a_missing_schedule_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"can't read the schedule .*absent\.json"):
        schedule_for(str(tmp_path / "absent.json"), SPEC, 2)


def test_a_reuse_that_nothing_implements_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({"compute": [[True] * 4] * 2, "reuse": "spline"}))
    with pytest.raises(InputError, match=r"odd\.json is not a schedule"):
        schedule_for(str(path), SPEC, 2)


def test_the_help_lists_every_policy_as_it_is_typed() -> None:
    assert policy_forms() == (
        "none, fora:N, window:N:FIRST:LAST (fora, but the ends compute), "
        "smoothcache:ALPHA (reuse while outputs change by less), "
        "dps:N[:FILE] (as many steps as fora, where least changes), "
        "l2c:FILE[:THETA[:SEGMENTS]] (by trained routers)"
    )


@pytest.mark.parametrize("policy", ["none", "fora:3", "window:3:2:2", "absent.json"])
def test_most_policies_see_no_statistics(policy: str) -> None:
    assert watching_of(policy) is None


def test_an_unknown_policy_is_refused_before_anything_is_watched() -> None:
    with pytest.raises(InputError, match=r"unknown policy 'forra:3'"):
        watching_of("forra:3")


def test_a_policy_that_sees_is_refused_without_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: object) -> CacheSchedule:
        raise AssertionError("called without what it needs")

    monkeypatch.setitem(POLICIES, "seeing", Policy(make, "N", watches=lambda _: Watching(distances=3)))
    assert watching_of("seeing:2") == Watching(distances=3)
    with pytest.raises(InputError, match=r"policy seeing:2 decides by statistics of FP images; compile a model"):
        schedule_for("seeing:2", SPEC, 5)


def test_a_short_trajectory_has_a_shorter_window() -> None:
    assert Watching(distances=3, sums=1).within(3) == Watching(distances=2, sums=1)
    assert Watching(distances=3, sums=5).window == 5


STEPS = 12


def changing(attn: list[float], mlp: list[float]) -> StepStatistics:
    """Statistics of SPEC, whose branches of a kind go so far at each step: a change over k steps is the way there."""
    relative = np.full((STEPS, 3, 4), np.nan)
    for place, way in enumerate((attn, mlp, attn, mlp)):
        for t, k in np.ndindex(STEPS, 3):
            if t > k:
                relative[t, k, place] = sum(way[t - k : t + 1])
    return StepStatistics(BRANCHES, 2, absolute=relative, relative=relative)


STEADY = changing([0.1] * STEPS, [0.1] * STEPS)


def smoothed(alpha: str, statistics: StepStatistics) -> list[str]:
    """The rows of attention and of the MLPs, # computed and . reused."""
    schedule = schedule_for(f"smoothcache:{alpha}", SPEC, STEPS, statistics)
    columns = ["".join("#" if cell else "." for cell in column) for column in zip(*schedule.compute, strict=True)]
    assert columns[:2] == columns[2:]  # kinds do the same in every block
    return columns[:2]


@pytest.mark.parametrize(
    ("alpha", "row"),
    [
        ("0", "############"),
        ("0.1", "############"),  # below it, not at it
        ("0.15", "#.#.#.#.#.#."),
        ("0.25", "#..#..#..#.."),
        ("0.35", "#...#...#..."),
        ("1e9", "#...#...#..."),  # no more than three in a row
    ],
)
def test_smoothcache_reuses_while_the_change_since_the_last_computed_step_stays_below_alpha(
    alpha: str, row: str
) -> None:
    assert smoothed(alpha, STEADY) == [row, row]


def test_smoothcache_without_a_bound_is_fora_of_four() -> None:
    assert schedule_for("smoothcache:1e9", SPEC, STEPS, STEADY) == schedule_for("fora:4", SPEC, STEPS)


def test_under_smoothcache_each_kind_of_branch_has_steps_of_its_own() -> None:
    early = [0.05] * 4 + [0.3] * 8
    assert smoothed("0.2", changing(early, [0.3] * STEPS)) == ["#...########", "############"]
    late = [0.3] * 6 + [0.05] * 6
    assert smoothed("0.2", changing(early, late)) == ["#...########", "######...#.."]


def test_under_smoothcache_one_large_change_ends_a_reuse_and_the_next_one_begins_there() -> None:
    way = [0.01] * STEPS
    way[6] = 1.0
    assert smoothed("0.2", changing(way, way))[0] == "#...#.#...#."


def test_smoothcache_averages_over_the_branches_of_a_kind() -> None:
    relative = STEADY.relative.copy()
    relative[:, :, 0] = 0.19 * (
        relative[:, :, 0] / relative[:, :, 0]
    )  # block 0 alone would reuse, block 1 changes more
    relative[:, :, 2] = 0.23 * (relative[:, :, 2] / relative[:, :, 2])
    apart = StepStatistics(BRANCHES, 2, absolute=relative, relative=relative)
    assert smoothed("0.2", apart)[0] == "#" * STEPS
    assert smoothed("0.22", apart)[0] == "#...#...#..."


def test_smoothcache_of_two_steps_has_one_to_decide() -> None:
    relative = np.full((2, 1, 4), np.nan)
    relative[1] = 0.1
    few = StepStatistics(BRANCHES, 2, absolute=relative, relative=relative)
    assert schedule_for("smoothcache:0.2", SPEC, 2, few).compute == (FULL, SKIP)
    assert schedule_for("smoothcache:0.05", SPEC, 2, few).compute == (FULL, FULL)


@pytest.mark.parametrize("alpha", ["", ":", ":-0.1", ":nan", ":inf", ":1e999", ":0.1:3", ": 0.1", ":0,1", ":1_0", ":²"])
def test_smoothcache_needs_one_number_from_0_on(alpha: str) -> None:
    for refuse in (watching_of, lambda policy: schedule_for(policy, SPEC, STEPS, STEADY)):
        with pytest.raises(InputError, match=r"smoothcache needs ALPHA >= 0, .*found .*--policy smoothcache:0\.1"):
            refuse(f"smoothcache{alpha}")


def test_smoothcache_looks_back_at_three_steps_and_no_sums() -> None:
    assert watching_of("smoothcache:.2") == watching_of("smoothcache:2e-1") == Watching(distances=3)
