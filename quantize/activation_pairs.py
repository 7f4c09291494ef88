"""The nodes around a Q/DQ pair whose scale is known only at run time, or whose range does not lie about zero.

    u = x / s     Q/DQ of u - c with a constant scale     y = s (W (u - c) + c rowsum(W))

These are the pieces that `qdq` puts into a graph, each only where it is needed, and how lowerings find them again: the
nodes carry their role in their metadata.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditc.quantize.linears import ROLE_KEY, Linear

__all__ = [
    "CENTRES",
    "CORRECTS",
    "DIVIDES",
    "MEASURES",
    "RECENTRES",
    "RESTORES",
    "ROLE_KEY",
    "ActivationPair",
    "activation_pairs",
    "add_constant",
    "bypass",
    "followed_by",
    "marked",
    "new_node",
    "preceded_by",
]

MEASURES, DIVIDES, CENTRES, RECENTRES, RESTORES = "measures", "divides", "centres", "recentres", "restores"
CORRECTS = "corrects"


@dataclass(frozen=True)
class ActivationPair:
    """Q and DQ of an activation and the products that read them, with what surrounds them, None where there is none."""

    quantize: ir.Node
    dequantize: ir.Node
    divide: ir.Node | None
    centre: ir.Node | None
    products: tuple[ir.Node, ...]
    recentres: tuple[ir.Node, ...]
    restores: tuple[ir.Node, ...]

    @property
    def magnitude(self) -> ir.Value | None:
        """The divisor of the activation."""
        return None if self.divide is None else self.divide.inputs[1]


def activation_pairs(model: ir.Model) -> list[ActivationPair]:
    """Every pair in graph order."""
    pairs = []
    for dequantize in model.graph:
        quantize = _given(dequantize.inputs[0]).producer() if dequantize.op_type == "DequantizeLinear" else None
        if quantize is None:  # of a weight, or no DequantizeLinear at all
            continue
        centre = _before(quantize, CENTRES)
        divide = _before(centre or quantize, DIVIDES)
        products = tuple(dequantize.outputs[0].consumers())
        recentres = tuple(node for product in products if (node := _behind(product, RECENTRES)))
        restores = tuple(node for product in recentres or products if (node := _behind(product, RESTORES)))
        pairs.append(ActivationPair(quantize, dequantize, divide, centre, products, recentres, restores))
    return pairs


def _before(node: ir.Node, role: str) -> ir.Node | None:
    producer = _given(node.inputs[0]).producer()
    return producer if producer is not None and producer.metadata_props.get(ROLE_KEY) == role else None


def _behind(node: ir.Node, role: str) -> ir.Node | None:
    readers = node.outputs[0].consumers()
    return readers[0] if len(readers) == 1 and readers[0].metadata_props.get(ROLE_KEY) == role else None


def preceded_by(
    model: ir.Model, linear: Linear, kind: str, activation: ir.Value, other: ir.Value, role: str
) -> ir.Value:
    """Put a node between an activation and the layer that will read it; returns its output."""
    node = marked(kind, linear, [activation, other], role)
    value = node.outputs[0]
    value.name, value.dtype = f"{activation.name}.{role}", ir.DataType.FLOAT
    value.shape = activation.shape
    model.graph.insert_before(linear.node, node)
    return value


def followed_by(model: ir.Model, linear: Linear, kind: str, other: ir.Value, role: str) -> None:
    """Put a node between the layer's product and everything that reads it; the result takes over the name."""
    before = linear.node.outputs[0]
    node = marked(kind, linear, [None, other], role)
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


def marked(kind: str, linear: Linear, inputs: list[ir.Value | None], role: str) -> ir.Node:
    """A node of a layer with its role."""
    node = ir.node(kind, inputs, name=f"{linear.name}/{kind}_{role}")
    node.metadata_props.update(linear.node.metadata_props)
    node.metadata_props[ROLE_KEY] = role
    return node


def new_node(kind: str, inputs: list[ir.Value | None], name: str, dtype: ir.DataType, **attributes: int) -> ir.Node:
    """A node with a name, its output named after it."""
    node = ir.node(kind, inputs, attributes=attributes, name=name)
    node.outputs[0].name, node.outputs[0].dtype = f"{name}.out", dtype
    return node


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
