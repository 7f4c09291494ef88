"""Distances of a set of generated images from a set of real ones, as distributions of features.

    real = RealSet(real_features)                 once for all that is held against it
    fp = measure_set(Generated(fp_features), real)         once for all that is compared with it
    comparison = compare_sets(measure_set(Generated(features), real), fp)

All of it is NumPy on features, (n, features), whatever made them. Two sets can be compared where they are pairs: the
same noise and label in the same place. Both then draw the same images in every round of the bootstrap.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ditc.errors import InputError
from ditc.quality.bootstrap import Counts, Estimate, Numbers, OnRound, bootstrapped, estimates, share, share_difference
from ditc.quality.manifolds import K, coverage, neighbours
from ditc.spec import PartialRecord, Record

__all__ = [
    "Comparison",
    "Distribution",
    "DistributionValues",
    "FeatureArray",
    "Generated",
    "MeasuredSet",
    "RealSet",
    "compare_sets",
    "distribution_values",
    "frechet_distance",
    "measure_set",
]

ROUNDS = 1000
FeatureArray = NDArray[Any]  # (n, features), of any float type


class RealSet:
    """Real features, (n, features), with what every comparison needs of them. They are held fixed in all intervals."""

    def __init__(self, features: FeatureArray) -> None:
        if len(features) < 2:
            raise InputError(f"a distribution needs at least 2 images, found {len(features)} real ones")
        self.features = np.float64(features)
        self.mean = self.features.mean(axis=0)
        covariance = np.cov(self.features, rowvar=False).reshape(2 * self.features.shape[1:])
        self.trace = float(np.trace(covariance))
        values, vectors = np.linalg.eigh(covariance)
        self.root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def radii(self) -> Numbers:
        """Of the real images' balls, (n,)."""
        return neighbours(self.features - self.mean, K).radii()

    def frechet_distance(self, features: Numbers, counts: Counts | None = None) -> float:
        """Return |mu - mu_r|^2 + tr(C + C_r - 2 (C_r C)^(1/2)), of features drawn `counts` times each, or once.

        The trace of the root comes from the eigenvalues of C_r^(1/2) C C_r^(1/2), which is symmetric.
        """
        weights = np.ones(len(features)) if counts is None else np.float64(counts)
        mean = weights @ features / weights.sum()
        centred = np.sqrt(weights)[:, None] * (features - mean)
        covariance = centred.T @ centred / (weights.sum() - 1)
        cross = np.sqrt(np.maximum(np.linalg.eigvalsh(self.root @ covariance @ self.root), 0)).sum()
        return float(((mean - self.mean) ** 2).sum() + np.trace(covariance) + self.trace - 2 * cross)


def frechet_distance(a: FeatureArray, b: FeatureArray) -> float:
    """Return the Frechet distance between Gaussians fitted to two sets of feature vectors, each (n, features)."""
    return RealSet(b).frechet_distance(np.float64(a))


@dataclass(frozen=True)
class Generated:
    """Features of generated images, (n, features), and whether each shows the class that was asked for, (n,) of bool.

    `consistent` is None where no classifier is known.
    """

    features: FeatureArray
    consistent: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if not np.isfinite(self.features).all():
            raise InputError("features hold NaN or infinity; the images or their extractor are broken")
        if self.consistent is not None and len(self.consistent) != len(self.features):
            raise InputError(f"{len(self.features)} images, but classes of {len(self.consistent)}")

    def part(self, rows: slice) -> Generated:
        """Return some of the images."""
        return Generated(self.features[rows], None if self.consistent is None else self.consistent[rows])


class Distribution(Record):
    """Measures of a set of images, or of the difference of two; `class_consistency` is None without a classifier."""

    frechet_distance: Estimate
    precision: Estimate
    recall: Estimate
    class_consistency: Estimate | None

    @property
    def measures(self) -> dict[str, Estimate]:
        """Those that are there, by name."""
        return {name: estimate for name, estimate in self if estimate is not None}


class DistributionValues(PartialRecord):
    """The measures of a set of images without intervals; `class_consistency` needs a classifier."""

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"class_consistency"})

    frechet_distance: float
    precision: float
    recall: float
    class_consistency: float | None = None


