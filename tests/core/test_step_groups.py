"""Groups of steps: the cheapest of all that are allowed, never worse than FORA's, and the noise that they count."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditc.errors import InputError
from ditc.policies import check_policy, schedule_for, watching_of
from ditc.step_groups import cheapest_starts, cost_of, lengths_of
from ditc.step_statistics import StepStatistics
from tests.core.test_schedule import BRANCHES, FULL, SKIP, SPEC

STEPS = 12
SEEDS = st.integers(0, 2**32)


def changes_of(rng: np.random.Generator, steps: int, interval: int) -> list[list[float]]:
    """Random distances, unlike those of points in a space."""
    return rng.random((steps, 2 * interval - 1)).tolist()


def allowed(steps: int, interval: int) -> Iterator[tuple[int, ...]]:
    """Every grouping that the limits leave, by its starts."""
    groups = -(-steps // interval)
    for later in combinations(range(1, steps), groups - 1):
        lengths = np.diff([0, *later, steps])
        if all(length in lengths_of(interval) for length in lengths[:-1]) and lengths[-1] <= 2 * interval:
            yield (0, *later)


@given(st.integers(2, 11), st.integers(1, 6), st.booleans(), SEEDS)
def test_the_groups_are_the_cheapest_of_all_that_are_allowed(steps: int, interval: int, noisy: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    changes, noise = changes_of(rng, steps, interval), rng.random(steps).tolist() if noisy else None
    starts = cheapest_starts(interval, changes, noise)
    assert tuple(starts) in set(allowed(steps, interval))
    least = min(cost_of(each, changes, noise) for each in allowed(steps, interval))
    assert cost_of(starts, changes, noise) == pytest.approx(least, rel=1e-12)


@given(st.integers(2, 80), st.integers(1, 20), st.booleans(), SEEDS)
def test_groups_are_as_many_as_foras_and_never_cost_more(steps: int, interval: int, noisy: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    changes, noise = changes_of(rng, steps, interval), rng.random(steps).tolist() if noisy else None
    starts, foras = cheapest_starts(interval, changes, noise), list(range(0, steps, interval))
    assert len(starts) == len(foras)
    assert cost_of(starts, changes, noise) <= cost_of(foras, changes, noise) + 1e-9
    lengths = np.diff([*starts, steps])
    assert all(-(-interval // 2) <= length <= 2 * interval for length in lengths[:-1])
    assert 1 <= lengths[-1] <= 2 * interval


def test_a_group_costs_what_its_steps_changed_since_the_one_that_computes() -> None:
    changes = [[0.0] * 3, [1.0, 0, 0], [2.0, 10, 0], [4.0, 20, 100]]
    assert cost_of([0, 2], changes) == 1 + 4
    assert cost_of([0, 1], changes) == 2 + 20
    assert cost_of([0], changes) == 1 + 10 + 100
    assert cost_of([0, 2], changes, [0.5, 9, 0.25, 9]) == 1 + 4 + 2 * 0.5 + 2 * 0.25


@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 1000), SEEDS)
def test_noise_that_is_the_same_at_every_step_changes_no_group(
    steps: int, interval: int, noise: int, seed: int
) -> None:
    """In whole numbers, which are added exactly."""
    changes = np.random.default_rng(seed).integers(0, 1000, (steps, 2 * interval - 1)).tolist()
    assert cheapest_starts(interval, changes, [noise] * steps) == cheapest_starts(interval, changes)


def test_what_a_noisy_step_left_is_reused_as_briefly_as_allowed() -> None:
    changes, noise = [[1.0] * 5] * STEPS, [10.0, *[0.0] * (STEPS - 1)]
    assert cheapest_starts(3, changes, noise)[1] == lengths_of(3)[0] == 2


def watched(seed: int = 0, interval: int = 3) -> StepStatistics:
    shape = (STEPS, 2 * interval - 1, len(BRANCHES))
    relative = np.random.default_rng(seed).random(shape)
    t, k = np.ogrid[:STEPS, 1 : 2 * interval]
    relative[k > t] = np.nan
    return StepStatistics(BRANCHES, 3, absolute=2 * relative, relative=relative)


def test_dps_computes_all_branches_or_none_at_the_cheapest_steps() -> None:
    schedule = schedule_for("dps:3", SPEC, STEPS, watched())
    assert set(schedule.compute) == {FULL, SKIP}
    starts = [step for step, row in enumerate(schedule.compute) if row == FULL]
    changes = np.nan_to_num(watched().absolute.mean(axis=-1)).tolist()
    assert len(starts) == 4
    assert cost_of(starts, changes) == min(cost_of(each, changes) for each in allowed(STEPS, 3))


def test_dps_of_one_reuses_nothing() -> None:
    assert schedule_for("dps:1", SPEC, STEPS, watched(interval=1)) == schedule_for("none", SPEC, STEPS)


def test_dps_looks_back_as_far_as_its_longest_group_reaches() -> None:
    for interval in (1, 3, 10):
        wanted = watching_of(f"dps:{interval}")
        assert wanted is not None
        assert (wanted.distances, wanted.sums) == (lengths_of(interval)[-1] - 1, 0)


def noise_file(folder: Path, noise: object, branches: tuple[str, ...] = BRANCHES) -> Path:
    path = folder / "noise.json"
    path.write_text(json.dumps({"veto": {"branches": branches, "noise": noise, "vetoed": 0.1}, "n": 4}))
    return path


def test_dps_counts_the_noise_of_a_file_as_shares_of_what_branches_give(tmp_path: Path) -> None:
    sizes = np.where(np.arange(STEPS) % 3 == 2, 20.0, 1.0)  # a noisy step is none where outputs are small
    sizes[0] = sizes[1]
    relative = watched().relative
    statistics = StepStatistics(BRANCHES, 3, absolute=sizes[:, None, None] * relative, relative=relative)
    shares = np.random.default_rng(1).random((STEPS, len(BRANCHES)))
    schedule = schedule_for(f"dps:3:{noise_file(tmp_path, shares.tolist())}", SPEC, STEPS, statistics)
    starts = [step for step, row in enumerate(schedule.compute) if row == FULL]
    changes = np.nan_to_num(statistics.absolute.mean(axis=-1)).tolist()
    noise = (sizes[:, None] * shares).mean(axis=-1).tolist()
    assert starts == cheapest_starts(3, changes, noise)
    assert starts not in (cheapest_starts(3, changes), cheapest_starts(3, changes, shares.mean(axis=-1).tolist()))


def test_a_branch_of_zeros_has_no_noise(tmp_path: Path) -> None:
    path = noise_file(tmp_path, [[None] * 4] * STEPS)
    assert schedule_for(f"dps:3:{path}", SPEC, STEPS, watched()) == schedule_for("dps:3", SPEC, STEPS, watched())


@pytest.mark.parametrize(
    ("noise", "branches", "said"),
    [
        ([[0.1] * 4] * 5, BRANCHES, "is of 5 steps and 4 branches, and tiny takes 12 steps and has 4"),
        ([[0.1] * 4] * STEPS, ("a", "b", "c", "d"), "is of 12 steps and 4 branches, and tiny"),
        ([[0.1] * 3] * STEPS, BRANCHES, "has no veto (veto: Value error, a step has not 4 shares"),
        ([[-0.1] * 4] * STEPS, BRANCHES, "has no veto (veto.noise.0.0"),
        (None, BRANCHES, "has no veto (veto.noise"),
    ],
)
def test_noise_of_something_else_is_refused_in_front_of_watching(
    noise: object, branches: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    path = noise_file(tmp_path, noise, branches)
    with pytest.raises(InputError) as refused:
        check_policy(f"dps:3:{path}", SPEC, STEPS)
    assert f"{path} {said}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_noise_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"can't read the noise .*absent\.json: No such file"):
        check_policy(f"dps:3:{tmp_path / 'absent.json'}", SPEC, STEPS)
    (tmp_path / "plain.json").write_text('{"n": 3}')
    with pytest.raises(InputError, match=r"has no veto \(veto: Field required\); write it with: ditc evaluate B"):
        check_policy(f"dps:3:{tmp_path / 'plain.json'}", SPEC, STEPS)


@pytest.mark.parametrize("argument", ["", ":", ":0", ":-1", ":two", ":3:", ":2.5", ": 3", ":²", ":12345"])
def test_dps_needs_an_interval(argument: str) -> None:
    with pytest.raises(InputError, match=r"policy dps needs N or N:FILE, .*found .*--policy dps:3"):
        watching_of(f"dps{argument}")


@pytest.mark.parametrize("interval", [STEPS, 99])
def test_one_group_of_all_steps_leaves_nothing_to_choose(interval: int) -> None:
    with pytest.raises(InputError, match=r"puts all 12 steps into one group, .*give an N below 12"):
        check_policy(f"dps:{interval}", SPEC, STEPS)
    check_policy(f"dps:{STEPS - 1}", SPEC, STEPS)


def test_dps_is_refused_without_statistics() -> None:
    with pytest.raises(InputError, match=r"policy dps:3 decides by statistics of FP images"):
        schedule_for("dps:3", SPEC, STEPS)


def test_other_policies_have_nothing_to_check_in_front() -> None:
    for policy in ("none", "fora:99", "smoothcache:0.1", "absent.json", "fora:3.json"):
        check_policy(policy, SPEC, STEPS)
