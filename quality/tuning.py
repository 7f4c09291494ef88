"""`ditc tune` as a function: the fastest bundle within a budget of quality, by measuring candidates.

Each candidate that the search asks for (quality/search.py) is a real bundle, compiled, timed and evaluated on this
machine. What is measured is kept in the work folder as it comes, so an interrupted search goes on where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from ditc.compiler.driver import check_places
from ditc.compiler.options import CompileOptions
from ditc.engines.integer_form import IntegerForm, arithmetic_of
from ditc.engines.targets import backend_for
from ditc.errors import InputError
from ditc.exporter.model_facts import ModelFacts
from ditc.loras import Lora, loras_from
from ditc.progress import Progress, silent
from ditc.quality.anchor import AnchorFigures
from ditc.quality.candidates import Candidates, Subject, trial_of
from ditc.quality.features import check_sources
from ditc.quality.options import Budget, TuneOptions
from ditc.quality.search import Again, Search
from ditc.quality.solvers import Solvers, solvers_of
from ditc.quality.trials import Changes, Trial, pareto_front
from ditc.spec import Record

__all__ = ["Tuning", "seven_bits_may_pay", "trial_of", "tune_model"]

ONE_SOLVER = (
    "sampler and steps stay as they are: PSNR tells how far images are from those of the same ones; a search with "
    "--worse-by alone tries others too"
)


class Tuning(Record):
    """A search and what it chose.

    `trials` are all that were measured, `front` those that no other one beats, fastest first.
    `vetoed` is the share of branches and steps where quantization noise exceeds what a cache saves, None where nothing
    is quantized; `notes` say what was not tried, and why. With a budget of distance alone `anchor` is what it is
    counted from, `confirmed` are trials of what won on noise of `fresh_seeds`, the last two of them timed in turn, and
    `rival` is the fastest without a cache among them.
    """

    budget: Budget
    images: int
    seeds: tuple[int, ...]
    chosen: Trial
    front: tuple[Trial, ...]
    trials: tuple[Trial, ...]
    vetoed: float | None
    notes: tuple[str, ...]
    anchor: AnchorFigures | None = None
    rival: Trial | None = None
    confirmed: tuple[Trial, ...] = ()
    fresh_seeds: tuple[int, ...] = ()


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
    base = base.model_copy(update={"watch_images": None})  # of a policy or a reuse, and both are searched
    work = target.with_name(f".{target.name}.tune")
    seven_bits = seven_bits_may_pay(base)
    subject = Subject(model, num_heads, vae, conditions, prompts, text, facts, loras_from(loras), on_note)
    solvers, notes = _solvers(subject, base, options)
    candidates = Candidates(subject, base, options, work, progress)

    def judge(stage: str, changes: Changes) -> Trial:
        trial = candidates.trial(stage, changes)
        on_trial(trial)
        return trial

    def confirm(trial: Trial) -> Trial:
        confirmed = candidates.confirmed(trial)
        on_trial(confirmed)
        return confirmed

    search = Search(
        base,
        options,
        judge,
        candidates.vetoed,
        seven_bits,
        notes=[*notes],
        solvers=solvers,
        again=Again(confirm, candidates.in_turn) if options.is_of_distance else None,
    )
    search.explore()
    chosen = search.choose()
    tuning = _tuning(search, chosen, candidates)
    subject.compiled(target, base.model_copy(update=chosen.changes), work, progress, force=force)
    shutil.rmtree(work)
    return tuning


def _solvers(subject: Subject, base: CompileOptions, options: TuneOptions) -> tuple[Solvers | None, tuple[str, ...]]:
    """Return the solvers to choose from, None for the base's alone, and a line about those that are not tried."""
    if not options.is_of_distance:
        return None, (ONE_SOLVER,)
    if options.step_counts == (base.steps,) and options.samplers == options.spacings == ():
        return None, ()  # known without a look at the model
    return solvers_of(subject.spec, base, options)


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


def _tuning(search: Search, chosen: Trial, candidates: Candidates) -> Tuning:
    return Tuning(
        budget=Budget.model_validate(search.options.model_dump(include=set(Budget.model_fields))),
        images=search.options.images,
        seeds=search.options.seeds,
        chosen=chosen,
        front=tuple(pareto_front(search.candidates)),
        trials=tuple(search.measured),
        vetoed=search.vetoed,
        notes=tuple(search.notes),
        anchor=candidates.figures(),
        rival=search.rival,
        confirmed=tuple(search.confirmed),
        fresh_seeds=search.options.fresh_seeds if search.confirmed else (),
    )
