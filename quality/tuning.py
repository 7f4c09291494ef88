"""`ditc tune` as a function: the fastest bundle within a budget of quality, by measuring candidates.

The search takes one setting after the other, each at what the ones before it gave, because a full grid would take days
on a large model:

    quantizer     ranges, scales and smoothing, without a cache: the one with the highest PSNR against FP
    precision     where that is beyond the budget: the first and last steps in floating point
    weights       where 8-bit weights run in a slower form on this machine: 7 bits, if those are within the budget
    schedule      FORA with growing N and every correction, until no correction is within the budget twice in a row
    window        where the shortest interval beyond the budget fails: computing the first and last steps too

Each candidate is a real bundle, compiled, timed and evaluated on this machine. What is measured is kept in the work
folder as it comes, so an interrupted search goes on where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ditc.bundle import Bundle, open_bundle
from ditc.compiler.driver import check_places, compile_model
from ditc.compiler.exporting import model_digest
from ditc.compiler.options import CompileOptions
from ditc.compiler.planning import SmallPoolError
from ditc.engines.integer_form import IntegerForm, arithmetic_of
from ditc.engines.targets import backend_for
from ditc.errors import CheckError, InputError
from ditc.exporter.model_facts import ModelFacts
from ditc.files import atomic_write, digest_of
from ditc.passes import NoSumsError, NothingQuantizedError
from ditc.progress import Progress, silent
from ditc.quality.evaluating import evaluate_bundle
from ditc.quality.features import check_sources
from ditc.quality.options import Budget, TuneOptions, VetoOptions
from ditc.quality.veto import veto_of
from ditc.spec import Record, Skipped
from ditc.speed.benching import bench_bundle
from ditc.speed.options import BenchOptions

__all__ = ["Trial", "Tuning", "described", "pareto_front", "tune_model"]

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
VETO_IMAGES = 2
MOST_VETOED = 0.5  # of branches and steps whose change from step to step is less than quantization noise
EXPORTS = "exports"  # folder of what candidates have in common
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
        """What the front holds against time; higher is better."""
        return self.psnr_db if self.worse_by is None else -self.worse_by


class Tuning(Record):
    """A search and what it chose.

    `trials` are all that were measured, `front` those that no other one beats, fastest first.
    `vetoed` is the share of branches and steps where quantization noise exceeds what a cache saves, None where nothing
    is quantized; `notes` say what was not tried, and why.
    """

    budget: Budget
    images: int
    seeds: tuple[int, ...]
    chosen: Trial
    front: tuple[Trial, ...]
    trials: tuple[Trial, ...]
    vetoed: float | None
    notes: tuple[str, ...]


@dataclass
class _Search:
    """One search: `measured` grows, in the order of the trials. `seven_bits` says whether such weights may pay here."""

    base: CompileOptions
    options: TuneOptions
    judge: Callable[[str, dict[str, str]], Trial]
    veto: Callable[[Trial], float]
    seven_bits: bool = False
    measured: list[Trial] = field(default_factory=list)
    vetoed: float | None = None
    notes: list[str] = field(default_factory=list)

    def tried(self, stage: str, changes: dict[str, str]) -> Trial:
        trial = self.judge(stage, changes)
        self.measured.append(trial)
        return trial

    def corrected(self, stage: str, kept: dict[str, str], policy: str) -> list[Trial]:
        """A schedule with every correction that it allows."""
        trials = []
        for changes in CORRECTIONS:
            try:
                trials.append(self.tried(stage, {**kept, "policy": policy, **changes}))
            except NoSumsError:
                without = f"--reuse {changes['reuse']} is not tried where no sums are made ahead"
                self.noted(f"{without} (docs/approximators.md)")
            except (NothingQuantizedError, SmallPoolError) as e:
                self.noted(f"--policy {policy} is not tried: {e}")
                break
        return trials

    def noted(self, note: str) -> None:
        self.notes += [] if note in self.notes else [note]

    @property
    def windows(self) -> Iterator[tuple[int, int]]:
        """Steps at both ends, together fewer than half of all."""
        return (ends for ends in WINDOWS if sum(ends) < self.base.steps // 2)


@dataclass(frozen=True)
class _Subject:
    """What is tuned: a model, and what is stated of it. `told` are the notes about it that were handed on."""

    model: Any
    num_heads: int | None
    vae: str | PathLike[str] | None
    facts: ModelFacts | None
    on_note: Callable[[str], None] | None
    told: set[str] = field(default_factory=set)

    def compiled(
        self, out: Path, options: CompileOptions, work: Path, progress: Progress, *, force: bool = True
    ) -> Bundle:
        """A bundle of it; what is exported is there for the next ones."""
        return compile_model(
            self.model,
            out,
            options,
            progress=progress,
            force=force,
            num_heads=self.num_heads,
            vae=self.vae,
            facts=self.facts,
            exports=work / EXPORTS,
            on_note=None if self.on_note is None else self._tell,
        )

    def _tell(self, note: str) -> None:
        """Hand on a note that was not handed on before: every candidate reads the same model."""
        if note not in self.told and self.on_note is not None:
            self.on_note(note)
        self.told.add(note)

    @property
    def digest(self) -> str:
        """What names it among the kept trials: its weights, or its name, what is stated, and when it was written."""
        if not isinstance(self.model, (str, PathLike)):
            return model_digest(self.model)
        path = Path(self.model)
        written = path.stat().st_mtime_ns if path.exists() else ""
        return f"{self.model} {written} {self.num_heads} {self.vae} {self.facts}"


def tune_model(
    model: Any,
    out: str | PathLike[str],
    base: CompileOptions,
    options: TuneOptions,
    *,
    progress: Progress = silent,
    on_trial: Callable[[Trial], None] = lambda _: None,
    on_note: Callable[[str], None] | None = None,
    force: bool = False,
    num_heads: int | None = None,
    vae: str | PathLike[str] | None = None,
    facts: ModelFacts | None = None,
) -> Tuning:
    """Search, and leave the fastest bundle within the budget at `out`; returns all trials and the front.

    `base` holds what is not searched; `num_heads`, `vae`, `facts` and `on_note` are those of `compile_model`. Raises
    CheckError, with what came nearest, where no candidate is within the budget; `out` is then as it was, and what was
    measured stays in the work folder beside it.
    """
    target = Path(out).absolute()
    check_sources(options.features, options.real)
    check_places(target, None, force=force)
    work = target.with_name(f".{target.name}.tune")
    subject = _Subject(model, num_heads, vae, facts, on_note)

    def judge(stage: str, changes: dict[str, str]) -> Trial:
        trial = _measured(subject, base.model_copy(update=changes), stage, changes, options, work, progress)
        on_trial(trial)
        return trial

    def veto(trial: Trial) -> float:
        compiled = base.model_copy(update=trial.changes)
        bundle = _candidate(subject, compiled, work, progress)
        return veto_of(bundle.path, VetoOptions(images=VETO_IMAGES, lag=1), progress=progress).vetoed

    search = _Search(base, options, judge, veto, seven_bits_may_pay(base))
    _explore(search)
    chosen = _chosen(search)
    best = base.model_copy(update=chosen.changes)
    subject.compiled(target, best, work, progress, force=force)
    shutil.rmtree(work)
    return _tuning(search, chosen)


def seven_bits_may_pay(base: CompileOptions) -> bool:
    """Are the products of W8A8 exact on this machine, but in a slower form? Raises InputError where they are not."""
    if base.precision != "w8a8":
        return False
    arithmetic = arithmetic_of(backend_for(base.target), base.precision)
    if arithmetic is not None and arithmetic.integers is None:
        raise InputError(
            f"--target {base.target} does not run w8a8 exactly on this machine, so it can't be measured here; "
            "search with --precision w7a8, or for another --target"
        )
    return arithmetic is not None and arithmetic.integers == IntegerForm.SWITCHED.value


def _explore(search: _Search) -> None:
    """All stages, each on what the one before it found best."""
    precise = [
        search.tried("quantizer", {"policy": "none", "vc": "none", **changes}) for changes in _quantizers(search)
    ]
    best = _with_fast_weights(search, _precise_enough(search, max(precise, key=lambda trial: trial.psnr_db)))
    if search.base.bits is not None:
        search.vetoed = search.veto(best)
        if search.vetoed > MOST_VETOED:
            search.notes.append(
                f"quantization noise exceeds the change from step to step in {search.vetoed:.0%} of branches and "
                f"steps, more than {MOST_VETOED:.0%}: a cache would reuse noise, none is tried (docs/evaluating.md)"
            )
            return
    kept = {name: value for name, value in best.changes.items() if name not in ("policy", "vc")}
    beyond = list(_schedules(search, kept))
    for first, last in search.windows if beyond else ():
        search.corrected("window", kept, f"window:{beyond[0]}:{first}:{last}")


def _quantizers(search: _Search) -> Sequence[dict[str, str]]:
    return QUANTIZERS if search.base.bits is not None else ({},)


def _precise_enough(search: _Search, best: Trial) -> Trial:
    """The best quantizer, with as many steps in floating point as it takes to be within the budget, if any do."""
    if best.within or search.base.bits is None:
        return best
    for first, last in search.windows:
        trial = search.tried("precision", {**best.changes, "float_steps": f"{first}:{last}"})
        if trial.within:
            return trial
    return best


def _with_fast_weights(search: _Search, best: Trial) -> Trial:
    """The best quantizer, with 7-bit weights where those are faster here and within the budget."""
    if not search.seven_bits or not best.within:
        return best
    trial = search.tried("weights", {**best.changes, "precision": "w7a8"})
    if trial.within and trial.seconds < best.seconds:
        return trial
    search.noted("7-bit weights, whose products need no slower form on this CPU, are not faster or beyond the budget")
    return best


def _schedules(search: _Search, kept: dict[str, str]) -> Iterator[int]:
    """Try growing intervals; yields those beyond the budget."""
    misses = 0
    for interval in search.options.intervals:
        if interval >= search.base.steps:
            search.notes.append(f"intervals from {interval} on reuse one step for all {search.base.steps}: not tried")
            return
        trials = search.corrected("schedule", kept, f"fora:{interval}")
        if not trials:
            continue
        if any(trial.within for trial in trials):
            misses = 0
            continue
        yield interval
        misses += 1
        if misses == PATIENCE:
            search.notes.append(f"no correction is within the budget at two intervals in a row: none beyond {interval}")
            return


def _chosen(search: _Search) -> Trial:
    """The fastest within the budget. Raises CheckError where there is none."""
    within, budget = [trial for trial in search.measured if trial.within], search.options
    if not within:
        nearest = max(search.measured, key=lambda trial: trial.quality)
        raise CheckError(f"no candidate is within the budget; the nearest is {described(nearest)}")
    fastest = min(within, key=lambda trial: trial.seconds)
    if budget.seconds is not None and fastest.seconds > budget.seconds:
        raise CheckError(
            f"no candidate within the budget of quality takes at most {budget.seconds:g} s per image; the fastest is "
            f"{described(fastest)}"
        )
    uncached = [trial for trial in within if trial.changes["policy"] == "none"]
    if uncached and fastest.changes["policy"] != "none":
        plain = min(uncached, key=lambda trial: trial.seconds)
        if plain.seconds < WORTH * fastest.seconds:
            search.notes.append(
                f"caching does not pay here: {described(fastest)} is {plain.seconds / fastest.seconds:.2f} times as "
                f"fast as no cache, less than {WORTH:g}; the bundle has no cache"
            )
            return plain
    return fastest


def described(trial: Trial) -> str:
    """A trial as text."""
    settings = ", ".join(f"{name} {value}" for name, value in trial.changes.items())
    worse = (
        "" if trial.worse_by is None else f", Frechet distance {trial.worse_by:+.3f} (up to {trial.worse_high:+.3f})"
    )
    return f"{settings}: {trial.seconds:.4g} s per image, PSNR {trial.psnr_db:.1f} dB{worse}"


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Those that no other one beats in time and quality both, fastest first."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.seconds, -trial.quality)):
        if not front or trial.quality > front[-1].quality:
            front.append(trial)
    return front


def _tuning(search: _Search, chosen: Trial) -> Tuning:
    return Tuning(
        budget=Budget.model_validate(search.options.model_dump(include=set(Budget.model_fields))),
        images=search.options.images,
        seeds=search.options.seeds,
        chosen=chosen,
        front=tuple(pareto_front(search.measured)),
        trials=tuple(search.measured),
        vetoed=search.vetoed,
        notes=tuple(search.notes),
    )


def _measured(
    subject: _Subject,
    candidate: CompileOptions,
    stage: str,
    changes: dict[str, str],
    options: TuneOptions,
    work: Path,
    progress: Progress,
) -> Trial:
    """Compile, time and evaluate a candidate, unless an earlier search did."""
    path = work / f"{digest_of([subject.digest, candidate.model_dump(), options.model_dump()])[:16]}.json"
    if (earlier := _earlier(path)) is not None:
        return earlier
    bundle = _candidate(subject, candidate, work, progress)
    trial = _judged(bundle, stage, changes, options, work, progress)
    atomic_write(path, trial.model_dump_json().encode())
    return trial


def _candidate(subject: _Subject, options: CompileOptions, work: Path, progress: Progress) -> Bundle:
    """The bundle of a candidate, in the place of the one before it."""
    return subject.compiled(work / "candidate", options, work, progress)


def _earlier(path: Path) -> Trial | None:
    try:
        return Trial.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _judged(
    bundle: Bundle, stage: str, changes: dict[str, str], options: TuneOptions, work: Path, progress: Progress
) -> Trial:
    evaluation = evaluate_bundle(bundle.path, options.evaluation, save=work / "evaluated", progress=progress)
    bench = bench_bundle(bundle.path, BenchOptions(requests=options.requests, warmup=1), progress=progress)
    psnr, distribution = evaluation.measured_pairs["psnr_db"], evaluation.distribution
    distance = None if isinstance(distribution, Skipped) else distribution.difference.frechet_distance
    budget = options
    near = True
    if budget.worse_by is not None:
        assert distance is not None
        near = distance.high <= budget.worse_by
    return Trial(
        stage=stage,
        changes=changes,
        seconds=bench.seconds_per_image,
        psnr_db=psnr.mean,
        psnr_low=psnr.low,
        worse_by=None if distance is None else distance.value,
        worse_high=None if distance is None else distance.high,
        size_bytes=open_bundle(bundle.path).manifest.size_bytes(reference=False),
        within=near and (budget.least_psnr_db is None or psnr.low >= budget.least_psnr_db),
    )
