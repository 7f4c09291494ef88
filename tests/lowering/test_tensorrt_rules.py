"""TensorRT's rules: each hand-made violation is named, and what is in order passes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from ditc.lowering.tensorrt_rules import RULES, violations_of

SOUND = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[4, 2] x) => (float[4, 2] out)
<float s = {0.05}, int8 z = {0}, int8[2, 2] w = {1, 2, 3, 4}, float[2] ws = {0.1, 0.2}, int8[2] wz = {0, 0}> {
    xq = QuantizeLinear (x, s, z)
    xd = DequantizeLinear (xq, s, z)
    wd = DequantizeLinear <axis = 1> (w, ws, wz)
    out = MatMul (xd, wd)
}
"""

# rule -> what to change in the sound graph to break it
BROKEN = {
    "zero point": [("int8 z = {0}", "int8 z = {3}")],
    "quantized type": [("int8 z = {0}", "uint8 z = {0}")],
    "constant scale": [
        ("(float[4, 2] x)", "(float[4, 2] x, float s)"),
        ("float s = {0.05}, ", ""),
    ],
    "positive scale": [("float[2] ws = {0.1, 0.2}", "float[2] ws = {0.1, 0.0}")],
    "per-tensor activation": [
        ("float s = {0.05}, int8 z = {0}", "float[2] s = {0.05, 0.1}, int8[2] z = {0, 0}"),
        ("QuantizeLinear (x", "QuantizeLinear <axis = 1> (x"),
        ("DequantizeLinear (xq", "DequantizeLinear <axis = 1> (xq"),
    ],
    "per-channel weight": [("<axis = 1> (w", "<axis = 0> (w")],
    "no blocks": [("<axis = 1> (w", "<axis = 1, block_size = 2> (w")],
    "scale type": [],
    "opset": [('"" : 20', '"" : 18')],
    "Q then DQ": [("xd = DequantizeLinear (xq, s, z)", "xd = Cast <to = 1> (xq)")],
    "quantized operator": [("out = MatMul (xd, wd)", "y = MatMul (xd, wd)\n    out = Add (y, xd)")],
    "unknown operator": [("out = MatMul (xd, wd)", "y = MatMul (xd, wd)\n    out = Hardmax (y)")],
    "type": [("float[4, 2] x", "double[4, 2] x")],
    "FP32 normalization": [
        ("float[4, 2] x", "float16[4, 2] h, float[4, 2] x"),
        ("out = MatMul", "n = LayerNormalization (h, g)\n    out = MatMul"),
        ("<float s", "<float16[2] g = {1, 1}, float s"),
    ],
}


HALF_SCALE = ("scale type", "opset")  # ONNX text has no float16 constants


def broken(text: str, *, half_scale: bool = False) -> set[str]:
    model = ir.from_onnx_text(text)
    if half_scale:
        scale = model.graph.initializers["s"]
        scale.const_value = ir.tensor(np.float16(0.05), name="s")
        scale.dtype = ir.DataType.FLOAT16
    return {violation.rule for violation in violations_of(model)}


def test_a_sound_graph_breaks_no_rule() -> None:
    assert broken(SOUND) == set()


@pytest.mark.parametrize("rule", BROKEN)
def test_a_violation_is_named(rule: str) -> None:
    text = SOUND
    for old, new in BROKEN[rule]:
        assert old in text
        text = text.replace(old, new)
    assert rule in broken(text, half_scale=rule in HALF_SCALE)


def test_every_rule_has_its_violation() -> None:
    assert set(BROKEN) == set(RULES)


def test_a_violation_names_the_node_and_says_what_was_found() -> None:
    model = ir.from_onnx_text(SOUND.replace("int8 z = {0}", "int8 z = {3}"))
    model.graph[0].name = "blocks.0.attn.qkv/QuantizeLinear"
    first = str(next(violations_of(model)))
    assert first == "blocks.0.attn.qkv/QuantizeLinear: zero point: zero point 3, expected 0"


def test_an_operator_of_another_domain_needs_a_plugin() -> None:
    text = SOUND.replace('"" : 20', '"" : 20, "com.microsoft" : 1').replace(
        "out = MatMul (xd, wd)", "y = MatMul (xd, wd)\n    out = com.microsoft.FastGelu (y)"
    )
    violations = [v for v in violations_of(ir.from_onnx_text(text)) if v.rule == "unknown operator"]
    assert "needs a plugin" in violations[0].problem
