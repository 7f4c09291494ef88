"""The worth of each forecast of a reuse, in floating point and in W8A8, at few computed steps.

    python benchmarks/quality/forecasts.py [--hours 2]
    python benchmarks/quality/results.py --write

Runs every trial of `forecast_cells.py` that forecasts.json doesn't hold yet; stopped and started again, it goes on.
"""

from __future__ import annotations

from pathlib import Path

from cells import BASE
from forecast_cells import FORECAST_CELLS
from trial_runs import run_trials

HERE = Path(__file__).parent

if __name__ == "__main__":
    run_trials(FORECAST_CELLS, {"base": dict(BASE)}, HERE / "forecasts.json", Path("out/forecasts"))
