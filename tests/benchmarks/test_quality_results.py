"""The statistics and tables of the quality experiment."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def statistics(results: ModuleType) -> ModuleType:
    return sys.modules["effects"]


def test_the_pages_are_what_the_script_writes_from_the_committed_data(results: ModuleType) -> None:
    experiment = json.loads((results.HERE / "experiment.json").read_text())
    steps = results.step_results(json.loads((results.HERE / "steps.json").read_text())["trials"])
    cells = {group: results.tried_cells(group, experiment["trials"]) for group in results.GROUPS}
    forecasts = json.loads((results.HERE / "forecasts.json").read_text())["trials"]
    page = (results.DOCS / "results.md").read_text()
    assert results.renewed(page, cells, steps, forecasts) == page
    assert results.tables_page(experiment, cells, steps) == results.TABLES.read_text()
    assert results.step_picture(steps[results.FLOAT]) == results.PICTURE.read_text()


def test_every_group_has_its_table(results: ModuleType) -> None:
    assert set(results.HEADINGS) == set(results.GROUPS)


def test_a_row_that_no_trial_has_is_named(results: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no trial of tap, ddim fora:3, in the group ddim"):
        results.summary([sys.modules["tables"].Rows("ddim", "ddim", "fora:3", ("tap",))], {})


def test_intervals_cover_the_mean_as_often_as_they_say(statistics: ModuleType) -> None:
    rng = np.random.default_rng(0)
    effects = [statistics.effect_of(rng.normal(3, 2, 5)) for _ in range(2000)]
    covered = np.mean([effect.low <= 3 <= effect.high for effect in effects])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_without_an_effect_p_is_below_5_percent_once_in_20(statistics: ModuleType) -> None:
    rng = np.random.default_rng(1)
    p = [statistics.effect_of(rng.normal(0, 2, 5)).p for _ in range(2000)]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.015)


def test_holm_stops_at_the_first_that_fails(statistics: ModuleType) -> None:
    """Levels are 0.05 / 4, / 3, / 2, / 1 in the order of p: 0.03 fails against 0.025, and 0.04 with it."""
    effects = [statistics.Effect(0, 0, 0, p, 5) for p in (0.04, 0.001, 0.03, 0.012)]
    assert statistics.significant(effects) == [False, True, False, True]


def trial(distance: float) -> dict[str, Any]:
    return {
        "found": {"frechet_distance": 5 + distance, "recall": 0.62},
        "fp": {"frechet_distance": 5.0, "recall": 0.65},
        "psnr_db": 40.0,
        "variance_ratio": 0.99,
    }


def test_a_table_holds_every_cell_to_fp_and_to_the_naive_one_of_its_seeds(results: ModuleType) -> None:
    cells = {
        cell.name: cell
        for cell in results.CELLS
        if (cell.group, cell.model) == ("ddim", "stressed")
        and cell.name in ("naive", "vc std", "tap")
        and cell.every_setting["policy"] == "fora:3"
    }
    distances = {"naive": (2.0, 4.0, 3.0), "vc std": (1.9, 4.0, 3.2), "tap": (9.0,)}  # one of tap: no interval
    trials = {
        results.digest_of_trial(cells[name], seed): trial(value)
        for name, values in distances.items()
        for seed, value in enumerate(values)
    }
    lines = results.table(results.tried_cells("ddim", trials))
    rows = [line.split(" | ") for line in lines[2:]]
    assert [row[3] for row in rows] == ["naive", "tap", "vc std"]
    assert rows[0][4:7] == ["3 x 2,000", "+3.000 (+0.516 to +5.484)", ""]
    assert rows[1][4:9] == ["1 x 2,000", "+9.000", "+7.000", "-0.030", "40.0"]
    assert rows[2][5:7] == ["+3.033 (+0.400 to +5.666)", "+0.033 (-0.346 to +0.413)"]


def test_a_forecast_is_held_against_taylor_of_its_own_precision_and_seeds(results: ModuleType) -> None:
    cells = {(cell.group, cell.name): cell for cell in sys.modules["forecast_cells"].FORECAST_CELLS[:16]}
    assert len(cells) == 16  # of one N
    values = {
        ("forecasts, FP", "taylor"): (40.0, 41.0),
        ("forecasts, FP", "learned"): (41.0, 42.0),
        ("forecasts, W8A8", "taylor"): (30.0,),
        ("forecasts, W8A8", "learned"): (28.0,),
    }
    trials = {
        results.digest_of_trial(cells[place], seed): {**trial(0.5), "psnr_db": value}
        for place, own in values.items()
        for seed, value in enumerate(own)
    }
    lines = [line.split(" | ") for line in results.forecast_page(trials)]
    assert [line[:4] for line in lines[2:6]] == [
        ["| 10", precision, f"`{reuse}`", str(len(values["forecasts, " + precision, reuse]))]
        for precision in ("FP", "W8A8")
        for reuse in ("taylor", "learned")
    ]
    assert [line[6] for line in lines[2:6]] == ["", "+1.00 (+1.00 to +1.00)", "", "-2.00"]
    assert lines[-1] == ["Trials that have been run: 6 of 128; a row that isn't here is open."]


def test_a_table_goes_between_its_marks_and_nowhere_else(results: ModuleType) -> None:
    text = "a\n<!-- main -->\nold\n<!-- end of main -->\nb"
    assert results.written(text, "main", ["1", "2"]) == "a\n<!-- main -->\n\n1\n2\n\n<!-- end of main -->\nb"
    with pytest.raises(SystemExit, match="no place for the table of bits"):
        results.written(text, "bits", [])


def test_every_cell_has_a_digest_of_its_own_in_its_group(results: ModuleType) -> None:
    for group in {cell.group for cell in results.CELLS}:
        digests = [results.digest_of_trial(cell, 0) for cell in results.CELLS if cell.group == group]
        assert len(set(digests)) == len(digests)
