"""Temporal-aware parallel clustering (TAP): Q&C, arXiv 2503.02508, section 3.2.

Points are alike when they look alike and when they are near in time:

    A[k, h] = alpha * cos(x_k, x_h) + (1 - alpha) * exp(-|i_k - i_h| / tau)      k over all N, h over a sub-sample
    L       = Dr^(-1/2) A Dc^(-1/2)                                              N x n
    E       = the leading left singular vectors of L

once for each of m random sub-samples of n = N / 20 points, which makes the cost O(N n) instead of O(N^3). The paper
leaves open how the m embeddings are joined; here their rows are normalised and put side by side, and k-means runs on
that: nothing has to be aligned (docs/adr/0003). Negative affinities are set to zero before the square roots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditc.errors import InputError

__all__ = ["TapSettings", "affinity", "spectral_embedding", "tap_embedding"]

Vectors = NDArray[np.float32]

CHUNK = 4096  # rows of the affinity made at a time; bounds the working memory beside A itself


@dataclass(frozen=True)
class TapSettings:
    """The paper's settings. `alpha` weighs looks against time, `tau` is in steps."""

    alpha: float = 0.5
    tau: float = 1.0
    subsamples: int = 3
    share: float = 1 / 20

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"TAP's alpha must be 0 to 1, found {self.alpha:g}")
        if not self.tau > 0 or self.subsamples < 1 or not 0 < self.share <= 1:
            raise InputError("TAP needs tau > 0, at least one sub-sample, and a share in (0, 1]")


def affinity(points: Vectors, steps: NDArray[np.int64], chosen: NDArray[np.int64], settings: TapSettings) -> Vectors:
    """A, (N, n): similarity of every point to the chosen ones, never negative."""
    landmarks = _unit(points[chosen])
    result = np.empty((len(points), len(chosen)), np.float32)
    for start in range(0, len(points), CHUNK):
        rows = slice(start, start + CHUNK)
        block = result[rows]
        np.matmul(_unit(points[rows]), landmarks.T, out=block)
        block *= np.float32(settings.alpha)
        gap = np.abs(steps[rows, None] - steps[None, chosen]).astype(np.float32)
        block += np.float32(1 - settings.alpha) * np.exp(-gap / np.float32(settings.tau))
        np.maximum(block, 0, out=block)
    return result


def spectral_embedding(similarity: Vectors, dimensions: int) -> Vectors:
    """The leading left singular vectors of the normalised affinity, (N, dimensions). Overwrites `similarity`.

    They come from the eigenvectors of the small n x n matrix L^T L, so the work is O(N n^2) at most.
    """
    from scipy.linalg import eigh
    from threadpoolctl import threadpool_limits

    rows = np.sqrt(similarity.sum(axis=1, dtype=np.float64))
    columns = np.sqrt(similarity.sum(axis=0, dtype=np.float64))
    similarity /= np.maximum(rows, 1e-12)[:, None].astype(np.float32)
    similarity /= np.maximum(columns, 1e-12).astype(np.float32)
    gram = np.zeros((similarity.shape[1],) * 2, np.float64)
    for start in range(0, len(similarity), CHUNK):
        block = similarity[start : start + CHUNK]
        gram += block.T @ block
    count = len(gram)
    with threadpool_limits(1):  # two threads get in each other's way here: slower, and many times so on a busy machine
        values, vectors = eigh(gram, subset_by_index=[count - dimensions, count - 1])
    order = np.argsort(values)[::-1]
    singular = np.sqrt(np.maximum(values[order], 1e-12))
    left = similarity @ (vectors[:, order] / singular).astype(np.float32)
    return np.asarray(left * _signs(left))


def tap_embedding(
    points: Vectors, steps: NDArray[np.int64], clusters: int, settings: TapSettings, rng: np.random.Generator
) -> Vectors:
    """The joined embedding of all sub-samples, (N, subsamples * dimensions), for k-means to cluster."""
    count = len(points)
    size = min(count, max(round(count * settings.share), clusters + 1))
    dimensions = min(clusters, max(size - 1, 1))
    parts = []
    for _ in range(settings.subsamples):
        chosen = np.sort(rng.choice(count, size, replace=False))
        parts.append(_unit(spectral_embedding(affinity(points, steps, chosen, settings), dimensions)))
    return np.concatenate(parts, axis=1)


def _unit(vectors: Vectors) -> Vectors:
    """Rows scaled to length 1; a zero row stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.float32(1e-12)))


def _signs(vectors: Vectors) -> Vectors:
    """A sign per column that makes its largest entry positive: singular vectors are defined up to sign."""
    largest = np.abs(vectors).argmax(axis=0)
    return np.asarray(np.sign(vectors[largest, np.arange(vectors.shape[1])]), np.float32)
