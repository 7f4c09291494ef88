"""What a segment needs of a device, read from its graph: ports, bytes of weights, bytes of activations.

It is measured at compile time and kept in the manifest, so that a machine without onnx knows it too.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ditc.spec import Record

__all__ = ["Footprint", "PortShape", "footprint_of"]


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
    """Needs of one segment: `activation_bytes` is the least that holds all values alive at the same time."""

    inputs: dict[str, PortShape]
    outputs: dict[str, PortShape]
    weight_bytes: int
    activation_bytes: int


BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}
TYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
    ir.DataType.BOOL: "bool",
}


def _port(value: ir.Value) -> PortShape:
    assert value.dtype is not None
    assert value.shape is not None
    return PortShape(
        dtype=TYPES[value.dtype],
        shape=tuple(size if isinstance(size, int) else str(size.value) for size in value.shape),
    )


def footprint_of(model: ir.Model, sizes: Mapping[str, int]) -> Footprint:
    """The needs of a segment with its open dimensions filled in from `sizes`."""
    graph = model.graph
    return Footprint(
        inputs={str(value.name): _port(value) for value in graph.inputs},
        outputs={str(value.name): _port(value) for value in graph.outputs},
        weight_bytes=sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value),
        activation_bytes=_peak_bytes(graph, sizes),
    )


def _peak_bytes(graph: ir.Graph, sizes: Mapping[str, int]) -> int:
    """The most bytes of inner values that are alive at once, in graph order: made, and read again later."""
    borders = {*graph.inputs, *graph.outputs}
    last_use: dict[ir.Value, int] = {}
    nodes = list(graph)
    for place, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and value.producer() is not None and value not in borders:
                last_use[value] = place
    alive, most = 0, 0
    ends: dict[int, list[int]] = {}
    for place, node in enumerate(nodes):
        for value in node.outputs:
            if value in last_use:
                size = _port(value).size_bytes(sizes)
                alive += size
                ends.setdefault(last_use[value], []).append(size)
        most = max(most, alive)
        alive -= sum(ends.pop(place, []))
    return most
