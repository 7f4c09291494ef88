"""Selectors of the points that calibrate.

A selector is a pure function from a pool and its options to the indices it picks. Same pool, options and seed, same
points, whatever order the pool came in.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ditc.calib_data.pool import Pool
from ditc.calib_data.tap import TapSettings, tap_embedding
from ditc.calib_data.time_groups import TIME_GROUPS, time_groups_of
from ditc.calibset import CalibSet
from ditc.errors import InputError, unknown_name

__all__ = [
    "SELECTORS",
    "SelectionOptions",
    "Selector",
    "check_selector",
    "cluster_quotas",
    "select_points",
    "tap_clusters",
]

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class SelectionOptions:
    """Numbers of points and clusters. The paper's are the defaults: 800 points, 3 to 10 a cluster.

    `clusters` of None means one for every 8 points, which is the paper's 100 at 800 points. `steps` are those of the
    trajectory, of None as many as the pool's points tell, and `time_groups` the groups that they are cut into.
    """

    points: int = 800
    clusters: int | None = None
    least_per_cluster: int = 3
    most_per_cluster: int = 10
    seed: int = 0
    steps: int | None = None
    time_groups: int = TIME_GROUPS
    tap: TapSettings = field(default_factory=TapSettings)

    def __post_init__(self) -> None:
        if self.points < 1:
            raise InputError(f"a calibration set needs at least 1 point, found {self.points}; change --points")
        if self.clusters is not None and not 1 <= self.clusters <= self.points:
            raise InputError(f"clusters must be 1 to {self.points} (the points), found {self.clusters}")

    @property
    def cluster_count(self) -> int:
        return self.clusters or max(1, self.points // 8)


def random_points(pool: Pool, options: SelectionOptions) -> Indices:
    """Pick points uniformly at random, without replacement."""
    return _rng(options).choice(len(pool), options.points, replace=False)


def uniform_time_points(pool: Pool, options: SelectionOptions) -> Indices:
    """Pick as many points from each step, at random within a step."""
    return _evenly(pool.step, options)


def time_group_points(pool: Pool, options: SelectionOptions) -> Indices:
    """Pick as many points from each group of neighbouring steps, at random within a group (TQ-DiT, arXiv 2502.04056).

    Where a group has too few, the others give more.
    """
    total = options.steps or int(pool.step.max()) + 1
    return _evenly(time_groups_of(pool.step, total, options.time_groups), options)


def _evenly(groups: NDArray[np.int64], options: SelectionOptions) -> Indices:
    """Pick as many points from each group, `groups` (n,), as long as it has some, at random within it."""
    shuffled = _rng(options).permutation(len(groups))
    groups = groups[shuffled]
    order = np.argsort(groups, kind="stable")
    rank = np.empty(len(groups), np.int64)  # a point's place among those of its group
    starts = np.searchsorted(groups[order], groups[order])
    rank[order] = np.arange(len(groups)) - starts
    return np.asarray(shuffled[np.lexsort((groups, rank))[: options.points]])


def kmeans_points(pool: Pool, options: SelectionOptions) -> Indices:
    """Pick points from every cluster of the samples themselves, blind to time."""
    return _from_clusters(_kmeans(pool.flat, options), options)


def tap_points(pool: Pool, options: SelectionOptions) -> Indices:
    """Pick points from every cluster of TAP (see `tap`)."""
    return _from_clusters(tap_clusters(pool, options), options)


def tap_activation_points(pool: Pool, options: SelectionOptions) -> Indices:
    """Pick by TAP, but points are alike when linear layers read alike magnitudes at them."""
    if pool.peaks is None:
        raise InputError(
            "nothing was recorded of what linear layers read at the pool's points; choose another selector"
        )
    sizes = np.log2(np.maximum(pool.peaks, np.finfo(np.float32).tiny))
    spread = sizes.std(axis=0)
    centred = (sizes - sizes.mean(axis=0)) / np.where(spread > 0, spread, 1)  # or every cosine would be near 1
    return _from_clusters(_tap(centred, pool.step, options), options)


def tap_clusters(pool: Pool, options: SelectionOptions) -> NDArray[np.int64]:
    """The cluster that TAP puts each point in, (n,)."""
    return _tap(pool.flat, pool.step, options)


def _tap(vectors: NDArray[np.float32], steps: NDArray[np.int64], options: SelectionOptions) -> NDArray[np.int64]:
    embedding = tap_embedding(vectors, steps, options.cluster_count, options.tap, _rng(options))
    return _kmeans(embedding, options)


@dataclass(frozen=True)
class Selector:
    """A way to pick points, and whether it takes what linear layers read at them (`Pool.peaks`)."""

    pick: Callable[[Pool, SelectionOptions], Indices]
    needs_peaks: bool = False


SELECTORS: dict[str, Selector] = {
    "tap": Selector(tap_points),
    "random": Selector(random_points),
    "uniform-time": Selector(uniform_time_points),
    "time-groups": Selector(time_group_points),
    "kmeans": Selector(kmeans_points),
    "tap-activations": Selector(tap_activation_points, needs_peaks=True),
}


def check_selector(name: str) -> None:
    """Raise InputError for a selector that doesn't exist."""
    if name not in SELECTORS:
        raise unknown_name("selector", name, SELECTORS)


