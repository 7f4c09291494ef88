"""Explicit Q/DQ: INT8 weights per output channel, INT8 activations per tensor, at the inputs of the linear layers only.

This is the portable artifact: symmetric, zero-point 0, constant scales, what TensorRT 10 and 11 take and what ONNX
Runtime turns into integer kernels. The bias stays a float Add after the MatMul. Q/DQ anywhere else would land where no
integer kernel takes it, and cost time for nothing. Where a scale is not the same at every step, the activation is
divided by its magnitude in front of the pair and the product multiplied behind it (`scale_binding`); where a range does
not lie about zero, its middle is taken from the activation and its product added behind (`midpoints`). Corrections of
products go into constants that are there anyway (`product_correction`).
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditc.errors import DitcError
from ditc.precision import INT8, LEVELS, WEIGHT_BITS_KEY, levels_of
from ditc.quantize.activation_pairs import (
    CENTRES,
    CORRECTS,
    DIVIDES,
    MEASURES,
    RECENTRES,
    RESTORES,
    add_constant,
    followed_by,
    marked,
    preceded_by,
)
from ditc.quantize.linears import Linear, linears_of
from ditc.quantize.product_correction import LayerCorrection
from ditc.quantize.rotated_graphs import check_rotated
from ditc.quantize.scale_binding import BINDINGS
from ditc.quantize.scale_sources import step_centre
from ditc.quantize.scale_table import ScaleTable
from ditc.quantize.scales import layers_without_scale

__all__ = ["QuantizedWeight", "insert_qdq", "quantize_weight"]


@dataclass(frozen=True)
class QuantizedWeight:
    """An INT8 weight (in, out) with one scale per output channel."""

    values: NDArray[np.int8]
    scale: NDArray[np.float32]

    def dequantized(self) -> NDArray[np.float32]:
        return self.values.astype(np.float32) * self.scale

    def column_sums(self) -> NDArray[np.float32]:
        """Return the layer's output for an input of ones, (out,)."""
        return np.asarray(self.values.sum(axis=0, dtype=np.int64).astype(np.float32) * self.scale)


def quantize_weight(weight: NDArray[np.float32], bits: int = INT8.weights) -> QuantizedWeight:
    """Symmetric per-output-channel integers of a weight (in, out); a channel of zeros gets scale 1."""
    levels = levels_of(bits)
    largest = np.abs(weight).max(axis=0)
    scale = (largest / np.float32(levels)).astype(np.float32)
    scale[scale == 0] = 1.0  # all zeros, or too small for float32 to divide by
    values = np.clip(np.round(weight / scale), -levels, levels).astype(np.int8)
    return QuantizedWeight(values, scale)


def insert_qdq(model: ir.Model, table: ScaleTable, layers: Container[str] | None = None) -> bool:
    """Quantize the linear layers of a segment in place. Returns whether anything changed.

    `layers` holds the names (`Linear.name`) of those to quantize, None is all of them.

    Layers that are quantized already are left alone, so doing it twice changes nothing. Layers that read the same
    tensor share one Q/DQ pair. Raises DitcError naming a layer that the table has no scale for, and where the segment
    is rotated otherwise than the one that scales were taken of.
    """
    check_rotated(model, table.rotation)
    linears = [linear for linear in linears_of(model) if layers is None or linear.name in layers]
    missing = layers_without_scale(table, linears)
    if missing:
        raise DitcError(f"no activation scale for {missing[0]}; calibrate on a segment that computes it")
    pairs: dict[str, _Pair] = {}
    for linear in linears:
        name = str(linear.activation.name)
        if name not in pairs:
            pairs[name] = _activation_pair(model, linear, table)
        pair = pairs[name]
        linear.node.replace_input_with(0, pair.output)
        weight = quantize_weight(linear.weight_array(), table.bits.weights)
        if table.corrections is not None:
            weight = _corrected(model, linear, weight, table.corrections[linear.path])
        linear.node.replace_input_with(1, _weight_dequantizer(model, linear, weight))
        if pair.magnitude is not None:
            followed_by(model, linear, "Mul", pair.magnitude, RESTORES)
        if pair.centre is not None:
            followed_by(model, linear, "Add", _centre_product(model, linear, pair.centre, weight), RECENTRES)
    if linears:
        _say_weight_bits(model, table.bits.weights)
    return bool(linears)


def _corrected(
    model: ir.Model, linear: Linear, weight: QuantizedWeight, correction: LayerCorrection
) -> QuantizedWeight:
    """Return the weight whose scales have the slopes, and add the shifts to the layer's bias."""
    shift, product = np.array(correction.shift, np.float32), linear.node.outputs[0]
    readers = product.consumers()
    bias = readers[0].inputs[1] if len(readers) == 1 and readers[0].op_type == "Add" else None
    if bias is None or bias.const_value is None or tuple(bias.shape or ()) != shift.shape:
        followed_by(model, linear, "Add", add_constant(model, f"{linear.name}.shift", shift), CORRECTS)
    else:
        total = np.asarray(bias.const_value.numpy() + shift)
        readers[0].replace_input_with(1, add_constant(model, f"{linear.name}.bias_corrected", total))
        if not bias.uses():
            model.graph.initializers.pop(str(bias.name))
    return QuantizedWeight(weight.values, weight.scale * np.array(correction.slope, np.float32))


def _say_weight_bits(model: ir.Model, bits: int) -> None:
    """Tell who opens the segment how many bits its weights have at most: what is exact on a machine depends on it."""
    model.metadata_props[WEIGHT_BITS_KEY] = str(max(bits, int(model.metadata_props.get(WEIGHT_BITS_KEY, 0))))


