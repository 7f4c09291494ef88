"""The figures of `forecasts.py` as Markdown: a line for each forecast, precision and number of computed steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cells import Cell
from effects import Effect, Row, Trials, distance, effect_of, psnr, recall, rows_of
from forecast_cells import FORECAST_CELLS, INTERVALS, PRECISIONS, SEEDS, TAYLOR
from tables import shown

__all__ = ["FORECASTS_MARK", "forecast_page"]

FORECASTS_MARK = "forecasts"  # of its place in docs/results.md
COLUMNS = ("computed", "", "`--reuse`", "trials", "distance less FP's", "PSNR", "PSNR less `taylor`'s", "recall")
Rows = Mapping[int, Row]  # by seed
Place = tuple[int, str, str]  # computed steps, precision, reuse


def forecast_page(trials: Trials) -> list[str]:
    """Return the table, and what is open."""
    tried = {place_of(cell): rows_of(cell, trials) for cell in FORECAST_CELLS}
    lines = [f"| {' | '.join(COLUMNS)} |".replace("|  |", "| |"), "|---" * len(COLUMNS) + "|"]
    lines += [line for place in in_order() if (line := line_of(place, tried)) is not None]
    done, every = sum(map(len, tried.values())), SEEDS * len(FORECAST_CELLS)
    return [*lines, "", f"Trials that have been run: {done} of {every}; a row that isn't here is open."]


def place_of(cell: Cell) -> Place:
    computed = INTERVALS[int(cell.settings["policy"].removeprefix("fora:"))]
    return computed, cell.group.removeprefix("forecasts, "), cell.name


def in_order() -> Iterator[Place]:
    """Yield the most computed steps first, and precisions side by side."""
    precisions = list(PRECISIONS)
    yield from sorted(map(place_of, FORECAST_CELLS), key=lambda place: (-place[0], precisions.index(place[1])))


def line_of(place: Place, tried: Mapping[Place, Rows]) -> str | None:
    """Return the line of a cell; None where it has not been run."""
    rows, beside = tried[place], tried[(place[0], place[1], TAYLOR)]
    if not rows:
        return None
    change = less(rows, beside) if place[2] != TAYLOR else None
    values = (
        str(place[0]),
        place[1],
        f"`{place[2]}`",
        str(len(rows)),
        shown(effect_of([distance(row) for row in rows.values()])),
        shown(effect_of([psnr(row) for row in rows.values()]), "{:.1f}"),
        "" if change is None else shown(change, "{:+.2f}"),
        shown(effect_of([recall(row) for row in rows.values()])),
    )
    return f"| {' | '.join(values)} |"


def less(rows: Rows, beside: Rows) -> Effect | None:
    """Return the PSNR less that of another cell, over the seeds of both; None where they share none."""
    shared = [seed for seed in rows if seed in beside]
    return effect_of([psnr(rows[seed]) - psnr(beside[seed]) for seed in shared]) if shared else None
