"""One trial of a cell: compile it with a seed, make images of that seed's noise, and hold them against FP's.

The seed decides the pool, the points and the compensation's pairs too, so what differs between trials is all that
differs between two compiles and their images. Stages, executor and segments are those of `ditc compile`; only the
sealing into a bundle is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from cells import Cell

from ditc.approximators import APPROXIMATORS
from ditc.bundle import read_tables
from ditc.compiler.examples import conditions_of
from ditc.compiler.exporting import export, model_digest
from ditc.compiler.fitting import approximate, fit
from ditc.compiler.learning import LEARNED_ON, close_loop, learn, learned_plan, learns, watch_sums
from ditc.compiler.options import CompileOptions
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.planning import make_plan, plan_to_watch
from ditc.compiler.pooling import select
from ditc.compiler.quantizing import quantize
from ditc.compiler.rotating import rotate_segments
from ditc.compiler.smoothing import smooth, smoothed_plan
from ditc.compiler.trajectories import executor
from ditc.compiler.watching import STATISTICS, watch
from ditc.compiler.work import replaced
from ditc.exporter.emoji import EMOJI, builtin_emoji
from ditc.exporter.models import builtin_digits
from ditc.exporter.stress import stressed
from ditc.files import digest_of, in_turn
from ditc.program import Program
from ditc.quality.distributions import DistributionValues, Generated, RealSet, distribution_values
from ditc.quality.features import DIGITS, open_extractor, real_features
from ditc.requests import Examples
from ditc.runtime.closeness import psnr_db, ssim, step_drift
from ditc.runtime.executor import Samples, seeded_noise
from ditc.step_statistics import StepStatistics
from ditc.tables import Tables

__all__ = ["SUBJECTS", "Subject", "compiled_segments", "digest_of_trial", "exported", "learned", "trial"]

REVISION = 1  # goes up when something changes what a trial measures, and all of them are run again
BATCH = 50
THREADS = 1  # a worker for each core: small products gain nothing from more
WATCHED = 100  # images whose samples are kept after every step


@dataclass(frozen=True)
class Subject:
    """A model that trials are of: what opens it, and the row of FEATURES that its images are measured by.

    `exact` names the model whose FP images they are held against, itself unless given, with the cell's settings but
    for `exact_settings`. A trial of a model that is `trained_on` is named after its weights.
    """

    open: Callable[[], Any]
    features: str = DIGITS
    exact: str | None = None
    exact_settings: Mapping[str, Any] = field(default_factory=dict)
    trained_on: bool = False


SUBJECTS: Mapping[str, Subject] = {
    "plain": Subject(builtin_digits),
    "stressed": Subject(lambda: stressed(builtin_digits()), exact="plain"),  # stress changes nothing in FP
    EMOJI: Subject(builtin_emoji, features=EMOJI, exact_settings={"steps": 25, "sampler": "euler"}, trained_on=True),
}


@dataclass(frozen=True)
class SeedImages:
    """Finished images, (n, *shape), and the first WATCHED of them after every step, (steps, WATCHED, *shape)."""

    images: Samples
    steps: Samples


def digest_of_trial(cell: Cell, seed: int) -> str:
    """Return the name of a trial: a digest of everything that decides its result."""
    return digest_of([REVISION, *named(cell.model), cell.every_setting, cell.images, seed])


@cache
def named(model: str) -> tuple[str, ...]:
    """Return a model's name, with a digest of its weights where they may change."""
    return (model, model_digest(SUBJECTS[model].open())) if SUBJECTS[model].trained_on else (model,)


@cache
def examples(model: str) -> Examples:
    """Return the conditions of a model's images: its classes in turn, or captions that its text encoder encodes."""
    return conditions_of(SUBJECTS[model].open())[1]


def trial(cell: Cell, seed: int, work: Path) -> dict[str, Any]:
    """Return the measures of one trial and of FP on the same noise."""
    options = CompileOptions(**cell.every_setting, seed=seed)
    model = SUBJECTS[cell.model].open()
    statistics = watched(model, options, work)
    plan = make_plan(model, options, statistics=statistics, examples=examples(cell.model))
    plan = replace(plan, threads=THREADS)
    segments = exported(cell.model, plan, work)
    exact = exact_side(cell, seed, work)
    with TemporaryDirectory(dir=work) as temporary:
        plan = learned(plan, cell.model, Path(temporary))
        plan, compiled, tables = compiled_segments(plan, segments, Path(temporary))
        own = seed_images(plan, plan.program, compiled, tables, seed, cell.images)
    return {
        "n": cell.images,
        "found": measures(cell.model, own.images).model_dump(),
        "fp": measures(cell.model, exact.images).model_dump(),
        "psnr_db": float(psnr_db(own.images, exact.images).mean()),
        "ssim": float(ssim(own.images, exact.images).mean()),
        "variance_ratio": float(own.images.var() / exact.images.var()),
        **({"steps": drift_of(own, exact)} if len(own.steps) == len(exact.steps) else {}),
    }


def drift_of(own: SeedImages, exact: SeedImages) -> dict[str, Any]:
    """Return how far the samples are from FP's after every step, by measure."""
    drift = step_drift(list(own.steps), list(exact.steps))
    return {
        "relative_error": np.round(drift.relative_error, 5).tolist(),
        "variance_drift": np.round(np.ravel(drift.variance_drift), 5).tolist(),
    }


