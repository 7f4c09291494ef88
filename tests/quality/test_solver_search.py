"""The search over samplers and steps, on a machine and images that are played: fewer steps against a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from ditc.compiler.options import CompileOptions
from ditc.errors import CheckError
from ditc.quality.cached_steps import Pace, computed_steps
from ditc.quality.options import TuneOptions
from ditc.quality.search import SOLVER, Again, Search
from ditc.quality.solvers import Solver, Solvers
from ditc.quality.trials import Changes, Trial

OPTIONS = TuneOptions(worse_by=0.05, intervals=(2, 3, 5))
BASE = CompileOptions()
COUNTS = (50, 37, 27, 20, 15, 11, 8, 6)
UNIPC = Solver((("sampler", "unipc"),))
SLOW, FAST = 40, 6  # computed steps that the base's solver, and UniPC, need


@dataclass
class World:
    """Images and times: distance falls with the steps, a reuse costs `lost`, holding `held`, INT8 `rounding`.

    On fresh noise the distance of each candidate is by `luck` of it worse. `share` is that of a reuse in time; `turns`
    are seconds per image of candidates in turn, by policy, where they are others.
    """

    lost: float = 0.001
    rounding: float = 0.01
    held: float = 0.02
    share: float = 0.2
    luck: Callable[[Changes], float] = lambda _: 0.0
    turns: Callable[[Trial], float] | None = None
    asked: list[tuple[str, Changes]] = field(default_factory=list)

    def distance(self, changes: Changes) -> float:
        """From the anchor's FP images: never below by a candidate's own steps."""
        steps, policy = int(changes.get("steps") or BASE.steps), str(changes["policy"])
        needs = FAST if changes.get("sampler") == "unipc" else SLOW
        reused = steps - computed_steps(policy, steps)
        held = self.held * (changes.get("reuse") == "hold") if reused else 0.0
        return 0.05 * needs / steps + self.lost * reused + held + (self.rounding if "precision" not in changes else 0)

    def seconds(self, changes: Changes) -> float:
        steps, policy = int(changes.get("steps") or BASE.steps), str(changes["policy"])
        computed = computed_steps(policy, steps)
        return (computed + self.share * (steps - computed)) * (3 if "precision" in changes else 1)

    def judge(self, stage: str, changes: Changes, worse: float = 0.0) -> Trial:
        self.asked.append((stage, changes))
        worse_by = self.distance(changes) + worse
        return Trial(
            stage=stage,
            changes=changes,
            seconds=self.seconds(changes),
            psnr_db=40,
            psnr_low=40,
            worse_by=worse_by,
            worse_high=worse_by,
            size_bytes=1,
            within=worse_by <= 0.05 + 1e-9,
            recall_by=-0.01,
            recall_low=-0.02,
        )

    def confirm(self, trial: Trial) -> Trial:
        return self.judge("confirm", trial.changes, self.luck(trial.changes))

    def in_turn(self, trials: Sequence[Trial]) -> list[float]:
        return [trial.seconds if self.turns is None else self.turns(trial) for trial in trials]

    def search(self, base: CompileOptions = BASE, **changes: Any) -> Search:
        solvers = Solvers((Solver(), UNIPC), COUNTS, True, lambda *_: None)
        options = OPTIONS.model_copy(update=changes)
        again = Again(self.confirm, self.in_turn)
        search = Search(base, options, self.judge, lambda _: 0.1, solvers=solvers, again=again)
        search.explore()
        return search


def stage(search: Search, name: str) -> list[Trial]:
    return [trial for trial in search.measured if trial.stage == name]


def test_solvers_are_tried_in_floating_point_and_without_a_cache() -> None:
    solved = stage(World().search(), SOLVER)
    assert all(trial.changes["precision"] == "fp32" and not trial.cached for trial in solved)
    assert {trial.changes.get("sampler") for trial in solved} == {None, "unipc"}
    assert solved[0].changes.get("steps") is None


def test_the_quantizer_is_chosen_at_the_fewest_steps_of_the_best_solver() -> None:
    quantizers = stage(World().search(), "quantizer")
    assert len(quantizers) == 8
    assert {(trial.changes["sampler"], trial.changes["steps"]) for trial in quantizers} == {("unipc", FAST)}


def test_where_int8_misses_the_budget_there_more_steps_make_up_for_it() -> None:
    search = World(rounding=0.01).search()
    steps = [trial.changes["steps"] for trial in stage(search, "steps")]
    assert steps == [8, 7]  # 0.05 * 6 / 8 + 0.01 is within, at 6 it was not, nor at 7
    assert not stage(search, "precision")
    assert not stage(World(rounding=0.0).search(), "steps")


def test_int8_that_misses_the_budget_at_any_steps_is_gone_on_from_at_the_most() -> None:
    search = World(rounding=0.2).search()
    assert [trial.changes["steps"] for trial in stage(search, "steps")] == [8, 11, 15, 20, 27, 37]
    assert stage(search, "precision")[0].changes["steps"] == 37


def test_a_cache_that_beats_the_solver_alone_is_chosen_and_held_against_it() -> None:
    search = World().search()
    chosen = search.choose()
    assert chosen.cached
    assert search.rival is not None
    assert not search.rival.cached
    assert search.rival.changes["steps"] == 8
    assert chosen.seconds < search.rival.seconds
    assert [trial.stage for trial in search.confirmed] == ["confirm", "confirm"]
    (line,) = [note for note in search.notes if "against fewer steps" in note]
    assert "times as fast" in line
    assert "policy none" in line
    assert f"policy {chosen.changes['policy']}" in line


def test_where_reuses_cost_too_much_the_solver_alone_is_chosen() -> None:
    search = World(lost=0.05).search()
    chosen = search.choose()
    assert chosen.changes["policy"] == "none"
    assert chosen.changes["steps"] == 8
    assert chosen == search.rival
    assert "no candidate with a cache that should be faster is within the budget" in search.notes[-1]


def test_a_rival_that_is_as_fast_in_turn_is_chosen() -> None:
    search = World(turns=lambda trial: 1.0 if trial.cached else 1.05).search()
    chosen = search.choose()
    assert chosen == search.rival
    assert "1.05 times as fast as no cache" in search.notes[-1]
    assert [trial.seconds for trial in search.confirmed] == [1.05, 1.0]


def test_what_only_won_by_luck_makes_way_for_the_next() -> None:
    search = World().search()
    lucky = search.choose().changes
    world = World(luck=lambda changes: 1.0 if changes == lucky else 0.0)
    again = world.search()
    chosen = again.choose()
    assert chosen.changes != lucky
    assert chosen.cached
    assert "beyond the budget on other noise, so not chosen" in " ".join(again.notes)
    assert [trial.within for trial in again.confirmed] == [True, False, True]


def test_where_other_noise_confirms_none_that_is_said() -> None:
    search = World(luck=lambda _: 1.0).search()
    with pytest.raises(CheckError, match="no candidate within the budget keeps to it on other noise"):
        search.choose()


def test_a_candidate_in_floating_point_is_not_chosen_where_integers_were_asked_for() -> None:
    search = World(rounding=1.0).search()
    assert [trial for trial in search.measured if trial.within]
    with pytest.raises(CheckError, match=r"no candidate is within the budget; the nearest is .*ranges mse"):
        search.choose()


def test_without_integers_a_solver_alone_may_be_chosen_as_it_is() -> None:
    search = World(lost=1.0, rounding=0).search(CompileOptions(precision="fp32"))
    chosen = search.choose()
    assert chosen.changes == {"policy": "none", "vc": "none", "sampler": "unipc", "steps": FAST}


def test_no_cache_that_would_be_slower_than_the_solver_alone_is_tried() -> None:
    search = World().search()
    alone = next(trial for trial in stage(search, "steps") if trial.within)
    assert all(trial.seconds < alone.seconds for trial in stage(search, "schedule"))
    assert {trial.changes["sampler"] for trial in stage(search, "schedule")} == {"unipc"}  # the other needs 40 steps
    assert len(search.measured) < 60


def test_a_time_that_only_a_cache_keeps_to_is_not_given_to_the_solver_alone() -> None:
    world = World(turns=lambda trial: 1.0 if trial.cached else 1.05)
    fastest = min(trial.seconds for trial in World().search().candidates if trial.within)
    chosen = world.search(seconds=fastest).choose()
    assert chosen.cached


def test_of_equal_steps_the_better_one_is_confirmed_whatever_disturbed_its_times() -> None:
    world = World(rounding=0.0, held=0.01, turns=lambda trial: 1.0 if trial.cached else 1.5)
    pair = {"sampler": "unipc", "steps": 12, "policy": "fora:2", "vc": "none"}
    alone = world.judge("quantizer", {"sampler": "unipc", "steps": 8, "policy": "none"})
    held, extrapolated = (world.judge("schedule", {**pair, "reuse": reuse}) for reuse in ("hold", "taylor"))
    disturbed = extrapolated.model_copy(update={"seconds": 1.3 * extrapolated.seconds})
    again = Again(world.confirm, world.in_turn)
    search = Search(
        BASE,
        OPTIONS,
        world.judge,
        lambda _: 0.1,
        measured=[alone, held, disturbed],
        again=again,
        pace=Pace(1.0),
        paced=alone,
    )
    assert held.within
    assert search.choose() == disturbed


def test_the_same_search_finds_the_same() -> None:
    first, second = World(), World()
    assert first.search().choose() == second.search().choose()
    assert first.asked == second.asked
