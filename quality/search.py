"""The search of `ditc tune`: which candidate is measured next, and which one is chosen.

It takes one setting after the other, each at what the ones before it gave, because a full grid would take days on a
large model:

    solver        samplers, spacings and fewer steps in floating point: the fewest steps within the budget
    quantizer     there: ranges, scales and smoothing, without a cache: the one with the highest PSNR against FP
    steps         where that is beyond the budget: more steps of the solver
    precision     where that is too: the first and last steps in floating point
    weights       where 8-bit weights run in a slower form on this machine: 7 bits, if those are within the budget
    schedule      FORA with growing N and every correction, until no correction is within the budget twice in a row
    window        where the shortest interval beyond the budget fails: computing the first and last steps too

Without solvers to choose from there is neither the first nor the third, and all are of the base's sampler and steps;
with them a schedule has as many steps as are predicted to be faster than what is within the budget already, so that a
cache over more steps stands against fewer steps. It measures nothing itself: `judge`, `veto` and `again` are handed in
(quality/tuning.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import median

from ditc.compiler.options import CompileOptions
from ditc.compiler.planning import SmallPoolError
from ditc.errors import CheckError, InputError
from ditc.passes import NoSumsError, NothingQuantizedError
from ditc.quality.cached_steps import WORTH, Pace, PairWalk
from ditc.quality.fewer_steps import PATIENCE, Reach, fewest_steps, halve
from ditc.quality.options import TuneOptions
from ditc.quality.solvers import SOLVER_SETTINGS, Solver, Solvers, in_floats
from ditc.quality.trials import Changes, Trial, described, pareto_front, versus

__all__ = ["SOLVER", "Again", "Search", "Trial", "described", "pareto_front"]

SOLVER = "solver"  # the stage whose candidates are in floating point
CACHED_SOLVERS = 2  # the best ones, on which caches are tried

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
MOST_VETOED = 0.5  # of branches and steps whose change from step to step is less than quantization noise


@dataclass(frozen=True)
class Again:
    """Measuring once more what won among many: `confirm` a candidate on noise that chose none, and some `in_turn`.

    `in_turn` returns seconds per image of candidates that run one after the other, round after round.
    """

    confirm: Callable[[Trial], Trial]
    in_turn: Callable[[Sequence[Trial]], Sequence[float]]


@dataclass
class Search:
    """One search: `measured` grows, in the order of the trials.

    `judge` measures a candidate of a stage with some changes to `base`. `veto` measures the share of branches and steps
    where quantization noise exceeds what a cache saves. `seven_bits` says whether such weights may pay here. `solvers`
    are those to choose from, None for the base's own at its steps. `again` measures what won on other noise, None for a
    budget that other noise hardly moves; `confirmed` are its trials, `rival` the fastest without a cache among them.
    `pace` is that of candidates by their steps, where those differ: of all with the arithmetic of `paced`.
    """

    base: CompileOptions
    options: TuneOptions
    judge: Callable[[str, Changes], Trial]
    veto: Callable[[Trial], float]
    seven_bits: bool = False
    measured: list[Trial] = field(default_factory=list)
    vetoed: float | None = None
    notes: list[str] = field(default_factory=list)
    solvers: Solvers | None = None
    again: Again | None = None
    confirmed: list[Trial] = field(default_factory=list)
    rival: Trial | None = None
    pace: Pace | None = None
    paced: Trial | None = None

    @property
    def candidates(self) -> list[Trial]:
        """Those that may be chosen: of the precision that was asked for, or fewer bits."""
        return [trial for trial in self.measured if trial.stage != SOLVER or self.base.bits is None]

    def explore(self) -> None:
        """Measure candidates, stage after stage, each on what the one before it found best."""
        reaches = [] if self.solvers is None else fewest_steps(self.solvers, self._solved)
        pair = reaches[0].solver.at(reaches[0].start, self.base) if reaches else {}
        precise = [
            self._try("quantizer", {"policy": "none", "vc": "none", **pair, **changes})
            for changes in self._quantizers()
        ]
        best = self._enough_steps(max(precise, key=lambda trial: trial.psnr_db), self.solvers, reaches)
        best = self._with_fast_weights(self._precise_enough(best))
        if self.base.bits is not None:
            self.vetoed = self.veto(best)
            if self.vetoed > MOST_VETOED:
                self._note(
                    f"quantization noise exceeds the change from step to step in {self.vetoed:.0%} of branches and "
                    f"steps, more than {MOST_VETOED:.0%}: a cache would reuse noise, none is tried (docs/evaluating.md)"
                )
                return
        settled = ("policy", "vc", *SOLVER_SETTINGS)
        quantizer = {name: value for name, value in best.changes.items() if name not in settled}
        if self.solvers is not None:
            self._cache_more_steps(self.solvers, reaches, quantizer, best)
            return
        beyond = list(self._schedules(quantizer))
        for first, last in self._ends(self.base.steps) if beyond else ():
            self._corrected("window", quantizer, f"window:{beyond[0]}:{first}:{last}")

    def choose(self) -> Trial:
        """Return the fastest within the budget, and note it where a cache does not pay.

        Raises CheckError where none is within the budget.
        """
        within, budget = [trial for trial in self.candidates if trial.within], self.options
        if not within:
            nearest = max(self.candidates, key=lambda trial: trial.quality)
            raise CheckError(f"no candidate is within the budget; the nearest is {described(nearest)}")
        fastest = min(within, key=lambda trial: trial.seconds)
        if budget.seconds is not None and fastest.seconds > budget.seconds:
            raise CheckError(
                f"no candidate within the budget of quality takes at most {budget.seconds:g} s per image; the fastest "
                f"is {described(fastest)}"
            )
        if self.again is not None:
            return self._confirmed_choice(self.again, within)
        uncached = [trial for trial in within if not trial.cached]
        if uncached and fastest.cached:
            plain = min(uncached, key=lambda trial: trial.seconds)
            if plain.seconds < WORTH * fastest.seconds:
                self._note(_hardly_pays(fastest, plain.seconds / fastest.seconds))
                return plain
        return fastest

    def _confirmed_choice(self, again: Again, within: Sequence[Trial]) -> Trial:
        """Return the fastest with a cache, or without where that is hardly slower, of those that other noise confirms.

        Raises CheckError where it confirms none.
        """
        alone, cached = (
            self._first_confirmed(again, [trial for trial in within if trial.cached is reuses])
            for reuses in (False, True)
        )
        self.rival = alone
        if cached is None:
            if alone is None:
                raise CheckError(
                    "no candidate within the budget keeps to it on other noise; give more --images or --seeds, or a "
                    "wider budget"
                )
            self._note("no candidate with a cache that should be faster is within the budget")
            return alone
        if alone is None:
            self._note("no candidate without a cache is within the budget")
            return cached
        ratio = self._race(again, cached, alone)
        if ratio < WORTH and (self.options.seconds is None or alone.seconds <= self.options.seconds):
            self._note(_hardly_pays(cached, ratio))
            return alone
        return cached

    def _race(self, again: Again, cached: Trial, alone: Trial) -> float:
        """Return how many times as fast as the other the cached one is, both in turn."""
        seconds = dict(zip((cached.key, alone.key), again.in_turn((cached, alone)), strict=True))
        self.confirmed = [
            trial.model_copy(update={"seconds": seconds.get(trial.key, trial.seconds)}) for trial in self.confirmed
        ]
        by_key = {trial.key: trial for trial in self.confirmed}
        self._note(versus(by_key[cached.key], by_key[alone.key]))
        return seconds[alone.key] / seconds[cached.key]

    def _first_confirmed(self, again: Again, trials: Sequence[Trial]) -> Trial | None:
        """Return the fastest that is within the budget on other noise too, None where none is."""
        for trial in sorted(trials, key=self._order):
            confirmed = again.confirm(trial)
            self.confirmed.append(confirmed)
            if confirmed.within:
                return trial
            self._note(f"beyond the budget on other noise, so not chosen: {described(confirmed)}")
        return None

    def _order(self, trial: Trial) -> tuple[float, float]:
        """Return the order in which candidates are confirmed: by pace, then by quality.

        Those of equal steps are as fast but for a few percent, which is less than trials minutes apart tell.
        """
        if self.pace is None or self.paced is None or _arithmetic(trial) != _arithmetic(self.paced):
            return trial.seconds, -trial.quality
        return self.pace.seconds(self._steps(trial), str(trial.changes["policy"])), -trial.quality

    def _quantizers(self) -> Sequence[dict[str, str]]:
        """Return the quantizers that the base takes, and note why it doesn't take the others."""
        if self.base.bits is None:
            return ({},)
        refusals = [self._refusal(changes) for changes in QUANTIZERS]
        for refusal in filter(None, refusals):
            self._note(f"a quantizer is not tried: {refusal}")
        return [changes for changes, refusal in zip(QUANTIZERS, refusals, strict=True) if refusal is None]

    def _refusal(self, changes: Mapping[str, str]) -> str | None:
        """Return the line that settings contradict each other in, with some changes to the base; None where none do."""
        try:
            self.base.model_copy(update=changes)
        except InputError as e:
            return str(e)
        return None

    def _ends(self, steps: int) -> Iterator[tuple[int, int]]:
        """Steps at both ends, together fewer than half of all."""
        return (ends for ends in WINDOWS if sum(ends) < steps // 2)

    def _steps(self, trial: Trial) -> int:
        """Return the number of steps of a candidate."""
        return int(trial.changes.get("steps") or self.base.steps)

    def _solved(self, solver: Solver, steps: int) -> Trial:
        return self._try(SOLVER, {**in_floats(self.base), **solver.at(steps, self.base)})

    def _try(self, stage: str, changes: Changes) -> Trial:
        trial = self.judge(stage, changes)
        self.measured.append(trial)
        return trial

    def _note(self, note: str) -> None:
        self.notes += [] if note in self.notes else [note]

    def _enough_steps(self, best: Trial, solvers: Solvers | None, reaches: Sequence[Reach]) -> Trial:
        """Return the best quantizer, with as many more steps of its solver as the budget takes, if any are enough."""
        if best.within or solvers is None or not reaches or self.base.bits is None:
            return best
        reach, tried = reaches[0], {self._steps(best): best}

        def is_within(steps: int) -> bool:
            if not solvers.takes(reach.solver, steps):
                return False
            unlike = {name: value for name, value in best.changes.items() if name != "steps"}
            tried[steps] = trial = self._try("steps", {**unlike, **reach.solver.at(steps, self.base)})
            return trial.within

        beyond = reach.start
        for steps in reach.more:
            if is_within(steps):
                if solvers.between:
                    halve(beyond, steps, is_within)
                return tried[min(steps for steps, trial in tried.items() if trial.within)]
            beyond = steps
        return tried[beyond]

    def _precise_enough(self, best: Trial) -> Trial:
        """Return the best quantizer, with as many steps in floating point as the budget takes, if any are enough."""
        if best.within or self.base.bits is None:
            return best
        for first, last in self._ends(self._steps(best)):
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

    def _cache_more_steps(self, solvers: Solvers, reaches: Sequence[Reach], quantizer: Changes, best: Trial) -> None:
        """Try caches over the best solvers, at the numbers of steps that would be faster than what is there."""
        for interval in self.options.intervals:
            if interval >= solvers.counts[0]:
                self._note(f"intervals from {interval} on reuse one step for all {solvers.counts[0]}: not tried")
                break
        # of all that are as fast by the step: a median leaves out what disturbed one of them
        alike = [trial for trial in self.candidates if not trial.cached and _arithmetic(trial) == _arithmetic(best)]
        self.pace, self.paced = Pace(median(trial.seconds / self._steps(trial) for trial in alike)), best
        walk = PairWalk(
            base=self.base,
            solvers=solvers,
            intervals=self.options.intervals,
            pace=self.pace,
            fastest=self.pace.seconds(self._steps(best), "none") if best.within else None,
            corrected=self._corrected,
            ends=self._ends,
            note=self._note,
        )
        for reach in reaches[:CACHED_SOLVERS]:
            walk.walk(reach.solver, quantizer, 0 if reaches[0].fewest is None else reach.floor)

    def _schedules(self, quantizer: Changes) -> Iterator[int]:
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

    def _corrected(self, stage: str, quantizer: Changes, policy: str) -> list[Trial]:
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


def _arithmetic(trial: Trial) -> tuple[str | int | None, ...]:
    """Return the settings of a candidate that decide how long a step takes that computes."""
    return trial.changes.get("precision"), trial.changes.get("float_steps")


def _hardly_pays(trial: Trial, ratio: float) -> str:
    return (
        f"caching does not pay here: {described(trial)} is {ratio:.2f} times as fast as no cache, less than {WORTH:g}; "
        "the bundle has no cache"
    )
