"""The candidates of one search, each a real bundle: compiled, timed, evaluated, and kept as a trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ditc.bundle import Bundle, open_bundle
from ditc.compiler.driver import compile_model, model_spec
from ditc.compiler.exporting import model_digest
from ditc.compiler.options import CompileOptions
from ditc.errors import BundleError
from ditc.exporter.model_facts import ModelFacts
from ditc.files import atomic_write, digest_of
from ditc.loras import Lora
from ditc.progress import Progress
from ditc.quality.anchor import Anchor, AnchorFigures
from ditc.quality.distributions import Distribution
from ditc.quality.evaluating import evaluate_bundle
from ditc.quality.options import Budget, TuneOptions, VetoOptions
from ditc.quality.search import SOLVER
from ditc.quality.solvers import SOLVER_SETTINGS, in_floats
from ditc.quality.trials import Changes, Trial
from ditc.quality.veto import veto_of
from ditc.spec import ModelSpec, Skipped
from ditc.speed.benching import bench_bundle
from ditc.speed.options import BenchOptions
from ditc.speed.turns import seconds_in_turn

__all__ = ["Candidates", "Subject", "trial_of"]

VETO_IMAGES = 2
ROUNDS = 5  # of the last two in turn, at least
EXPORTS = "exports"  # folder of what candidates have in common
EVALUATED = "evaluated"  # folder of FP's images


def trial_of(
    bundle: Bundle,
    stage: str,
    changes: Changes,
    options: TuneOptions,
    work: Path,
    progress: Progress,
    anchor: Anchor | None = None,
) -> Trial:
    """Time and evaluate the bundle of a candidate, and hold it to the budget.

    Its distance is counted from the anchor's; without one from that of FP of its own sampler and steps.
    """
    if anchor is None:
        figures = _evaluated(bundle, options, work, progress)
    else:
        held = anchor.held(bundle, options.evaluation, exact=stage == SOLVER)
        figures = Figures.of(held.psnr_db, held.psnr_low, held.difference)
    bench = bench_bundle(bundle.path, BenchOptions(requests=options.requests, warmup=1), progress=progress)
    return Trial(
        stage=stage,
        changes=changes,
        seconds=bench.seconds_per_image,
        size_bytes=open_bundle(bundle.path).manifest.size_bytes(reference=False),
        within=figures.within(options),
        **asdict(figures),
    )


@dataclass(frozen=True)
class Figures:
    """The quality of a candidate, as a Trial has it."""

    psnr_db: float
    psnr_low: float
    worse_by: float | None = None
    worse_high: float | None = None
    recall_by: float | None = None
    recall_low: float | None = None

    @staticmethod
    def of(psnr_db: float, psnr_low: float, difference: Distribution | None) -> Figures:
        """Return PSNR and its lower end with the difference of distributions, where there is one."""
        if difference is None:
            return Figures(psnr_db, psnr_low)
        distance, recall = difference.frechet_distance, difference.recall
        return Figures(psnr_db, psnr_low, distance.value, distance.high, recall.value, recall.low)

    def within(self, budget: Budget) -> bool:
        """Are the ends of the intervals within the bounds that there are?"""
        at_most = (
            (self.worse_high, budget.worse_by),
            (_negative(self.recall_low), budget.less_recall),
            (_negative(self.psnr_low), _negative(budget.least_psnr_db)),
        )
        return all(bound is None or (value is not None and value <= bound) for value, bound in at_most)


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _evaluated(bundle: Bundle, options: TuneOptions, work: Path, progress: Progress) -> Figures:
    evaluation = evaluate_bundle(bundle.path, options.evaluation, save=work / EVALUATED, progress=progress)
    psnr, distribution = evaluation.measured_pairs["psnr_db"], evaluation.distribution
    difference = None if isinstance(distribution, Skipped) else distribution.difference
    return Figures.of(psnr.mean, psnr.low, difference)


@dataclass(frozen=True)
class Subject:
    """The model that is tuned, and what is stated of it. `told` are the notes about it that were handed on."""

    model: Any
    num_heads: int | None = None
    vae: str | PathLike[str] | None = None
    conditions: str | PathLike[str] | None = None
    prompts: str | PathLike[str] | None = None
    text: bool = True
    facts: ModelFacts | None = None
    loras: tuple[Lora, ...] = ()
    on_note: Callable[[str], None] | None = None
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

    @property
    def spec(self) -> ModelSpec:
        """The specification that the model states itself."""
        return model_spec(self.model, num_heads=self.num_heads, vae=self.vae, facts=self.facts, loras=self.loras)

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
class Candidates:
    """The candidates of one search, each compiled in the place of the one before it; their trials stay in `work`."""

    subject: Subject
    base: CompileOptions
    options: TuneOptions
    work: Path
    progress: Progress

    @cached_property
    def anchor(self) -> Anchor | None:
        """The images that distances are counted from, None where PSNR is part of the budget."""
        return Anchor(self._anchored, self.work / EVALUATED, self.progress) if self.options.is_of_distance else None

    def trial(self, stage: str, changes: Changes) -> Trial:
        """Compile, time and evaluate a candidate, unless an earlier search did."""
        return self._trial(stage, changes, self.options, lambda: self._bundle(changes, "candidate"))

    def confirmed(self, trial: Trial) -> Trial:
        """Time and evaluate a candidate once more, on noise of seeds that chose none."""
        fresh = self.options.model_copy(update={"seeds": self.options.fresh_seeds})
        return self._trial("confirm", trial.changes, fresh, lambda: self._last(trial))

    def in_turn(self, trials: Sequence[Trial]) -> Sequence[float]:
        """Return seconds per image of candidates that run one after the other, round after round."""
        paths = [self._last(trial).path for trial in trials]
        return seconds_in_turn(paths, max(ROUNDS, self.options.requests), self.progress)

    def vetoed(self, trial: Trial) -> float:
        """Return the share of branches and steps of a candidate that the veto is against."""
        bundle = self._bundle(trial.changes, "candidate")
        return veto_of(bundle.path, VetoOptions(images=VETO_IMAGES, lag=1), progress=self.progress).vetoed

    def figures(self) -> AnchorFigures | None:
        """Return what the distances are counted from."""
        if self.anchor is None:
            return None
        measured = self.anchor.distribution(self.options.evaluation)
        return AnchorFigures(
            sampler=self.base.sampler,
            spacing=self.base.spacing,
            steps=self.base.steps,
            frechet_distance=measured.frechet_distance.value,
            recall=measured.recall.value,
        )

    def _trial(self, stage: str, changes: Changes, options: TuneOptions, bundle: Callable[[], Bundle]) -> Trial:
        """Return a trial of this or an earlier search; the budget may have been another one."""
        candidate = self.base.model_copy(update=changes)
        counted_from = self.base.model_dump(include={*SOLVER_SETTINGS}) if options.is_of_distance else None
        decided = [candidate.model_dump(), options.evaluation.model_dump(), options.requests, counted_from]
        path = self.work / f"{digest_of([self.subject.digest, *decided])[:16]}.json"
        if (earlier := _earlier(path)) is not None:
            figures = Figures(**earlier.model_dump(include={field.name for field in fields(Figures)}))
            return earlier.model_copy(update={"stage": stage, "within": figures.within(options)})
        trial = trial_of(bundle(), stage, changes, options, self.work, self.progress, self.anchor)
        atomic_write(path, trial.model_dump_json().encode())
        return trial

    def _anchored(self) -> Bundle:
        return self._bundle(in_floats(self.base), "anchor")

    def _last(self, trial: Trial) -> Bundle:
        """Return the bundle of a candidate that is measured once more, in a place of its own."""
        place = f"last-{digest_of(trial.changes)[:16]}"
        try:
            return open_bundle(self.work / place)
        except BundleError:
            return self._bundle(trial.changes, place)

    def _bundle(self, changes: Changes, place: str) -> Bundle:
        return self.subject.compiled(self.work / place, self.base.model_copy(update=changes), self.work, self.progress)


def _earlier(path: Path) -> Trial | None:
    """Load a trial of an earlier search; None where there is none."""
    try:
        return Trial.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
