"""The cells of the comparison of forecasts: every way to forecast a reuse, at 17, 10, 8 and 7 computed of 50 steps."""

from __future__ import annotations

from collections.abc import Mapping

from cells import Cell, Settings

__all__ = ["FORECASTS", "FORECAST_CELLS", "INTERVALS", "PRECISIONS", "SEEDS", "TAYLOR"]

SEEDS, IMAGES = 2, 1_000
INTERVALS: Mapping[int, int] = {5: 10, 3: 17, 7: 8, 8: 7}  # N -> computed steps, in the order in which they are run
# as ditc compiles by default: 800 points, TAP, smoothed
PRECISIONS: Mapping[str, Settings] = {
    "FP": {"precision": "fp32"},
    "W8A8": {"precision": "w8a8", "select": "tap", "smooth": "smooth"},
}
TAYLOR = "taylor"  # what the others are held against
FORECASTS = (TAYLOR, "learned", "learned:closed", "taylor:2", "hermite", "hold", "chebyshev", "taylor:3")

FORECAST_CELLS: tuple[Cell, ...] = tuple(
    Cell(f"forecasts, {name}", reuse, "plain", {"policy": f"fora:{n}", "reuse": reuse, **precision}, SEEDS, IMAGES)
    for n in INTERVALS
    for reuse in FORECASTS
    for name, precision in PRECISIONS.items()
)
