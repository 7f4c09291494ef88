"""The stage "solver" of a search: with how few steps each solver, in floating point, keeps to the budget.

The first solver walks down its numbers of steps, until PATIENCE of them in a row are beyond the budget. Every other one
begins below the fewest so far: with more steps it could not be faster. Where numbers between may be tried, the two that
promise most then halve the gap that is left, so that what a cache is held against is no coarser than need be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ditc.quality.solvers import Solver, Solvers
from ditc.quality.trials import Trial

__all__ = ["PATIENCE", "Reach", "fewest_steps", "halve"]

PATIENCE = 2  # numbers of steps, or intervals, beyond the budget before others are given up
REFINED = 2  # solvers whose fewest steps are looked for to one step
Judge = Callable[[Solver, int], Trial]


@dataclass
class Reach:
    """A solver with its trials by the number of steps."""

    solver: Solver
    trials: dict[int, Trial] = field(default_factory=dict)

    @property
    def fewest(self) -> int | None:
        """The fewest steps within the budget, None where no number of them is."""
        return min((steps for steps, trial in self.trials.items() if trial.within), default=None)

    @property
    def start(self) -> int:
        """The fewest steps within the budget, or those that come nearest."""
        fewest = self.fewest
        return max(self.trials, key=lambda steps: self.trials[steps].quality) if fewest is None else fewest

    @property
    def more(self) -> list[int]:
        """Numbers of steps within the budget beyond the fewest, growing."""
        return sorted(steps for steps, trial in self.trials.items() if trial.within and steps > self.start)

    @property
    def floor(self) -> int:
        """The largest number of steps beyond the budget below those within it, 0 where there is none."""
        most = math.inf if self.fewest is None else self.fewest
        return max((steps for steps, trial in self.trials.items() if not trial.within and steps < most), default=0)

    @property
    def promise(self) -> tuple[float, float]:
        """The order of solvers, the best one least: by the fewest steps that may do, then by quality just below those.

        One that began below another's fewest steps was tried at few numbers, and perhaps at none within the budget.
        """
        return (self.floor + 1, -self.trials[self.floor].quality) if self.floor else (self.start, -self.best_quality)

    @property
    def best_quality(self) -> float:
        """The quality at the steps to go on from."""
        return self.trials[self.start].quality


def fewest_steps(solvers: Solvers, judge: Judge) -> list[Reach]:
    """Try solvers with fewer and fewer steps; return those that were tried, the best first."""
    reaches: list[Reach] = []
    for solver in solvers.every:
        below = _fewest(reaches)
        reach = Reach(solver)
        _descend(reach, [s for s in solvers.counts if s < below and solvers.takes(solver, s)], judge)
        reaches += [reach] if reach.trials else []
    reaches.sort(key=lambda reach: reach.promise)
    if solvers.between:
        for reach in reaches[:REFINED]:
            _refine(reach, _fewest(reaches), solvers, judge)
        reaches.sort(key=lambda reach: reach.promise)
    return sorted(reaches, key=lambda reach: reach.fewest != _fewest(reaches))  # the fastest, then those that promise


def _fewest(reaches: Sequence[Reach]) -> float:
    return min((reach.fewest for reach in reaches if reach.fewest is not None), default=math.inf)


def _descend(reach: Reach, counts: Sequence[int], judge: Judge) -> None:
    misses = 0
    for steps in counts:
        reach.trials[steps] = trial = judge(reach.solver, steps)
        misses = 0 if trial.within else misses + 1
        if misses == PATIENCE:
            return


def _refine(reach: Reach, fewest: float, solvers: Solvers, judge: Judge) -> None:
    """Halve the gap between the fewest steps of any solver and this one's largest number beyond the budget."""
    beyond = max((steps for steps, trial in reach.trials.items() if not trial.within and steps < fewest), default=0)
    if not beyond or fewest == math.inf:
        return

    def is_within(steps: int) -> bool:
        if not solvers.takes(reach.solver, steps):
            return False
        reach.trials[steps] = trial = judge(reach.solver, steps)
        return trial.within

    halve(beyond, int(fewest), is_within)


def halve(beyond: int, within: int, is_within: Callable[[int], bool]) -> None:
    """Ask about numbers of steps between one beyond the budget and one within it, until the two are neighbours."""
    while within - beyond > 1:
        steps = (within + beyond) // 2
        within, beyond = (steps, beyond) if is_within(steps) else (within, steps)
