"""Intervals that say how much a figure owes to the images that happened to be drawn.

The bootstrap (Efron 1979) draws the images again, with replacement, and makes the measure anew each time. Both sides
of a comparison are drawn together, so a difference is one of pairs.

Some measures are biased in the number of images: a Frechet distance of few images is too large. Images drawn from
images add the same bias once more, so plain percentiles lie beside the value. They are moved back by that bias, the
replicates' mean less the value. The interval is then about the expectation *at this number of images*, which is what
two sides of equal number are compared at. Taken off the value once more, the bias leads to the measure of endless
images (`Estimate.corrected`). For a measure without bias these are the plain percentiles.

A share that is 0 or 1 among all images has replicates without any spread, so shares have intervals in closed form:
Wilson (1927) for one, Agresti and Min (2005) for the difference of two shares of the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.errors import InputError
from ditc.spec import Record

__all__ = ["LEVEL", "Estimate", "bootstrapped", "estimates", "resamples", "share", "share_difference"]

LEVEL = 0.95
NORMAL_QUANTILE = 1.959964  # of (1 + LEVEL) / 2

Numbers = NDArray[np.float64]
Counts = NDArray[np.int64]  # how often each image was drawn, (n,)
Measures = Callable[[Counts], Numbers]  # -> (measures,)
OnRound = Callable[[int, int], None]  # (done, rounds)


class Estimate(Record):
    """A measure and its interval at the level `LEVEL`.

    `bias` is the bootstrap's estimate of the part of the value that comes from the number of images alone.
    """

    value: float
    low: float
    high: float
    bias: float = 0.0

    @property
    def corrected(self) -> float:
        """The value that endless images would tend to; its interval is this one's less the bias, too."""
        return self.value - self.bias


def resamples(n: int, rounds: int, seed: int) -> Iterable[Counts]:
    """Yield the number of times each of `n` images is drawn, (n,), once for each round."""
    if n < 2 or rounds < 2:
        raise InputError(f"a bootstrap needs at least 2 images and 2 rounds, found {n} and {rounds}")
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        yield np.bincount(rng.integers(0, n, n), minlength=n)


def bootstrapped(measures: Measures, n: int, rounds: int, seed: int, watch: OnRound = lambda *_: None) -> Numbers:
    """Return the measures of every resample, (rounds, measures)."""
    rows = []
    for done, counts in enumerate(resamples(n, rounds, seed), start=1):
        rows.append(measures(counts))
        watch(done, rounds)
    return np.stack(rows)


def estimates(values: Numbers, replicates: Numbers) -> list[Estimate]:
    """Return the estimate of each measure: values (measures,), replicates (rounds, measures)."""
    bias = replicates.mean(axis=0) - values
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0) - bias
    rows = np.stack([values, low, high, bias], axis=1).tolist()
    return [Estimate(value=value, low=low, high=high, bias=bias) for value, low, high, bias in rows]


def share(hits: NDArray[Any]) -> Estimate:
    """Return the share of True among images, (n,), with Wilson's score interval."""
    n, value, square = len(hits), float(np.mean(hits)), NORMAL_QUANTILE**2
    centre = (value + square / (2 * n)) / (1 + square / n)
    half = NORMAL_QUANTILE * np.sqrt(value * (1 - value) / n + square / (4 * n * n)) / (1 + square / n)
    return Estimate(value=value, low=max(0.0, centre - half), high=min(1.0, centre + half))


def share_difference(ours: NDArray[Any], exact: NDArray[Any]) -> Estimate:
    """Return ours - exact of two shares of the same images, each (n,) of bool: Agresti and Min's interval for pairs.

    A half is added to each of the four counts (both, only one, only the other, neither), then it is the usual
    interval of a difference of matched shares.
    """
    gained, lost = int(np.sum(ours & ~exact)), int(np.sum(exact & ~ours))
    n = len(ours) + 2
    centre = (gained - lost) / n
    half = NORMAL_QUANTILE * float(np.sqrt(gained + lost + 1 - (gained - lost) ** 2 / n)) / n
    value = float(np.mean(ours)) - float(np.mean(exact))
    return Estimate(value=value, low=max(-1.0, centre - half), high=min(1.0, centre + half))
