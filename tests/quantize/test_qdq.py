"""Q/DQ: where it goes, what it computes, and that integer kernels take it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ditc.bundle import Bundle
from ditc.compiler.quantizing import check_integer_kernels
from ditc.engines.backend import runnable_path
from ditc.engines.onnxrt import OnnxRuntimeBackend, kernel_census
from ditc.errors import CheckError, DitcError
from ditc.exporter.onnx_files import load_graph, save_graph
from ditc.precision import Bits
from ditc.program import BRANCH_KEY, PATH_KEY
from ditc.quantize.linears import linears_of
from ditc.quantize.qdq import insert_qdq, quantize_weight
from ditc.quantize.scale_table import ScaleTable
from ditc.quantize.scales import Origin, activation_probe, histograms_of, ranges_of, scale_table


def two_readers() -> ir.Model:
    """x -> two linear layers of one branch that share their input, and one layer outside any branch."""
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 8] x) => (float[batch, 8] out, float[batch, 4] tail)
        <float[8, 8] wq = {0}, float[8, 8] wk = {0}, float[8, 4] wt = {0}> {
            q = MatMul (x, wq)
            k = MatMul (x, wk)
            out = Add (q, k)
            tail = MatMul (out, wt)
        }
        """.replace("= {0}", "= {" + ",".join(["0"] * 64) + "}", 2).replace("= {0}", "= {" + ",".join(["0"] * 32) + "}")
    )
    rng = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        shape = tuple(int(size) for size in value.shape)
        value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name)
    for node, path in zip(model.graph, ("a.to_q", "a.to_k", "a", "tail"), strict=True):
        node.metadata_props[PATH_KEY] = path
        if path != "tail":
            node.metadata_props[BRANCH_KEY] = "a"
    return model


def table(**scales: float) -> ScaleTable:
    return ScaleTable(method="max", segment_sha256="", calibration_digest="", scales=scales)


BOTH = {"a.to_q": 0.05, "a.to_k": 0.05}


def run(path: Path, x: np.ndarray) -> np.ndarray:
    return OnnxRuntimeBackend().session(path).run(["out"], {"x": x})[0]


def test_only_linear_layers_inside_a_branch_are_quantized() -> None:
    model = two_readers()
    insert_qdq(model, table(**BOTH))
    tail = next(node for node in model.graph if node.metadata_props[PATH_KEY] == "tail")
    assert [node.op_type for node in model.graph].count("DequantizeLinear") == 3
    assert tail.inputs[1].name == "wt"


def test_layers_with_one_input_share_one_pair() -> None:
    model = two_readers()
    insert_qdq(model, table(**BOTH))
    assert [node.op_type for node in model.graph].count("QuantizeLinear") == 1


def test_quantizing_twice_changes_nothing(tmp_path: Path) -> None:
    model = two_readers()
    assert insert_qdq(model, table(**BOTH))
    save_graph(model, tmp_path / "once.onnx")
    assert not insert_qdq(model, table(**BOTH))
    save_graph(model, tmp_path / "twice.onnx")
    assert (tmp_path / "once.onnx").read_bytes() == (tmp_path / "twice.onnx").read_bytes()