def select_points(name: str, pool: Pool, options: SelectionOptions) -> CalibSet:
    """The calibration set that a selector picks, ordered by (sample, step)."""
    check_selector(name)
    if len(pool) < options.cluster_count or len(pool) < options.points:
        raise InputError(
            f"the pool has {len(pool)} points, fewer than the {options.points} in {options.cluster_count} clusters "
            "asked for; record more images (--pool) or ask for fewer points (--points)"
        )
    canonical = pool.ordered()
    picked = np.sort(SELECTORS[name].pick(canonical, options))
    return canonical.take(picked).calibration_set()


def cluster_quotas(sizes: NDArray[np.int64], points: int, least: int, most: int) -> NDArray[np.int64]:
    """Return each cluster's number of points: in proportion to its size, within [least, most], `points` in all.

    A cluster never gives more than it has. Where the bounds make the total impossible they yield, `most` first.
    """
    quotas = np.minimum(sizes, np.clip(np.round(sizes * points / sizes.sum()).astype(np.int64), least, most))
    while (gap := points - quotas.sum()) > 0:
        open_clusters = np.flatnonzero(quotas < np.minimum(sizes, most))
        if len(open_clusters) == 0:
            most = int(sizes.max())
            continue
        neediest = open_clusters[np.argsort(-(sizes[open_clusters] / (quotas[open_clusters] + 1)), kind="stable")]
        quotas[neediest[:gap]] += 1
    while (excess := quotas.sum() - points) > 0:
        rich = np.flatnonzero(quotas > least) if (quotas > least).any() else np.flatnonzero(quotas > 0)
        fullest = rich[np.argsort(-(quotas[rich] / sizes[rich]), kind="stable")]
        quotas[fullest[:excess]] -= 1
    return np.asarray(quotas, np.int64)


def _rng(options: SelectionOptions) -> np.random.Generator:
    return np.random.default_rng(options.seed)


def _kmeans(vectors: NDArray[np.float32], options: SelectionOptions) -> NDArray[np.int64]:
    """Cluster labels. One thread: a parallel sum would make the clusters depend on timing."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal points make fewer clusters, and that is fine
        clustering = KMeans(options.cluster_count, n_init=1, max_iter=50, random_state=options.seed).fit(vectors)
    return np.asarray(clustering.labels_, np.int64)


def _from_clusters(labels: NDArray[np.int64], options: SelectionOptions) -> Indices:
    rng = _rng(options)
    names, sizes = np.unique(labels, return_counts=True)
    quotas = cluster_quotas(sizes, options.points, options.least_per_cluster, options.most_per_cluster)
    picks = [
        rng.choice(np.flatnonzero(labels == name), quota, replace=False)
        for name, quota in zip(names, quotas, strict=True)
    ]
    return np.asarray(np.concatenate(picks), np.int64)
