"""The effects that the trials of the experiment show: against FP and one other cell, with intervals and stars.

A trial is a compile and its images, all from one seed, so an interval over trials covers the choice of calibration
points and the noise of the images at once. Intervals are Student's t at 95 %, the differences are paired by seed. A
star marks a difference that stays significant at 5 % after Holm's correction for all of its kind in the group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from cells import BASE, CELLS, Cell
from scipy import stats
from trial import digest_of_trial

__all__ = [
    "BESIDE",
    "GROUPS",
    "NAIVE",
    "Effect",
    "Row",
    "Trials",
    "TriedCell",
    "distance",
    "effect_of",
    "psnr",
    "recall",
    "significant",
    "tried_cells",
    "variance",
]

LEVEL = 0.95
GROUPS = tuple(dict.fromkeys(cell.group for cell in CELLS))
Row = Mapping[str, Any]
Trials = Mapping[str, Row]
Measure = Callable[[Row], float]
# what the cells of a group are held against beside FP: the naive combination, but for those named here
BESIDE = {"seven": "w8a8"}
NAIVE = "naive"


@dataclass(frozen=True)
class Effect:
    """A mean over trials, its interval, and the probability of one at least as far from 0 if there is none."""

    mean: float
    low: float
    high: float
    p: float
    n: int


@dataclass(frozen=True)
class TriedCell:
    """A cell with the trials of it that have been run, by seed, and those of the cell that it is held against."""

    cell: Cell
    rows: Mapping[int, Row]
    beside: Mapping[int, Row]

    def effect(self, measure: Measure) -> Effect:
        """Of a measure, over all trials."""
        return effect_of([measure(row) for row in self.rows.values()])

    @property
    def change(self) -> Effect | None:
        """Of the Frechet distance, against the other cell with the same seeds; None where it is that itself."""
        shared = [seed for seed in self.rows if seed in self.beside]
        changes = [distance(self.rows[seed]) - distance(self.beside[seed]) for seed in shared]
        return effect_of(changes) if any(changes) else None


def distance(row: Row) -> float:
    """Return the distance from the real digits less that of FP's images of the same noise."""
    return float(row["found"]["frechet_distance"] - row["fp"]["frechet_distance"])


def recall(row: Row) -> float:
    """Return the part of the real digits among the images less that among FP's of the same noise."""
    return float(row["found"]["recall"] - row["fp"]["recall"])


def psnr(row: Row) -> float:
    return float(row["psnr_db"])


def variance(row: Row) -> float:
    return float(row["variance_ratio"])


def effect_of(values: Sequence[float]) -> Effect:
    """Return Student's t; one trial alone has no interval, and shows nothing."""
    numbers = np.asarray(values, np.float64)
    n, mean = len(numbers), float(numbers.mean())
    if n == 1:
        return Effect(mean, -np.inf, np.inf, 1.0, n)
    error = float(numbers.std(ddof=1) / np.sqrt(n))
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    return Effect(mean, mean - half, mean + half, p, n)


def significant(effects: Sequence[Effect]) -> list[bool]:
    """Run Holm's step-down procedure over all of them."""
    order = np.argsort([effect.p for effect in effects])
    stars = [False] * len(effects)
    for rank, place in enumerate(order):
        if effects[place].p > (1 - LEVEL) / (len(effects) - rank):
            break
        stars[place] = True
    return stars


def rows_of(cell: Cell, trials: Trials) -> dict[int, Row]:
    """Return the trials of a cell that have been run, by seed."""
    digests = {seed: digest_of_trial(cell, seed) for seed in range(cell.seeds)}
    return {seed: trials[digest] for seed, digest in digests.items() if digest in trials}


def naive_of(cell: Cell) -> Cell:
    """Return the naive combination at a cell's sampler, schedule and precision."""
    shared = {name: value for name, value in cell.every_setting.items() if name in ("sampler", "policy", "precision")}
    return Cell(cell.group, "naive", cell.model, {**BASE, **shared}, cell.seeds, cell.images)


def eight_bits_of(cell: Cell) -> Cell:
    """Return the same settings with eight bits of weights."""
    settings = {name: value for name, value in cell.settings.items() if name != "precision"}
    return replace(cell, name=BESIDE["seven"], settings=settings)


def tried_cells(group: str, trials: Trials) -> list[TriedCell]:
    """Return the cells of a group that have been tried."""
    tried, other = {}, eight_bits_of if group in BESIDE else naive_of
    for cell in CELLS:
        rows = rows_of(cell, trials)
        if cell.group == group and rows:
            name = (cell.model, cell.name, *(cell.every_setting[key] for key in ("sampler", "policy")))
            tried[name] = TriedCell(cell, rows, rows_of(other(cell), trials))
    return list(tried.values())
