"""Ranges that do not lie about zero: m = midpoint, quantize x - m, and bias += m * rowsum(W).

GELU never goes below -0.17, so half of a symmetric range stays empty behind it. Where a lower bound is known from the
operator, the range starts there and its 255 levels are all used. The midpoint is a whole number of steps, so it is a
zero point for a backend that has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditc.precision import LEVELS
from ditc.quantize.linears import linears_of
from ditc.quantize.ranges import Doubles, Histogram, clipping_range

__all__ = ["MIDPOINTS", "Range", "centred_scales", "lower_bounds", "range_of"]

# what an operator's output never goes below; GELU's least value is -0.16997, -0.17004 in its tanh form
LOWER_BOUNDS: Mapping[str, float] = {"Gelu": -0.17005, "Relu": 0.0}
MIDPOINTS: dict[str, Mapping[str, float]] = {"zero": {}, "bounded": LOWER_BOUNDS}


class Range(NamedTuple):
    """The unclipped range of an activation."""

    low: float
    high: float


def lower_bounds(model: ir.Model, midpoint: str) -> dict[str, float]:
    """The lower bound of each activation that a linear layer reads, where it has one under a row of MIDPOINTS."""
    known = MIDPOINTS[midpoint]
    makers = {str(linear.activation.name): linear.activation.producer() for linear in linears_of(model)}
    return {name: known[node.op_type] for name, node in makers.items() if node is not None and node.op_type in known}


def range_of(histogram: Histogram, method: str, low: float | None, levels: int = LEVELS) -> Range:
    """The range of an activation. `histogram` is that of |x|, or of x - low where there is a lower bound."""
    if low is None:
        high = clipping_range(method, histogram, levels)
        return Range(-high, high)
    return Range(low, low + clipping_range(method, histogram, 2 * levels))


def centred_scales(low: Doubles, high: Doubles, levels: int = LEVELS) -> tuple[NDArray[np.int64], Doubles]:
    """(midpoint in steps of the scale, scale) of each range from `low` to `high`, all (groups,).

    A symmetric range gives 0 and high / levels.
    """
    high = np.maximum(high, -low)  # never more levels below zero than above it
    # down to a whole step, so that nothing is clipped at the low end; up to rounding, which is not a step
    midpoint = np.floor(levels + low * (2 * levels / (high - low)) + 1e-9).astype(np.int64)
    return midpoint, high / (levels + midpoint)
