"""Equivalent re-parameterisations in front of linear layers: x / s and s W, the same product, easier to quantize.

One activation scale serves all channels of a tensor. A few channels much larger than the rest take its levels away
from all others; a factor per channel moves their size into the weight, which has a scale per output channel. A method
is a pure function from what calibration saw and the weight to the factors s. Where 1/s goes: `fold_sites`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditc.errors import DitcError, unknown_name
from ditc.precision import INT8, Bits, levels_of
from ditc.quantize.qdq import quantize_weight
from ditc.quantize.ranges import Doubles, Histogram, clipping_range

__all__ = ["ALPHAS", "TRANSFORMS", "ChannelStatistics", "Choice", "check_transform", "choose_factors"]

Singles = NDArray[np.float32]

NONE = "none"
SAMPLE_ROWS = 256  # of an activation, kept for the search
ALPHAS = tuple(round(0.05 * i, 2) for i in range(2, 19))  # 0.1 to 0.9
WIDEST = 2.0**13  # a factor's distance from their mean; keeps tables and weights within FP16


@dataclass(frozen=True)
class ChannelStatistics:
    """Statistics of one activation in calibration.

    `peaks` is (steps, channels), the largest magnitude of each channel at each step that had points. `rows` is
    (n, channels), tokens drawn evenly from all of them, n at most SAMPLE_ROWS; `keys` are the numbers that drew them.
    """

    peaks: Singles
    rows: Singles
    keys: Doubles

    @staticmethod
    def empty(channels: int) -> ChannelStatistics:
        return ChannelStatistics(np.empty((0, channels), np.float32), np.empty((0, channels), np.float32), np.empty(0))

    def add(self, values: Singles, new_step: bool, rng: np.random.Generator) -> ChannelStatistics:
        """With the activation at more points, (..., channels), of the next step or of the one that came last.

        Raises DitcError for NaN or infinity.
        """
        tokens = values.reshape(-1, values.shape[-1])
        peak = np.abs(tokens).max(axis=0, initial=0.0)
        if not np.isfinite(peak).all():
            raise DitcError("an activation is NaN or infinite; the model overflows on the calibration points")
        before, last = (self.peaks, None) if new_step else (self.peaks[:-1], self.peaks[-1])
        peaks = np.concatenate([before, (peak if last is None else np.maximum(peak, last))[None]])
        drawn = rng.random(len(tokens))
        few = np.flatnonzero(drawn < (self.keys[-1] if len(self.keys) == SAMPLE_ROWS else 1.0))
        keys = np.concatenate([self.keys, drawn[few]])
        least = np.argsort(keys, kind="stable")[:SAMPLE_ROWS]  # the rows with the least keys are a fair draw
        return ChannelStatistics(peaks, np.concatenate([self.rows, tokens[few]])[least], keys[least])


@dataclass(frozen=True)
class Choice:
    """Factors s of one activation, (channels,), and the exponent they were made with; None leaves it as it is."""

    factors: Doubles
    alpha: float | None


Method = Callable[[ChannelStatistics, Singles, str, Bits], Choice]


def smooth_factors(seen: ChannelStatistics, weight: Singles, ranges: str, bits: Bits) -> Choice:
    """SmoothQuant (arXiv 2211.10438): s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), alpha by search.

    Of ALPHAS and of leaving the layer alone, the one whose quantized product is nearest to the exact one on the kept
    rows, in mean square; the first of equals.
    """
    x, w = seen.peaks.max(axis=0).astype(np.float64), _weight_peaks(weight)
    best = Choice(np.ones(len(x)), None)
    least = quantization_error(seen, weight, best.factors, ranges, bits)
    for alpha in ALPHAS:
        factors = _balanced(x**alpha, w ** (1 - alpha))
        error = quantization_error(seen, weight, factors, ranges, bits)
        if error < least:
            best, least = Choice(factors, alpha), error
    return best


def balance_factors(seen: ChannelStatistics, weight: Singles, ranges: str, bits: Bits) -> Choice:
    """PTQ4DiT's channel-wise salience balancing (arXiv 2405.16005): both sides meet at their geometric mean.

    s = sqrt(s(X) / s(W)), where s(W) = max|W_j|, and s(X) is the mean of max|X_j^(t)| over the steps t, weighted by the
    softmax of -rho: steps whose large channels are not the weight's large ones can be balanced best, and count most.
    """
    w = _weight_peaks(weight)
    steps = seen.peaks.astype(np.float64)
    rho = np.array([rank_correlation(peaks, w) for peaks in steps])
    share = np.exp(-rho) / np.exp(-rho).sum()
    return Choice(_balanced(np.sqrt(share @ steps), np.sqrt(w)), 0.5)


TRANSFORMS: dict[str, Method] = {"smooth": smooth_factors, "balance": balance_factors}


def check_transform(name: str) -> None:
    """Raise InputError for a transform that is not in the table."""
    if name not in (NONE, *TRANSFORMS):
        raise unknown_name("smoothing", name, (NONE, *TRANSFORMS))


def choose_factors(method: str, seen: ChannelStatistics, weight: Singles, ranges: str, bits: Bits = INT8) -> Choice:
    """The factors of one activation in front of a weight (in, out); several layers' weights lie side by side.

    `ranges` is the method that will choose the activation's scale, `bits` those of both operands.
    """
    check_transform(method)
    return TRANSFORMS[method](seen, weight, ranges, bits)


def _weight_peaks(weight: Singles) -> Doubles:
    return np.asarray(np.abs(weight).max(axis=1), np.float64)


def _balanced(above: Doubles, below: Doubles) -> Doubles:
    """The quotient with geometric mean 1; a channel that is zero on either side stays as it is.

    A factor that all channels share changes nothing, since both scales follow it.
    """
    live = (above > 0) & (below > 0)
    logs = np.log(above[live]) - np.log(below[live])
    factors = np.ones(len(above))
    factors[live] = np.clip(np.exp(logs - logs.mean()), 1 / WIDEST, WIDEST) if live.any() else 1.0
    return factors


def rank_correlation(a: Doubles, b: Doubles) -> float:
    """Spearman's rho: the correlation of ranks, equals sharing theirs; 0 where one side does not vary."""
    ranks = [_ranks(values) - (len(values) - 1) / 2 for values in (a, b)]
    size = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / size) if size > 0 else 0.0


def _ranks(values: Doubles) -> Doubles:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count + 1) / 2)[place.reshape(-1)])


def quantization_error(
    seen: ChannelStatistics, weight: Singles, factors: Doubles, ranges: str, bits: Bits = INT8
) -> float:
    """Squared error of the layer's output on the kept rows, with both operands quantized as they will be."""
    levels = levels_of(bits.activations)
    rows = np.float32(seen.rows / factors)
    widest = np.float32(seen.peaks.max(axis=0) / factors)  # the kept rows alone may have missed the largest values
    scale = clipping_range(ranges, Histogram.empty().add(np.concatenate([rows, widest[None]])), levels) / levels
    quantized = np.float32(np.clip(np.round(rows / scale), -levels, levels) * scale)
    inner = quantize_weight(np.float32(weight * factors[:, None]), bits.weights).dequantized()
    return float(np.square(quantized @ inner - seen.rows @ weight).sum(dtype=np.float64))
