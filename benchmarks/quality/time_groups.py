"""Scales of groups of steps, and points from each, beside one scale and one for each step: DDIM-50, no cache.

    PYTHONPATH=benchmarks/quality python benchmarks/quality/time_groups.py [--hours 0.5]

A first look: two seeds of few images, nothing smoothed. Stopped and started again, it goes on (`trial_runs.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

from cells import Cell, Settings
from trial_runs import run_trials

HERE = Path(__file__).parent
SEEDS, IMAGES = 2, 64
GROUPS: Settings = {"scales": "time-groups"}
POINTS: Settings = {"select": "time-groups"}
ROWS: Mapping[str, Settings] = {
    "static": {"select": "random"},
    "static, points of 10 groups": POINTS,
    "5 groups": {"select": "random", **GROUPS, "time_groups": 5},
    "10 groups": {"select": "random", **GROUPS},
    "10 groups, points of each": {**GROUPS, **POINTS},
    "each step": {"select": "random", "scales": "per-step"},
}


def cells() -> Iterator[Cell]:
    """Yield the cells that say most first."""
    for model, (name, row) in product(("stressed", "plain"), ROWS.items()):
        settings = {"policy": "none", "smooth": "none", "points": 400, **row}
        yield Cell("time groups", f"{model}, {name}", model, settings, SEEDS, IMAGES)


if __name__ == "__main__":
    note = f"a first look: {SEEDS} seeds of {IMAGES} images each"
    run_trials(cells(), {"note": note}, HERE / "time_groups.json", Path("out/quality"))
