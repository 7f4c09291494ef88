"""`ditc tune` as a function: the fastest bundle within a budget of quality, by measuring candidates.

Each candidate that the search asks for (quality/search.py) is a real bundle, compiled, timed and evaluated on this
machine. What is measured is kept in the work folder as it comes, so an interrupted search goes on where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ditc.bundle import Bundle, open_bundle
from ditc.compiler.driver import check_places, compile_model
from ditc.compiler.exporting import model_digest
from ditc.compiler.options import CompileOptions
from ditc.engines.integer_form import IntegerForm, arithmetic_of
from ditc.engines.targets import backend_for
from ditc.errors import InputError
from ditc.exporter.model_facts import ModelFacts
from ditc.files import atomic_write, digest_of
from ditc.loras import Lora, loras_from
from ditc.progress import Progress, silent
from ditc.quality.evaluating import evaluate_bundle
from ditc.quality.features import check_sources
from ditc.quality.options import Budget, TuneOptions, VetoOptions
from ditc.quality.search import Search, Trial, pareto_front
from ditc.quality.veto import veto_of
from ditc.spec import Record, Skipped
from ditc.speed.benching import bench_bundle
from ditc.speed.options import BenchOptions

__all__ = ["Tuning", "seven_bits_may_pay", "trial_of", "tune_model"]

VETO_IMAGES = 2
EXPORTS = "exports"  # folder of what candidates have in common


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
    conditions: str | PathLike[str] | None = None,
    prompts: str | PathLike[str] | None = None,
    text: bool = True,
    facts: ModelFacts | None = None,
    loras: Iterable[str | PathLike[str] | Lora] = (),
) -> Tuning:
    """Search, leave the fastest bundle within the budget at `out`, and return all trials and the front.

    `base` holds what is not searched; `num_heads`, `vae`, `conditions`, `prompts`, `text`, `facts`, `loras` and
    `on_note` are those of `compile_model`. Raises CheckError, with what came nearest, where no candidate is within the
    budget; `out` is then as it was, and what was measured stays in the work folder beside it.
    """
    target = Path(out).absolute()
    check_sources(options.features, options.real)
    check_places(target, None, force=force)
    work = target.with_name(f".{target.name}.tune")
    subject = _Subject(model, num_heads, vae, conditions, prompts, text, facts, loras_from(loras), on_note)
    candidates = _Candidates(subject, base, options, work, progress)

    def judge(stage: str, changes: dict[str, str]) -> Trial:
        trial = candidates.trial(stage, changes)
        on_trial(trial)
        return trial

    search = Search(base, options, judge, candidates.vetoed, seven_bits_may_pay(base))
    search.explore()
    chosen = search.choose()
    candidates.subject.compiled(target, base.model_copy(update=chosen.changes), work, progress, force=force)
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


def trial_of(
    bundle: Bundle, stage: str, changes: dict[str, str], options: TuneOptions, work: Path, progress: Progress
) -> Trial:
    """Time and evaluate the bundle of a candidate, and hold it to the budget."""
    evaluation = evaluate_bundle(bundle.path, options.evaluation, save=work / "evaluated", progress=progress)
    bench = bench_bundle(bundle.path, BenchOptions(requests=options.requests, warmup=1), progress=progress)
    psnr, distribution = evaluation.measured_pairs["psnr_db"], evaluation.distribution
    distance = None if isinstance(distribution, Skipped) else distribution.difference.frechet_distance
    near = True
    if options.worse_by is not None:
        assert distance is not None
        near = distance.high <= options.worse_by
    return Trial(
        stage=stage,
        changes=changes,
        seconds=bench.seconds_per_image,
        psnr_db=psnr.mean,
        psnr_low=psnr.low,
        worse_by=None if distance is None else distance.value,
        worse_high=None if distance is None else distance.high,
        size_bytes=open_bundle(bundle.path).manifest.size_bytes(reference=False),
        within=near and (options.least_psnr_db is None or psnr.low >= options.least_psnr_db),
    )


@dataclass(frozen=True)
class _Subject:
    """The model that is tuned, and what is stated of it. `told` are the notes about it that were handed on."""

    model: Any
    num_heads: int | None
    vae: str | PathLike[str] | None
    conditions: str | PathLike[str] | None
    prompts: str | PathLike[str] | None
    text: bool
    facts: ModelFacts | None
    loras: tuple[Lora, ...]
    on_note: Callable[[str], None] | None
    told: set[str] = field(default_factory=set)

    def compiled(
        self, out: Path, options: CompileOptions, work: Path, progress: Progress, *, force: bool = True
    ) -> Bundle:
        """Compile a bundle of it; what is exported is there for the next ones."""
        return compile_model(
            self.model,
            out,
            options,
            progress=progress,
            force=force,
            num_heads=self.num_heads,
            vae=self.vae,
            conditions=self.conditions,
            prompts=self.prompts,
            text=self.text,
            facts=self.facts,
            loras=self.loras,
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
        """Its name among trials on disk: its weights, or its name, what is stated, and when it was written."""
        conditions = "" if self.conditions is None else _written(self.conditions)
        conditions += "" if self.prompts is None else f" prompts {_written(self.prompts)}"
        conditions += "" if self.text else " no text"
        if not isinstance(self.model, (str, PathLike)):
            return model_digest(self.model) + conditions
        loras = "".join(f" {lora.path}:{lora.weight} {_written(lora.path)}" for lora in self.loras)
        return f"{self.model} {_written(self.model)} {self.num_heads} {self.vae} {self.facts}{conditions}{loras}"


def _written(path: str | PathLike[str]) -> str:
    """When a file was written; nothing of a name that is no file."""
    return str(Path(path).stat().st_mtime_ns) if Path(path).exists() else ""


@dataclass(frozen=True)
class _Candidates:
    """The candidates of one search, each compiled in the place of the one before it; their trials stay in `work`."""

    subject: _Subject
    base: CompileOptions
    options: TuneOptions
    work: Path
    progress: Progress

    def trial(self, stage: str, changes: dict[str, str]) -> Trial:
        """Compile, time and evaluate a candidate, unless an earlier search did."""
        candidate = self.base.model_copy(update=changes)
        digest = digest_of([self.subject.digest, candidate.model_dump(), self.options.model_dump()])
        path = self.work / f"{digest[:16]}.json"
        if (earlier := _earlier(path)) is not None:
            return earlier
        trial = trial_of(self._bundle(candidate), stage, changes, self.options, self.work, self.progress)
        atomic_write(path, trial.model_dump_json().encode())
        return trial

    def vetoed(self, trial: Trial) -> float:
        """Return the share of branches and steps of a candidate that the veto is against."""
        bundle = self._bundle(self.base.model_copy(update=trial.changes))
        return veto_of(bundle.path, VetoOptions(images=VETO_IMAGES, lag=1), progress=self.progress).vetoed

    def _bundle(self, options: CompileOptions) -> Bundle:
        return self.subject.compiled(self.work / "candidate", options, self.work, self.progress)


def _earlier(path: Path) -> Trial | None:
    """Load a trial of an earlier search; None where there is none."""
    try:
        return Trial.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _tuning(search: Search, chosen: Trial) -> Tuning:
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
