"""Weights stored as FP16, multiplied as FP32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from ditc.bundle import Bundle
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.exporter.onnx_files import load_graph, save_graph
from ditc.lowering.half_storage import half_storage


def model(weight: np.ndarray, *, also_read: bool = False) -> ir.Model:
    """Two products by one weight; with `also_read` an Add reads it too."""
    lines = ["p = MatMul (x, w)", "q = MatMul (p, w)"]
    lines += ["r = ReduceMax <keepdims = 0> (w)", "s = Add (q, r)"] if also_read else ["s = Identity (q)"]
    body = "\n".join(lines)
    text = (
        '<ir_version: 10, opset_import: ["" : 20]>\n'
        f"g (float[n, 64] x, float[64, 64] w) => (float[n, 64] s) {{\n{body}\n}}"
    )
    built = ir.from_onnx_text(text)
    value = built.graph.inputs.pop()
    value.const_value = ir.tensor(weight, name="w")
    built.graph.register_initializer(value)
    return built


WEIGHT = np.random.default_rng(0).normal(0, 0.1, (64, 64)).astype(np.float32)


def run(model: ir.Model, path: Path) -> np.ndarray:
    save_graph(model, path)
    x = np.random.default_rng(1).standard_normal((3, 64), dtype=np.float32)
    return np.asarray(OnnxRuntimeBackend().session(path).run(None, {"x": x})[0])


def test_products_keep_their_numbers_to_the_rounding_of_fp16(tmp_path: Path) -> None:
    exact, small = model(WEIGHT), model(WEIGHT)
    assert half_storage(small)
    assert small.graph.initializers["w"].dtype == ir.DataType.FLOAT16
    assert [node.op_type for node in small.graph].count("Cast") == 1  # shared by both products
    expected, output = run(exact, tmp_path / "exact.onnx"), run(small, tmp_path / "small.onnx")
    error = np.linalg.norm(output - expected) / np.linalg.norm(expected)
    assert 0 < error < 2**-11


def test_storing_twice_changes_nothing() -> None:
    small = model(WEIGHT)
    assert half_storage(small)
    assert not half_storage(small)


@pytest.mark.parametrize("bad", [1e5, np.nan, -np.inf])
def test_a_weight_that_fp16_cannot_hold_stays(bad: float) -> None:
    weight = WEIGHT.copy()
    weight[3, 4] = bad
    assert not half_storage(model(weight))


def test_a_weight_that_something_else_reads_stays() -> None:
    assert not half_storage(model(WEIGHT, also_read=True))


def test_the_conditioning_of_a_quantized_bundle_takes_half_the_bytes(bundles: dict[str, Bundle]) -> None:
    small, full = (bundles[name].segment_path("condition") for name in ("cached", "fp32-cached"))
    sizes = [path.with_name(f"{path.name}.data").stat().st_size for path in (small, full)]
    assert sizes[0] < 0.6 * sizes[1]
    error = bundles["cached"].manifest.checks["storage"]["condition"]["relative_error"]  # type: ignore[index,call-overload]
    assert 0 < error < 2**-11


def test_the_weights_of_the_conditioning_stay_in_the_file(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """The graph that runs still widens its weights: folded, they would be FP32 in memory."""
    optimized = tmp_path / "optimized.onnx"
    segment = bundles["cached"].segment_path("condition")
    OnnxRuntimeBackend().session(segment, optimized)
    widened = [n for n in load_graph(optimized).graph if n.op_type == "Cast" and n.name and n.name.endswith("/Widen")]
    stored = [n for n in load_graph(segment).graph if n.op_type == "Cast" and n.name and n.name.endswith("/Widen")]
    assert len(widened) == len(stored) > 4
