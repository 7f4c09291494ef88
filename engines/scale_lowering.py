"""Passes that give one backend the form of per-step scales that costs it least.

What they find is what `magnitudes` put there: u = x / s in front of a Q/DQ pair, y = s (W u) behind the product.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ditc.engines.magnitudes import ScaledPair, add_constant, bypass, is_step_split, scaled_pairs
from ditc.engines.ranges import LEVELS
from ditc.engines.scale_table import SCALES_INPUT

__all__ = ["fold_magnitudes_into_tables", "scales_from_input"]


def scales_from_input(model: ir.Model) -> bool:
    """Let Q and DQ take the step's scale itself, instead of dividing before and multiplying behind them.

    ONNX Runtime fuses such a pair into the same integer kernel as one with a constant scale.
    """
    pairs = [pair for pair in scaled_pairs(model) if is_step_split(pair.magnitude.producer())]
    for pair in pairs:
        for node in (pair.quantize, pair.dequantize):
            node.replace_input_with(1, pair.magnitude)
        for _, restore in pair.products:
            bypass(model, restore)
        _drop_division(model, pair)
    if pairs:
        _divide_by_levels(model)
    return bool(pairs)


def _divide_by_levels(model: ir.Model) -> None:
    """Magnitudes to scales, all columns at once."""
    split = next(node for node in model.graph if is_step_split(node))
    levels = add_constant(model, f"{SCALES_INPUT}/levels", np.float32(LEVELS))
    scales = _node("Div", [split.inputs[0], levels], f"{SCALES_INPUT}/Div", ir.DataType.FLOAT)
    model.graph.insert_before(split, scales)
    split.replace_input_with(0, scales.outputs[0])


def fold_magnitudes_into_tables(model: ir.Model) -> bool:
    """Divide the rows of a modulation table instead of what they modulate: (n a + b) / s = n (a / s) + b / s.

    Works where an activation is a product and a sum with rows that a Split cuts from a table of the step, and nothing
    else reads those rows: adaLN in front of qkv and fc1. The rows of a table are divided together, so it costs one
    pass over the table instead of one over the tokens for every layer. Other divisions stay where they are.
    """
    columns: dict[ir.Node, dict[int, int]] = {}  # the Split of a table -> output -> column of the scales
    for pair in scaled_pairs(model):
        rows = _modulating_rows(pair.divide, pair.activation)
        if not rows or not is_step_split(pair.magnitude.producer()):
            continue
        for split, output in rows:
            columns.setdefault(split, {})[output] = _place(pair.magnitude)
        activation, name = pair.activation, pair.divide.outputs[0].name
        _drop_division(model, pair)
        activation.name = name  # it is the divided one now, as in the portable form
    for split, column_of in columns.items():
        _divide_table(model, split, column_of)
    return bool(columns)


def _modulating_rows(reader: ir.Node, activation: ir.Value) -> list[tuple[ir.Node, int]]:
    """(Split, output) of the scale and the shift of an activation that is n a + b; empty where it is none."""
    add = _only_reader_is(activation, reader, "Add")
    if add is None:
        return []
    for product, shift in (add.inputs, add.inputs[::-1]):
        mul = None if product is None else _only_reader_is(product, add, "Mul")
        scales = [] if mul is None else [value for value in mul.inputs if _is_own_row(value)]
        if len(scales) == 1 and _is_own_row(shift):
            return [_cut(scales[0]), _cut(shift)]
    return []


def _only_reader_is(value: ir.Value, reader: ir.Node, kind: str) -> ir.Node | None:
    """The node that makes a value, if it is of a kind and nothing but `reader` takes the value."""
    node = value.producer()
    private = tuple(value.consumers()) == (reader,) and not value.is_graph_output()
    return node if private and node is not None and node.op_type == kind else None


def _is_own_row(value: ir.Value | None) -> bool:
    """Is this a part of a table of the step, along an axis behind the batch, that has one reader?"""
    split = None if value is None else value.producer()
    if value is None or split is None or split.op_type != "Split" or len(value.uses()) != 1:
        return False
    table = split.inputs[0]
    return (
        table is not None
        and table.is_graph_input()
        and table.shape is not None
        and _axis(split) > 0
        and isinstance(table.shape[_axis(split)], int)
    )


def _cut(value: ir.Value | None) -> tuple[ir.Node, int]:
    assert value is not None
    split = value.producer()
    assert split is not None
    return split, _place(value)


def _place(value: ir.Value) -> int:
    """Which output of its node a value is."""
    place = value.index()
    assert place is not None
    return place


def _axis(split: ir.Node) -> int:
    table = split.inputs[0]
    assert table is not None
    assert table.shape is not None
    axis = split.attributes["axis"].as_int() if "axis" in split.attributes else 0
    return axis % len(table.shape)


def _divide_table(model: ir.Model, split: ir.Node, column_of: dict[int, int]) -> None:
    """Divide the rows of a table by their magnitudes in front of its Split; rows that have none by 1."""
    table, axis = split.inputs[0], _axis(split)
    assert table is not None
    assert table.shape is not None
    scales = next(value for value in model.graph.inputs if value.name == SCALES_INPUT)
    assert scales.shape is not None
    (width,), rank = scales.shape.numpy(), len(table.shape)
    lengths = np.array([value.shape[axis] for value in split.outputs if value.shape is not None], np.int64)
    places = np.repeat([column_of.get(output, width) for output in range(len(lengths))], lengths)
    stem, kind = f"{table.name}/magnitudes", ir.DataType.FLOAT
    one = add_constant(model, f"{stem}.one", np.ones(1, np.float32))
    row_places = add_constant(model, f"{stem}.places", places.astype(np.int64))
    row_shape = add_constant(model, f"{stem}.shape", np.array([-1] + [1] * (rank - axis - 1), np.int64))
    padded = _node("Concat", [scales, one], f"{stem}/Concat", kind, axis=0)
    rows = _node("Gather", [padded.outputs[0], row_places], f"{stem}/Gather", kind, axis=0)
    factors = _node("Reshape", [rows.outputs[0], row_shape], f"{stem}/Reshape", kind)
    divided = _node("Div", [table, factors.outputs[0]], f"{stem}/Div", kind)
    padded.outputs[0].shape = ir.Shape([width + 1])
    rows.outputs[0].shape = ir.Shape([len(places)])
    factors.outputs[0].shape = ir.Shape([len(places)] + [1] * (rank - axis - 1))
    divided.outputs[0].shape = table.shape
    model.graph.insert_before(split, [padded, rows, factors, divided])
    split.replace_input_with(0, divided.outputs[0])


def _drop_division(model: ir.Model, pair: ScaledPair) -> None:
    pair.quantize.replace_input_with(0, pair.activation)
    model.graph.remove(pair.divide, safe=True)


def _node(kind: str, inputs: list[ir.Value | None], name: str, dtype: ir.DataType, **attributes: int) -> ir.Node:
    node = ir.node(kind, inputs, attributes=attributes, name=name)
    node.outputs[0].name, node.outputs[0].dtype = f"{name}.out", dtype
    return node
