"""From a histogram of magnitudes to a clipping range: max, percentile, MSE search (by gradients too), KL entropy.

Histograms stream in one pass: the range is a power of two, and when a value exceeds it, it doubles and neighbouring
bins merge. So memory does not grow with the calibration set, no point is run twice, and histograms of parts add up to
that of the whole, in any order. A method is a pure function from a histogram and a number of levels to the magnitude
that maps to the last level: 127 for symmetric INT8, what TensorRT accepts. Its row says whether the histogram has to
weigh values by their gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import frexp

import numpy as np
from numpy.typing import NDArray

from ditc.errors import DitcError, unknown_name
from ditc.precision import LEVELS

__all__ = ["BINS", "RANGES", "Doubles", "Histogram", "RangeSearch", "clipping_range"]

Doubles = NDArray[np.float64]

BINS = 4096  # at least half of them below the largest value: 2,048, as TensorRT and ONNX Runtime use, or more
LEAST_LIMIT = 2.0**-100  # keeps bins / limit within float32


@dataclass(frozen=True)
class Histogram:
    """Counts of |x| in equal bins over [0, limit], and the exact largest magnitude seen, `amax` <= limit.

    `limit` is the least power of two that will do, or 0 as long as everything was 0, which the first bin counts. Where
    values have weights, `counts` are sums of those.
    """

    counts: NDArray[np.int64] | Doubles
    limit: float
    amax: float

    @staticmethod
    def empty(bins: int = BINS) -> Histogram:
        return Histogram(counts=np.zeros(bins, np.int64), limit=0.0, amax=0.0)

    def add(self, values: NDArray[np.float32], weights: Doubles | None = None) -> Histogram:
        """The histogram with more values counted, once each or by their weights, shaped as they are.

        Raises DitcError for NaN or infinity.
        """
        magnitudes = np.abs(values.ravel(), dtype=np.float32)
        largest = float(magnitudes.max(initial=0.0))
        if not np.isfinite(largest):
            raise DitcError("an activation is NaN or infinite; the model overflows on the calibration points")
        widened = self._widened(largest)
        bins = len(widened.counts)
        if widened.limit > 0:
            magnitudes *= np.float32(bins / widened.limit)
        index = np.minimum(magnitudes.astype(np.int32), bins - 1)
        counts = widened.counts + np.bincount(index, None if weights is None else weights.ravel(), bins)
        return Histogram(counts, widened.limit, max(self.amax, largest))

    def merged(self, other: Histogram) -> Histogram:
        """The histogram of both sides' values."""
        amax = max(self.amax, other.amax)
        both = self._widened(amax).counts + other._widened(amax).counts
        return Histogram(both, _limit_of(amax), amax)

    def _widened(self, largest: float) -> Histogram:
        counts, limit, wanted = self.counts, self.limit, _limit_of(largest)
        if limit == 0:  # so far nothing but zeros, all in the first bin
            return Histogram(counts, wanted, self.amax)
        while limit < wanted:
            counts = np.concatenate([counts.reshape(-1, 2).sum(axis=1), np.zeros(len(counts) // 2, counts.dtype)])
            limit *= 2
        return Histogram(counts, limit, self.amax)

    @property
    def bin_width(self) -> float:
        return self.limit / len(self.counts)

    @property
    def centers(self) -> Doubles:
        """Bin centres; the last one that holds anything is cut at `amax`."""
        return np.asarray(np.minimum((np.arange(len(self.counts)) + 0.5) * self.bin_width, self.amax))


def _limit_of(largest: float) -> float:
    """The least power of two that is no smaller; 0 of 0."""
    if largest <= 0:
        return 0.0
    mantissa, exponent = frexp(max(largest, LEAST_LIMIT))
    return float(2.0 ** (exponent - (mantissa == 0.5)))


Method = Callable[[Histogram, int], float]


def max_range(histogram: Histogram, levels: int = LEVELS) -> float:
    """The largest magnitude seen: nothing clips."""
    return histogram.amax


def percentile_range(histogram: Histogram, levels: int = LEVELS, share: float = 0.9999) -> float:
    """The magnitude that `share` of the values stay under."""
    reached = np.cumsum(histogram.counts) / histogram.counts.sum()
    index = int(np.searchsorted(reached, share))
    return float(min((index + 1) * histogram.bin_width, histogram.amax))


def mse_range(histogram: Histogram, levels: int = LEVELS, candidates: int = 100) -> float:
    """The range with the least squared quantization error, over shrink factors of amax down to 1 %."""
    values, counts = histogram.centers, histogram.counts
    best, best_error = histogram.amax, np.inf
    for shrink in np.linspace(1.0, 1.0 / candidates, candidates):
        scale = shrink * histogram.amax / levels
        rounded = np.minimum(np.round(values / scale), levels) * scale
        error = float((counts * (values - rounded) ** 2).sum())
        if error < best_error:
            best, best_error = shrink * histogram.amax, error
    return float(best)


def entropy_range(histogram: Histogram, levels: int = LEVELS) -> float:
    """The range whose histogram of `levels` + 1 bins is closest in KL divergence to the clipped original.

    The method of TensorRT's entropy calibrator (S. Migacz, "8-bit inference with TensorRT", GTC 2017). For each
    number of kept bins the tail is added to the last bin of the reference; the kept bins are merged into the levels
    and spread back over their non-empty bins.
    """
    used = int(np.flatnonzero(histogram.counts)[-1]) + 1
    counts = histogram.counts[:used].astype(np.float64)
    bins = levels + 1
    if used <= bins:
        return histogram.amax
    counts[0] = counts[1]  # exact zeros say nothing about the range
    best, best_divergence = used, np.inf
    for edge in range(used, bins - 1, -8):
        divergence = _divergence(counts, edge, bins)
        if divergence < best_divergence:
            best, best_divergence = edge, divergence
    return float(min(best * histogram.bin_width, histogram.amax))


def _divergence(counts: Doubles, edge: int, levels: int) -> float:
    reference = counts[:edge].copy()
    reference[-1] += counts[edge:].sum()
    level_of = np.arange(edge) * levels // edge
    filled = reference > 0
    mass = np.bincount(level_of, weights=counts[:edge], minlength=levels)
    members = np.bincount(level_of, weights=filled, minlength=levels)
    spread = np.where(filled, mass[level_of] / np.maximum(members[level_of], 1), 0.0)
    if spread.sum() == 0:
        return np.inf
    p, q = reference / reference.sum(), spread / spread.sum()
    q = np.where(filled, np.maximum(q, 1e-12), q)
    return float((p[filled] * np.log(p[filled] / q[filled])).sum())


@dataclass(frozen=True)
class RangeSearch:
    """A way to choose a range, and whether its histograms weigh each value by the square of its gradient."""

    choose: Method
    needs_gradients: bool = False


RANGES: dict[str, RangeSearch] = {
    "max": RangeSearch(max_range),
    "percentile": RangeSearch(percentile_range),
    "mse": RangeSearch(mse_range),
    "entropy": RangeSearch(entropy_range),
    "fisher": RangeSearch(mse_range, needs_gradients=True),  # TQ-DiT (arXiv 2502.04056): least sum of g^2 (x - Q(x))^2
}


def clipping_range(method: str, histogram: Histogram, levels: int = LEVELS) -> float:
    """The magnitude that maps to the last level. A tensor that was always zero gets 1: any scale represents it."""
    if method not in RANGES:
        raise unknown_name("range method", method, RANGES)
    return RANGES[method].choose(histogram, levels) if histogram.amax > 0 else 1.0
