"""Sources of the numbers around a Q/DQ pair at run time: a row of the bundle's tables, or the tensor itself."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ditc.errors import DitcError
from ditc.precision import LEVELS
from ditc.quantize.activation_pairs import MEASURES, ActivationPair, add_constant, marked
from ditc.quantize.linears import Linear
from ditc.quantize.scale_table import LEAST_MAGNITUDE, ScaleTable
from ditc.tables import MIDPOINTS_INPUT, SCALES_INPUT

__all__ = ["is_of_the_step", "largest_magnitude", "split_of", "step_centre", "step_magnitude"]


def step_magnitude(model: ir.Model, linear: Linear, table: ScaleTable) -> ir.Value:
    """The current step's magnitude of a layer, (1,): one element of the segment's input."""
    split = split_of(model, SCALES_INPUT) or _cut_input(model, SCALES_INPUT, len(set(table.columns.values())))
    return split.outputs[table.columns[linear.path]]


def step_centre(model: ir.Model, linear: Linear, table: ScaleTable) -> ir.Value:
    """The middle of the current step's range over its magnitude, (1,): one element of an input over 127."""
    columns = table.midpoint_columns
    split = split_of(model, MIDPOINTS_INPUT)
    if split is None:
        split = _cut_input(model, MIDPOINTS_INPUT, len(columns))
        levels = add_constant(model, f"{MIDPOINTS_INPUT}/levels", np.float32(LEVELS))
        centres = ir.node("Div", [split.inputs[0], levels], name=f"{MIDPOINTS_INPUT}/Div")
        value = centres.outputs[0]
        value.name, value.dtype, value.shape = f"{MIDPOINTS_INPUT}.centres", ir.DataType.FLOAT, ir.Shape([len(columns)])
        model.graph.insert_before(split, centres)
        split.replace_input_with(0, value)
    return split.outputs[columns.index(table.columns[linear.path])]


def split_of(model: ir.Model, name: str) -> ir.Node | None:
    """The node that cuts an input of the step into one value per column."""
    return next((node for node in model.graph if node.name == f"{name}/Split"), None)


def is_of_the_step(pair: ActivationPair) -> bool:
    """Is the pair behind a division by what the segment reads at each step?"""
    split = None if pair.magnitude is None else pair.magnitude.producer()
    return split is not None and split.name == f"{SCALES_INPUT}/Split"


def _cut_input(model: ir.Model, name: str, width: int) -> ir.Node:
    """A new input of the segment, and the node that cuts it into one value per column."""
    if any(value.name == name for value in model.graph.inputs):
        raise DitcError(f"the model has a table named {name!r}, which is an input of quantized segments; rename it")
    row = ir.Value(name=name, shape=ir.Shape([width]), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.inputs.append(row)
    attributes = {"axis": 0, "num_outputs": width}
    node = ir.node("Split", [row], attributes=attributes, num_outputs=width, name=f"{name}/Split")
    for column, value in enumerate(node.outputs):
        value.name, value.dtype, value.shape = f"{name}.{column}", ir.DataType.FLOAT, ir.Shape([1])
    model.graph.insert_before(model.graph[0], node)
    return node


def largest_magnitude(model: ir.Model, linear: Linear, table: ScaleTable) -> ir.Value:
    """The largest |x| of what a layer reads, (1, ..., 1): over the whole tensor, all rows of the batch together."""
    activation = linear.activation
    assert activation.shape is not None
    floor = add_constant(model, f"{linear.name}.input_floor", np.float32(LEAST_MAGNITUDE))
    size = marked("Abs", linear, [activation], MEASURES)
    largest = marked("ReduceMax", linear, [size.outputs[0]], MEASURES)
    bounded = marked("Max", linear, [largest.outputs[0], floor], MEASURES)
    scalar = ir.Shape([1] * len(activation.shape))
    for node, name, shape in (
        (size, "size", activation.shape),
        (largest, "largest", scalar),
        (bounded, "magnitude", scalar),
    ):
        value = node.outputs[0]
        value.name, value.dtype, value.shape = f"{activation.name}.{name}", ir.DataType.FLOAT, shape
    model.graph.insert_before(linear.node, [size, largest, bounded])
    return bounded.outputs[0]