def test_the_quantized_layer_computes_the_integer_product(tmp_path: Path) -> None:
    model = two_readers()
    weights = {linear.path: linear.weight_array() for linear in linears_of(model)}
    insert_qdq(model, table(**BOTH))
    save_graph(model, tmp_path / "q.onnx")
    x = np.random.default_rng(1).uniform(-7, 7, (5, 8)).astype(np.float32)
    rounded = np.clip(np.round(x / 0.05), -128, 127).astype(np.int64)
    expected = sum(
        (rounded @ quantize_weight(w).values.astype(np.int64)) * (0.05 * quantize_weight(w).scale)
        for w in weights.values()
    )
    np.testing.assert_allclose(run(tmp_path / "q.onnx", x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [Bits(weights=4), Bits(activations=6), Bits(3, 5)])
def test_fewer_bits_take_fewer_values(bits: Bits, tmp_path: Path) -> None:
    model = two_readers()
    weights = [quantize_weight(linear.weight_array(), bits.weights) for linear in linears_of(model)]
    insert_qdq(model, table(**BOTH).model_copy(update={"bits": bits}))
    save_graph(model, tmp_path / "q.onnx")
    assert max(np.abs(weight.values).max() for weight in weights) == 2 ** (bits.weights - 1) - 1
    x = np.random.default_rng(1).uniform(-9, 9, (5, 8)).astype(np.float32)
    most = 2 ** (bits.activations - 1) - 1
    rounded = np.clip(np.round(x / np.float32(0.05)), -most - (most == 127), most).astype(np.int64)
    expected = sum((rounded @ weight.values.astype(np.int64)) * (0.05 * weight.scale) for weight in weights)
    np.testing.assert_allclose(run(tmp_path / "q.onnx", x), expected, rtol=1e-5, atol=1e-4)


def test_the_scale_of_fewer_bits_reaches_as_far() -> None:
    histograms = histograms_of(lambda feeds: {"x": feeds["x"]}, [{"x": np.full((2, 2), 3.1, np.float32)}])
    ranges, groups = ranges_of(histograms, "max", levels=31), np.zeros(1, np.int64)
    calibrated = scale_table([ranges], {"x": ("a",)}, groups, Origin("max", "", "", bits=Bits(activations=6)))
    assert calibrated.scales["a"] == pytest.approx(0.1)


def test_a_layer_without_a_scale_is_named() -> None:
    with pytest.raises(DitcError, match=r"no activation scale for a\.to_k"):
        insert_qdq(two_readers(), table(**{"a.to_q": 0.05}))


def test_every_linear_layer_of_a_compiled_segment_runs_an_integer_kernel(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["cached"]
    census = kernel_census(OnnxRuntimeBackend(), runnable_path(bundle.segment_path("full"), "onnxrt"))
    assert census["MatMulIntegerToFloat"] == 8  # two blocks: qkv, proj, fc1, fc2
    assert census["Gemm"] == 0
    assert bundle.manifest.checks["kernels"] == {"full": {"linears": 8, "integer": 8}}


def test_no_quantizer_is_left_over_in_the_optimized_graph(bundles: dict[str, Bundle]) -> None:
    segment = bundles["cached"].segment_path("full")
    census = kernel_census(OnnxRuntimeBackend(), runnable_path(segment, "onnxrt"))
    assert census["QuantizeLinear"] == 8
    assert census["DequantizeLinear"] == 0


def test_a_layer_that_stays_float_fails_the_check(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(CheckError, match="0 of 8 linear layers"):
        check_integer_kernels(OnnxRuntimeBackend(), bundles["fp32-cached"].segment_path("full"), 8)


def test_the_probe_returns_each_activation_once_with_its_readers() -> None:
    model = two_readers()
    assert activation_probe(model) == {"x": ("a.to_q", "a.to_k")}
    assert [value.name for value in model.graph.outputs] == ["x"]


def test_scales_follow_the_largest_activation() -> None:
    points = [{"x": np.full((2, 2), value, np.float32)} for value in (1.0, -12.7, 3.0)]
    histograms = histograms_of(lambda feeds: {"x": feeds["x"]}, points)
    calibrated = scale_table(
        [ranges_of(histograms, "max")], {"x": ("a",)}, np.zeros(1, np.int64), Origin("max", "", "")
    )
    assert calibrated.scales["a"] == pytest.approx(0.1)


def test_a_layer_reaches_as_far_as_its_bits_do() -> None:
    reaches = [
        table(a=0.1).model_copy(update={"bits": bits}).reach("a", 0) for bits in (Bits(), Bits(weights=7), Bits(8, 6))
    ]
    assert reaches == pytest.approx([12.7, 12.7, 3.1])


def test_a_scale_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a positive number"):
        table(a=0.0)


@given(arrays.arrays(np.float32, (6, 3), elements=st.floats(-100, 100, width=32)))
def test_a_quantized_weight_is_within_half_a_step(weight: np.ndarray) -> None:
    quantized = quantize_weight(weight)
    assert np.abs(quantized.values).max() <= 127
    assert np.all(np.abs(quantized.dequantized() - weight) <= quantized.scale * 0.5001 + 1e-6)


def test_the_bundle_names_the_points_its_scales_came_from(bundles: dict[str, Bundle]) -> None:
    folder = bundles["cached"].path / "calib"
    calibrated = ScaleTable.model_validate_json((folder / "scales.json").read_bytes())
    assert set(calibrated.scales) == {linear for linear in calibrated.scales if linear.startswith("blocks.")}
    assert len(calibrated.scales) == 8
    quantized = load_graph(bundles["cached"].segment_path("full"))
    names = [name for name in quantized.graph.initializers if name.endswith("input_scale")]
    assert {name.removesuffix(".input_scale") for name in names} == set(calibrated.scales)