def _centre_product(model: ir.Model, linear: Linear, centre: ir.Value, weight: QuantizedWeight) -> ir.Value:
    """Return the layer's product of the middle that was taken from its input, (out,)."""
    name, sums = f"{linear.name}.input_centre_product", weight.column_sums()
    if centre.const_value is not None:
        return add_constant(model, name, np.asarray(centre.const_value.numpy() * sums))
    node = marked("Mul", linear, [add_constant(model, f"{linear.name}.weight_sums", sums), centre], MEASURES)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, ir.DataType.FLOAT, ir.Shape(sums.shape)
    model.graph.insert_before(linear.node, node)
    return node.outputs[0]


@dataclass(frozen=True)
class _Pair:
    """DQ's output, and what the activation was divided by and what was taken from it in front of Q."""

    output: ir.Value
    magnitude: ir.Value | None
    centre: ir.Value | None


def _activation_pair(model: ir.Model, linear: Linear, table: ScaleTable) -> _Pair:
    """Q and DQ in front of the layer, as the table's binding has it."""
    magnitude_of = BINDINGS[table.binding].magnitude
    magnitude, scale, activation = None, np.float32(table.scales.get(linear.path, 0)), linear.activation
    if magnitude_of is not None:
        magnitude, scale = magnitude_of(model, linear, table), np.float32(1 / LEVELS)
        activation = preceded_by(model, linear, "Div", activation, magnitude, DIVIDES)
    centre = _centre(model, linear, table, scale)
    if centre is not None:
        activation = preceded_by(model, linear, "Sub", activation, centre, CENTRES)
    if table.bits.activations < INT8.activations:
        activation = _clipped(model, linear, activation, scale * np.float32(levels_of(table.bits.activations)))
    return _Pair(_qdq(model, linear, activation, scale), magnitude, centre)


def _clipped(model: ir.Model, linear: Linear, activation: ir.Value, largest: np.float32) -> ir.Value:
    """The activation within its range: fewer levels than INT8's own are not kept by Q itself."""
    low, high = (
        add_constant(model, f"{linear.name}.input_{end}", value)
        for end, value in (("low", -largest), ("high", largest))
    )
    node = ir.node("Clip", [activation, low, high], name=f"{linear.name}/ClipInput")
    value = node.outputs[0]
    value.name, value.dtype, value.shape = f"{linear.activation.name}.clipped", ir.DataType.FLOAT, activation.shape
    return _placed(model, linear, node)


def _centre(model: ir.Model, linear: Linear, table: ScaleTable, scale: np.float32) -> ir.Value | None:
    """The middle of the layer's range, None where that is zero."""
    if linear.path not in table.midpoints:
        return None
    if BINDINGS[table.binding].by_step:
        return step_centre(model, linear, table)
    (midpoint,) = table.midpoints[linear.path]
    return add_constant(model, f"{linear.name}.input_centre", np.float32(midpoint) * scale)


def _qdq(model: ir.Model, linear: Linear, activation: ir.Value, scale: np.float32) -> ir.Value:
    """Q and DQ of an activation, with a constant scale; returns DQ's output."""
    stem = str(linear.activation.name)
    scale_value = add_constant(model, f"{linear.name}.input_scale", scale)
    zero = add_constant(model, f"{linear.name}.input_zero", np.int8(0))
    quantize = ir.node("QuantizeLinear", [activation, scale_value, zero], name=f"{linear.name}/QuantizeLinear")
    dequantize = ir.node(
        "DequantizeLinear", [quantize.outputs[0], scale_value, zero], name=f"{linear.name}/DequantizeLinear"
    )
    for node, suffix, kind in ((quantize, "q", ir.DataType.INT8), (dequantize, "dq", ir.DataType.FLOAT)):
        node.outputs[0].name, node.outputs[0].dtype = f"{stem}.{suffix}", kind
        node.outputs[0].shape = linear.activation.shape
    return _placed(model, linear, quantize, dequantize)


def _weight_dequantizer(model: ir.Model, linear: Linear, weight: QuantizedWeight) -> ir.Value:
    """The INT8 weight as a constant behind a per-channel DQ; returns DQ's output. The float weight is dropped."""
    values = add_constant(model, f"{linear.name}.weight_int8", weight.values)
    scale = add_constant(model, f"{linear.name}.weight_scale", weight.scale)
    # written out for each channel: what ONNX Runtime's switch for exact products puts in its place does not fit
    zero = add_constant(model, f"{linear.name}.weight_zero", np.zeros(len(weight.scale), np.int8))
    dequantize = ir.node(
        "DequantizeLinear",
        [values, scale, zero],
        attributes={"axis": 1},
        name=f"{linear.name}/DequantizeWeight",
    )
    dequantize.outputs[0].name, dequantize.outputs[0].dtype = f"{linear.name}.weight_dq", ir.DataType.FLOAT
    dequantize.outputs[0].shape = linear.weight.shape
    if [use.node for use in linear.weight.uses()] == [linear.node]:
        model.graph.initializers.pop(str(linear.weight.name))
    return _placed(model, linear, dequantize)


def _placed(model: ir.Model, linear: Linear, *nodes: ir.Node) -> ir.Value:
    for node in nodes:
        node.metadata_props.update(linear.node.metadata_props)
    model.graph.insert_before(linear.node, list(nodes))
    return nodes[-1].outputs[0]
