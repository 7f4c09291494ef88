"""Caches over more steps: which pairs of steps and interval are tried, on a machine and images that are played."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditc.compiler.options import CompileOptions
from ditc.policies import schedule_for
from ditc.quality.cached_steps import REUSE_SHARE, WORTH, Pace, PairWalk, computed_steps
from ditc.quality.solvers import Solver, Solvers
from ditc.quality.trials import Changes, Trial
from tests.quality.test_solvers import model

BASE, SOLVER = CompileOptions(steps=50), Solver((("sampler", "unipc"),))
INTERVALS = (2, 3, 5)


@given(st.integers(4, 60), st.integers(2, 12), st.integers(1, 8), st.integers(1, 8))
def test_the_steps_that_compute_are_those_of_the_schedule(steps: int, interval: int, first: int, last: int) -> None:
    policies = ["none", f"fora:{interval}", *([f"window:{interval}:{first}:{last}"] if first + last < steps else [])]
    for policy in policies:
        schedule = schedule_for(policy, model(), steps)
        assert computed_steps(policy, steps) == sum(map(any, schedule.compute))


def test_a_reuses_share_is_learnt_from_more_trials_than_one_pair_has() -> None:
    pace = Pace(2.0)
    assert pace.seconds(10, "fora:2") == 2 * (5 + REUSE_SHARE * 5)
    for seconds in (20.0, 30.0, 9.0, 20.0):  # all disturbed: as if reuses took as long as computing, or nothing
        pace.learn(played("fora:2", 10, seconds, True), 10, "fora:2")
    assert pace.share == REUSE_SHARE
    for _ in range(12):
        pace.learn(played("fora:2", 10, 10.5, True), 10, "fora:2")  # 5 computed are 10 s, 5 reuses the other 0.5
    assert pace.share == pytest.approx(0.05)
    pace.learn(played("none", 10, 20.0, True), 10, "none")
    assert len(pace.shares) == 16


def played(policy: str, steps: int, seconds: float, within: bool) -> Trial:
    return Trial(
        stage="schedule",
        changes={"policy": policy, "steps": steps},
        seconds=seconds,
        psnr_db=30,
        psnr_low=30,
        worse_by=0.0,
        worse_high=0.0,
        size_bytes=1,
        within=within,
    )


class Machine:
    """A machine with a reuse of a known share, and images that are good enough or not; `tried` are (steps, policy)."""

    def __init__(self, good: Callable[[int, str], bool], share: float = REUSE_SHARE) -> None:
        self.good, self.pace = good, Pace(1.0, [share])
        self.tried: list[tuple[int, str]] = []
        self.changes: list[Changes] = []

    def __call__(self, stage: str, changes: Changes, policy: str) -> list[Trial]:
        steps = int(changes.get("steps") or BASE.steps)
        self.tried.append((steps, policy))
        self.changes.append(changes)
        return [played(policy, steps, self.pace.seconds(steps, policy), self.good(steps, policy))]


def walk(
    machine: Machine, fastest: float | None, *, counts: tuple[int, ...] = (50, 37, 27, 20, 15, 11, 8, 6), **more: Any
) -> tuple[PairWalk, list[str]]:
    notes: list[str] = []

    def ends(steps: int) -> Iterator[tuple[int, int]]:
        return (pair for pair in ((2, 2), (4, 4)) if sum(pair) < steps // 2)

    solvers = Solvers((Solver(), SOLVER), counts, more.get("between", True), lambda *_: None)
    pairs = PairWalk(BASE, solvers, INTERVALS, Pace(1.0), fastest, machine, ends, notes.append)
    pairs.walk(SOLVER, {"ranges": "mse"}, more.get("floor", 0))
    return pairs, notes


def test_only_pairs_that_are_to_be_faster_than_the_fastest_are_tried() -> None:
    machine = Machine(lambda *_: True)
    pairs, _ = walk(machine, 10.0)
    seconds = [machine.pace.seconds(*pair) for pair in machine.tried]
    assert seconds[0] * WORTH <= 10.0
    assert all(after * WORTH <= before for before, after in pairwise(seconds))
    assert pairs.fastest == min(seconds)


def test_an_interval_begins_with_the_most_steps_that_are_fast_enough_and_ends_beyond_the_budget() -> None:
    machine = Machine(lambda steps, policy: policy == "fora:2" and steps >= 13)
    walk(machine, 10.0)
    at_two = [steps for steps, policy in machine.tried if policy == "fora:2"]
    assert at_two[0] == max(s for s in range(51) if machine.pace.seconds(s, "fora:2") * WORTH <= 10)
    assert [steps >= 13 for steps in at_two] == [True] * (len(at_two) - 1) + [False]


def test_two_intervals_in_a_row_beyond_the_budget_end_the_walk() -> None:
    machine = Machine(lambda *_: False)
    _, notes = walk(machine, 10.0)
    assert [policy for _, policy in machine.tried if policy.startswith("fora")] == ["fora:2", "fora:3"]
    assert notes == ["no correction is within the budget at two intervals in a row: none beyond 3"]


def test_windows_are_tried_at_the_first_pair_beyond_the_budget_where_they_are_fast_enough() -> None:
    machine = Machine(lambda *_: False)
    walk(machine, None)
    assert machine.tried[-2:] == [(50, "window:2:2:2"), (50, "window:2:4:4")]
    slow = Machine(lambda *_: False)
    walk(slow, 10.0)
    assert not [policy for _, policy in slow.tried if policy.startswith("window")]


def test_where_nothing_is_within_the_budget_yet_the_most_steps_come_first() -> None:
    machine = Machine(lambda *_: True)
    walk(machine, None)
    assert machine.tried[0] == (50, "fora:2")


def test_only_numbers_of_steps_that_were_asked_for_are_tried() -> None:
    machine = Machine(lambda *_: True)
    walk(machine, 12.0, counts=(50, 20, 10), between=False)
    assert {steps for steps, _ in machine.tried} <= {50, 20, 10}


def test_no_fewer_steps_are_tried_than_the_solver_alone_needs() -> None:
    machine = Machine(lambda *_: True)
    walk(machine, 10.0, floor=16)
    assert machine.tried
    assert min(steps for steps, _ in machine.tried) >= 16


def test_a_pair_takes_the_solver_and_what_was_settled_before_it() -> None:
    machine = Machine(lambda *_: False)
    walk(machine, 10.0)
    assert all(changes["sampler"] == "unipc" and changes["ranges"] == "mse" for changes in machine.changes)


def test_the_cheaper_a_reuse_is_the_more_steps_a_cache_is_tried_over() -> None:
    cheap, dear = Pace(1.0, [0.03] * 9), Pace(1.0, [0.4] * 9)
    most = [
        max(steps for steps in range(2, 50) if pace.seconds(steps, "fora:2") * WORTH <= 10) for pace in (cheap, dear)
    ]
    assert most == [16, 12]
