"""The trajectory pool: the points that the cached FP program really visited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditc.calibset import CalibSet
from ditc.errors import InputError

__all__ = ["Pool", "Visit", "pool_from_visits"]


class Visit(NamedTuple):
    """One step of one batch: samples `first` .. `first + len(x)`, their labels, and x_t as the network took it."""

    step: int
    t: float
    first: int
    labels: NDArray[np.int64]
    x: NDArray[np.float32]


@dataclass(frozen=True)
class Pool:
    """N points of trajectories: `x` (N, channels, *space); the other fields are (N,).

    `sample` and `step` are a point's origin; points are ordered by (sample, step), whatever order they came in.
    `peaks` (N, tensors) are the largest magnitudes that linear layers read at a point, where they were looked at.
    """

    x: NDArray[np.float32]
    sample: NDArray[np.int64]
    step: NDArray[np.int64]
    t: NDArray[np.float64]
    label: NDArray[np.int64]
    peaks: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if len(self.x) == 0:
            raise InputError("the trajectory pool is empty; record at least one image")
        if not np.isfinite(self.x).all():
            raise InputError("the trajectory pool has NaN or infinite points; the model diverges on this sampler")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def flat(self) -> NDArray[np.float32]:
        """The points as vectors, (N, channels * height * width)."""
        return self.x.reshape(len(self.x), -1)

    def ordered(self) -> Pool:
        """The same points in canonical order; a pool that is in order already is not copied."""
        order = np.lexsort((self.step, self.sample))
        return self if np.array_equal(order, np.arange(len(self))) else self.take(order)

    def take(self, index: NDArray[Any]) -> Pool:
        peaks = None if self.peaks is None else self.peaks[index]
        return Pool(self.x[index], self.sample[index], self.step[index], self.t[index], self.label[index], peaks)

    def calibration_set(self) -> CalibSet:
        """Every point, equally weighted."""
        return CalibSet(self.x, self.sample, self.step, self.t, self.label, np.ones(len(self)))

    def with_peaks(self, seen: Mapping[tuple[int, int], NDArray[Any]]) -> Pool:
        """The same points with what was seen of each, (sample, step) -> (tensors,)."""
        origins = zip(self.sample.tolist(), self.step.tolist(), strict=True)
        return replace(self, peaks=np.stack([seen[origin] for origin in origins]).astype(np.float32))


def pool_from_visits(visits: Iterable[Visit]) -> Pool:
    """A pool from the steps of any number of requests."""
    filled = [visit for visit in visits if len(visit.x)]
    if not filled:
        raise InputError("the trajectory pool is empty; record at least one image")
    counts = [len(visit.x) for visit in filled]
    return Pool(
        x=np.concatenate([visit.x for visit in filled]),
        sample=np.concatenate([visit.first + np.arange(len(visit.x)) for visit in filled]),
        step=np.repeat([visit.step for visit in filled], counts),
        t=np.repeat([visit.t for visit in filled], counts),
        label=np.concatenate([np.asarray(visit.labels, np.int64) for visit in filled]),
    ).ordered()
