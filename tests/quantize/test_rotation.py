"""Rotation in groups of channels: the matrices, and that a graph computes the same with and without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from ditc.errors import DitcError, InputError
from ditc.lowering.typed_form import half_precision
from ditc.program import BRANCH_KEY, PATH_KEY
from ditc.quantize.linears import linear_count, linears_of
from ditc.quantize.qdq import insert_qdq, quantize_weight
from ditc.quantize.rotated_graphs import check_groups, foldable_layers, rotate
from ditc.quantize.rotation import Rotation, columns_turned, hadamard, inverse, rows_turned
from ditc.quantize.scale_table import ScaleTable
from tests.quantize.test_fold_sites import DIM, HEADS, PROJ, TOKENS, attention

Make = Callable[..., ir.Model]
Run = Callable[..., dict[str, np.ndarray]]

SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
WIDTH = DIM // HEADS  # of a head


@pytest.mark.parametrize("size", SIZES)
def test_entries_have_one_magnitude_that_fp16_holds_and_the_matrix_is_its_own_inverse(size: int) -> None:
    matrix = hadamard(size)
    magnitude = abs(matrix[0, 0])
    np.testing.assert_array_equal(np.abs(matrix), magnitude)
    assert np.log2(magnitude).is_integer()
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(matrix @ matrix, np.eye(size) * (1 if np.log2(size) % 2 == 0 else 2))
    np.testing.assert_array_equal(matrix @ inverse(matrix), np.eye(size))


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_no_channel_gathers_what_all_have_in_common(size: int) -> None:
    """All rows have one sum; the first one of Sylvester's matrix has all of it."""
    np.testing.assert_array_equal(hadamard(size).sum(axis=0), 1)


def test_rows_and_columns_are_turned_in_groups() -> None:
    rng = np.random.default_rng(0)
    matrix, weight = hadamard(4), rng.standard_normal((8, 12))
    whole = np.kron(np.eye(2), matrix)
    np.testing.assert_allclose(rows_turned(weight, matrix), whole @ weight)
    columns = (7, 1, 0, 3, 11, 10, 9, 8)
    turned = columns_turned(weight, matrix, columns)
    np.testing.assert_allclose(turned[:, columns], weight[:, columns] @ whole)
    others = [2, 4, 5, 6]
    np.testing.assert_array_equal(turned[:, others], weight[:, others])


def test_an_outlier_channel_loses_its_cost() -> None:
    rng = np.random.default_rng(0)
    x, weight = np.float32(rng.standard_normal((200, 64))), np.float32(rng.standard_normal((64, 16)))
    x[:, 5] *= 30
    matrix, errors = hadamard(64), []
    for values, rows in ((x, weight), (x @ matrix, inverse(matrix) @ weight)):
        scale = np.abs(values).max() / 127
        product = np.round(values / scale) * scale @ quantize_weight(np.float32(rows)).dequantized()
        errors.append(np.linalg.norm(product - x @ weight) / np.linalg.norm(x @ weight))
    assert errors[1] < errors[0] / 2


def feeds(seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"x": (2, TOKENS, DIM), "rows": (2, 3, DIM)}
    return {name: np.float32(rng.standard_normal(shape)) for name, shape in shapes.items()}


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_attention_computes_the_same_and_folds_where_groups_stay_in_a_head(
    size: int, make_graph: Make, run_model: Run
) -> None:
    before, after = attention(make_graph), attention(make_graph)
    folded = foldable_layers({"full": after}, size)
    assert folded == (PROJ if size <= WIDTH else ())
    assert rotate(after, Rotation(size=size, folded=folded))
    products = 2 - len(folded)  # in front of qkv, and of the projection where nothing takes it
    assert kinds(after).count("MatMul") == kinds(before).count("MatMul") + products
    assert kinds(after).count("Reshape") == kinds(before).count("Reshape") + (2 * products if size < DIM else 0)
    assert linear_count(after) == 2
    expected, output = (run_model(model, feeds())["out"] for model in (before, after))
    assert np.linalg.norm(output - expected) < 1e-6 * np.linalg.norm(expected)


def test_layers_read_rotated_channels(make_graph: Make, run_model: Run) -> None:
    """Folded or not, a layer's input is the same one: scales are of both."""
    inputs = {}
    for name, folded in (("folded", PROJ), ("product", ())):
        model = attention(make_graph)
        plain = attention(make_graph)
        rotate(model, Rotation(size=4, folded=folded))
        for graph in (model, plain):
            (linear,) = (each for each in linears_of(graph) if each.name == PROJ[0])
            graph.graph.outputs.append(linear.activation)
        (values, exact) = (list(run_model(graph, feeds()).values())[-1] for graph in (model, plain))
        inputs[name] = values
        np.testing.assert_allclose(values, exact @ np.kron(np.eye(2), hadamard(4)), atol=1e-5)
    np.testing.assert_allclose(inputs["folded"], inputs["product"], atol=1e-5)


