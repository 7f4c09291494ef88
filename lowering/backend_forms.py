"""Lowerings: changes of portable segments for one backend. Graph only; the weights file is shared.

A pass edits the graph and answers whether it changed it. For ONNX Runtime the integers stay as they were, but for
rounding in the float arithmetic between them; for TensorRT they are those of FP16 arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ditc.lowering.cpu_fusions import fuse_attention, fuse_integer_products
from ditc.lowering.modulation_folding import fold_magnitudes_into_tables
from ditc.lowering.scale_forms import (
    UNSIGNED_ZERO,
    centres_as_zero_points,
    dynamic_products,
    merge_recentring,
    scales_from_input,
)
from ditc.lowering.typed_form import half_precision

__all__ = ["LOWERINGS", "lower"]

GraphPass = Callable[[ir.Model], bool]


def unsigned_activations(model: ir.Model) -> bool:
    """Quantize activations to uint8 around 128 instead of int8 around 0: the same numbers, shifted.

    ONNX Runtime's fast integer kernels on x86 take unsigned activations and signed weights. It shifts a signed pair by
    itself, but not where several layers share it, and then leaves all of them in float.
    """
    pairs = [node for node in model.graph if node.op_type == "QuantizeLinear" and _is_signed(node)]
    for quantize in pairs:
        zero = _unsigned_zero(model, f"{quantize.name}/zero_point")
        quantize.replace_input_with(2, zero)
        quantize.outputs[0].dtype = ir.DataType.UINT8
        for node in quantize.outputs[0].consumers():
            node.replace_input_with(2, zero)
    return bool(pairs)


def _is_signed(quantize: ir.Node) -> bool:
    zero = quantize.inputs[2]
    return zero is not None and zero.const_value is not None and zero.const_value.dtype == ir.DataType.INT8


def _unsigned_zero(model: ir.Model, name: str) -> ir.Value:
    tensor = ir.tensor(np.uint8(UNSIGNED_ZERO), name=name)
    value = ir.Value(name=name, shape=ir.Shape(()), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def drop_unused_constants(model: ir.Model) -> bool:
    """Forget initializers that nothing reads any more."""
    unused = [name for name, value in model.graph.initializers.items() if not value.uses()]
    for name in unused:
        model.graph.initializers.pop(name)
    return bool(unused)


LOWERINGS: dict[str, tuple[GraphPass, ...]] = {
    "onnxrt": (
        centres_as_zero_points,  # first: afterwards scales and products lie side by side
        scales_from_input,
        dynamic_products,  # now every pair that is left is a plain one
        unsigned_activations,
        fuse_integer_products,  # the fast kernel wants the unsigned form
        fuse_attention,
        drop_unused_constants,  # last: the signed zero points are unused by then
    ),
    "trt": (
        fold_magnitudes_into_tables,  # first: it looks for rows of the tables as they come in
        merge_recentring,
        half_precision,  # strongly typed networks compute in the type that the graph says
    ),
}


def lower(model: ir.Model, backend: str) -> bool:
    """Apply a backend's lowerings in place, each of them. Returns whether anything changed."""
    changed = False
    for transform in LOWERINGS.get(backend, ()):
        changed |= transform(model)
    return changed
