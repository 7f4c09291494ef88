"""The search of `ditc tune`: which candidate is measured next, and which one is chosen.

It takes one setting after the other, each at what the ones before it gave, because a full grid would take days on a
large model:

    quantizer     ranges, scales and smoothing, without a cache: the one with the highest PSNR against FP
    precision     where that is beyond the budget: the first and last steps in floating point
    weights       where 8-bit weights run in a slower form on this machine: 7 bits, if those are within the budget
    schedule      FORA with growing N and every correction, until no correction is within the budget twice in a row
    window        where the shortest interval beyond the budget fails: computing the first and last steps too

It measures nothing itself: `judge` and `veto` are handed in (quality/tuning.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from ditc.compiler.options import CompileOptions
from ditc.compiler.planning import SmallPoolError
from ditc.errors import CheckError
from ditc.passes import NoSumsError, NothingQuantizedError
from ditc.quality.options import TuneOptions
from ditc.spec import Record

__all__ = ["Search", "Trial", "described", "pareto_front"]

QUANTIZERS = tuple(
    {"ranges": ranges, "scales": scales, "smooth": smooth}
    for smooth, scales, ranges in product(("none", "smooth"), ("static", "per-step"), ("mse", "percentile"))
)
CORRECTIONS = (
    {"reuse": "hold", "vc": "none"},
    {"reuse": "hold", "vc": "std"},
    {"reuse": "hold", "vc": "lsq"},
    {"reuse": "taylor", "vc": "none"},  # with it compensation has nothing left to do (docs/approximators.md)
)
WINDOWS = ((2, 2), (4, 4), (8, 8))  # first and last steps that compute, or are not quantized
PATIENCE = 2  # intervals beyond the budget before longer ones are given up
MOST_VETOED = 0.5  # of branches and steps whose change from step to step is less than quantization noise
WORTH = 1.1  # a cache has to be this much faster than no cache


class Trial(Record):
    """A candidate as measured: what it changes, seconds per image, PSNR and, where there are features, the distance.

    `worse_by` is Frechet distance less FP's. `psnr_low` and `worse_high` are the ends of the intervals that count
    against it.
    """

    stage: str
    changes: dict[str, str]
    seconds: float
    psnr_db: float
    psnr_low: float
    worse_by: float | None
    worse_high: float | None
    size_bytes: int
    within: bool

    @property
    def quality(self) -> float:
        """The quality that the front holds against time; higher is better."""
        return self.psnr_db if self.worse_by is None else -self.worse_by


@dataclass
class Search:
    """One search: `measured` grows, in the order of the trials.

    `judge` measures a candidate of a stage with some changes to `base`. `veto` measures the share of branches and steps
    where quantization noise exceeds what a cache saves. `seven_bits` says whether such weights may pay here.
    """

    base: CompileOptions
    options: TuneOptions
    judge: Callable[[str, dict[str, str]], Trial]
    veto: Callable[[Trial], float]
    seven_bits: bool = False
    measured: list[Trial] = field(default_factory=list)
    vetoed: float | None = None
    notes: list[str] = field(default_factory=list)

    def explore(self) -> None:
        """Measure candidates, stage after stage, each on what the one before it found best."""
        precise = [self._try("quantizer", {"policy": "none", "vc": "none", **changes}) for changes in self._quantizers]
        best = self._with_fast_weights(self._precise_enough(max(precise, key=lambda trial: trial.psnr_db)))
        if self.base.bits is not None:
            self.vetoed = self.veto(best)
            if self.vetoed > MOST_VETOED:
                self._note(
                    f"quantization noise exceeds the change from step to step in {self.vetoed:.0%} of branches and "
                    f"steps, more than {MOST_VETOED:.0%}: a cache would reuse noise, none is tried (docs/evaluating.md)"
                )
                return
        quantizer = {name: value for name, value in best.changes.items() if name not in ("policy", "vc")}
        beyond = list(self._schedules(quantizer))
        for first, last in self._windows if beyond else ():
            self._corrected("window", quantizer, f"window:{beyond[0]}:{first}:{last}")

    def choose(self) -> Trial:
        """Return the fastest within the budget, and note it where a cache does not pay.

        Raises CheckError where none is within the budget.
        """
        within, budget = [trial for trial in self.measured if trial.within], self.options
        if not within:
            nearest = max(self.measured, key=lambda trial: trial.quality)
            raise CheckError(f"no candidate is within the budget; the nearest is {described(nearest)}")
        fastest = min(within, key=lambda trial: trial.seconds)
        if budget.seconds is not None and fastest.seconds > budget.seconds:
            raise CheckError(
                f"no candidate within the budget of quality takes at most {budget.seconds:g} s per image; the fastest "
                f"is {described(fastest)}"
            )
        uncached = [trial for trial in within if trial.changes["policy"] == "none"]
        if uncached and fastest.changes["policy"] != "none":
            plain = min(uncached, key=lambda trial: trial.seconds)
            if plain.seconds < WORTH * fastest.seconds:
                self._note(
                    f"caching does not pay here: {described(fastest)} is {plain.seconds / fastest.seconds:.2f} times "
                    f"as fast as no cache, less than {WORTH:g}; the bundle has no cache"
                )
                return plain
        return fastest

    @property
    def _quantizers(self) -> Sequence[dict[str, str]]:
        return QUANTIZERS if self.base.bits is not None else ({},)

    @property
    def _windows(self) -> Iterator[tuple[int, int]]:
        """Steps at both ends, together fewer than half of all."""
        return (ends for ends in WINDOWS if sum(ends) < self.base.steps // 2)

    def _try(self, stage: str, changes: dict[str, str]) -> Trial:
        trial = self.judge(stage, changes)
        self.measured.append(trial)
        return trial

    def _note(self, note: str) -> None:
        self.notes += [] if note in self.notes else [note]

    def _precise_enough(self, best: Trial) -> Trial:
        """Return the best quantizer, with as many steps in floating point as the budget takes, if any are enough."""
        if best.within or self.base.bits is None:
            return best
        for first, last in self._windows:
            trial = self._try("precision", {**best.changes, "float_steps": f"{first}:{last}"})
            if trial.within:
                return trial
        return best

    def _with_fast_weights(self, best: Trial) -> Trial:
        """Return the best quantizer, with 7-bit weights where those are faster here and within the budget."""
        if not self.seven_bits or not best.within:
            return best
        trial = self._try("weights", {**best.changes, "precision": "w7a8"})
        if trial.within and trial.seconds < best.seconds:
            return trial
        self._note("7-bit weights, whose products need no slower form on this CPU, are not faster or beyond the budget")
        return best

    def _schedules(self, quantizer: dict[str, str]) -> Iterator[int]:
        """Try growing intervals; yields those beyond the budget."""
        misses = 0
        for interval in self.options.intervals:
            if interval >= self.base.steps:
                self._note(f"intervals from {interval} on reuse one step for all {self.base.steps}: not tried")
                return
            trials = self._corrected("schedule", quantizer, f"fora:{interval}")
            if not trials:
                continue
            if any(trial.within for trial in trials):
                misses = 0
                continue
            yield interval
            misses += 1
            if misses == PATIENCE:
                self._note(f"no correction is within the budget at two intervals in a row: none beyond {interval}")
                return

    def _corrected(self, stage: str, quantizer: dict[str, str], policy: str) -> list[Trial]:
        """Try a schedule with every correction that it allows."""
        trials = []
        for changes in CORRECTIONS:
            try:
                trials.append(self._try(stage, {**quantizer, "policy": policy, **changes}))
            except NoSumsError:
                without = f"--reuse {changes['reuse']} is not tried where no sums are made ahead"
                self._note(f"{without} (docs/approximators.md)")
            except (NothingQuantizedError, SmallPoolError) as e:
                self._note(f"--policy {policy} is not tried: {e}")
                break
        return trials


def described(trial: Trial) -> str:
    """Return a trial as text."""
    settings = ", ".join(f"{name} {value}" for name, value in trial.changes.items())
    worse = (
        "" if trial.worse_by is None else f", Frechet distance {trial.worse_by:+.3f} (up to {trial.worse_high:+.3f})"
    )
    return f"{settings}: {trial.seconds:.4g} s per image, PSNR {trial.psnr_db:.1f} dB{worse}"


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Return those that no other one beats in time and quality both, fastest first."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.seconds, -trial.quality)):
        if not front or trial.quality > front[-1].quality:
            front.append(trial)
    return front
