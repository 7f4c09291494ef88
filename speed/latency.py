"""Latency as it should be told: how often it was measured, the middle, the spread."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ditc.errors import InputError
from ditc.spec import Record

__all__ = ["Latency", "SpreadLatency", "latency_of", "with_spread"]


class Latency(Record):
    """Seconds of `n` equal calls: median, 90th percentile, least and most."""

    n: int
    median: float
    p90: float
    least: float
    most: float


class SpreadLatency(Latency):
    """A latency with its `spread`: the 90th percentile's distance above the median, as a share of it."""

    spread: float


def latency_of(seconds: Sequence[float]) -> Latency:
    """Return the latency of equal calls; raises InputError without any."""
    if not seconds:
        raise InputError("no call was measured; ask for at least one")
    values = np.asarray(seconds, np.float64)
    return Latency(
        n=len(values),
        median=float(np.median(values)),
        p90=float(np.quantile(values, 0.9)),
        least=float(values.min()),
        most=float(values.max()),
    )


def with_spread(latency: Latency) -> SpreadLatency:
    """Return the latency with its spread beside it."""
    return SpreadLatency(**dict(latency), spread=latency.p90 / latency.median - 1)