class Comparison(Record):
    """A bundle's images, FP's on the same noise, and the difference bundle - FP, all at the same number of images."""

    n: int
    real: int
    dimensions: int
    rounds: int
    ours: Distribution
    exact: Distribution
    difference: Distribution


@dataclass(frozen=True)
class MeasuredSet:
    """One set with its bootstrap: all that a comparison needs, and no features any more.

    `values` are (Frechet distance, recall), `replicates` those of every round, (rounds, 2); `precise` says which images
    lie inside the real manifold, `consistent` which show their class, each (n,).
    """

    real: RealSet
    seed: int
    values: Numbers
    replicates: Numbers
    precise: NDArray[np.bool_]
    consistent: NDArray[np.bool_] | None

    @property
    def distribution(self) -> Distribution:
        """The measures of this set alone."""
        consistency = None if self.consistent is None else share(self.consistent)
        return _distribution(self.values, self.replicates, share(self.precise), consistency)


def measure_set(
    generated: Generated,
    real: RealSet,
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
    watch: OnRound = lambda *_: None,
) -> MeasuredSet:
    """Measure a set, and every one of `rounds` resamples of it. Sets of equal number and `seed` draw the same images.

    Raises InputError where the features are of another kind than the real ones.
    """
    side = _Side(generated, real)
    return MeasuredSet(
        real=real,
        seed=seed,
        values=side.resampled(),
        replicates=bootstrapped(side.resampled, len(generated.features), rounds, seed, watch),
        precise=side.precise,
        consistent=generated.consistent,
    )


def compare_sets(ours: MeasuredSet, exact: MeasuredSet) -> Comparison:
    """Compare two paired sets. Raises InputError where they are not pairs, or measured another way."""
    drawn = [(len(side.precise), len(side.replicates), side.seed) for side in (ours, exact)]
    if drawn[0] != drawn[1]:
        raise InputError(f"expected pairs, measured alike; found (images, rounds, seed) {drawn[0]} and {drawn[1]}")
    if not np.array_equal(ours.real.features, exact.real.features):
        raise InputError("expected two sets that were held against the same real images")
    consistency = None
    if ours.consistent is not None and exact.consistent is not None:
        consistency = share_difference(ours.consistent, exact.consistent)
    return Comparison(
        n=len(ours.precise),
        real=len(ours.real),
        dimensions=ours.real.features.shape[1],
        rounds=len(ours.replicates),
        ours=ours.distribution,
        exact=exact.distribution,
        difference=_distribution(
            ours.values - exact.values,
            ours.replicates - exact.replicates,
            share_difference(ours.precise, exact.precise),
            consistency,
        ),
    )


def distribution_values(generated: Generated, real: RealSet) -> DistributionValues:
    """Measure a set without intervals."""
    side = _Side(generated, real)
    distance, recall = side.resampled().tolist()
    return DistributionValues(
        frechet_distance=distance,
        precision=float(side.precise.mean()),
        recall=recall,
        class_consistency=None if generated.consistent is None else float(generated.consistent.mean()),
    )


class _Side:
    """One set with its neighbourhoods: what a resample needs."""

    def __init__(self, generated: Generated, real: RealSet) -> None:
        if generated.features.shape[1:] != real.features.shape[1:]:
            kinds = generated.features.shape[1:], real.features.shape[1:]
            raise InputError(f"expected the real set's features, {kinds[1]} per image, found {kinds[0]}")
        self._real = real
        self._features = np.float64(generated.features)
        centred, real_centred = self._features - real.mean, real.features - real.mean
        self._neighbours = neighbours(centred)
        self._reals = coverage(real_centred, centred, self._neighbours.reach)
        self.precise = coverage(centred, real_centred, real.radii).covered(real.radii)

    def resampled(self, counts: Counts | None = None) -> Numbers:
        """Return (Frechet distance, recall) of a resample, or of the set itself."""
        recalled = self._reals.covered(self._neighbours.radii(counts))
        return np.array([self._real.frechet_distance(self._features, counts), recalled.mean()])


def _distribution(
    values: Numbers, replicates: Numbers, precision: Estimate, consistency: Estimate | None
) -> Distribution:
    distance, recall = estimates(values, replicates)
    return Distribution(frechet_distance=distance, precision=precision, recall=recall, class_consistency=consistency)