def test_layers_that_read_one_tensor_share_one_product_and_others_see_what_they_saw(
    make_graph: Make, run_model: Run
) -> None:
    body = "a = MatMul(x, w) b = MatMul(x, v) c = Relu(x) ab = Add(a, b) out = Add(ab, c)"
    rng = np.random.default_rng(2)
    weights = {name: np.float32(rng.standard_normal((DIM, DIM))) for name in ("w", "v")}
    models = [branch(make_graph(f"float[batch, {DIM}] x", f"float[batch, {DIM}] out", body, **weights)) for _ in "ab"]
    rotate(models[1], Rotation(size=4))
    assert kinds(models[1]).count("MatMul") == 3
    x = {"x": np.float32(rng.standard_normal((3, DIM)))}
    expected, output = (run_model(model, x)["out"] for model in models)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", ["MatMul(y, w)", "Add(y, w)"])
def test_a_weight_with_two_readers_is_rotated_for_layers_alone(other: str, make_graph: Make, run_model: Run) -> None:
    body = f"y = MatMul(x, w) out = {other}"
    rng = np.random.default_rng(2)
    weight = np.float32(rng.standard_normal((DIM, DIM)))
    io = f"float[{DIM}, {DIM}] x", f"float[{DIM}, {DIM}] out"
    models = [branch(make_graph(*io, body, w=weight)) for _ in "ab"]
    rotate(models[1], Rotation(size=2))
    x = {"x": np.float32(rng.standard_normal((DIM, DIM)))}
    expected, output = (run_model(model, x)["out"] for model in models)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


def branch(model: ir.Model) -> ir.Model:
    for node in model.graph:
        node.metadata_props.update({BRANCH_KEY: "mlp", PATH_KEY: str(node.inputs[-1].name)})
    return model


def test_rotating_twice_changes_nothing(make_graph: Make, run_model: Run) -> None:
    model = attention(make_graph)
    assert rotate(model, Rotation(size=4))
    before, output = kinds(model), run_model(model, feeds())["out"]
    assert not rotate(model, Rotation(size=4))
    assert kinds(model) == before
    np.testing.assert_array_equal(run_model(model, feeds())["out"], output)


def test_a_fold_that_the_graph_does_not_prove_is_refused(make_graph: Make) -> None:
    with pytest.raises(DitcError, match="nothing in front of wqkv can take its rotation"):
        rotate(attention(make_graph), Rotation(size=4, folded=("wqkv",)))
    with pytest.raises(DitcError, match="nothing in front of wproj can take its rotation"):
        rotate(attention(make_graph), Rotation(size=8, folded=PROJ))


@pytest.mark.parametrize(("own", "wanted"), [(4, None), (None, 4), (4, 2)])
def test_scales_of_other_inputs_are_refused(own: int | None, wanted: int | None, make_graph: Make) -> None:
    model = attention(make_graph)
    if own is not None:
        rotate(model, Rotation(size=own))
    table = table_of(None if wanted is None else Rotation(size=wanted))
    with pytest.raises(DitcError, match=f"rotated groups of {wanted}, the segment has {own}; rotate it first"):
        insert_qdq(model, table)


def table_of(rotation: Rotation | None) -> ScaleTable:
    scales = {"wqkv": 0.05, "wproj": 0.05}
    return ScaleTable(method="max", segment_sha256="", calibration_digest="", scales=scales, rotation=rotation)


def test_the_matrix_is_exact_in_fp16_and_stays_a_float_product(make_graph: Make) -> None:
    model, rotation = attention(make_graph), Rotation(size=8)
    rotate(model, rotation)
    insert_qdq(model, table_of(rotation))
    half_precision(model)
    matrix: Any = model.graph.initializers["rotation"].const_value
    assert matrix.dtype == ir.DataType.FLOAT16
    np.testing.assert_array_equal(matrix.numpy().astype(np.float64), hadamard(8))
    assert kinds(model).count("QuantizeLinear") == 2


def test_groups_that_do_not_divide_a_layers_input_are_refused(make_graph: Make) -> None:
    model = attention(make_graph)
    check_groups(model, 8)
    with pytest.raises(InputError, match=r"needs inputs .* found 8 channels at wqkv; give at most --rotate 8"):
        check_groups(model, 16)
