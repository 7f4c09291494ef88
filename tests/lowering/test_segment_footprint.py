"""A segment's needs of a device: counted on graphs small enough to count by hand."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from ditc.lowering.segment_footprint import footprint_of

CHAIN = """
<ir_version: 10, opset_import: ["" : 20]>
chain (float[batch, 8] x) => (float[batch, 8] y)
<float[8] w = {1, 1, 1, 1, 1, 1, 1, 1}, float[batch, 8] a, float[batch, 8] b, float[batch, 8] c>
{
  a = Add (x, w)
  b = Add (a, w)
  c = Add (b, w)
  y = Add (c, w)
}
"""

FORK = """
<ir_version: 10, opset_import: ["" : 20]>
fork (float16[batch, 8] x) => (float16[batch, 8] y)
<float16[batch, 8] a, float16[batch, 8] b, float16[batch, 8] c>
{
  a = Neg (x)
  b = Neg (x)
  c = Add (a, b)
  y = Add (c, a)
}
"""


@pytest.mark.parametrize(
    ("text", "activations", "weights"),
    [
        (CHAIN, 2 * 3 * 8 * 4, 8 * 4),  # one value made from the one before
        (FORK, 3 * 3 * 8 * 2, 0),  # a and b live until c is made
    ],
)
def test_activations_count_what_is_alive_at_one_time(text: str, activations: int, weights: int) -> None:
    footprint = footprint_of(ir.from_onnx_text(text), {"batch": 3})
    assert footprint.activation_bytes == activations
    assert footprint.weight_bytes == weights


EXPRESSION = """
<ir_version: 10, opset_import: ["" : 20]>
flattened (float[batch, 4] x) => (float[batch, 4] y)
<int64[2] flat = {-1, 2}, int64[2] back = {-1, 4}, float["2*batch", 2] a, float["2*batch", 2] b>
{
  a = Reshape (x, flat)
  b = Neg (a)
  y = Reshape (b, back)
}
"""


def test_a_dimension_may_be_an_expression() -> None:
    assert footprint_of(ir.from_onnx_text(EXPRESSION), {"batch": 3}).activation_bytes == 2 * 3 * 4 * 4


def test_ports_keep_their_open_dimensions() -> None:
    port = footprint_of(ir.from_onnx_text(CHAIN), {"batch": 3}).inputs["x"]
    assert port.shape == ("batch", 8)
    assert port.size_bytes({"batch": 5}) == 5 * 8 * 4


WORK = """
<ir_version: 10, opset_import: ["" : 20]>
work (float[batch, 8] x) => (float[batch, 2] y)
<float scale = {0.1}, int8 zero = {0}, int8[8, 4] w, float[4] ws = {1, 1, 1, 1}, int8[4] wz = {0, 0, 0, 0},
 float[4, 2] v, float[batch, 8] xd, float[batch, 4] h, float[batch, 4] g>
{
  xq = QuantizeLinear (x, scale, zero)
  xd = DequantizeLinear (xq, scale, zero)
  wd = DequantizeLinear <axis = 1> (w, ws, wz)
  h = MatMul (xd, wd)
  g = Neg (h)
  y = MatMul (g, v)
}
"""


def test_work_is_counted_by_type() -> None:
    footprint = footprint_of(ir.from_onnx_text(WORK), {"batch": 3})
    assert footprint.int8_operations == 2 * 3 * 8 * 4
    assert footprint.float_operations == 2 * 3 * 4 * 2
    assert footprint.moved_bytes == 2 * 3 * 4 * 4  # Neg reads and writes (3, 4) of float32; Q/DQ belong to the product
