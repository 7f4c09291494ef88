"""Following elements through operators that move them: what is said of them is what ONNX Runtime does with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from ditc.quantize.element_places import MOVES, moved_from, origin_of, readings, row_shape

X, OUT = "float[batch, 4, 6] x", "float[a, b, c] out"


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


MOVED = {
    "Gather": ("out = Gather<axis = 1>(x, i)", {"i": ints(2, 0)}),
    "Identity": ("out = Identity(x)", {}),
    "Reshape": ("out = Reshape(x, s)", {"s": ints(0, -1, 3)}),
    "Slice": ("out = Slice(x, s, e, i, k)", {"s": ints(1, 5), "e": ints(3, -9), "i": ints(1, 2), "k": ints(1, -2)}),
    "Split": ("other, out = Split<axis = 2, num_outputs = 2>(x)", {}),
    "Squeeze": ("y = Reshape(x, s) out = Squeeze(y, i)", {"s": ints(-1, 1, 4, 6), "i": ints(1)}),
    "Transpose": ("out = Transpose<perm = [0, 2, 1]>(x)", {}),
    "Unsqueeze": ("y = Unsqueeze(x, i) out = Reshape(y, s)", {"i": ints(1), "s": ints(-1, 4, 6)}),
    "an uneven split": ("other, out = Split<axis = -1>(x, s)", {"s": ints(1, 5)}),
    "heads": (
        "y = Reshape(x, s) z = Transpose<perm = [0, 2, 1, 3]>(y) v = Gather<axis = 1>(z, i) out = Squeeze(v, i)",
        {"s": ints(-1, 4, 3, 2), "i": ints(1)},
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_places_are_where_onnx_runtime_puts_the_elements(
    name: str, make_graph: Callable[..., ir.Model], run_model: Callable[..., dict[str, np.ndarray]]
) -> None:
    body, constants = MOVED[name]
    model = make_graph(X, OUT, body, **constants)
    places = moved_from(model.graph.inputs[0])[model.graph.outputs[0]]
    moved = run_model(model, {"x": np.arange(24, dtype=np.float32).reshape(1, 4, 6)})
    np.testing.assert_array_equal(places, moved["out"])


def test_every_move_is_held_to_onnx_runtime() -> None:
    assert set(MOVES) <= set(MOVED)


def test_what_computes_is_not_followed(make_graph: Callable[..., ir.Model]) -> None:
    model = make_graph(X, OUT, "y = Identity(x) z = Relu(y) out = Identity(z)")
    moved = moved_from(model.graph.inputs[0])
    assert {value.name for value in moved} == {"x", "y"}
    assert [(reading.node.op_type, reading.place) for reading in readings(moved) if reading.node] == [("Relu", 0)]
    assert origin_of(model.graph.outputs[0]).name == "z"


@pytest.mark.parametrize(
    ("body", "constants", "readers"),
    [
        ("out = Reshape(x, s)", {"s": ints(7, 2, -1)}, {"Reshape"}),  # fits no batch of one
        ("s = Shape(x) out = Reshape(x, s)", {}, {"Shape", "Reshape"}),  # known at run time only
    ],
)
def test_a_move_that_is_not_known_is_a_reader(
    make_graph: Callable[..., ir.Model], body: str, constants: dict[str, np.ndarray], readers: set[str]
) -> None:
    moved = moved_from(make_graph(X, OUT, body, **constants).graph.inputs[0])
    assert [value.name for value in moved] == ["x"]
    assert {reading.node.op_type for reading in readings(moved) if reading.node} == readers


def test_an_element_that_leaves_the_graph_is_read(make_graph: Callable[..., ir.Model]) -> None:
    model = make_graph(X, OUT, "out = Identity(x)")
    assert [reading.node for reading in readings(moved_from(model.graph.inputs[0]))] == [None]


def test_more_than_one_open_dimension_is_not_followed() -> None:
    value = ir.Value(name="v", shape=ir.Shape(["batch", "tokens", 3]))
    assert row_shape(value) is None
    assert moved_from(value) == {}
