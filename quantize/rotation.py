"""Rotation of what linear layers read, in groups of channels: x R and R^-1 W, the same product, easier to quantize.

A Hadamard matrix spreads a channel that is much larger than the rest over all channels of its group, in the activation
as in the weight's rows (QuaRot, arXiv 2404.00456; in groups, for diffusion transformers: ConvRot, arXiv 2512.03673). R
has one for each group on its diagonal. Where it goes in a graph: `rotated_graphs`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ditc.spec import Record

__all__ = ["Rotation", "columns_turned", "hadamard", "inverse", "rows_turned"]

Matrix = NDArray[np.float64]

TWO = np.array([[1, 1], [1, -1]], np.float64)
FOUR = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float64)


class Rotation(Record):
    """Rotation of all linear layers by groups of `size` channels, a power of two.

    `folded` names the layers (`Linear.name`) for whose input that costs nothing.
    """

    size: int
    folded: tuple[str, ...] = ()


def hadamard(size: int) -> Matrix:
    """Return R of one group, (size, size), for a power of two: symmetric, entries of one magnitude, R R = c I.

    It is a Kronecker power of the regular matrix of four rows, whose sums are equal: none gathers what all channels
    have in common, as the first one of Sylvester's does (ConvRot). An odd power of two has one of Sylvester's factors
    beside. The magnitude is a power of two, exact in FP16, so that c is 1, or 2 for odd powers: a factor that all
    channels share changes no rounding.
    """
    exponent = size.bit_length() - 1
    matrix: Matrix = np.ones((1, 1))
    for factor in [TWO] * (exponent % 2) + [FOUR] * (exponent // 2):
        matrix = np.asarray(np.kron(matrix, factor))
    return np.asarray(matrix / 2.0 ** (exponent // 2))


def inverse(matrix: Matrix) -> Matrix:
    """Return the inverse of a matrix that `hadamard` made."""
    return np.asarray(matrix / np.square(matrix[0]).sum())


def rows_turned(weight: Matrix, matrix: Matrix) -> Matrix:
    """Return a weight (in, out) with each group of rows multiplied from the left by `matrix`, (size, size)."""
    return np.asarray((matrix @ weight.reshape(-1, len(matrix), weight.shape[-1])).reshape(weight.shape))


def columns_turned(constant: Matrix, matrix: Matrix, columns: Sequence[int]) -> Matrix:
    """Return a weight or bias (..., out) with groups of the named columns multiplied from the right by `matrix`."""
    after, places = constant.copy(), list(columns)
    groups = constant[..., places].reshape(*constant.shape[:-1], -1, len(matrix))
    after[..., places] = (groups @ matrix).reshape(*constant.shape[:-1], len(places))
    return np.asarray(after)
