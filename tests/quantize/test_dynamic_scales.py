"""Scales that are measured on the tensor as it comes: integer kernels on the CPU, plain operators for TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from ditc.bundle import Bundle, read_tables
from ditc.compiler.options import CompileOptions
from ditc.compiler.planning import make_plan
from ditc.compiler.quantizing import quantize
from ditc.compiler.trajectories import executor
from ditc.engines.onnxrt import OnnxRuntimeBackend, kernel_census
from ditc.exporter.dit import DiT
from ditc.exporter.onnx_files import save_graph
from ditc.lowering.backend_forms import lower
from ditc.lowering.tensorrt_rules import violations_of
from ditc.program import BRANCH_KEY, PATH_KEY
from ditc.quantize.qdq import insert_qdq
from ditc.quantize.scale_table import ScaleTable
from ditc.requests import Request
from ditc.runtime.closeness import relative_error
from ditc.runtime.executor import seeded_noise

LAYERS = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 4, 8] x) => (float[batch, 4, 8] out, float[batch, 4, 8] k) {
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    sum = Add (q, k)
    p = MatMul (sum, wp)
    out = Add (p, b)
}
"""
DYNAMIC = ScaleTable(method="mse", segment_sha256="", calibration_digest="", scales={}, binding="dynamic")


def layers() -> ir.Model:
    """Two layers that share an input, one of them a graph output without a bias, and one of its own."""
    rng = np.random.default_rng(0)
    shapes = {"wq": (8, 8), "wk": (8, 8), "wp": (8, 8), "b": (8,)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model = ir.from_onnx_text(LAYERS, [ir.tensor(array, name=name) for name, array in weights.items()])
    for node in model.graph:
        node.metadata_props[BRANCH_KEY] = "a"
        node.metadata_props[PATH_KEY] = str(node.outputs[0].name)
    ShapeInferencePass()(model)
    return model


def results(model: ir.Model, folder: Path, name: str, x: np.ndarray) -> list[np.ndarray]:
    save_graph(model, folder / f"{name}.onnx")
    return OnnxRuntimeBackend().session(folder / f"{name}.onnx").run(["out", "k"], {"x": x})


def quantized(backend: str) -> ir.Model:
    model = layers()
    assert insert_qdq(model, DYNAMIC)
    lower(model, backend)
    return model


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("backend", ["none", "onnxrt"])
def test_every_size_of_an_activation_is_quantized_as_well(size: float, backend: str, tmp_path: Path) -> None:
    x = (size * np.random.default_rng(1).standard_normal((2, 4, 8))).astype(np.float32)
    exact = results(layers(), tmp_path, "fp", x)
    for output, expected in zip(results(quantized(backend), tmp_path, "q", x), exact, strict=True):
        assert relative_error(output - output.mean(), expected - expected.mean()) < 0.02


@pytest.mark.parametrize("backend", ["none", "onnxrt"])
def test_an_activation_of_zeros_stays_finite(backend: str, tmp_path: Path) -> None:
    x = np.zeros((2, 4, 8), np.float32)
    for output, expected in zip(
        results(quantized(backend), tmp_path, "q", x), results(layers(), tmp_path, "fp", x), strict=True
    ):
        np.testing.assert_allclose(output, expected, atol=1e-5)


def test_dynamic_layers_run_integer_kernels(tmp_path: Path) -> None:
    save_graph(quantized("onnxrt"), tmp_path / "q.onnx")
    census = kernel_census(OnnxRuntimeBackend(), tmp_path / "q.onnx")
    assert census["DynamicQuantizeMatMul"] == 1  # measured, rounded and multiplied in one
    assert census["DynamicQuantizeLinear"] == 1  # two layers share one rounding
    assert census["MatMulIntegerToFloat"] == 2
    assert census["MatMul"] == census["ReduceMax"] == census["DequantizeLinear"] == 0


def test_the_plain_operators_break_no_rule_of_tensorrt(tmp_path: Path) -> None:
    portable, typed = quantized("none"), quantized("trt")
    assert [str(v) for model in (portable, typed) for v in violations_of(model)] == []
    x = np.random.default_rng(1).standard_normal((2, 4, 8)).astype(np.float32)
    (output, _), (expected, _) = results(typed, tmp_path, "typed", x), results(portable, tmp_path, "plain", x)
    assert relative_error(output, expected) < 0.02


def test_quantizing_or_lowering_twice_changes_nothing() -> None:
    model = layers()
    assert insert_qdq(model, DYNAMIC)
    assert not insert_qdq(model, DYNAMIC)
    assert lower(model, "onnxrt")
    assert not lower(model, "onnxrt")


def test_nothing_is_calibrated_for_dynamic_scales(
    bundles: dict[str, Bundle],
    quick_options: CompileOptions,
    make_small_model: Callable[..., DiT],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The segments of a bundle quantized again, with no point run, and a whole trajectory with them."""
    bundle = bundles["cached"]
    settings = quick_options.model_copy(update={"policy": "fora:2", "scales": "dynamic"})
    plan = make_plan(make_small_model(), settings)
    exact = {name: bundle.reference_path(name) for name in plan.program.calls}
    monkeypatch.setattr("ditc.compiler.calibrating.histograms_of", None)
    quantize(plan, exact, bundle.path / "calib" / "calib.npz", tmp_path)
    assert read_tables(tmp_path / "scales.safetensors") == {}
    assert ScaleTable.model_validate_json((tmp_path / "scales.json").read_bytes()).scales == {}
    assert (tmp_path / "kernels.json").read_text().count('"integer": 8') == 1
    noise, fresh = seeded_noise(0, 0, 4, plan.spec.latent_shape)
    ends = []
    for segments in (exact, exact | {"full": tmp_path / "full.onnx"}):
        with executor(plan, plan.program, segments) as runner:
            ends.append(runner.last(Request.of(plan.spec, [0, 1, 2, 3]), noise, fresh))
    assert 0 < relative_error(ends[1], ends[0]) < 0.05
