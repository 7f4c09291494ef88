"""Per-step scales without an operator on the tokens: their magnitudes divide the modulation in front of a layer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ditc.program import OF_STEP
from ditc.quantize.activation_pairs import activation_pairs, add_constant, bypass, new_node
from ditc.quantize.scale_sources import is_of_the_step
from ditc.tables import SCALES_INPUT

__all__ = ["OVER_MAGNITUDE", "fold_magnitudes_into_tables"]

OVER_MAGNITUDE = "over_magnitude"  # in the name of every tensor that the portable form does not have


def fold_magnitudes_into_tables(model: ir.Model) -> bool:
    """Divide the rows of a modulation table instead of what they modulate: (n a + b) / s = n (a / s) + b / s.

    Works where an activation is a product and a sum with rows that a Split cuts from a table of the step, and nothing
    else reads those rows: adaLN in front of qkv and fc1. The rows of a table are divided together, so it costs one
    pass over the table instead of one over the tokens for every layer. Other divisions stay where they are.
    """
    columns: dict[ir.Node, dict[int, int]] = {}  # the Split of a table -> output -> column of the scales
    for pair in filter(is_of_the_step, activation_pairs(model)):
        modulation = _modulation(pair.divide)
        if modulation is None or pair.divide is None:
            continue
        for row in (modulation.scale, modulation.shift):
            columns.setdefault(_split_of(row), {})[_place(row)] = _place(pair.magnitude)
        bypass(model, pair.divide)  # the activation takes its name: it is the divided one now
        layer = pair.quantize.name.split("/")[0] if pair.quantize.name else ""
        for part, value in modulation._asdict().items():  # no tensor of the portable form is another one here
            value.name = f"{layer}/{part}_{OVER_MAGNITUDE}"
    for split, column_of in columns.items():
        _divide_table(model, split, column_of)
    return bool(columns)


class _Modulation(NamedTuple):
    """n a + b, with a and b rows of a table."""

    scale: ir.Value
    shift: ir.Value
    product: ir.Value


def _modulation(reader: ir.Node | None) -> _Modulation | None:
    """Return the modulation that makes the activation of a node, where nothing else reads its parts."""
    activation = None if reader is None else reader.inputs[0]
    add = None if activation is None or reader is None else _only_reader_is(activation, reader, "Add")
    if add is None:
        return None
    for product, shift in (add.inputs, add.inputs[::-1]):
        mul = None if product is None else _only_reader_is(product, add, "Mul")
        scales = [] if mul is None else [value for value in mul.inputs if value is not None and _is_own_row(value)]
        if product is not None and shift is not None and len(scales) == 1 and _is_own_row(shift):
            return _Modulation(scales[0], shift, product)
    return None


def _only_reader_is(value: ir.Value, reader: ir.Node, kind: str) -> ir.Node | None:
    """The node that makes a value, if it is of a kind and nothing but `reader` takes the value."""
    node = value.producer()
    private = tuple(value.consumers()) == (reader,) and not value.is_graph_output()
    return node if private and node is not None and node.op_type == kind else None


def _is_own_row(value: ir.Value) -> bool:
    """Is this a part of a table of the step, along an axis behind the batch if it has one, that has one reader?"""
    split = value.producer()
    if split is None or split.op_type != "Split" or len(value.uses()) != 1:
        return False
    table = split.inputs[0]
    return (
        table is not None
        and table.is_graph_input()
        and table.shape is not None
        and (_axis(split) > 0 or str(table.name).startswith(OF_STEP))
        and isinstance(table.shape[_axis(split)], int)
    )


def _split_of(row: ir.Value) -> ir.Node:
    split = row.producer()
    assert split is not None
    return split


def _place(value: ir.Value | None) -> int:
    """Return a value's number among its node's outputs."""
    assert value is not None
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
    stem, kind = f"{table.name}/{OVER_MAGNITUDE}", ir.DataType.FLOAT
    unit = add_constant(model, f"{stem}.one", np.ones(1, np.float32))
    row_places = add_constant(model, f"{stem}.places", places.astype(np.int64))
    row_shape = add_constant(model, f"{stem}.shape", np.array([-1] + [1] * (rank - axis - 1), np.int64))
    padded = new_node("Concat", [scales, unit], f"{stem}/Concat", kind, axis=0)
    rows = new_node("Gather", [padded.outputs[0], row_places], f"{stem}/Gather", kind, axis=0)
    factors = new_node("Reshape", [rows.outputs[0], row_shape], f"{stem}/Reshape", kind)
    divided = new_node("Div", [table, factors.outputs[0]], f"{stem}/Div", kind)
    padded.outputs[0].shape = ir.Shape([width + 1])
    rows.outputs[0].shape = ir.Shape([len(places)])
    factors.outputs[0].shape = ir.Shape([len(places)] + [1] * (rank - axis - 1))
    divided.outputs[0].shape = table.shape
    model.graph.insert_before(split, [padded, rows, factors, divided])
    split.replace_input_with(0, divided.outputs[0])
