"""Needs of a segment on a device: ports, bytes of weights, bytes of activations.

`segment_footprint` measures it at compile time; the manifest keeps it, so that a machine without onnx knows it too.
"""

from __future__ import annotations

from collections.abc import Mapping

from ditc.spec import Record

__all__ = ["Footprint", "PortShape"]


class PortShape(Record):
    """Type and shape of an input or output; a dimension is a number, or a name where it is open."""

    dtype: str
    shape: tuple[int | str, ...]

    def size_bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes with the open dimensions filled in."""
        count = BYTES[self.dtype]
        for size in self.shape:
            count *= size if isinstance(size, int) else sizes[size]
        return count


class Footprint(Record):
    """Needs and work of one segment at its profile.

    `activation_bytes` is the least that holds all values alive at the same time. Operations are two per multiplication
    and addition of matrix products and convolutions; `moved_bytes` is what all other operators read and write, each by
    itself.
    """

    inputs: dict[str, PortShape]
    outputs: dict[str, PortShape]
    weight_bytes: int
    activation_bytes: int
    int8_operations: int = 0
    float_operations: int = 0
    moved_bytes: int = 0


BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}
