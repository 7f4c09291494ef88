"""Fusions for ONNX Runtime on the CPU: what the session really runs, and that the numbers stay."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from ditc.bundle import Bundle
from ditc.engines.backend import runnable_path
from ditc.engines.onnxrt import OnnxRuntimeBackend, kernel_census
from ditc.exporter.onnx_files import load_graph, save_graph
from ditc.lowering.cpu_fusions import fuse_attention, fuse_integer_products

ATTENTION = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 8, 24] q, float[batch, 8, 24] k, float[batch, 8, 24] v, float[8, 8] mask) => (float[batch, 8, 24] y)
<int64[4] cut = {-1, 8, 4, 6}, int64[3] join = {-1, 8, 24}, float scale = {0.4},
 float[batch, 8, 4, 6] qc, float[batch, 8, 4, 6] kc, float[batch, 8, 4, 6] vc> {
    qc = Reshape (q, cut)
    kc = Reshape (k, cut)
    vc = Reshape (v, cut)
    qh = Transpose <perm = [0, 2, 1, 3]> (qc)
    qs = Mul (qh, scale)
    kh = Transpose <perm = [0, 2, 3, 1]> (kc)
    vh = Transpose <perm = [0, 2, 1, 3]> (vc)
    scores = MatMul (qs, kh)
    p = Softmax <axis = -1> (scores)
    mixed = MatMul (p, vh)
    turned = Transpose <perm = [0, 2, 1, 3]> (mixed)
    y = Reshape (turned, join)
}
"""

PRODUCT = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 8] x) => (float[batch, 4] y)
<float s = {0.1}, uint8 z = {128}, int8[8, 4] w = {WEIGHTS}, float[4] ws = {0.01, 0.02, 0.03, 0.04},
 int8[4] wz = {0, 0, 0, 0}, float[4] bias = {1.0, -2.0, 3.0, 0.5}> {
    q = QuantizeLinear (x, s, z)
    d = DequantizeLinear (q, s, z)
    wd = DequantizeLinear <axis = 1> (w, ws, wz)
    p = MatMul (d, wd)
    y = Add (p, bias)
}
"""


def attention(text: str = ATTENTION) -> ir.Model:
    return ir.from_onnx_text(text)


def product(text: str = PRODUCT) -> ir.Model:
    weights = ", ".join(map(str, np.random.default_rng(0).integers(-127, 128, 32)))
    return ir.from_onnx_text(text.replace("WEIGHTS", weights))


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def outputs(model: ir.Model, path: Path, **feeds: np.ndarray) -> list[np.ndarray]:
    save_graph(model, path)
    session = OnnxRuntimeBackend().session(path)
    return list(session.run(None, {port.name: feeds[port.name] for port in session.get_inputs()}))


def attention_feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((3, 8, 24), dtype=np.float32) for name in "qkv"} | {
        "mask": np.zeros((8, 8), np.float32)
    }


def test_attention_becomes_one_operator_with_the_same_numbers(tmp_path: Path) -> None:
    before = outputs(attention(), tmp_path / "before.onnx", **attention_feeds())
    model = attention()
    assert fuse_attention(model)
    assert operators(model) == {"MultiHeadAttention": 1}
    after = outputs(model, tmp_path / "after.onnx", **attention_feeds())
    np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-6)
    assert not fuse_attention(model)


@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        ("a mask", "p = Softmax <axis = -1> (scores)", "m = Add (scores, mask)\np = Softmax <axis = -1> (m)"),
        ("another axis", "Softmax <axis = -1>", "Softmax <axis = 2>"),
        ("keys not transposed", "kh = Transpose <perm = [0, 2, 3, 1]> (kc)", "kh = Transpose <perm=[0, 2, 3, 1]> (qh)"),
        ("a factor per channel", "float scale = {0.4}", "float[6] scale = {1, 2, 3, 4, 5, 6}"),
        ("heads left in front", "turned = Transpose <perm = [0, 2, 1, 3]>", "turned = Transpose <perm = [0, 1, 2, 3]>"),
    ],
)
def test_attention_of_another_form_is_left_alone(case: str, old: str, new: str) -> None:
    assert old in ATTENTION
    model = attention(ATTENTION.replace(old, new))
    before = operators(model)
    assert not fuse_attention(model), case
    assert operators(model) == before


TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 8, 24] q, float[batch, 4, 5, 6] request_k, float[batch, 4, 5, 6] request_v,
   float[batch, 1, 1, 5] request_bias) => (float[batch, 8, 24] y)
<int64[4] cut = {-1, 8, 4, 6}, int64[3] join = {-1, 8, 24}, float[batch, 8, 4, 6] qc> {
    qc = Reshape (q, cut)
    qh = Transpose <perm = [0, 2, 1, 3]> (qc)
    kt = Transpose <perm = [0, 1, 3, 2]> (request_k)
    scores = MatMul (qh, kt)
    biased = Add (scores, request_bias)
    p = Softmax <axis = -1> (biased)
    mixed = MatMul (p, request_v)
    turned = Transpose <perm = [0, 2, 1, 3]> (mixed)
    y = Reshape (turned, join)
}
"""


def attention_to_a_text(text: str = TEXT) -> ir.Model:
    """A graph whose tables of a request have the names of such."""
    model = ir.from_onnx_text(text)
    for value in model.graph.inputs:
        value.name = str(value.name).replace("request_", "request.")
    return model


