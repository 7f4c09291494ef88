"""Precision and recall of generated images (Kynkaanniemi et al. 2019, arXiv 1904.06991).

The manifold of a set of features is the union of balls, one around each, that reach to its k-th nearest other point.
Precision is the share of generated images inside the manifold of the real ones, recall the share of real images inside
that of the generated ones.

For the bootstrap the generated set is weighted by how often each image was drawn. A copy counts as a neighbour, as it
does where the resample is written out. The nearest neighbours of all points and the few pairs that can ever matter are
found once, so that a resample costs no distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.errors import InputError
from ditc.quality.bootstrap import Counts, Numbers

__all__ = ["Coverage", "K", "Neighbours", "coverage", "neighbours"]

K = 3  # the paper's choice for its figures
RESAMPLED_DEPTH = 32  # a resample without K of a point's 32 nearest is as good as impossible
BLOCK = 1 << 22  # distances that are held at a time


def distances(points: Numbers, others: Numbers) -> Iterator[tuple[slice, Numbers]]:
    """Yield Euclidean distances in blocks of rows: (rows, (rows, others))."""
    squares = (others**2).sum(axis=1)
    rows = max(1, BLOCK // len(others))
    for start in range(0, len(points), rows):
        part = points[start : start + rows]
        gaps = (part**2).sum(axis=1)[:, None] + squares - 2 * part @ others.T
        yield slice(start, start + len(part)), np.sqrt(np.maximum(gaps, 0))


@dataclass(frozen=True)
class Neighbours:
    """The nearest other points of each point, nearest first: their places and distances, each (n, depth)."""

    places: NDArray[np.intp]
    distances: Numbers

    @property
    def reach(self) -> Numbers:
        """The largest radius a ball can have, (n,)."""
        return np.asarray(self.distances[:, -1])

    def radii(self, counts: Counts | None = None, k: int = K) -> Numbers:
        """Return distances to the k-th neighbour, (n,); with `counts` of a resample, below 0 for points not in it."""
        if counts is None:
            return np.asarray(self.distances[:, k - 1])
        copies = counts - 1  # of the point itself, at no distance
        seen = counts[self.places].cumsum(axis=1) + copies[:, None] >= k
        place = np.where(seen[:, -1], seen.argmax(axis=1), -1)
        radii = self.distances[np.arange(len(place)), place]
        return np.where(counts == 0, -1.0, np.where(copies >= k, 0.0, radii))


def neighbours(points: Numbers, depth: int = RESAMPLED_DEPTH) -> Neighbours:
    """Return the `depth` nearest other points of each of (n, features), or all there are."""
    if len(points) <= K:
        raise InputError(f"precision and recall need more than {K} images, found {len(points)}")
    depth = min(depth, len(points) - 1)
    places, lengths = [], []
    for rows, block in distances(points, points):
        block[np.arange(len(block)), np.arange(len(points))[rows]] = np.inf  # a point is not its own neighbour
        near = np.argpartition(block, depth - 1, axis=1)[:, :depth]
        nearest = np.take_along_axis(block, near, axis=1)
        order = nearest.argsort(axis=1)
        places.append(np.take_along_axis(near, order, axis=1))
        lengths.append(np.take_along_axis(nearest, order, axis=1))
    return Neighbours(np.concatenate(places), np.concatenate(lengths))


@dataclass(frozen=True)
class Coverage:
    """Pairs of a point and a centre in whose ball it can lie, with their distance, each (pairs,)."""

    points: int
    point: NDArray[Any]
    centre: NDArray[Any]
    distance: Numbers

    def covered(self, radii: Numbers) -> NDArray[np.bool_]:
        """Does a point lie in any ball? (points,); `radii` are those of the centres."""
        inside: NDArray[np.bool_] = np.zeros(self.points, bool)
        inside[self.point[self.distance <= radii[self.centre]]] = True
        return inside


def coverage(points: Numbers, centres: Numbers, reach: Numbers) -> Coverage:
    """Return the pairs of points and centres that lie within the centres' reach, (centres,)."""
    pairs, lengths = [], []
    for rows, block in distances(points, centres):
        near, centre = np.nonzero(block <= reach)
        pairs.append(np.stack([near + rows.start, centre]).astype(np.int32))
        lengths.append(block[near, centre])
    point, centre = np.concatenate(pairs, axis=1)
    return Coverage(len(points), point, centre, np.concatenate(lengths))
