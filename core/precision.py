"""Arithmetic of a bundle: the precisions of `ditc compile`, and how many bits a linear layer's operands have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["INT8", "LEVELS", "PRECISIONS", "WEIGHT_BITS_KEY", "Bits", "levels_of", "quantized"]

WEIGHT_BITS_KEY = "ditc.weight_bits"  # metadata of a segment with integers; eight where it is not there


class Bits(NamedTuple):
    """Bits of a linear layer's weights and activations, symmetric about zero."""

    weights: int = 8
    activations: int = 8


INT8 = Bits()
# None is arithmetic in floating point. Fewer bits than eight lie in INT8 tensors that the INT8 kernels multiply, at
# their speed and size. Four and six are a simulation of their accuracy. Seven of weights are for CPUs without integer
# dot products, whose kernels add two products in 16 bits: 2 * 255 * 63 fits there, 2 * 255 * 127 does not
PRECISIONS: Mapping[str, Bits | None] = {
    "fp32": None,
    "fp16": None,
    "w8a8": INT8,
    "w7a8": Bits(weights=7),
    "w4a8": Bits(weights=4),
    "w8a6": Bits(activations=6),
}


def quantized(precision: str) -> bool:
    """Are there integers in the linear layers?"""
    return PRECISIONS.get(precision) is not None


def levels_of(bits: int) -> int:
    """The largest integer of a symmetric range: 127 of 8 bits."""
    return int(2 ** (bits - 1)) - 1


LEVELS = levels_of(INT8.weights)  # largest magnitude of symmetric INT8
