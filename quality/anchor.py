"""The anchor of a search: images of its base in floating point, without a cache, which all candidates are held against.

A candidate may take other samplers and fewer steps than the base. Held against FP of its own sampler and steps, as
`ditc evaluate` does, any number of steps would look perfect. So the distance of every candidate is counted from the
anchor's, on the same noise and against the same real images; where those are FP images of other noise they are the
anchor's too. PSNR alone stays against FP of the same sampler and steps: two solvers lead to unlike images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ditc.bundle import Bundle
from ditc.progress import Progress
from ditc.quality.distributions import Distribution, MeasuredSet, RealSet, compare_sets
from ditc.quality.evaluating import generated, measured_features, paired_measures
from ditc.quality.evaluation import PairedMeasure
from ditc.quality.features import Extractor, RealFeatures
from ditc.quality.options import EvaluateOptions
from ditc.quality.pairs import Work, measure_exact, measure_pairs
from ditc.runtime.closeness import psnr_db
from ditc.runtime.options import HERE
from ditc.spec import Record

__all__ = ["Anchor", "AnchorFigures", "Held"]

NO_ERROR_DB = float(psnr_db(np.zeros((1, 1)), np.zeros((1, 1)))[0])  # of an image and itself


class AnchorFigures(Record):
    """The sampler that all candidates are held against, as it was asked for, its steps, and how good its images are.

    `sampler` and `spacing` of None are the model's own.
    """

    sampler: str | None
    spacing: str | None
    steps: int
    frechet_distance: float
    recall: float


@dataclass(frozen=True)
class Held:
    """A candidate's images: PSNR in dB against FP of its own sampler and steps, and the measures less the anchor's."""

    psnr_db: float
    psnr_low: float
    difference: Distribution


@dataclass(frozen=True)
class _Side:
    """The anchor's images of some seeds, measured, with the real ones."""

    extractor: Extractor
    real: RealFeatures
    against: RealSet
    measured: MeasuredSet


@dataclass(frozen=True)
class Anchor:
    """The anchor of one search. Its bundle is opened, and its images made, when a candidate asks for them.

    FP images are kept in `folder`.
    """

    bundle: Callable[[], Bundle]
    folder: Path
    progress: Progress
    sides: dict[tuple[int, ...], _Side] = field(default_factory=dict)

    def held(self, candidate: Bundle, options: EvaluateOptions, *, exact: bool) -> Held:
        """Hold a candidate's images against the anchor's; `exact` ones are those of its FP program.

        Raises InputError where images have no features, CheckError where they are NaN.
        """
        side, work = self._side(options), self._work(options)
        if exact:
            psnr = PairedMeasure(mean=NO_ERROR_DB, low=NO_ERROR_DB, high=NO_ERROR_DB, worst=NO_ERROR_DB)
            features = measure_exact(candidate.path, work, side.real).features
        else:
            pairs = measure_pairs(candidate.path, work, side.real)
            measure = paired_measures(pairs, options.rounds)["psnr_db"]
            assert isinstance(measure, PairedMeasure)
            psnr, features = measure, np.concatenate(pairs.ours)
        images = generated([features], side.extractor, candidate, options)
        ours = measured_features("bundle", images, side.against, work)
        return Held(psnr.mean, psnr.low, compare_sets(ours, side.measured).difference)

    def distribution(self, options: EvaluateOptions) -> Distribution:
        """Return the measures of the anchor's own images."""
        return self._side(options).measured.distribution

    def _side(self, options: EvaluateOptions) -> _Side:
        if options.seeds not in self.sides:
            work = self._work(options)
            exact = measure_exact(self.bundle().path, work)
            against = RealSet(exact.real.features)
            images = generated([exact.features], exact.extractor, exact.bundle, options)
            measured = measured_features("anchor", images, against, work)
            self.sides[options.seeds] = _Side(exact.extractor, exact.real, against, measured)
        return self.sides[options.seeds]

    def _work(self, options: EvaluateOptions) -> Work:
        return Work(options, HERE, self.folder, self.progress)
