"""Addends of steps that reuse: sums made ahead, combined with numbers per step and channel (`ditc.approximators`).

    h = embed(x) + a_t * S_near + ...        S = sum_l gate_l(t) * out_l, made by an earlier step with this step's gates

`rows` are a bundle's table, (steps, n, channels): what each step's combination takes, (1, 0, ...) where it is to hold:
a weight for each sum that it reads, the latest first, zeros for those that it lacks, and a shift where there is any.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditc.approximators import APPROXIMATORS
from ditc.program import Program, Step, distance_of

__all__ = ["Moments", "first_rows", "fitted_rows", "holding_rows", "makers_of"]

Channels = NDArray[np.float64]
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Moments:
    """Sums over tuples of values per channel: their count, first moments (values, channels), and those of products.

    In a tuple are what was seen, sums from the latest on, and at the end what is exact. All zero to begin with.
    """

    count: int
    first: Channels
    products: Channels  # (values, values, channels)

    @staticmethod
    def empty(values: int, channels: int) -> Moments:
        return Moments(0, np.zeros((values, channels)), np.zeros((values, values, channels)))

    def add(self, *values: NDArray[np.float32]) -> Moments:
        """With further tuples, each value (..., channels)."""
        columns = [np.asarray(value, np.float64).reshape(-1, value.shape[-1]) for value in values]
        products = [[(one * other).sum(axis=0) for other in columns] for one in columns]
        return Moments(
            self.count + len(columns[0]),
            self.first + np.stack([column.sum(axis=0) for column in columns]),
            self.products + np.array(products),
        )

    @property
    def means(self) -> Channels:
        """Return (values, channels)."""
        return self.first / self.count

    @property
    def spreads(self) -> Channels:
        """Return variances and covariances, (values, values, channels)."""
        means = self.means
        return self.products / self.count - means[:, None] * means[None]


def fitted_rows(method: str, moments: Moments, images: int, prior_images: float = 4.0) -> Rows:
    """Return the numbers of one step, (rows, channels), drawn towards holding as if further pairs had been exact.

    `method` is a row of APPROXIMATORS that fits; `moments` are over `images` images, and `prior_images` counts those
    further ones. A channel in which anything that was seen is constant is held.
    """
    approximator, sums = APPROXIMATORS[method], len(moments.first) - 1
    assert approximator.fit is not None
    usable = _vary(moments, sums).all(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        fitted = np.stack(approximator.fit(moments.means, moments.spreads))
    rows: Rows = holding_rows(1, approximator.rows, fitted.shape[-1])[0]
    places = [*range(sums), *range(approximator.looks_back, approximator.rows)]  # of the sums, and of a shift
    drawn = np.where(usable, fitted - rows[places], 0) * (images / (images + prior_images))
    drawn[0] += 1
    rows[places] = drawn
    return rows


def _vary(moments: Moments, sums: int) -> NDArray[np.bool_]:
    """Say of each sum that was seen, (sums, channels), where its values are not all the same."""
    places = np.arange(sums)
    squares = moments.products[places, places] / moments.count
    return moments.spreads[places, places] > 1e-12 * np.maximum(squares, 1e-30)


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
    approximator = APPROXIMATORS[program.reuse]
    if approximator.weights is None:
        return table
    places = [getattr(step, approximator.along) for step in program.steps]
    for step in program.steps:
        if program.segment(step.segment).rows:
            own = approximator.weights(places[step.index], [places[maker] for maker in makers_of(step)])
            table[step.index, : len(own)] = np.array(own)[:, None]
    return table


def makers_of(step: Step) -> list[int]:
    """Return the steps that made the sums that a step reads, the latest first."""
    return [step.index - distance for distance in sorted(map(distance_of, step.reads))]
