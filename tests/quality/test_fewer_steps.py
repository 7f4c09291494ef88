"""The stage that looks for the fewest steps: on solvers whose images are played."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from ditc.quality.fewer_steps import Reach, fewest_steps
from ditc.quality.solvers import Solver, Solvers
from ditc.quality.trials import Trial

OWN, FIRST, SECOND = Solver(), Solver((("sampler", "dpm++2m"),)), Solver((("sampler", "unipc"),))
COUNTS = (50, 37, 27, 20, 15, 11, 8, 6)


def trial(solver: Solver, steps: int, worse_by: float) -> Trial:
    return Trial(
        stage="solver",
        changes={"policy": "none", **solver.changes, "steps": steps},
        seconds=float(steps),
        psnr_db=200,
        psnr_low=200,
        worse_by=worse_by,
        worse_high=worse_by,
        size_bytes=1,
        within=worse_by <= 0,
    )


class Player:
    """A judge of solvers that need so many steps each; `tried` are (solver, steps) in their order."""

    def __init__(self, needs: dict[Solver, float]) -> None:
        self.needs = needs
        self.tried: list[tuple[Solver, int]] = []

    def __call__(self, solver: Solver, steps: int) -> Trial:
        self.tried.append((solver, steps))
        return trial(solver, steps, (self.needs[solver] - steps) / 100)


def reaches(
    needs: dict[Solver, float], *, between: bool = True, refused: Callable[[Solver, int], bool] = lambda *_: False
) -> tuple[list[Reach], Player]:
    player = Player(needs)
    solvers = Solvers(tuple(needs), COUNTS, between, lambda *pair: "no" if refused(*pair) else None)
    return fewest_steps(solvers, player), player


def test_the_first_solver_walks_down_until_two_numbers_in_a_row_are_beyond_the_budget() -> None:
    (reach,), player = reaches({OWN: 20}, between=False)
    assert [steps for _, steps in player.tried] == [50, 37, 27, 20, 15, 11]
    assert reach.fewest == 20
    assert reach.more == [27, 37, 50]


def test_every_other_solver_begins_below_the_fewest_steps_so_far() -> None:
    ranked, player = reaches({OWN: 20, FIRST: 8, SECOND: 30}, between=False)
    assert [steps for solver, steps in player.tried if solver is FIRST] == [15, 11, 8, 6]
    assert [steps for solver, steps in player.tried if solver is SECOND] == [6]
    assert ranked[0].solver is FIRST
    assert ranked[0].fewest == 8


def test_a_solver_is_not_tried_where_it_can_not_be_taken() -> None:
    ranked, player = reaches({OWN: 50, FIRST: 8}, between=False, refused=lambda solver, steps: steps in (15, 6))
    assert not [steps for _, steps in player.tried if steps in (15, 6)]
    assert ranked[0].fewest == 8


@given(st.integers(5, 50), st.integers(5, 60))
def test_the_fewest_steps_of_the_best_are_known_to_one(first: int, second: int) -> None:
    ranked, _ = reaches({OWN: first, FIRST: second})
    assert ranked[0].fewest == max(min(first, second), COUNTS[-1])


def test_numbers_that_were_asked_for_are_not_refined() -> None:
    _, player = reaches({OWN: 17}, between=False)
    assert {steps for _, steps in player.tried} <= {*COUNTS}


def test_where_none_is_within_the_budget_the_nearest_is_gone_on_from() -> None:
    ranked, player = reaches({OWN: 90, FIRST: 70})
    assert [reach.fewest for reach in ranked] == [None, None]
    assert ranked[0].solver is FIRST
    assert ranked[0].start == 50
    assert len(player.tried) == 4


def test_a_solver_promises_by_the_steps_that_may_do_and_then_by_quality_just_below() -> None:
    def reach(solver: Solver, **worse_by: float) -> Reach:
        return Reach(
            solver, {int(steps[1:]): trial(solver, int(steps[1:]), worse) for steps, worse in worse_by.items()}
        )

    slow = reach(OWN, s20=0.0, s15=0.1)  # within at 20, maybe at 16
    fast = reach(FIRST, s8=0.0, s6=0.2)
    faster = reach(SECOND, s6=0.1)  # began below 8, and misses by less
    assert sorted([slow, fast, faster], key=lambda each: each.promise) == [faster, fast, slow]
    everywhere = reach(OWN, s8=-0.2, s6=-0.1)
    assert everywhere.promise[0] == 6


def test_a_solver_that_began_below_the_best_is_refined_where_it_misses_by_less() -> None:
    ranked, player = reaches({FIRST: 8, OWN: 7.9, SECOND: 7})  # the last one begins at 6
    assert (SECOND, 7) in player.tried
    assert (ranked[0].solver, ranked[0].fewest) == (SECOND, 7)
    assert ranked[1].solver in (OWN, FIRST)


def test_the_first_solver_is_one_that_is_within_the_budget_though_another_promises_more() -> None:
    ranked, _ = reaches({FIRST: 8, SECOND: 7.5})  # the second one was tried at 6 and 7 alone, and misses by less
    assert [(reach.solver, reach.fewest) for reach in ranked] == [(FIRST, 8), (SECOND, None)]


def test_a_number_of_steps_within_the_budget_forgives_one_beyond_it() -> None:
    lucky = {50: -1.0, 37: 1.0, 27: -1.0, 20: 1.0, 15: -1.0, 11: 1.0, 8: 1.0}
    solvers = Solvers((OWN,), COUNTS, False, lambda *_: None)
    (reach,) = fewest_steps(solvers, lambda solver, steps: trial(solver, steps, lucky[steps]))
    assert reach.fewest == 15
    assert reach.floor == 11