def watched(model: Any, options: CompileOptions, work: Path) -> StepStatistics | None:
    """Return the statistics that the policy asks for, None where it asks for none."""
    to_watch = plan_to_watch(model, options)
    if to_watch is None:
        return None
    with TemporaryDirectory(dir=work) as folder:
        watch(to_watch[0], model, to_watch[1], Path(folder))
        return StepStatistics.load(Path(folder) / STATISTICS)


def exported(model: str, plan: Plan, work: Path) -> Segments:
    """Return the FP segments of a model, exported once for all programs that call the same."""
    shapes = [part.model_dump() for part in plan.cached_program.segments]
    folder = work / f"export-{digest_of([REVISION, *named(model), shapes, plan.options.cfg])}"
    with in_turn(folder.with_name(f".{folder.name}.lock")):
        if not (folder / "parity.json").is_file():
            folder.mkdir(exist_ok=True)
            export(plan, SUBJECTS[model].open(), folder)
    return {call: folder / f"{call}.onnx" for call in plan.cached_program.calls}


def learned(plan: Plan, model: str, folder: Path) -> Plan:
    """Return the plan with the numbers that its reuse learns, where it does."""
    if not learns(plan):
        return plan
    for name in (*LEARNED_ON, "learn"):
        (folder / name).mkdir()
    for name, purpose in LEARNED_ON.items():
        watch_sums(plan, SUBJECTS[model].open(), purpose, folder / name)
    learn(plan, [folder / name for name in LEARNED_ON], folder / "learn")
    return learned_plan(plan, folder / "learn")


def compiled_segments(plan: Plan, segments: Segments, folder: Path) -> tuple[Plan, Segments, Tables]:
    """Return the segments as `ditc compile` makes them, the plan that has their tables of timesteps, and the others."""
    compiled, tables = segments, dict(plan.reuse_tables)
    if plan.options.bits is not None:
        select(plan, segments, folder)
        calib = folder / "calib.npz"
        if plan.options.smooth != "none":
            (folder / "smooth").mkdir()
            smooth(plan, segments, calib, folder / "smooth")
            segments = replaced(segments, folder / "smooth")
            plan = smoothed_plan(plan, folder / "smooth")
        rotated = None
        if plan.options.rotate is not None:
            (folder / "rotate").mkdir()
            rotate_segments(plan, segments, calib, folder / "rotate")
            rotated = replaced(segments, folder / "rotate")
        (folder / "quantize").mkdir()
        quantize(plan, segments, calib, folder / "quantize", rotated=rotated)
        compiled = replaced(segments, folder / "quantize")
        tables |= read_tables(folder / "quantize" / "scales.safetensors")
    approximator = APPROXIMATORS[plan.options.reuse]
    closes = approximator.learned == "closed" and learns(plan)
    if approximator.fit is not None or closes:
        (close_loop if closes else approximate)(plan, segments, compiled, tables, folder)
        tables |= read_tables(folder / "approximate.safetensors")
    if plan.options.vc != "none":
        fit(plan, segments, compiled, tables, folder)
        tables |= read_tables(folder / "compensation.safetensors")
    return plan, compiled, tables


def seed_images(plan: Plan, program: Program, segments: Segments, tables: Tables, seed: int, count: int) -> SeedImages:
    """Return the images of a seed; the classes take turns."""
    images: list[Samples] = []
    watched: list[list[Samples]] = [[] for _ in program.steps]
    with executor(plan, program, segments, tables) as runner:
        for first in range(0, count, BATCH):
            size = min(BATCH, count - first)
            noise, fresh = seeded_noise(seed, first, size, plan.spec.latent_shape)
            for event in runner.run(plan.examples.in_turn(first, size), noise, fresh):
                if first < WATCHED:
                    watched[event.index].append(event.x.copy())
            images.append(event.x.copy())
    return SeedImages(np.concatenate(images), np.stack([np.concatenate(parts)[:WATCHED] for parts in watched]))


def exact_side(cell: Cell, seed: int, work: Path) -> SeedImages:
    """Return FP without a cache. Run once a sampler and seed."""
    model = SUBJECTS[cell.model].exact or cell.model
    settings = {**cell.every_setting, **SUBJECTS[model].exact_settings}
    key = [REVISION, *named(model), settings["sampler"], settings["steps"], settings["cfg"], cell.images, seed]
    path = work / f"fp-{digest_of(key)}.npz"
    with in_turn(path.with_name(f".{path.name}.lock")):
        if not path.is_file():
            without: dict[str, Any] = {"policy": "none", "reuse": "hold", "precision": "fp32", "float_steps": "none"}
            without |= {"smooth": "none", "rotate": None}
            options = CompileOptions(**{**settings, **without})
            plan = replace(make_plan(SUBJECTS[model].open(), options, examples=examples(model)), threads=THREADS)
            exact = seed_images(plan, plan.program, exported(model, plan, work), {}, seed, cell.images)
            np.savez(path, images=exact.images, steps=exact.steps)
    with np.load(path, allow_pickle=False) as arrays:
        return SeedImages(arrays["images"], arrays["steps"])


def measures(model: str, images: Samples) -> DistributionValues:
    """Measure images against the real ones of a model, over its classifier's features."""
    own = examples(model)
    shape = images.shape[1:]
    extractor = open_extractor(SUBJECTS[model].features, shape)
    assert extractor.classes is not None
    prompts = own.in_turn(0, len(images)).prompts
    asked = np.array(own.spec.labels_in_turn(0, len(images))) if extractor.asked is None else extractor.asked(prompts)
    features = extractor.features(images)
    return distribution_values(
        Generated(features, extractor.classes(features) == asked),
        RealSet(real_features(extractor.name, extractor, shape).features),
    )
