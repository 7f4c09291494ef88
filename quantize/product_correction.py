"""Corrections of integer products, per output channel, behind the product and in front of the bias.

    p = x W         q = x^ W^      x^, W^: what the integers stand for
    y = slope * q + shift + bias

DEC-quant of CacheQuant (arXiv 2503.01323) takes the least squares line of p over q. Its released code fits outputs that
hold the bias and then scales the product alone, which leaves (slope - 1) * bias in every output; here neither p nor q
holds it, and it stays as it is. The slope goes into the weight's scales and the shift into the bias: a step takes as
long as before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from ditc.precision import INT8, Bits, levels_of
from ditc.spec import Record

__all__ = ["CORRECTIONS", "LayerCorrection", "ProductMoments", "correction_of", "what_integers_stand_for"]

Channels = NDArray[np.float64]  # (out,)
LEAST_SPREAD = 1e-12  # of a channel's mean square: what varies by less has no slope


class LayerCorrection(Record):
    """A slope and a shift for each output channel of a linear layer; slopes are positive, as parts of scales."""

    slope: tuple[float, ...]
    shift: tuple[float, ...]

    @model_validator(mode="after")
    def _usable(self) -> LayerCorrection:
        numbers = np.array([self.slope, self.shift])
        if not np.isfinite(numbers).all() or not (numbers[0] > 0).all():
            raise ValueError("a correction needs finite numbers and slopes above 0")
        return self


@dataclass(frozen=True)
class ProductMoments:
    """Sums over rows of a layer's exact products p and integer products q: p, q, p q and q q, each (out,)."""

    rows: int
    exact: Channels
    integer: Channels
    mixed: Channels
    square: Channels

    @staticmethod
    def empty(channels: int) -> ProductMoments:
        return ProductMoments(0, *(np.zeros(channels) for _ in range(4)))

    def add(self, exact: NDArray[np.float32], integer: NDArray[np.float32]) -> ProductMoments:
        """With further rows, both (..., out)."""
        p, q = (np.asarray(each, np.float64).reshape(-1, each.shape[-1]) for each in (exact, integer))
        return ProductMoments(
            self.rows + len(p),
            self.exact + p.sum(axis=0),
            self.integer + q.sum(axis=0),
            self.mixed + (p * q).sum(axis=0),
            self.square + (q * q).sum(axis=0),
        )


def _dec_quant(moments: ProductMoments) -> tuple[Channels, Channels]:
    """The least squares line; a channel that stands still, or whose line falls, is shifted alone."""
    p, q, mixed, square = (
        each / moments.rows for each in (moments.exact, moments.integer, moments.mixed, moments.square)
    )
    spread = square - q * q
    lines = (spread > LEAST_SPREAD * square) & (mixed > p * q)
    slope = np.divide(mixed - p * q, spread, out=np.ones_like(spread), where=lines)
    return slope, p - slope * q


CORRECTIONS: dict[str, Callable[[ProductMoments], tuple[Channels, Channels]]] = {"dec-quant": _dec_quant}


def correction_of(method: str, moments: ProductMoments) -> LayerCorrection:
    """Return the numbers of a row of CORRECTIONS, rounded to what a table of them keeps."""
    slope, shift = CORRECTIONS[method](moments)
    return LayerCorrection(slope=tuple(map(_rounded, slope)), shift=tuple(map(_rounded, shift)))


def _rounded(number: float) -> float:
    return float(f"{number:.7g}")


def what_integers_stand_for(x: NDArray[np.float32], scale: float, midpoint: int, bits: Bits) -> NDArray[np.float32]:
    """Return activations after a Q/DQ pair: rounded to whole steps of `scale` about the middle, and clipped."""
    high = levels_of(bits.activations)
    low = -high - 1 if bits.activations == INT8.activations else -high  # a pair alone clips where int8 ends
    steps = np.clip(np.round(x / np.float32(scale) - np.float32(midpoint)), low, high)
    return np.asarray((steps + np.float32(midpoint)) * np.float32(scale), np.float32)
