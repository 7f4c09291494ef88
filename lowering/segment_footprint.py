"""The needs of a segment, measured on its graph: which values are alive at the same time, and how large they are."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from ditc.footprint import Footprint, PortShape

__all__ = ["footprint_of"]

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


def _size_bytes(value: ir.Value, sizes: Mapping[str, int]) -> int:
    """Bytes of a value; a dimension that shape inference leaves unknown counts as 1, so this is a lower bound."""
    if value.dtype is None or value.shape is None:
        return 0
    return math.prod(_length(size, sizes) for size in value.shape) * math.ceil(value.dtype.itemsize)


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def _length(size: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int:
    """A dimension as a number: a name, or an expression of names and numbers like "16*batch"."""
    if isinstance(size, int):
        return size
    try:
        return _number(ast.parse(str(size.value), mode="eval").body, sizes)
    except (SyntaxError, KeyError):
        return 1


def _number(node: ast.AST, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.BinOp):
        return int(OPERATORS[type(node.op)](_number(node.left, sizes), _number(node.right, sizes)))
    raise KeyError(ast.dump(node))


def footprint_of(model: ir.Model, sizes: Mapping[str, int]) -> Footprint:
    """The needs of a segment with its open dimensions filled in from `sizes`. Shapes that it lacks are inferred."""
    if any(value.shape is None for node in model.graph for value in node.outputs):
        ShapeInferencePass()(model)
    graph = model.graph
    return Footprint(
        inputs={str(value.name): _port(value) for value in graph.inputs},
        outputs={str(value.name): _port(value) for value in graph.outputs},
        weight_bytes=sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value),
        activation_bytes=_peak_bytes(graph, sizes),
        **_work(graph, sizes),
    )


# operators that change how a tensor is looked at, or that the integer products take in
FREE = frozenset({"DequantizeLinear", "Flatten", "Identity", "QuantizeLinear", "Reshape", "Squeeze", "Unsqueeze"})


def _work(graph: ir.Graph, sizes: Mapping[str, int]) -> dict[str, int]:
    """Operations of the products by type, and bytes that everything else moves."""
    work = {"int8_operations": 0, "float_operations": 0, "moved_bytes": 0}
    for node in graph:
        reduced = _reduced_length(node, sizes)
        if reduced:
            weight = node.inputs[1].producer() if node.inputs[1] is not None else None
            quantized = weight is not None and weight.op_type == "DequantizeLinear"
            kind = "int8_operations" if quantized else "float_operations"
            work[kind] += 2 * reduced * _elements(node.outputs[0], sizes)
        elif node.op_type not in FREE:
            values = {value for value in (*node.inputs, *node.outputs) if value is not None}
            work["moved_bytes"] += sum(_size_bytes(value, sizes) for value in values)
    return work


def _reduced_length(node: ir.Node, sizes: Mapping[str, int]) -> int:
    """Count the products in one element of the output; 0 for operators that are no product."""
    if node.op_type in ("MatMul", "Gemm") and node.inputs[0] is not None and node.inputs[0].shape is not None:
        last = (
            0 if node.op_type == "Gemm" and "transA" in node.attributes and node.attributes["transA"].as_int() else -1
        )
        return _length(node.inputs[0].shape[last], sizes)
    if node.op_type == "Conv" and node.inputs[1] is not None and node.inputs[1].shape is not None:
        return math.prod(_length(size, sizes) for size in node.inputs[1].shape[1:])
    return 0


def _elements(value: ir.Value, sizes: Mapping[str, int]) -> int:
    return 0 if value.shape is None else math.prod(_length(size, sizes) for size in value.shape)


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
                size = _size_bytes(value, sizes)
                alive += size
                ends.setdefault(last_use[value], []).append(size)
        most = max(most, alive)
        alive -= sum(ends.pop(place, []))
    return most
