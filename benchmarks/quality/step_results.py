"""The figures of `steps.py`: a solver alone against one with a cache, at equal computed steps and in equal time.

A trial is a seed's images. Differences are paired by seed, intervals are those of `effects.py`. A cell that won among
many on the same images that judge it would look better than it is, so in a `Duel` both sides are chosen on the other
seeds, anew for each one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from cells import Cell
from effects import Effect, Row, Trials, effect_of, rows_of
from step_cells import ALONE, GRID, GROUPS, SOLVERS, STEP_CELLS

__all__ = [
    "CALLS",
    "Duel",
    "StepResults",
    "StepTrials",
    "duels",
    "less",
    "measure",
    "named",
    "reuse_shares",
    "step_results",
]

REUSE_COST = Path(__file__).parents[1] / "reuse_cost.json"
FIRST = (ALONE, "order 1")
CALLS = 0.0  # share of a computing step that a reuse takes, where calls of the network are counted
Measure = Callable[[Row], float]


def measure(name: str) -> Measure:
    """Return the measure of a trial that has this name in the JSON."""
    return lambda row: float(row[name])


DISTANCE = measure("frechet_distance")


@dataclass(frozen=True)
class StepTrials:
    """A cell with the trials of it that have been run, by seed."""

    cell: Cell
    rows: Mapping[int, Row]

    @property
    def solver(self) -> str:
        own = {key: self.cell.settings[key] for key in ("sampler", "spacing") if key in self.cell.settings}
        return next(name for name, settings in SOLVERS.items() if settings == own)

    @property
    def steps(self) -> int:
        return int(self.cell.settings["steps"])

    @property
    def interval(self) -> int:
        """The N of the schedule; 1 for a solver alone."""
        policy = self.cell.settings["policy"]
        return 1 if policy == "none" else int(policy.removeprefix("fora:"))

    @property
    def alone(self) -> bool:
        return self.cell.name == ALONE

    @cached_property
    def computed(self) -> int:
        """Calls of the network, as the program has them."""
        return int(next(iter(self.rows.values()))["computed"])

    def time(self, share: float) -> float:
        """Return the time of a run in computing steps, where a step that reuses takes a `share` of one."""
        return self.computed + share * (self.steps - self.computed)

    def effect(self, of: Measure) -> Effect:
        """Of a measure, over all trials."""
        return effect_of([of(row) for row in self.rows.values()])

    def mean(self, seeds: Sequence[int]) -> float:
        """Return the mean distance over some seeds."""
        return float(np.mean([DISTANCE(self.rows[seed]) for seed in seeds]))


def named(trials: StepTrials) -> str:
    """Return the name of a cell: solver, steps, and the cache where it has one."""
    cache = "" if trials.alone else f", N = {trials.interval}, {trials.cell.name}"
    return f"{trials.solver}, {trials.steps} steps{cache}"


@dataclass(frozen=True)
class StepResults:
    """The cells of a group, the seeds that are compared, and how many trials have been run in all.

    A seed is compared when every cell of FIRST has it: seeds differ more than cells do.
    """

    cells: tuple[StepTrials, ...]
    seeds: tuple[int, ...]
    run: int

    @property
    def alone(self) -> list[StepTrials]:
        return [trials for trials in self.cells if trials.alone]

    @property
    def cached(self) -> list[StepTrials]:
        """Those with a cache that have every seed; others are compared when they have."""
        return [trials for trials in self.cells if not trials.alone and {*self.seeds} <= trials.rows.keys()]

    def of(self, solvers: Sequence[str]) -> StepResults:
        """Return those of some solvers."""
        return replace(self, cells=tuple(trials for trials in self.cells if trials.solver in solvers))

    def at(self, solver: str, steps: int, interval: int, name: str) -> StepTrials | None:
        """Return one cell; None where it has not been run."""
        place = (solver, steps, interval, name)
        return next((t for t in self.cells if (t.solver, t.steps, t.interval, t.cell.name) == place), None)

    def rival(self, computed: int) -> StepTrials:
        """Return the best solver alone with as many computed steps, or up to the next number that was tried."""
        most = next(steps for steps in GRID if steps >= computed)
        return best([trials for trials in self.alone if trials.computed <= most], self.seeds)


def step_results(trials: Trials) -> dict[str, StepResults]:
    """Return what has been run of each group, but for groups without a whole seed."""
    results = {}
    for group in GROUPS:
        pairs = [(cell, rows_of(cell, trials)) for cell in STEP_CELLS if cell.group == group]
        seeds = set.intersection(*(set(rows) for cell, rows in pairs if cell.name in FIRST))
        compared = [(cell, {seed: row for seed, row in rows.items() if seed in seeds}) for cell, rows in pairs]
        cells = tuple(StepTrials(cell, rows) for cell, rows in compared if rows)
        if seeds:
            results[group] = StepResults(cells, tuple(sorted(seeds)), sum(len(rows) for _, rows in pairs))
    return results


def best(cells: Sequence[StepTrials], seeds: Sequence[int]) -> StepTrials:
    """Return the cell with the least mean distance over some seeds."""
    return min(cells, key=lambda trials: trials.mean(seeds))


def less(cell: StepTrials, other: StepTrials, of: Measure = DISTANCE) -> Effect | None:
    """Return a measure less that of another cell, over the seeds of both; None where they share none."""
    shared = [seed for seed in cell.rows if seed in other.rows]
    return effect_of([of(cell.rows[seed]) - of(other.rows[seed]) for seed in shared]) if shared else None


@dataclass(frozen=True)
class Duel:
    """The best solver alone and the best cell with a cache among those that take at most `most`.

    `distance` and `recall` are the cache's less the other's: of each seed, between the two that are best on the others.
    """

    most: int
    alone: StepTrials
    cached: StepTrials
    distance: Effect
    recall: Effect


def duels(results: StepResults, share: float, solvers: Sequence[str] = tuple(SOLVERS)) -> list[Duel]:
    """Return a duel for each number of steps that was tried alone; the cache is that of some `solvers`."""
    cached = [trials for trials in results.cached if trials.solver in solvers]
    rows = []
    for most in sorted({trials.computed for trials in results.alone}):
        sides = [[t for t in side if t.time(share) <= most + 1e-9] for side in (results.alone, cached)]
        if all(sides):
            rows.append(duel(most, sides[0], sides[1], results.seeds))
    return rows


def duel(most: int, alone: Sequence[StepTrials], cached: Sequence[StepTrials], seeds: Sequence[int]) -> Duel:
    """Return one duel; with a single seed both sides are chosen on it, for there is no other."""
    differences: dict[str, list[float]] = {"frechet_distance": [], "recall": []}
    for seed in seeds:
        others = [other for other in seeds if other != seed] or seeds
        theirs, ours = (best(side, others).rows[seed] for side in (alone, cached))
        for name, values in differences.items():
            values.append(float(ours[name] - theirs[name]))
    distance, recall = (effect_of(values) for values in differences.values())
    return Duel(most, best(alone, seeds), best(cached, seeds), distance, recall)


def reuse_shares() -> dict[str, float]:
    """Return the share of a computing step that a reuse takes, by model: the largest that was measured."""
    shares: dict[str, float] = {}
    for name, ways in json.loads(REUSE_COST.read_text())["found"].items():
        model = name.split(", N")[0]
        for way in ("hold", "taylor"):
            times = {kind: latency["median"] for kind, latency in ways[way].items()}
            slowest = max(seconds for kind, seconds in times.items() if kind not in ("step", "run"))
            shares[model] = max(shares.get(model, 0.0), slowest / times["step"])
    return shares
