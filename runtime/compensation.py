"""Variance compensation (VC): pull the sample's variance back after each step (Q&C, arXiv 2503.02508, section 3.3).

    x = mu + K * (x - mu)          K and mu: one row per step, one number per channel

Applied to the sample after the sampler's update. K and mu are a table made at compile time by a closed-loop fit: the
compiled program walks beside the FP program on the same noise, and K of each step is estimated on samples that
already carry the K of the steps before. mu is the population mean of the compiled samples (see docs/adr/0004).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.errors import unknown_name
from ditc.runtime.executor import Samples
from ditc.tables import COMPENSATION, Tables

__all__ = ["ESTIMATORS", "ClosedLoopFit", "TableCompensation", "estimate_k"]

Channels = NDArray[np.float64]
Estimator = Callable[[NDArray[np.float64], NDArray[np.float64], Channels], Channels]


def _but_channels(samples: NDArray[Any]) -> tuple[int, ...]:
    """Return every axis of samples (n, channels, *space) but the channels."""
    return 0, *range(2, samples.ndim)


def _per_channel(values: NDArray[Any], samples: NDArray[Any]) -> NDArray[Any]:
    """Return one number a channel, (channels,), in a shape that spreads over samples (n, channels, *space)."""
    return values.reshape(-1, *(1 for _ in samples.shape[2:]))


def _std(exact: NDArray[np.float64], seen: NDArray[np.float64], mean: Channels) -> Channels:
    """Ratio of the standard deviations: the variance match that the text motivates."""
    axes = _but_channels(seen)
    return np.asarray(exact.std(axis=axes) / seen.std(axis=axes))


def _lsq(exact: NDArray[np.float64], seen: NDArray[np.float64], mean: Channels) -> Channels:
    """Slope of the least squares line through (seen - mu, exact - mu); shrinks under independent error."""
    axes, centre = _but_channels(seen), _per_channel(mean, seen)
    centred = seen - centre
    top = (centred * (exact - centre)).sum(axis=axes)
    return np.asarray(top / (centred**2).sum(axis=axes))


def _paper(exact: NDArray[np.float64], seen: NDArray[np.float64], mean: Channels) -> Channels:
    """Eq. 12 as printed, with the elementwise 1 / x' bounded: unguarded it diverges where x' is near zero."""
    axes, centre = _but_channels(seen), _per_channel(mean, seen)
    centred, shifted = seen - centre, exact - centre
    floor = max(0.1 * float(exact.std()), 1e-6)
    guarded = np.where(np.abs(exact) < floor, np.copysign(floor, exact), exact)
    top = (shifted * centred).sum(axis=axes) + (centred / guarded).sum(axis=axes)
    bottom = (centred**2).sum(axis=axes) + (centred**2 / guarded**2).sum(axis=axes)
    return np.asarray(top / bottom)


ESTIMATORS: dict[str, Estimator] = {"std": _std, "lsq": _lsq, "paper": _paper}


def estimate_k(method: str, exact: Samples, seen: Samples, prior_samples: float) -> tuple[Channels, Channels]:
    """(K, mu), each (channels,), from paired samples (n, channels, *space).

    The estimate is drawn towards 1 as if `prior_samples` further pairs had shown no shift.
    """
    if method not in ESTIMATORS:
        raise unknown_name("compensation", method, ["none", *ESTIMATORS])
    exact64, seen64 = exact.astype(np.float64), seen.astype(np.float64)
    mean = np.asarray(seen64.mean(axis=_but_channels(seen64)))
    spread = seen64.std(axis=_but_channels(seen64))
    usable = spread > 1e-12  # a constant channel has no variance to match
    with np.errstate(divide="ignore", invalid="ignore"):
        raw = np.where(usable, ESTIMATORS[method](exact64, seen64, mean), 1.0)
    count = len(exact)
    return (count * raw + prior_samples) / (count + prior_samples), mean


@dataclass(frozen=True)
class TableCompensation:
    """Compensation as a bundle stores it: tables `k` and `mu`, each (steps, channels)."""

    k: NDArray[np.float64]
    mu: NDArray[np.float64]

    def __call__(self, step: int, x: Samples) -> Samples:
        k = _per_channel(self.k[step].astype(np.float32), x)
        if np.all(k == 1):
            return x
        mu = _per_channel(self.mu[step].astype(np.float32), x)
        return np.asarray(mu + k * (x - mu))

    @staticmethod
    def from_tables(tables: Tables) -> TableCompensation | None:
        """The compensation of a bundle's tables, None where it has none."""
        k, mu = COMPENSATION
        return TableCompensation(k=tables[k], mu=tables[mu]) if k in tables else None


@dataclass
class ClosedLoopFit:
    """A correction that is fitted as it is applied: every step's K from samples that carry the K of those before it.

    Hand it to an executor and walk one request. `exact[i]`, (n, channels, *space), are the FP samples after step
    i on the same noise and labels.
    """

    exact: Sequence[Samples]
    method: str
    prior_samples: float = 4.0
    _rows: list[TableCompensation] = field(default_factory=list, init=False)  # of the steps so far, one row each

    def __call__(self, step: int, x: Samples) -> Samples:
        assert step == len(self._rows), "one request, from its first step on"
        k, mu = estimate_k(self.method, self.exact[step], x, self.prior_samples)
        self._rows.append(TableCompensation(k=k[None], mu=mu[None]))
        return self._rows[step](0, x)

    @property
    def table(self) -> TableCompensation:
        """The compensation of the steps so far."""
        k, mu = ([getattr(row, name) for row in self._rows] for name in ("k", "mu"))
        return TableCompensation(k=np.concatenate(k), mu=np.concatenate(mu))
