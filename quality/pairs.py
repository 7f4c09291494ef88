"""Pairs of images: a bundle's and FP's on the same noise, measured as they come, with the features of both sides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import Bundle
from ditc.errors import InputError
from ditc.progress import Progress
from ditc.quality.distributions import FeatureArray
from ditc.quality.features import (
    Extractor,
    RealFeatures,
    default_extractor,
    default_real,
    open_extractor,
    real_features,
)
from ditc.quality.generating import ImageSource, stored_images
from ditc.quality.options import EvaluateOptions
from ditc.quality.pretrained import lpips_distance
from ditc.runtime.closeness import StepDrift, measures_of, step_drift
from ditc.runtime.executor import Samples
from ditc.runtime.options import Place

__all__ = ["ExactImages", "Pairs", "Work", "measure_exact", "measure_pairs"]

FEATURES_AT_ONCE = 64  # images


@dataclass(frozen=True)
class Work:
    """One evaluation: its settings, where the bundle runs, where FP's images lie."""

    options: EvaluateOptions
    place: Place
    folder: Path
    progress: Progress


@dataclass(frozen=True)
class Judges:
    """The measures of images: `paired` by name, and the extractor or the reason why there is none."""

    paired: Mapping[str, Callable[[Samples, Samples], NDArray[np.float64]]]
    extractor: Extractor | None
    no_extractor: str
    no_lpips: str


@dataclass(frozen=True)
class Pairs:
    """The measures of all images of all seeds, in order: every pair, and the features of both sides."""

    bundle: Bundle
    judges: Judges
    image_shape: tuple[int, ...]
    real: RealFeatures | None
    steps: dict[str, StepDrift] = field(default_factory=dict)
    paired: dict[str, list[NDArray[np.float64]]] = field(default_factory=lambda: defaultdict(list))
    ours: list[FeatureArray] = field(default_factory=list)
    exact: list[FeatureArray] = field(default_factory=list)

    def add(self, images: Samples, twins: Samples) -> None:
        """Measure some images and their FP twins."""
        for name, measure in self.judges.paired.items():
            self.paired[name].append(measure(images, twins))
        if self.judges.extractor is not None:
            self.ours.append(self.judges.extractor.features(images))
            self.exact.append(self.judges.extractor.features(twins))


def measure_pairs(path: Path, work: Work, given: RealFeatures | None = None) -> Pairs:
    """Run FP, the bundle, and the bundle without its compensation, one after the other.

    `given` are real features that are known already, for bundles that are all held against the same.
    """
    options, watched = work.options, (work.options.seeds[0], min(work.options.step_images, work.options.images))
    source = ImageSource(work.place.load(path), work.progress)  # refused before FP takes its time
    with work.place.load(path, reference=True) as pipe:
        fp = ImageSource(pipe, work.progress)
        judges = _judges(fp, options)
        real = _real(fp, work, judges) if given is None else given
        exact_steps = fp.trajectory("steps-fp", *watched)
        exact = [stored_images(fp, work.folder, f"fp-{seed}", seed, 0, options.images) for seed in options.seeds]
        pairs = Pairs(pipe.bundle, judges, exact[0].shape[1:], real)
    with source.pipe:
        pairs.steps["bundle"] = step_drift(source.trajectory("steps", *watched), exact_steps)
        for seed, stored in zip(options.seeds, exact, strict=True):
            for places, images in source.images(f"bundle-{seed}", seed, 0, options.images):
                pairs.add(images, np.asarray(stored[places]))
    if "compensation.k" in pairs.bundle.tables():
        with work.place.load(path, compensation=False) as pipe:
            bare = ImageSource(pipe, work.progress).trajectory("steps-without-vc", *watched)
            pairs.steps["uncompensated"] = step_drift(bare, exact_steps)
    return pairs


@dataclass(frozen=True)
class ExactImages:
    """FP's images of all seeds in features, (n, features), and the real ones; made by the FP program of a bundle."""

    bundle: Bundle
    extractor: Extractor
    features: FeatureArray
    real: RealFeatures


def measure_exact(path: Path, work: Work, given: RealFeatures | None = None) -> ExactImages:
    """Run the FP program of a bundle alone. Raises InputError where its images have no features."""
    options = work.options
    with work.place.load(path, reference=True) as pipe:
        fp = ImageSource(pipe, work.progress)
        judges = _judges(fp, options)
        real = _real(fp, work, judges) if given is None else given
        if judges.extractor is None or real is None:
            raise InputError(f"no distance can be measured: {judges.no_extractor}; give --features, or --least-psnr")
        images = [stored_images(fp, work.folder, f"fp-{seed}", seed, 0, options.images) for seed in options.seeds]
        features = _features_of(judges.extractor, images)
    return ExactImages(pipe.bundle, judges.extractor, features, real)


def _features_of(extractor: Extractor, sets: Iterable[Samples]) -> FeatureArray:
    return np.concatenate(
        [
            extractor.features(np.asarray(images[start : start + FEATURES_AT_ONCE]))
            for images in sets
            for start in range(0, len(images), FEATURES_AT_ONCE)
        ]
    )


def _judges(source: ImageSource, options: EvaluateOptions) -> Judges:
    """Open what fits the model's images. Features that were asked for by name have to be there."""
    if not source.pipe.makes_images:
        reason = "the bundle makes latents and has no decoder; compile it with --vae FOLDER"
        if options.needs_features:
            raise InputError(f"features need images, but {reason}")
        return Judges(measures_of(source.pipe.bundle.manifest.model.latent_shape), None, reason, reason)
    shape = source.image_shape
    paired, extractor, no_extractor, no_lpips = measures_of(shape), None, "", ""
    try:
        paired = {**paired, "lpips": lpips_distance(*shape[1:])}
    except InputError as e:
        no_lpips = str(e)
    name = options.features or default_extractor(source.pipe.bundle.manifest.model.name, shape)
    try:
        extractor = open_extractor(name, shape)
    except InputError as e:
        if options.needs_features:
            raise
        no_extractor = str(e)
    return Judges(paired, extractor, no_extractor, no_lpips)


def _real(fp: ImageSource, work: Work, judges: Judges) -> RealFeatures | None:
    """Return the real features; with "fp" those of the same seeds' next FP images, which no pair has."""
    options, extractor = work.options, judges.extractor
    if extractor is None:
        return None
    shape = fp.image_shape
    source = options.real or default_real(fp.pipe.bundle.manifest.model.name, shape)
    if source != "fp":
        return real_features(source, extractor, shape)
    sets = (
        stored_images(fp, work.folder, f"fp-real-{seed}", seed, options.images, options.images)
        for seed in options.seeds
    )
    features = _features_of(extractor, sets)
    return RealFeatures(f"{len(features):,} FP images of other noise", features)
