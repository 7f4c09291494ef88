"""The strongly typed form: FP16 with FP32 islands, near the portable segment, within TensorRT's rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import ditc
from ditc.bundle import Bundle
from ditc.engines.backend import lowered_path
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.exporter.onnx_files import load_graph, save_graph
from ditc.lowering.backend_forms import lower
from ditc.lowering.tensorrt_rules import violations_of
from ditc.lowering.typed_form import LEAST_SCALE, half_precision
from ditc.runtime.closeness import relative_error

SMALL_SCALES = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 2] x) => (float[batch, 2] out)
<float s = {0.05}, int8 z = {0}, int8[2] wz = {0, 0},
 int8[2, 2] w = {100, 100, -50, 7}, float[2] ws = {0.00000001, 0.01}> {
    xq = QuantizeLinear (x, s, z)
    xd = DequantizeLinear (xq, s, z)
    wd = DequantizeLinear <axis = 1> (w, ws, wz)
    out = MatMul (xd, wd)
}
"""


@pytest.mark.parametrize("name", ["condition", "full", "reuse"])
def test_typed_segments_are_valid_onnx_of_one_type_per_edge(bundles: dict[str, Bundle], name: str) -> None:
    path = lowered_path(bundles["cached"].segment_path(name), "trt")
    onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize("name", ["condition", "full", "reuse"])
def test_typed_segments_break_no_rule_of_tensorrt(bundles: dict[str, Bundle], name: str) -> None:
    path = lowered_path(bundles["cached"].segment_path(name), "trt")
    assert [str(violation) for violation in violations_of(load_graph(path))] == []


RESIZE = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 1, 2, 2] latent) => (float[batch, 1, 4, 4] image)
<float[4] scales = {1, 1, 2, 2}, float[1] half = {0.5}> {
    scaled = Mul (latent, half)
    image = Resize <mode = "nearest"> (scaled, , scales)
}
"""


def test_the_scales_of_a_resize_stay_in_full_precision(tmp_path: Path) -> None:
    """As a VAE's decoder of several levels has them: ONNX knows no others."""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(RESIZE)))
    assert half_precision(model)
    kinds = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert kinds == {"scales": ir.DataType.FLOAT, "half": ir.DataType.FLOAT16}
    save_graph(model, tmp_path / "decode.onnx")
    onnx.checker.check_model(str(tmp_path / "decode.onnx"), full_check=True)
    latent = np.ones((1, 1, 2, 2), np.float32)
    (image,) = OnnxRuntimeBackend().session(tmp_path / "decode.onnx").run(["image"], {"latent": latent})
    assert (image == 0.5).all()


def test_the_manifest_says_which_rules_are_broken(bundles: dict[str, Bundle]) -> None:
    assert bundles["cached"].manifest.checks["tensorrt"] == {
        name: [] for name in ("condition", "full", "reuse", "update")
    }


def test_linear_layers_are_fp16_behind_int8_and_norms_are_fp32(bundles: dict[str, Bundle]) -> None:
    graph = load_graph(lowered_path(bundles["cached"].segment_path("full"), "trt")).graph
    by_kind: dict[str, set[ir.DataType | None]] = {}
    for node in graph:
        by_kind.setdefault(node.op_type, set()).add(node.outputs[0].dtype)
    assert by_kind["MatMul"] == {ir.DataType.FLOAT16}
    assert by_kind["Softmax"] == {ir.DataType.FLOAT16}
    assert by_kind["LayerNormalization"] == {ir.DataType.FLOAT}
    assert by_kind["QuantizeLinear"] == {ir.DataType.INT8}


def test_the_sample_and_the_prediction_stay_fp32_and_the_cache_is_fp16(bundles: dict[str, Bundle]) -> None:
    segment = lowered_path(bundles["cached"].segment_path("full"), "trt")
    with OnnxRuntimeBackend().open(segment) as engine:
        assert engine.inputs["x"].dtype == engine.outputs["out"].dtype == "float32"
        assert engine.inputs["modulation"].dtype == "float16"
        assert {port.dtype for name, port in engine.outputs.items() if name.startswith("cache.")} == {"float16"}


def test_a_trajectory_of_typed_segments_stays_near_the_portable_one(bundles: dict[str, Bundle]) -> None:
    """ONNX Runtime plays the part of TensorRT: same files, same types, FP16 slots."""
    path = bundles["cached"].path
    with ditc.load(path) as portable, ditc.load(path, backend=OnnxRuntimeBackend(name="trt")) as typed:
        expected, events = (list(pipe.generate([0, 1, 2, 3], seed=0)) for pipe in (portable, typed))
    assert relative_error(events[0].x, expected[0].x) < 5e-3
    assert relative_error(events[-1].x, expected[-1].x) < 0.1


def test_typed_twice_is_typed_once(bundles: dict[str, Bundle]) -> None:
    for name in ("condition", "full", "reuse"):
        model = load_graph(bundles["cached"].segment_path(name))
        assert half_precision(model)
        assert not half_precision(model)


def test_scales_too_small_for_fp16_are_raised_and_their_integers_lowered(tmp_path: Path) -> None:
    model = ir.from_onnx_text(SMALL_SCALES)
    save_graph(model, tmp_path / "float.onnx")
    assert lower(model, "trt")
    save_graph(model, tmp_path / "half.onnx")
    scale = model.graph.initializers["ws"].const_value
    assert scale is not None
    assert scale.numpy().min() == np.float16(LEAST_SCALE)
    x = np.array([[1.0, 2.0], [-3.0, 0.5]], np.float32)
    expected, output = (
        OnnxRuntimeBackend().session(tmp_path / f"{name}.onnx").run(None, {"x": x})[0] for name in ("float", "half")
    )
    np.testing.assert_allclose(output[:, 1], expected[:, 1], rtol=2e-3)
    assert np.abs(output[:, 0] - expected[:, 0]).max() < 1e-4


def test_an_fp32_bundle_has_no_typed_form(bundles: dict[str, Bundle]) -> None:
    assert not lowered_path(bundles["fp32-none"].segment_path("full"), "trt").exists()
