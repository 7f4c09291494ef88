"""Passes that give one backend the form of scales and midpoints that costs it least.

What they find is what `activation_pairs` describes: u = x / s in front of a Q/DQ pair and y = s (W u) behind the
product, with a middle taken off and added again where a range does not lie about zero.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ditc.precision import LEVELS
from ditc.quantize.activation_pairs import activation_pairs, add_constant, bypass, new_node
from ditc.quantize.scale_sources import is_of_the_step, split_of
from ditc.tables import MIDPOINTS_INPUT, SCALES_INPUT

__all__ = ["centres_as_zero_points", "dynamic_products", "merge_recentring", "scales_from_input"]

UNSIGNED_ZERO = 128  # int8 -128..127 becomes uint8 0..255


def centres_as_zero_points(model: ir.Model) -> bool:
    """Let the zero point of an unsigned pair take the middle off, instead of operators before and behind it.

    The middle is a whole number of steps, so the integers stay what they were, and the kernel gives the product of the
    activation itself.
    """
    pairs = [pair for pair in activation_pairs(model) if pair.centre is not None]
    for pair in pairs:
        assert pair.centre is not None
        zero = _zero_point(model, pair.quantize, pair.centre.inputs[1])
        for node in (pair.quantize, pair.dequantize):
            node.replace_input_with(2, zero)
        pair.quantize.outputs[0].dtype = ir.DataType.UINT8
        for node in pair.recentres:
            bypass(model, node)
        _step_over(model, pair.centre)
    split = split_of(model, MIDPOINTS_INPUT)
    if pairs and split is not None:
        _cut_zero_points(model, split)
    if pairs:
        RemoveUnusedNodesPass()(model)
    return bool(pairs)


def _zero_point(model: ir.Model, quantize: ir.Node, centre: ir.Value | None) -> ir.Value | None:
    """The zero point of a middle: a constant, or the value itself where the step decides it."""
    scale = quantize.inputs[1]
    if centre is None or centre.const_value is None or scale is None or scale.const_value is None:
        return centre
    steps = round(float(centre.const_value.numpy()) / float(scale.const_value.numpy()))
    return add_constant(model, f"{quantize.name}/zero_point", np.uint8(UNSIGNED_ZERO - steps))


def _cut_zero_points(model: ir.Model, split: ir.Node) -> None:
    """Let the node that cut midpoints cut zero points: 128 - midpoint, as uint8."""
    row = next(value for value in model.graph.inputs if value.name == MIDPOINTS_INPUT)
    unsigned = add_constant(model, f"{MIDPOINTS_INPUT}/unsigned", np.float32(UNSIGNED_ZERO))
    shifted = new_node("Sub", [unsigned, row], f"{MIDPOINTS_INPUT}/Sub", ir.DataType.FLOAT)
    kind = ir.DataType.UINT8
    zeros = new_node("Cast", [shifted.outputs[0]], f"{MIDPOINTS_INPUT}/Cast", kind, to=int(kind))
    model.graph.insert_before(split, [shifted, zeros])
    split.replace_input_with(0, zeros.outputs[0])
    for value in split.outputs:
        value.dtype = kind


def merge_recentring(model: ir.Model) -> bool:
    """Add the product of the middle and the bias as one constant, where nothing is between them."""
    changed = False
    for node in [node for pair in activation_pairs(model) for node in pair.recentres]:
        readers = node.outputs[0].consumers()
        bias = readers[0].inputs[1] if len(readers) == 1 and readers[0].op_type == "Add" else None
        product = node.inputs[1]
        if bias is None or bias.const_value is None or product is None or product.const_value is None:
            continue
        total = np.asarray(bias.const_value.numpy() + product.const_value.numpy())
        readers[0].replace_input_with(1, add_constant(model, f"{product.name}.bias", total))
        _step_over(model, node)
        changed = True
    return changed


def dynamic_products(model: ir.Model) -> bool:
    """Quantize by DynamicQuantizeLinear, which measures and rounds in one operator, in front of integer products.

    It is per tensor as well, but unsigned between the least and the largest value: finer where an activation does not
    lie about zero. ONNX Runtime makes one DynamicQuantizeMatMul of it where a single layer reads the activation.
    """
    pairs = [pair for pair in activation_pairs(model) if pair.divide is not None and not is_of_the_step(pair)]
    for pair in pairs:
        assert pair.divide is not None
        activation = pair.divide.inputs[0]
        node = ir.node("DynamicQuantizeLinear", [activation], num_outputs=3, name=f"{pair.quantize.name}Dynamic")
        for value, part, kind in zip(node.outputs, ("q", "scale", "zero"), DYNAMIC_TYPES, strict=True):
            value.name, value.dtype = f"{pair.quantize.outputs[0].name}.{part}", kind
        model.graph.insert_before(pair.quantize, node)
        for product, restore in zip(pair.products, pair.restores, strict=True):
            _multiply_integers(model, node, product, restore)
    if pairs:
        RemoveUnusedNodesPass()(model)
    return bool(pairs)


DYNAMIC_TYPES = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)


def _multiply_integers(model: ir.Model, quantize: ir.Node, product: ir.Node, restore: ir.Node) -> None:
    """Put an integer product in the place of a float one and the Mul behind it, in operators that get fused."""
    values, scale, zero = quantize.outputs
    weight = _producer(product.inputs[1])
    integers = ir.node("MatMulInteger", [values, weight.inputs[0], zero], name=f"{restore.name}/MatMulInteger")
    floats = ir.node("Cast", [integers.outputs[0]], attributes={"to": int(ir.DataType.FLOAT)})
    step = ir.node("Mul", [scale, weight.inputs[1]])
    result = ir.node("Mul", [floats.outputs[0], step.outputs[0]], name=restore.name)
    out = restore.outputs[0]
    for node, name in ((integers, "integers"), (floats, "floats"), (step, "step"), (result, "product")):
        node.metadata_props.update(product.metadata_props)
        node.outputs[0].name, node.outputs[0].dtype = f"{out.name}.{name}", ir.DataType.FLOAT
    integers.outputs[0].dtype = ir.DataType.INT32
    model.graph.insert_before(restore, [integers, floats, step, result])
    out.replace_all_uses_with(result.outputs[0], replace_graph_outputs=True)
    result.outputs[0].shape = out.shape
    result.outputs[0].name, out.name = out.name, f"{out.name}.replaced"


def _producer(value: ir.Value | None) -> ir.Node:
    node = None if value is None else value.producer()
    assert node is not None
    return node


def scales_from_input(model: ir.Model) -> bool:
    """Let Q and DQ take the step's scale itself, instead of dividing before and multiplying behind them.

    ONNX Runtime fuses such a pair into the same integer kernel as one with a constant scale.
    """
    pairs = [pair for pair in activation_pairs(model) if is_of_the_step(pair)]
    for pair in pairs:
        for node in (pair.quantize, pair.dequantize):
            node.replace_input_with(1, pair.magnitude)
        for restore in pair.restores:
            bypass(model, restore)
        _step_over(model, pair.divide)
    if pairs:
        _divide_by_levels(model)
    return bool(pairs)


def _divide_by_levels(model: ir.Model) -> None:
    """Make scales of magnitudes, all columns at once."""
    split = split_of(model, SCALES_INPUT)
    assert split is not None
    levels = add_constant(model, f"{SCALES_INPUT}/levels", np.float32(LEVELS))
    scales = new_node("Div", [split.inputs[0], levels], f"{SCALES_INPUT}/Div", ir.DataType.FLOAT)
    model.graph.insert_before(split, scales)
    split.replace_input_with(0, scales.outputs[0])


def _step_over(model: ir.Model, node: ir.Node | None) -> None:
    """Let what reads a node read its first input instead, and remove it."""
    assert node is not None
    before = node.inputs[0]
    assert before is not None
    node.outputs[0].replace_all_uses_with(before)
    model.graph.remove(node, safe=True)
