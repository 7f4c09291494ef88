"""Weights kept in half precision and multiplied in full: half the file and half the memory, FP32 arithmetic.

For `condition`, whose weights are a third of a DiT and are read once per request. FP16 rounds a weight by at most
2^-11 of itself, some tens of times less than INT8 rounds the activations that the tables then scale.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

__all__ = ["half_storage"]

LEAST_ELEMENTS = 1 << 12  # below that a cast costs more than it saves


def half_storage(model: ir.Model) -> bool:
    """Store the weights of matrix products as FP16 behind a Cast, in place. Returns whether anything changed.

    A weight that FP16 can't hold (beyond 65,504, NaN) stays as it is, and so does one that anything else reads.
    """
    weights = list(_products_by_weight(model))
    changed = False
    for weight, products in weights:
        assert weight.const_value is not None
        half = _halved(weight.const_value.numpy())
        if half is None:
            continue
        weight.const_value, weight.dtype = ir.tensor(half, name=weight.name), ir.DataType.FLOAT16
        cast = ir.node("Cast", [weight], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{products[0].name}/Widen")
        cast.metadata_props.update(products[0].metadata_props)
        cast.outputs[0].name, cast.outputs[0].shape = f"{weight.name}.wide", weight.shape
        cast.outputs[0].dtype = ir.DataType.FLOAT
        for product in products:
            product.replace_input_with(1, cast.outputs[0])
        model.graph.insert_before(products[0], cast)
        changed = True
    return changed


def _products_by_weight(model: ir.Model) -> Iterator[tuple[ir.Value, list[ir.Node]]]:
    """Each large constant that nothing but matrix products read as their second operand, and those products."""
    for value in list(model.graph.initializers.values()):
        constant, uses = value.const_value, value.uses()
        if constant is None or constant.dtype != ir.DataType.FLOAT or constant.size < LEAST_ELEMENTS:
            continue
        if uses and all(use.node.op_type == "MatMul" and use.idx == 1 for use in uses):
            order = {node: place for place, node in enumerate(model.graph)}
            yield value, sorted((use.node for use in uses), key=lambda node: order[node])


def _halved(weight: np.ndarray) -> np.ndarray | None:
    """The weight in FP16, None where it doesn't fit."""
    with np.errstate(over="ignore"):
        half = weight.astype(np.float16)
    return half if np.isfinite(half).all() else None