def test_attention_to_a_text_becomes_one_operator_with_the_same_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])  # the last text is nothing but padding
    feeds = {f"request.{name}": rng.standard_normal((3, 4, 5, 6), dtype=np.float32) for name in "kv"}
    feeds |= {"q": rng.standard_normal((3, 8, 24), dtype=np.float32)}
    feeds |= {"request.bias": np.float32((1 - mask) * -10000.0)[:, None, None]}
    before = outputs(attention_to_a_text(), tmp_path / "before.onnx", **feeds)
    model = attention_to_a_text()
    assert fuse_attention(model)
    assert operators(model) == {"Expand": 1, "MultiHeadAttention": 1}
    after = outputs(model, tmp_path / "after.onnx", **feeds)
    np.testing.assert_allclose(after[0], before[0], rtol=1e-3, atol=1e-3)  # scores near -10000 have few bits left
    np.testing.assert_allclose(after[0][:2], before[0][:2], rtol=1e-5, atol=1e-6)
    assert not fuse_attention(model)


@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        ("a bias of each query", "float[batch, 1, 1, 5] request_bias", "float[batch, 1, 8, 5] request_bias"),
        ("a bias of no request", "request_bias", "bias"),
        ("keys that are made here", "kt = Transpose", "k = Neg (request_k)\nkt = Transpose"),
        ("keys turned otherwise", "kt = Transpose <perm = [0, 1, 3, 2]>", "kt = Transpose <perm = [1, 0, 3, 2]>"),
    ],
)
def test_attention_to_a_text_of_another_form_is_left_alone(case: str, old: str, new: str) -> None:
    assert old in TEXT
    text = TEXT.replace(old, new)
    model = attention_to_a_text(text.replace("(request_k)\n    scores", "(k)\n    scores") if "Neg" in new else text)
    before = operators(model)
    assert not fuse_attention(model), case
    assert operators(model) == before


def test_attention_whose_probabilities_are_asked_for_is_left_alone() -> None:
    model = attention()
    probabilities = next(node.outputs[0] for node in model.graph if node.op_type == "Softmax")
    model.graph.outputs.append(probabilities)
    assert not fuse_attention(model)


def test_the_bias_is_added_inside_the_integer_product_bit_for_bit(tmp_path: Path) -> None:
    x = np.random.default_rng(1).uniform(-9, 9, (5, 8)).astype(np.float32)
    before = outputs(product(), tmp_path / "before.onnx", x=x)
    model = product()
    assert fuse_integer_products(model)
    assert operators(model) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}
    np.testing.assert_array_equal(outputs(model, tmp_path / "after.onnx", x=x)[0], before[0])
    assert not fuse_integer_products(model)


@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        ("signed activations", "uint8 z = {128}", "int8 z = {0}"),
        (
            "no zero point of the weight",
            "DequantizeLinear <axis = 1> (w, ws, wz)",
            "DequantizeLinear <axis = 1> (w, ws)",
        ),
    ],
)
def test_a_product_that_misses_the_fast_kernel_is_left_alone(case: str, old: str, new: str) -> None:
    assert old in PRODUCT
    assert not fuse_integer_products(product(PRODUCT.replace(old, new))), case


def test_a_bias_that_is_computed_stays_an_add() -> None:
    text = PRODUCT.replace("float[batch, 8] x)", "float[batch, 8] x, float[4] b)").replace(
        "Add (p, bias)", "Add (p, b)"
    )
    model = product(text)
    assert fuse_integer_products(model)
    assert operators(model) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1, "Add": 1}


def test_a_block_is_four_products_one_attention_and_what_must_be_between(bundles: dict[str, Bundle]) -> None:
    """The graph that ONNX Runtime really runs: no stray transpose, cast or copy in a block."""
    bundle = bundles["cached"]
    blocks, ahead = len(bundle.manifest.model.branches) // 2, bundle.manifest.program.segment("full").ahead
    census = kernel_census(OnnxRuntimeBackend(), runnable_path(bundle.segment_path("full"), "onnxrt"))
    assert census["MatMulIntegerToFloat"] == 4 * blocks
    assert census["MultiHeadAttention"] == blocks
    assert census["Gelu"] == blocks
    assert census["QuantizeLinear"] == 4 * blocks
    assert census["Add"] <= (4 + 2 * ahead) * blocks + 3  # modulation, residual, sums ahead; three at the ends
    assert census["Transpose"] <= 2  # patches in and out
    assert census["Softmax"] == census["Cast"] == census["DequantizeLinear"] == census["FusedMatMul"] == 0


def test_attention_of_the_fp_network_is_recognised_and_keeps_its_numbers(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    reference = bundles["cached"].reference_path("full")
    model = load_graph(reference)
    rng = np.random.default_rng(0)
    session = OnnxRuntimeBackend().session(reference)
    feeds = {
        port.name: rng.standard_normal([2 if isinstance(d, str) else d for d in port.shape], dtype=np.float32)
        for port in session.get_inputs()
    }
    before = session.run(["out"], feeds)[0]
    assert fuse_attention(model)
    after = outputs(model, tmp_path / "fused.onnx", **feeds)
    np.testing.assert_allclose(after[0], before, rtol=1e-3, atol=1e-4)
