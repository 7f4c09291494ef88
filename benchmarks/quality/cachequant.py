"""CacheQuant's rows beside those that they are held against, on the reference model: W8A8, DDIM-50, N = 3.

Trials are those of `trial.py`, fewer and smaller than the experiment's: two seeds of 500 images say where to look, not
what a default should be. Stopped and started again, it goes on (`trial_runs.py`).

    PYTHONPATH=benchmarks/quality python benchmarks/quality/cachequant.py [--cells "dps:3, hold" ...] [--hours 0.5]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cells import Cell, Settings
from trial import SUBJECTS, watched
from trial_runs import run_trials

from ditc.compiler.options import CompileOptions
from ditc.policies import schedule_for

HERE = Path(__file__).parent
SEEDS, IMAGES = 2, 500
DEFAULT: Settings = {"smooth": "smooth", "select": "tap"}
ROWS: Mapping[str, Settings] = {
    "fora:3, hold": {"policy": "fora:3"},
    "dps:3, hold": {"policy": "dps:3"},
    "fora:3, taylor": {"policy": "fora:3", "reuse": "taylor"},
    "dps:3, taylor": {"policy": "dps:3", "reuse": "taylor"},
    "smoothcache at fora:3's share": {"policy": "smoothcache:0.18"},
    "fora:3, affine": {"policy": "fora:3", "reuse": "affine"},
    "fora:3, affine:open": {"policy": "fora:3", "reuse": "affine:open"},
    "dps:3, affine": {"policy": "dps:3", "reuse": "affine"},
    "fora:3, dec-quant": {"policy": "fora:3", "correct": "dec-quant"},
    "fora:3, w4a8": {"policy": "fora:3", "precision": "w4a8"},
    "fora:3, w4a8, dec-quant": {"policy": "fora:3", "precision": "w4a8", "correct": "dec-quant"},
}
CELLS = tuple(Cell("cachequant", name, "plain", {**DEFAULT, **row}, SEEDS, IMAGES) for name, row in ROWS.items())


def computed_share(cell: Cell, seed: int, work: Path) -> dict[str, float]:
    """Return the share of the branches' evaluations that compute, as `computed`."""
    options, model = CompileOptions(**cell.every_setting, seed=seed), SUBJECTS[cell.model].open()
    schedule = schedule_for(options.policy, model.spec, options.steps, watched(model, options, work))
    return {"computed": schedule.computed_fraction}


if __name__ == "__main__":
    note = f"a first look: at most {SEEDS} seeds of {IMAGES} images each"
    run_trials(CELLS, {"note": note}, HERE / "cachequant.json", Path("out/quality"), computed_share)
