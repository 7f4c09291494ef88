"""The strongly typed form for TensorRT: FP16 compute, INT8 linear layers behind FP16 scales, normalization in FP32.

Since TensorRT 11 a network's precision is what its ONNX says, and 10 accepts the same, so one typed graph serves both.
Sample and prediction stay FP32 for the sampler, and so do per-step numbers; tables and cached outputs are FP16 at the
border. Normalization and its parts run in FP32 islands between casts, because FP16 overflows there (TensorRT #2564,
#2781, #3692, #4493).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ditc.program import AHEAD, OF_STEP, REUSE_ROWS
from ditc.tables import MIDPOINTS_INPUT, SCALES_INPUT

__all__ = ["FP32_OPERATORS", "FULL_PRECISION_PORTS", "half_precision"]

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
FP32_OPERATORS = frozenset(
    {
        *("GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"),
        *("Pow", "ReduceMean", "Sqrt", "Reciprocal"),  # the parts of a normalization written out
    }
)
FULL_PRECISION_PORTS = frozenset({"x", "out", "latent", "image", SCALES_INPUT, MIDPOINTS_INPUT, REUSE_ROWS})
SAMPLES = frozenset({"x", "latent"})  # every segment but `condition` takes one of them
FLOAT_OPERANDS = {"Resize": (1, 2)}  # inputs of an operator that are FP32 whatever it works on
LEAST_SCALE = 2.0**-14  # the smallest FP16 number with full precision


def half_precision(model: ir.Model) -> bool:
    """Type a segment as FP16 in place. Returns whether anything changed.

    The conditioning runs once per request and stays FP32 inside; its tables leave it as FP16.
    """
    if any(HALF in (value.dtype for value in node.outputs) for node in model.graph):
        return False
    if not SAMPLES & {value.name for value in model.graph.inputs}:  # `condition`
        for place, value in enumerate(list(model.graph.outputs)):
            _cast_before_output(model, place, value, HALF)
        return True
    _requantize_small_scales(model)
    graph = model.graph
    original = list(graph)
    for value in [*graph.initializers.values()]:
        _halve_constant(model, value)
    for value in graph.inputs:
        if value.dtype == FLOAT and _stays_float(str(value.name)):
            _cast_after_input(model, value)
        elif value.dtype == FLOAT:
            value.dtype = HALF
    for node in original:
        for output in node.outputs:
            if output.dtype == FLOAT:
                output.dtype = HALF
        if node.op_type in FP32_OPERATORS:
            _make_island(model, node)
    for place, value in enumerate(list(graph.outputs)):
        if value.dtype == HALF and value.name in FULL_PRECISION_PORTS:
            _cast_before_output(model, place, value, FLOAT)
    return True


def _stays_float(port: str) -> bool:
    """Is this an input of full precision: a sample, or a row of a bundle's tables?"""
    return port in FULL_PRECISION_PORTS or port.removeprefix(f"{AHEAD}.").startswith(OF_STEP)


def _requantize_small_scales(model: ir.Model) -> None:
    """Raise weight scales that FP16 holds with few bits or none, and lower their integers to match."""
    for node in model.graph:
        if node.op_type != "DequantizeLinear" or not node.inputs[0] or node.inputs[0].const_value is None:
            continue
        scale_value = node.inputs[1]
        assert scale_value is not None
        assert scale_value.const_value is not None
        scale = scale_value.const_value.numpy().astype(np.float64)
        raised = np.maximum(scale, LEAST_SCALE).astype(np.float16).astype(np.float64)
        if (scale >= LEAST_SCALE).all():
            continue
        integers = node.inputs[0].const_value.numpy().astype(np.float64)
        lowered = np.clip(np.round(integers * (scale / raised)), -127, 127).astype(np.int8)
        columns = scale < LEAST_SCALE
        adjusted = np.where(columns, lowered, integers.astype(np.int8))
        node.inputs[0].const_value = ir.tensor(adjusted, name=node.inputs[0].name)
        scale_value.const_value = ir.tensor(raised.astype(np.float32), name=scale_value.name)


def _halve_constant(model: ir.Model, value: ir.Value) -> None:
    """Make a float constant FP16, unless every reader is an FP32 island, or takes it in FP32 all the same."""
    readers = {use.node.op_type for use in value.uses()}
    if value.dtype != FLOAT or value.const_value is None or (readers and readers <= FP32_OPERATORS):
        return
    if any(use.idx in FLOAT_OPERANDS.get(use.node.op_type, ()) for use in value.uses()):
        return
    with np.errstate(over="ignore"):
        array = value.const_value.numpy().astype(np.float16)
    value.const_value = ir.tensor(np.clip(array, -65504, 65504), name=value.name)
    value.dtype = HALF


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(to)}, name=name)
    node.outputs[0].name = name
    node.outputs[0].dtype = to
    node.outputs[0].shape = value.shape
    return node


def _cast_after_input(model: ir.Model, value: ir.Value) -> None:
    uses = list(value.uses())
    node = _cast(value, HALF, f"{value.name}.half")
    for use in uses:
        use.node.replace_input_with(use.idx, node.outputs[0])
    model.graph.insert_before(model.graph[0], node)


def _make_island(model: ir.Model, node: ir.Node) -> None:
    """Cast to FP32 in front of an operator and back behind it; neighbouring islands stay joined."""
    for place, value in enumerate(node.inputs):
        if value is None or value.dtype != HALF:
            continue
        before = value.producer()
        if before is not None and before.op_type == "Cast" and before.inputs[0] and before.inputs[0].dtype == FLOAT:
            node.replace_input_with(place, before.inputs[0])  # it was FP32 a moment ago
            continue
        cast = _cast(value, FLOAT, f"{value.name}.float.{node.name}")
        node.replace_input_with(place, cast.outputs[0])
        model.graph.insert_before(node, cast)
    for output in node.outputs:
        if output.dtype != HALF:
            continue
        uses = list(output.uses())
        output.dtype = FLOAT
        cast = _cast(output, HALF, f"{output.name}.half")
        for use in uses:
            use.node.replace_input_with(use.idx, cast.outputs[0])
        model.graph.insert_after(node, cast)


def _cast_before_output(model: ir.Model, place: int, value: ir.Value, to: ir.DataType) -> None:
    name = str(value.name)
    value.name = f"{name}.inside"
    cast = _cast(value, to, name)
    model.graph.append(cast)
    model.graph.outputs[place] = cast.outputs[0]
