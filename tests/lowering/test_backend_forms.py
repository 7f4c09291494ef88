"""Lowerings for ONNX Runtime: same numbers, and integer kernels where the portable graph has none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from ditc.bundle import Bundle
from ditc.engines.backend import lowered_path
from ditc.engines.onnxrt import OnnxRuntimeBackend, kernel_census
from ditc.exporter.onnx_files import load_graph, save_graph
from ditc.lowering.backend_forms import lower

# each weight has a zero point of its own, as `insert_qdq` gives it: the switch for exact products takes no other
SHARED_PAIR = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 32] x) => (float[batch, 32] q, float[batch, 32] k)
<float scale = {0.05}, int8 zero = {0}, int8[32, 32] wq = {WQ}, int8[32, 32] wk = {WK}, float[32] ws = {WS},
 int8[32] wqz = {WZ}, int8[32] wkz = {WZ}> {
    xq = QuantizeLinear (x, scale, zero)
    xd = DequantizeLinear (xq, scale, zero)
    wqd = DequantizeLinear <axis = 1> (wq, ws, wqz)
    wkd = DequantizeLinear <axis = 1> (wk, ws, wkz)
    q = MatMul (xd, wqd)
    k = MatMul (xd, wkd)
}
"""


@pytest.fixture
def shared_pair(tmp_path: Path) -> Path:
    """Two linear layers that read one Q/DQ pair, as separate q and k do."""
    rng = np.random.default_rng(0)
    text = SHARED_PAIR.replace("WS", ", ".join(["0.01"] * 32)).replace("WZ", ", ".join(["0"] * 32))
    for name in ("WQ", "WK"):
        text = text.replace(name, ", ".join(map(str, rng.integers(-127, 128, 32 * 32))))
    model = ir.from_onnx_text(text)
    save_graph(model, tmp_path / "shared.onnx")
    return tmp_path / "shared.onnx"


def lowered(segment: Path) -> Path:
    model = load_graph(segment)
    assert lower(model, "onnxrt")
    path = lowered_path(segment, "onnxrt")
    save_graph(model, path)
    return path


def test_layers_that_share_a_pair_run_integer_kernels_when_lowered(shared_pair: Path) -> None:
    census = kernel_census(OnnxRuntimeBackend(), lowered(shared_pair))
    assert census["MatMulIntegerToFloat"] == 2
    assert census["MatMul"] == 0


def test_lowering_keeps_the_numbers(shared_pair: Path) -> None:
    x = np.random.default_rng(1).uniform(-9, 9, (7, 32)).astype(np.float32)
    plain, changed = (
        OnnxRuntimeBackend().session(path).run(None, {"x": x}) for path in (shared_pair, lowered(shared_pair))
    )
    for before, after in zip(plain, changed, strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-4)


def test_lowering_twice_changes_nothing(shared_pair: Path) -> None:
    model = load_graph(shared_pair)
    assert lower(model, "onnxrt")
    assert not lower(model, "onnxrt")


PLACES = {"DequantizeLinear": (0, 2), "MatMulIntegerToFloat": (1, 5)}  # inputs of an operator: weight, its zero point


@pytest.mark.parametrize("name", ["cached", "per-step", "float-ends"])
def test_no_two_weights_of_a_segment_share_a_zero_point(name: str, bundles: dict[str, Bundle]) -> None:
    """Without VNNI a session with such a one would not open."""
    segment = bundles[name].segment_path("full")
    for path in (segment, lowered_path(segment, "onnxrt")):
        zeros = []
        for node in load_graph(path).graph:
            weight, zero = (node.inputs[place] for place in PLACES.get(node.op_type, (0, 0)))
            if node.op_type in PLACES and weight is not None and weight.const_value is not None:
                zeros.append(zero)
        assert len(zeros) == 8
        assert len(set(map(id, zeros))) == 8


def test_another_backend_gets_the_portable_graph(shared_pair: Path) -> None:
    assert not lower(load_graph(shared_pair), "fake")


def test_the_portable_segment_of_a_bundle_stays_symmetric(bundles: dict[str, Bundle]) -> None:
    model = load_graph(bundles["cached"].segment_path("full"))
    zeros = [node.inputs[2] for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(zeros) == 24
    for zero in zeros:
        assert zero is not None
        assert zero.const_value is not None
        assert zero.const_value.dtype == ir.DataType.INT8
        assert not zero.const_value.numpy().any()


def test_the_lowered_graph_holds_no_second_copy_of_the_weights(bundles: dict[str, Bundle]) -> None:
    segment = bundles["cached"].segment_path("full")
    path = lowered_path(segment, "onnxrt")
    assert path.stat().st_size < segment.with_name("full.onnx.data").stat().st_size
    assert not path.with_name(f"{path.name}.data").exists()
