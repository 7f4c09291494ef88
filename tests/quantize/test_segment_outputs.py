"""Values inside a segment: the outputs of its branches."""

from __future__ import annotations

import onnx_ir as ir

from ditc.program import BRANCH_KEY
from ditc.quantize.segment_outputs import branch_outputs, branch_values

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
segment (float[2, 4] h, float[4, 4] w, float[4] gate) => (float[2, 4] after, float[2, 4] cached) {
    shape = Shape(h)
    normed = Relu(h)
    product = MatMul(normed, w)
    attn = Reshape(product, shape)
    scaled = Mul(attn, gate)
    after = Add(h, scaled)
    cached = Reshape(after, shape)
}
"""


def test_the_output_of_a_branch_is_the_last_that_others_read() -> None:
    """`shape` leaves the first branch too, since constants are shared; an output of the graph is read by the caller."""
    model = ir.from_onnx_text(GRAPH)
    for node, branch in zip(model.graph, ["a", "a", "a", "a", None, None, "b"], strict=True):
        if branch is not None:
            node.metadata_props[BRANCH_KEY] = branch
    assert {branch: value.name for branch, value in branch_outputs(model).items()} == {"a": "attn", "b": "cached"}


def test_what_leads_back_into_a_branch_is_none_of_its_outputs() -> None:
    """Some nodes between `product` and `cached` have lost the branch's name."""
    model = ir.from_onnx_text(GRAPH)
    for node, branch in zip(model.graph, ["a", "a", "a", None, None, None, "a"], strict=True):
        if branch is not None:
            node.metadata_props[BRANCH_KEY] = branch
    assert [value.name for value in branch_values(model)["a"]] == ["cached"]
    model.graph[6].metadata_props.pop(BRANCH_KEY)
    model.graph[3].metadata_props[BRANCH_KEY] = "a"
    assert [value.name for value in branch_values(model)["a"]] == ["attn"]
