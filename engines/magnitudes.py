"""Quantization by a magnitude that is known only at run time: u = x / s, Q/DQ with the scale 1/127, y = s (W u).

The pieces that `qdq` puts into a graph, and how lowerings find them again: the nodes that divide and restore carry
their role in their metadata.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditc.engines.linears import Linear
from ditc.engines.scale_table import SCALES_INPUT, ScaleTable
from ditc.errors import DitcError

__all__ = [
    "DIVIDES",
    "RESTORES",
    "ROLE_KEY",
    "ScaledPair",
    "add_constant",
    "bypass",
    "divided",
    "followed_by",
    "is_step_split",
    "scaled_pairs",
    "step_magnitude",
    "step_split",
]

ROLE_KEY = "ditc.role"
DIVIDES, RESTORES = "divides", "restores"
SPLIT = f"{SCALES_INPUT}/Split"


@dataclass(frozen=True)
class ScaledPair:
    """A Q/DQ pair behind a division, and the products whose size is restored: (MatMul, the Mul behind it) each."""

    divide: ir.Node
    quantize: ir.Node
    dequantize: ir.Node
    products: tuple[tuple[ir.Node, ir.Node], ...]

    @property
    def activation(self) -> ir.Value:
        return _given(self.divide.inputs[0])

    @property
    def magnitude(self) -> ir.Value:
        return _given(self.divide.inputs[1])


def scaled_pairs(model: ir.Model) -> list[ScaledPair]:
    """Every pair of the graph behind a division by its magnitude, in graph order."""
    found = []
    for divide in model.graph:
        if divide.metadata_props.get(ROLE_KEY) != DIVIDES:
            continue
        (quantize,) = divide.outputs[0].consumers()
        (dequantize,) = quantize.outputs[0].consumers()
        products = tuple((product, _restorer(product)) for product in dequantize.outputs[0].consumers())
        found.append(ScaledPair(divide, quantize, dequantize, products))
    return found


def _restorer(product: ir.Node) -> ir.Node:
    (after,) = product.outputs[0].consumers()
    assert after.metadata_props.get(ROLE_KEY) == RESTORES
    return after


def step_magnitude(model: ir.Model, linear: Linear, table: ScaleTable) -> ir.Value:
    """The current step's magnitude of a layer, (1,): one element of the segment's input."""
    return step_split(model, table.width).outputs[table.columns[linear.path]]


def step_split(model: ir.Model, width: int) -> ir.Node:
    """The node that cuts the input into one value per column; made with the input where the graph has none."""
    for node in model.graph:
        if is_step_split(node):
            return node
    if any(value.name == SCALES_INPUT for value in model.graph.inputs):
        raise DitcError(f"the model has a table named {SCALES_INPUT!r}, as the activation scales are; rename it")
    scales = ir.Value(name=SCALES_INPUT, shape=ir.Shape([width]), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.inputs.append(scales)
    node = ir.node("Split", [scales], attributes={"axis": 0, "num_outputs": width}, num_outputs=width, name=SPLIT)
    for column, value in enumerate(node.outputs):
        value.name, value.dtype, value.shape = f"{SCALES_INPUT}.{column}", ir.DataType.FLOAT, ir.Shape([1])
    model.graph.insert_before(model.graph[0], node)
    return node


def is_step_split(node: ir.Node | None) -> bool:
    """Is this the node that cuts the input into magnitudes?"""
    return node is not None and node.name == SPLIT


def divided(model: ir.Model, linear: Linear, magnitude: ir.Value) -> ir.Value:
    """What the layer reads, over its magnitude: between -1 and 1."""
    node = _marked("Div", linear, [linear.activation, magnitude], DIVIDES)
    value = node.outputs[0]
    value.name, value.dtype = f"{linear.activation.name}.scaled", ir.DataType.FLOAT
    value.shape = linear.activation.shape
    model.graph.insert_before(linear.node, node)
    return value


def followed_by(model: ir.Model, linear: Linear, kind: str, other: ir.Value, role: str) -> None:
    """Put a node between the layer's product and everything that reads it; the result takes over the name."""
    before = linear.node.outputs[0]
    node = _marked(kind, linear, [None, other], role)
    after = node.outputs[0]
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    node.replace_input_with(0, before)
    after.name, before.name = before.name, f"{before.name}.{role}"
    after.type, after.shape = before.type, before.shape
    model.graph.insert_after(linear.node, node)


def bypass(model: ir.Model, node: ir.Node) -> None:
    """Remove a node and give what reads it its first input, under the name that it had."""
    before, after = _given(node.inputs[0]), node.outputs[0]
    name = after.name
    after.replace_all_uses_with(before, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    before.name = name


def add_constant(model: ir.Model, name: str, array: NDArray[np.generic] | np.generic) -> ir.Value:
    """A constant of the graph."""
    tensor = ir.tensor(np.asarray(array))
    value = ir.Value(name=name, shape=ir.Shape(np.shape(array)), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _marked(kind: str, linear: Linear, inputs: list[ir.Value | None], role: str) -> ir.Node:
    node = ir.node(kind, inputs, name=f"{linear.name}/{kind}_{role}")
    node.metadata_props.update(linear.node.metadata_props)
    node.metadata_props[ROLE_KEY] = role
    return node


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
