"""The comparison of fewer steps with the cache: which trials are run, and what their figures are said to show."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from ditc.program import FULL, REUSE, Program, SegmentPlan, Step

Distances = Mapping[tuple[int, int], Sequence[float]]  # (steps, N) of UniPC -> Frechet distance of each seed


@pytest.fixture(scope="module")
def runner(results: ModuleType) -> ModuleType:
    import steps as module

    return module


@pytest.fixture(scope="module")
def figures(results: ModuleType) -> ModuleType:
    return sys.modules[results.step_results.__module__]


@pytest.fixture(scope="module")
def words(results: ModuleType) -> ModuleType:
    return sys.modules[results.step_tables.__module__]


def test_every_cell_has_its_first_seed_before_any_has_its_second(runner: ModuleType) -> None:
    todo = [(cell, seed) for _, cell, seed in runner.missing({}) if cell.group == runner.GROUPS[0]]
    seeds = [seed for _, seed in todo]
    assert seeds == sorted(seeds)
    assert {seed: seeds.count(seed) for seed in seeds} == dict.fromkeys(range(5), len(seeds) // 5)


def test_higher_orders_come_after_the_other_cells_of_a_seed(runner: ModuleType, results: ModuleType) -> None:
    names = [cell.name for cell in sys.modules["step_cells"].STEP_CELLS if cell.group == results.FLOAT]
    assert list(dict.fromkeys(names)) == ["alone", "order 1", "hold", "order 2", "order 3"]


def test_a_trial_that_is_there_is_not_run_again(runner: ModuleType) -> None:
    (digest, *_), *rest = runner.missing({})
    assert [other for other, *_ in runner.missing({digest: {}})] == [other for other, *_ in rest]


def test_settings_that_are_not_known_yet_are_left_for_later(
    runner: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = sys.modules["step_cells"]
    ready = cells.STEP_CELLS[0]
    unknown = replace(ready, settings={**ready.settings, "reuse": "no such reuse"})
    assert cells.known(ready)
    assert not cells.known(unknown)
    monkeypatch.setattr(runner, "STEP_CELLS", (unknown, ready))
    assert [cell for _, cell, _ in runner.missing({})] == [ready] * 5


def test_calls_of_the_network_are_steps_with_a_branch_that_computes(runner: ModuleType) -> None:
    segments = (SegmentPlan(name=FULL, compute=(True, True)), SegmentPlan(name=REUSE, compute=(False, False)))
    steps = tuple(Step(index=i, t=9.0 - i, segment=name) for i, name in enumerate((FULL, REUSE, REUSE, FULL, REUSE)))
    assert runner.computed_steps(Program(branches=("attn", "mlp"), steps=steps, segments=segments)) == 2


def cell(figures: ModuleType, steps: int, interval: int, distances: Sequence[float]) -> Any:
    """Return a cell of UniPC with trials of these distances; their recall falls as they grow."""
    cells = sys.modules["step_cells"]
    policy = "none" if interval == 1 else f"fora:{interval}"
    own = cells.step_cell(cells.FLOAT, "UniPC", steps, policy, "taylor")
    rows = {
        seed: {"computed": -(-steps // interval), "frechet_distance": value, "recall": 1 - value}
        for seed, value in enumerate(distances)
    }
    return figures.StepTrials(own, rows)


def results_of(figures: ModuleType, distances: Distances) -> Any:
    cells = tuple(cell(figures, *place, values) for place, values in distances.items())
    return figures.StepResults(cells, tuple(range(len(cells[0].rows))), 0)


def test_a_cell_that_is_lucky_with_one_seed_wins_nothing_by_it(figures: ModuleType) -> None:
    """It is the best by its mean, but on the other seeds it is not."""
    lucky, steady = (0.0, 0.5, 0.5), (0.4, 0.4, 0.4)
    own = results_of(figures, {(10, 1): (0.4, 0.4, 0.4), (20, 2): lucky, (50, 5): steady})
    (row,) = figures.duels(own, figures.CALLS)
    assert row.cached.steps == 20
    # chosen for seed 0: the steady one; for seeds 1 and 2: the lucky one
    assert row.distance.mean == pytest.approx((0.0 + 0.1 + 0.1) / 3)
    assert row.recall.mean == pytest.approx(-row.distance.mean)


def test_by_time_a_reuse_counts_as_its_share_of_a_step(figures: ModuleType) -> None:
    own = results_of(figures, {(10, 1): (0.5, 0.5), (20, 1): (0.4, 0.4), (50, 5): (0.3, 0.3)})
    assert [row.most for row in figures.duels(own, figures.CALLS)] == [10, 20]
    assert [row.most for row in figures.duels(own, 0.2)] == [20]  # 10 + 0.2 x 40 = 18
    assert figures.duels(own, 0.3) == []


def test_solvers_are_compared_among_themselves_where_others_are_left_out(figures: ModuleType) -> None:
    own = results_of(figures, {(10, 1): (0.5, 0.5), (20, 2): (0.3, 0.3)})
    leading = [
        figures.StepTrials(replace(t.cell, settings={**t.cell.settings, "spacing": "leading"}), t.rows)
        for t in own.cells
    ]
    both = replace(own, cells=(*own.cells, *leading))
    assert both.of(("UniPC",)).cells == own.cells
    assert both.of(("UniPC, leading",)).cells == tuple(leading)


def test_the_share_of_a_reuse_is_the_largest_that_was_measured(figures: ModuleType) -> None:
    shares = figures.reuse_shares()
    assert set(shares) == {"digits", "blocks of DiT-XL/2"}
    assert shares["blocks of DiT-XL/2"] < 0.05 < shares["digits"] < 0.3


def test_a_rival_may_have_up_to_the_next_number_of_steps(figures: ModuleType) -> None:
    own = results_of(figures, {(7, 1): (0.3, 0.3), (10, 1): (0.4, 0.4), (17, 1): (0.2, 0.2), (17, 2): (0.3, 0.3)})
    assert own.rival(9).steps == 7  # of those with at most 10 the best
    assert own.rival(10).steps == 7
    assert own.rival(12).steps == 17


def test_seeds_are_compared_when_every_cell_alone_and_of_order_1_has_them(
    figures: ModuleType, results: ModuleType
) -> None:
    """Cells that lack one of them are not compared, and what has been run of other seeds changes no figure."""
    cells = sys.modules["step_cells"]
    whole, later = [], []
    for own in cells.STEP_CELLS:
        if own.group == cells.FLOAT:
            (whole if own.name in ("alone", "order 1") else later).append(own)
    row = {"computed": 7, "frechet_distance": 0.4, "recall": 0.6}
    pairs = [(own, seed) for seed in (0, 1) for own in whole] + [(own, 0) for own in later] + [(whole[0], 2)]
    trials = {results.digest_of_trial(own, seed): row for own, seed in pairs}
    of_float = figures.step_results(trials)[cells.FLOAT]
    assert of_float.seeds == (0, 1)
    assert of_float.run == len(pairs)
    assert {trials.cell.name for trials in of_float.cached} == {"order 1"}
    assert set(of_float.cells[0].rows) == {0, 1}


def duel(figures: ModuleType, most: int, distance: Sequence[float], recall: Sequence[float], n: int = 5) -> Any:
    """Return a duel with these intervals."""
    effects = (sys.modules["effects"].Effect(sum(ends) / 2, *ends, 0.5, n) for ends in (distance, recall))
    side = cell(figures, most, 1, (0.4,))
    return figures.Duel(most, side, side, *effects)


def test_words_follow_the_intervals(figures: ModuleType, words: ModuleType) -> None:
    rows = [
        duel(figures, 7, (-0.2, -0.1), (0.1, 0.2)),
        duel(figures, 10, (-0.1, -0.01), (0.01, 0.1)),
        duel(figures, 17, (-0.2, 0.1), (-0.1, 0.2)),
        duel(figures, 20, (0.1, 0.2), (-0.2, -0.1)),
    ]
    assert words.verdicts(rows) == (
        "the cache's distance is smaller at 7 and 10, larger at 20, undecided at 17; "
        "its recall is higher at 7 and 10, lower at 20."
    )
    assert words.verdicts(rows[2:3]) == "the cache's distance is undecided at 17; its recall is undecided at all."


def test_a_single_seed_shows_nothing(figures: ModuleType, words: ModuleType) -> None:
    assert words.verdicts([duel(figures, 7, (-0.2, -0.1), (0.1, 0.2), n=1)]) == words.SINGLE
    own = results_of(figures, {(50, 1): (0.5,), (20, 2): (0.4,)})
    ddim = figures.StepTrials(
        replace(own.cells[0].cell, settings={**own.cells[0].cell.settings, "sampler": "ddim"}), own.cells[0].rows
    )
    lines = words.conclusions({sys.modules["step_cells"].FLOAT: replace(own, cells=(*own.cells, ddim))})
    assert lines[0] == f"- **No verdict**: {words.SINGLE}"
    assert not any("smaller at" in text for text in lines)


def test_it_is_said_how_few_calls_come_as_close_as_ddim(figures: ModuleType, words: ModuleType) -> None:
    own = results_of(figures, {(10, 1): (0.5, 0.5), (17, 1): (0.4, 0.4), (20, 2): (0.3, 0.3), (20, 5): (0.6, 0.6)})
    cells = sys.modules["step_cells"]
    ddim = figures.StepTrials(
        cells.step_cell(cells.FLOAT, "DDIM", 50, "none", "hold"),
        {s: {**own.cells[0].rows[s], "computed": 50} for s in (0, 1)},
    )
    (text,) = words.reach(replace(own, cells=(*own.cells, ddim)))
    assert text == (
        "- **Calls that come as close as DDIM's 50 steps** (0.500): alone 10 (UniPC, 10 steps: 0.500), "
        "with a cache 10 (UniPC, 20 steps, N = 2, order 1: 0.300)."
    )


def test_what_stands_out_is_counted_after_correction(words: ModuleType) -> None:
    effect = sys.modules["effects"].Effect
    changes = [effect(-0.2, -0.3, -0.1, 0.001, 5), effect(-0.1, -0.2, -0.01, 0.04, 5), effect(0.2, 0.1, 0.3, 0.002, 5)]
    changes.append(effect(-0.1, -0.2, -0.01, 0.04, 5))  # two of 0.04: neither stays
    assert (
        words.stood_out(changes)
        == "closer in 3 of 4 by the mean; significantly closer in 1, significantly farther in 1"
    )


def test_what_has_not_been_run_is_said(figures: ModuleType, words: ModuleType, results: ModuleType) -> None:
    own = replace(results_of(figures, {(10, 1): (0.5, 0.5), (20, 2): (0.4, 0.4)}), run=4)
    (text,) = words.state({results.FLOAT: own})
    assert text.startswith("- Trials that have been run: 4 of ")
    assert text.endswith("seeds that are compared: 2. Not run yet: hold, order 2, order 3, W8A8.")


def test_the_picture_is_well_formed_and_has_a_line_for_each_side(figures: ModuleType, results: ModuleType) -> None:
    own = results_of(figures, {(10, 1): (0.5, 0.4), (20, 1): (0.4, 0.4), (50, 5): (0.4, 0.3)})
    picture = ElementTree.fromstring(results.step_picture(own))
    paths = [part for part in picture.iter() if part.tag.endswith("path")]
    assert [part.get("stroke-dasharray") for part in paths] == ["5 3", None] * 2  # of each panel, alone and cached


def test_what_is_told_of_the_searches_is_in_their_record() -> None:
    """Figures of docs/tuning.md and ADR 0032 about the cache against fewer steps."""
    root = Path(__file__).parents[2]
    searches = json.loads((root / "benchmarks/quality/tuned_steps.json").read_text())["searches"]
    by_distance, by_both = searches["distance"], searches["distance and recall"]
    cached = {"sampler": "unipc", "spacing": "leading", "steps": 10, "policy": "fora:2", "reuse": "taylor"}
    for search, steps, times_as_fast in ((by_distance, 7, "1.17"), (by_both, 9, "1.50")):
        rival, chosen = search["confirmed"]
        assert (rival["changes"]["sampler"], rival["changes"]["steps"]) == ("unipc", steps)
        assert cached.items() <= chosen["changes"].items()
        assert f"{rival['seconds'] / chosen['seconds']:.2f}" == times_as_fast
        assert chosen["worse_high"] < 0.05
        assert chosen["recall_low"] > -0.05
    assert f"{by_distance['confirmed'][0]['recall_by']:.3f}" == "-0.064"
    told = "7 steps", "0.064", "9", "1.17", "1.5", "`fora:2`"
    for page in ("docs/tuning.md", "docs/adr/0032-fewer-steps-and-the-default.md"):
        assert all(each in (root / page).read_text() for each in told)


def test_what_is_told_of_the_solver_in_full_and_cached_is_in_the_trials() -> None:
    """UniPC in 34 steps, in docs/results.md: alone, and with N = 5 and order 3."""
    root = Path(__file__).parents[2]
    trials = json.loads((root / "benchmarks/quality/steps.json").read_text())["trials"].values()
    solver = {"sampler": "unipc", "steps": 34, "precision": "fp32"}
    cells = ({"policy": "none"}, {"policy": "fora:5", "reuse": "taylor:3"})
    rows = [
        [
            trial
            for trial in trials
            if {**solver, **cell}.items() <= trial["settings"].items() and not trial["settings"].get("spacing")
        ]
        for cell in cells
    ]
    assert [len(each) for each in rows] == [5, 5]
    alone, cached = (
        {name: fmean(trial[name] for trial in each) for name in ("frechet_distance", "recall", "precision")}
        for each in rows
    )
    page = (root / "docs/results.md").read_text()
    assert f"{alone['frechet_distance']:.3f} alone, {cached['frechet_distance']:.3f} with N = 5" in page
    assert f"recall rises ({alone['recall']:.3f} to {cached['recall']:.3f})" in page
    assert f"precision falls ({alone['precision']:.3f} to {cached['precision']:.3f})" in page
