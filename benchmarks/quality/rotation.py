"""Rotation beside smoothing, alone and together, on the reference model, plain and stressed: DDIM-50, no cache.

    PYTHONPATH=benchmarks/quality python benchmarks/quality/rotation.py [--hours 0.5]

A first look: one seed of few images. Stopped and started again, it goes on (`trial_runs.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

from cells import Cell, Settings
from trial_runs import run_trials

HERE = Path(__file__).parent
SEEDS, IMAGES = 1, 64
SMOOTH: Settings = {"smooth": "smooth"}
ROWS: Mapping[str, Settings] = {
    "neither": {},
    "smooth": SMOOTH,
    "rotate 32": {"rotate": 32},
    "smooth + rotate 32": {**SMOOTH, "rotate": 32},
    "rotate 128": {"rotate": 128},
    "smooth + rotate 128": {**SMOOTH, "rotate": 128},
}


def cells() -> Iterator[Cell]:
    """Yield the cells that say most first."""
    for (name, row), model, precision in product(ROWS.items(), ("stressed", "plain"), ("w8a8", "w4a8")):
        settings = {"policy": "none", "precision": precision, "points": 256, **row}
        yield Cell("rotation", f"{model}, {precision}, {name}", model, settings, SEEDS, IMAGES)


if __name__ == "__main__":
    note = f"a first look: {SEEDS} seed of {IMAGES} images each"
    run_trials(cells(), {"note": note}, HERE / "rotation.json", Path("out/quality"))
