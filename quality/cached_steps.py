"""Caches over more steps against fewer steps: the pairs (steps, N) of a search, by the time they are to take.

A pair is tried only where it is to be faster than the fastest candidate within the budget, by WORTH: both by a pace
that many trials together give, since the seconds of a single one hang on what else the machine does. For each interval
N that is first the largest number of steps that is fast enough, which should be the best of them; within the budget, it
makes way for fewer, as long as the solver alone keeps to the budget there. So what a cache brings is what it brings
over a better solver with fewer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from ditc.compiler.options import CompileOptions
from ditc.quality.fewer_steps import PATIENCE
from ditc.quality.solvers import Solver, Solvers
from ditc.quality.trials import Changes, Trial

__all__ = ["REUSE_SHARE", "WORTH", "Pace", "PairWalk", "computed_steps"]

REUSE_SHARE = 0.2  # of a computing step, before one was measured: the reference model's (benchmarks/reuse_cost.json)
PRIOR = 4  # trials that it counts for: those of one pair may all be disturbed
WORTH = 1.1  # a cache has to be this much faster than no cache
# (stage, changes beside the policy, policy) -> trials, one for each correction that the schedule allows
TryCorrections = Callable[[str, Changes, str], list[Trial]]


def computed_steps(policy: str, steps: int) -> int:
    """Return how many of the steps compute under `none`, `fora:N` or `window:N:FIRST:LAST`."""
    name, *numbers = policy.split(":")
    interval, first, last = (*map(int, numbers), *(0, 0, 0))[:3]
    if name == "none":
        return steps
    return -(-steps // interval) if name == "fora" else first + last + (steps - first - last) // interval


@dataclass
class Pace:
    """Seconds per image of a step that computes, and the share of it that a reuse took in each trial."""

    step: float
    shares: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The share of a computing step that a reuse takes."""
        return median([*[REUSE_SHARE] * PRIOR, *self.shares])

    def seconds(self, steps: int, policy: str) -> float:
        """Return the seconds per image that so many steps are to take."""
        computed = computed_steps(policy, steps)
        return self.step * (computed + self.share * (steps - computed))

    def learn(self, trial: Trial, steps: int, policy: str) -> None:
        """Take a reuse's share from a trial."""
        computed = computed_steps(policy, steps)
        if computed < steps:
            share = (trial.seconds / self.step - computed) / (steps - computed)
            self.shares.append(min(max(share, 0.0), 1.0))


@dataclass
class PairWalk:
    """The walk over the pairs of one search; `fastest` are the seconds, by pace, of the fastest within the budget.

    `ends` returns the numbers of first and last steps that windows compute, of a number of steps.
    """

    base: CompileOptions
    solvers: Solvers
    intervals: Sequence[int]
    pace: Pace
    fastest: float | None
    corrected: TryCorrections
    ends: Callable[[int], Iterator[tuple[int, int]]]
    note: Callable[[str], None]

    def walk(self, solver: Solver, quantizer: Mapping[str, str | int | None], floor: int = 0) -> None:
        """Try growing intervals, until PATIENCE of them in a row bring nothing, then windows where the first failed.

        Fewer steps than `floor` are not tried.
        """
        misses, failed = 0, None
        for interval in self.intervals:
            tried, within = self._interval(solver, quantizer, interval, floor)
            if not tried:
                continue
            misses = 0 if within else misses + 1
            failed = failed or (None if within else (interval, tried[-1]))
            if misses == PATIENCE:
                self.note(f"no correction is within the budget at two intervals in a row: none beyond {interval}")
                break
        if failed is not None:
            interval, steps = failed
            for first, last in self.ends(steps):
                policy = f"window:{interval}:{first}:{last}"
                if self._fast_enough(steps, policy):
                    self._try("window", solver, quantizer, steps, policy)

    def _interval(
        self, solver: Solver, quantizer: Mapping[str, str | int | None], interval: int, floor: int
    ) -> tuple[list[int], bool]:
        """Return the numbers of steps that were tried at an interval, and whether any was within the budget."""
        policy, tried, hit = f"fora:{interval}", [], False
        for steps in self.solvers.falling:
            if steps <= interval or steps < floor:
                break
            if not self._fast_enough(steps, policy) or not self.solvers.takes(solver, steps):
                continue
            trials = self._try("schedule", solver, quantizer, steps, policy)
            tried += [steps] if trials else []
            if not any(trial.within for trial in trials):
                break
            hit = True
        return tried, hit

    def _fast_enough(self, steps: int, policy: str) -> bool:
        return self.fastest is None or self.pace.seconds(steps, policy) * WORTH <= self.fastest

    def _try(
        self, stage: str, solver: Solver, quantizer: Mapping[str, str | int | None], steps: int, policy: str
    ) -> list[Trial]:
        trials = self.corrected(stage, {**quantizer, **solver.at(steps, self.base)}, policy)
        for trial in trials:
            self.pace.learn(trial, steps, policy)
        if any(trial.within for trial in trials):
            seconds = self.pace.seconds(steps, policy)
            self.fastest = seconds if self.fastest is None else min(self.fastest, seconds)
        return trials
