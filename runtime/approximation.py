"""Addends of steps that reuse: sums made ahead, combined with numbers per step and channel.

    h = embed(x) + a_t * S_near + ...        S = sum_l gate_l(t) * out_l, made by an earlier step with this step's gates

`rows` are a bundle's table, (steps, n, channels): what each step's combination takes, (1, 0) where it is to hold.

| reuse | rows | numbers |
|---|---|---|
| affine | a, b: a S + b | least squares against the FP program (DEC of CacheQuant, arXiv 2503.01323) |
| variance | a, b: mu + a (S - mu) | ratio of standard deviations: variance compensation of the residual |
| taylor | 1 + w, -w: S + w (S - S_before) | w = (t_near - t) / (t_before - t_near): first order, nothing is fitted |

`S_before` are the outputs of the step that computed before the last one, with this step's gates as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditc.program import EXTRAPOLATE, Program, Step, distance_of

__all__ = ["FITS", "Moments", "first_rows", "fitted_rows", "holding_rows"]

Channels = NDArray[np.float64]
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Moments:
    """Sums over pairs (seen, exact) per channel: their count, first and second moments; all zero to begin with."""

    count: int
    seen: Channels
    exact: Channels
    seen_seen: Channels
    seen_exact: Channels
    exact_exact: Channels

    @staticmethod
    def empty(channels: int) -> Moments:
        return Moments(0, *(np.zeros(channels) for _ in range(5)))

    def add(self, seen: NDArray[np.float32], exact: NDArray[np.float32]) -> Moments:
        """With further pairs, both (..., channels)."""
        x, y = (np.asarray(values, np.float64).reshape(-1, values.shape[-1]) for values in (seen, exact))
        return Moments(
            self.count + len(x),
            self.seen + x.sum(axis=0),
            self.exact + y.sum(axis=0),
            self.seen_seen + (x * x).sum(axis=0),
            self.seen_exact + (x * y).sum(axis=0),
            self.exact_exact + (y * y).sum(axis=0),
        )

    @property
    def means(self) -> tuple[Channels, Channels]:
        return self.seen / self.count, self.exact / self.count

    @property
    def spreads(self) -> tuple[Channels, Channels, Channels]:
        """Variance of what was seen, covariance, variance of what is exact."""
        x, y = self.means
        products = (self.seen_seen, self.seen_exact, self.exact_exact)
        centred = (part / self.count - mean for part, mean in zip(products, (x * x, x * y, y * y), strict=True))
        variance, covariance, exact_variance = centred
        return variance, covariance, exact_variance


def _affine(moments: Moments) -> tuple[Channels, Channels]:
    """The least squares line: its slope shrinks where the error is independent of what was seen."""
    (x, y), (variance, covariance, _) = moments.means, moments.spreads
    slope = covariance / variance
    return slope, y - slope * x


def _variance(moments: Moments) -> tuple[Channels, Channels]:
    """The exact spread about the mean that was seen."""
    (x, _), (variance, _, exact_variance) = moments.means, moments.spreads
    slope = np.sqrt(np.maximum(exact_variance, 0) / variance)
    return slope, (1 - slope) * x


FITS: dict[str, Callable[[Moments], tuple[Channels, Channels]]] = {"affine": _affine, "variance": _variance}


def fitted_rows(method: str, moments: Moments, images: int, prior_images: float = 4.0) -> Rows:
    """(a, b) of one step, (2, channels), drawn towards (1, 0) as if `prior_images` further pairs had been exact.

    `method` is a row of FITS; `moments` are over `images` images. A channel that is constant is held.
    """
    variance = moments.spreads[0]
    usable = variance > 1e-12 * np.maximum(moments.seen_seen / moments.count, 1e-30)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope, shift = FITS[method](moments)
    share = images / (images + prior_images)
    a, b = np.where(usable, slope - 1, 0) * share + 1, np.where(usable, shift, 0) * share
    return np.stack([a, b]).astype(np.float32)


def holding_rows(steps: int, rows: int, channels: int) -> Rows:
    """A table under which every step adds the last sum as it is, (steps, rows, channels)."""
    table = np.zeros((steps, rows, channels), np.float32)
    table[:, 0] = 1
    return table


def first_rows(program: Program, channels: int) -> Rows | None:
    """The table as it is before anything is fitted, (steps, rows, channels); None where no step takes numbers."""
    rows = max(plan.rows for plan in program.segments)
    if not rows:
        return None
    table = holding_rows(len(program.steps), rows, channels)
    for step in program.steps:
        if step.segment == EXTRAPOLATE:
            table[step.index] = _taylor(program, step)
    return table


def _taylor(program: Program, step: Step) -> NDArray[np.float64]:
    """First order over the last two steps that computed, (2, 1)."""
    near, before = (program.steps[step.index - back].t for back in sorted(map(distance_of, step.reads)))
    weight = (near - step.t) / (before - near)
    return np.array([[1 + weight], [-weight]])
