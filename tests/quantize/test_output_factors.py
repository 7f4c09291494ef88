"""Multiplying an output by constants: as a product behind it would, but without it where the algebra allows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ditc.quantize.output_factors import multiply_output

C, TABLE, ROWS = "float[steps, batch, 3] c", "float[steps, batch, 4] out", "float[steps, batch, 2, 3] out"
RNG = np.random.default_rng(0)
CONSTANTS = {
    "w": RNG.standard_normal((3, 4)).astype(np.float32),
    "v": RNG.standard_normal((3, 2)).astype(np.float32),
    "b": RNG.standard_normal(4).astype(np.float32),
    "one": np.float32([0, 1, 0, 1]),
    "s": np.array([0, 0, 2, 3], np.int64),
}
FOLDED = {
    "as DiT makes its table": (
        ROWS,
        "m = MatMul(c, w) n = Add(m, b) o = Add(n, one) p = MatMul(c, v) k = Concat<axis = -1>(o, p) "
        "out = Reshape(k, s)",
    ),
    "a constant with two readers": (TABLE, "m = MatMul(c, w) n = Add(m, b) out = Add(n, b)"),
    "the constant on the left": (TABLE, "m = MatMul(c, w) out = Add(b, m)"),
}
MULTIPLIED = {
    "a nonlinearity": (TABLE, "m = MatMul(c, w) out = Sigmoid(m)", 1),
    "one summand is nonlinear": (TABLE, "m = MatMul(c, w) q = Sigmoid(m) n = MatMul(c, w) out = Add(q, n)", 1),
    "a value with another reader": (
        TABLE,
        "m = MatMul(c, w) q = Add(m, b) r = Sigmoid(m) t = Add(q, r) out = Add(t, b)",
        2,
    ),
    "a concatenation along batch": (TABLE, "m = MatMul(c, w) n = MatMul(c, w) out = Concat<axis = 1>(m, n)", 1),
    "a summand of another shape": (
        TABLE,
        "m = MatMul(c, w) i = ReduceMax<keepdims = 1>(c) out = Add(m, i)",
        1,
    ),
}


def changed(make_graph: Callable[..., ir.Model], outputs: str, body: str) -> tuple[ir.Model, ir.Model, np.ndarray]:
    """The graph, its copy with the output multiplied, and the factor."""
    names = [name for name in CONSTANTS if f"{name})" in body or f", {name}" in body or f"({name}," in body]
    before, after = (make_graph(C, outputs, body, **{name: CONSTANTS[name] for name in names}) for _ in range(2))
    shape = (2, 3) if outputs == ROWS else (4,)
    factor = np.random.default_rng(1).uniform(0.5, 2, shape)
    multiply_output(after, "out", factor)
    return before, after, factor


def assert_multiplied(
    run_model: Callable[..., dict[str, np.ndarray]], before: ir.Model, after: ir.Model, factor: np.ndarray
) -> None:
    onnx.shape_inference.infer_shapes(ir.to_proto(after), strict_mode=True)  # raises for shapes that do not fit
    feeds = {"c": np.random.default_rng(2).standard_normal((5, 2, 3)).astype(np.float32)}
    expected = run_model(before, feeds)["out"] * factor
    np.testing.assert_allclose(run_model(after, feeds)["out"], expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", FOLDED)
def test_a_factor_vanishes_into_constants(
    name: str, make_graph: Callable[..., ir.Model], run_model: Callable[..., dict[str, np.ndarray]]
) -> None:
    before, after, factor = changed(make_graph, *FOLDED[name])
    assert [node.op_type for node in after.graph] == [node.op_type for node in before.graph]
    assert_multiplied(run_model, before, after, factor)


@pytest.mark.parametrize("name", MULTIPLIED)
def test_where_it_can_not_vanish_it_is_multiplied(
    name: str, make_graph: Callable[..., ir.Model], run_model: Callable[..., dict[str, np.ndarray]]
) -> None:
    outputs, body, products = MULTIPLIED[name]
    before, after, factor = changed(make_graph, outputs, body)
    assert sum(node.op_type == "Mul" for node in after.graph) == products
    assert_multiplied(run_model, before, after, factor)


def test_an_output_that_is_read_inside_keeps_its_value_there(
    make_graph: Callable[..., ir.Model], run_model: Callable[..., dict[str, np.ndarray]]
) -> None:
    outputs = f"{TABLE}, float[steps, batch, 4] other"
    before, after = (make_graph(C, outputs, "out = MatMul(c, w) other = Sigmoid(out)", w=CONSTANTS["w"]) for _ in "ab")
    multiply_output(after, "out", np.full(4, 3.0))
    feeds = {"c": np.ones((1, 1, 3), np.float32)}
    expected, actual = run_model(before, feeds), run_model(after, feeds)
    np.testing.assert_array_equal(actual["other"], expected["other"])
    np.testing.assert_allclose(actual["out"], 3 * expected["out"], rtol=1e-6)
