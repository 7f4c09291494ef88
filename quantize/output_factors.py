"""Multiplying an output of a graph by constants, carried up into the weights that make it.

The factor moves from a value to what it is made of, as far as the algebra allows: through reshapes and concatenations,
into both sides of a sum, into the columns of a weight. Where it can't go on, one Mul is put; for the tables of
`condition`, that is one product per request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditc.program import REQUEST

__all__ = ["multiply_output", "scaled_tensor"]

Factor = NDArray[np.float64]  # the trailing axes of a value: what is the same in every row of a batch

LEADING = 2  # axes of a table before those: steps and batch


class Share(NamedTuple):
    """The factor of one operand of a node."""

    operand: int
    factor: Factor


Rule = Callable[[ir.Node, Factor], "list[Share] | None"]


def multiply_output(model: ir.Model, name: str, factor: Factor) -> None:
    """Multiply output `name`, (steps, batch, *factor.shape), by a factor, in place.

    One of the request has no steps; its factor is one Mul.
    """
    place, value = next((i, value) for i, value in enumerate(model.graph.outputs) if value.name == name)
    if not value.uses() and not name.startswith(REQUEST) and _carried(model, value, factor):
        return
    value.name = f"{name}.unscaled"
    node = _product(model, value, factor, name)
    model.graph.append(node)
    model.graph.outputs[place] = node.outputs[0]


def _carried(model: ir.Model, value: ir.Value, factor: Factor) -> bool:
    """Multiply what a value is made of, where its operator has a rule."""
    node = value.producer()
    rule = RULES.get(node.op_type) if node is not None else None
    shares = rule(node, factor) if rule is not None and node is not None else None
    if node is None or shares is None:
        return False
    for share in shares:
        if not (share.factor == 1).all():
            _multiply_operand(model, node, share)
    return True


def _multiply_operand(model: ir.Model, node: ir.Node, share: Share) -> None:
    """Make a node read an operand times a factor; other readers of the operand see what they saw."""
    value = node.inputs[share.operand]
    assert value is not None
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    if value.const_value is not None:
        node.replace_input_with(share.operand, _scaled_constant(model, value, share.factor, alone))
    elif not (alone and _carried(model, value, share.factor)):
        product = _product(model, value, share.factor, f"{value.name}.scaled.{node.name}")
        model.graph.insert_before(node, product)
        node.replace_input_with(share.operand, product.outputs[0])


def _scaled_constant(model: ir.Model, value: ir.Value, factor: Factor, alone: bool) -> ir.Value:
    """The constant times the factor; it takes the name of one that nobody else reads."""
    tensor = value.const_value
    assert tensor is not None
    name = str(value.name)
    if alone:
        model.graph.initializers.pop(name)
    number = 1
    while name in model.graph.initializers:
        number += 1
        name = f"{value.name}.scaled_{number}"
    lazy = scaled_tensor(tensor, factor, name)
    scaled = ir.Value(name=name, shape=lazy.shape, type=value.type, const_value=lazy)
    model.graph.register_initializer(scaled)
    return scaled


def scaled_tensor(tensor: ir.TensorProtocol, factor: Factor, name: str) -> ir.LazyTensor:
    """A constant times a factor, made when it is written: a large model's weights are not held in memory."""
    shape = ir.Shape(np.broadcast_shapes(tensor.shape.numpy(), factor.shape))

    def product() -> Any:
        return ir.Tensor((tensor.numpy() * factor).astype(np.float32), name=name)

    return ir.LazyTensor(product, dtype=tensor.dtype, shape=shape, name=name)


def _product(model: ir.Model, value: ir.Value, factor: Factor, name: str) -> ir.Node:
    tensor = ir.tensor(factor.astype(np.float32), name=f"{name}.factor")
    shape = ir.Shape(factor.shape)
    constant = ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(constant)
    node = ir.node("Mul", [value, constant], name=f"{name}/Mul")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, value.shape
    return node


def _trailing(value: ir.Value | None) -> list[int] | None:
    if value is None or value.shape is None:
        return None
    sizes = list(value.shape)[LEADING:]
    return [size for size in sizes if isinstance(size, int)] if all(isinstance(s, int) for s in sizes) else None


def _reshape(node: ir.Node, factor: Factor) -> list[Share] | None:
    before = _trailing(node.inputs[0])
    if not before or int(np.prod(before)) != factor.size:
        return None
    return [Share(0, factor.reshape(before))]


def _concat(node: ir.Node, factor: Factor) -> list[Share] | None:
    widths = [sizes[-1] if (sizes := _trailing(value)) else 0 for value in node.inputs]
    if 0 in widths or sum(widths) != factor.shape[-1]:
        return None  # or along another axis
    return [Share(i, part) for i, part in enumerate(np.split(factor, np.cumsum(widths)[:-1], axis=-1))]


def _add(node: ir.Node, factor: Factor) -> list[Share] | None:
    for value in node.inputs:
        if value is None or (value.const_value is None and _trailing(value) != list(factor.shape)):
            return None
    return [Share(0, factor), Share(1, factor)]


def _matmul(node: ir.Node, factor: Factor) -> list[Share] | None:
    weight = node.inputs[1]
    constant = weight is not None and weight.const_value is not None and len(weight.const_value.shape) == 2
    return [Share(1, factor)] if constant and factor.ndim == 1 else None


RULES: dict[str, Rule] = {"Add": _add, "Concat": _concat, "MatMul": _matmul, "Reshape": _reshape}
