"""Groups of layers: every one in exactly one group, those that share a Q/DQ pair together."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from ditc.bundle import Bundle
from ditc.errors import InputError
from ditc.exporter.onnx_files import load_graph
from ditc.program import BRANCH_KEY, PATH_KEY
from ditc.quantize.layer_groups import GROUPINGS, groups_of
from ditc.quantize.linears import linears_of
from ditc.quantize.qdq import insert_qdq
from ditc.quantize.scale_table import ScaleTable

WEIGHTS = ", ".join(["1"] * 16)
SEPARATE = f"""
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 4] x) => (float[batch, 4] out)
<float[4, 4] wq = {{{WEIGHTS}}}, float[4, 4] wk = {{{WEIGHTS}}}, float[4, 4] wo = {{{WEIGHTS}}}> {{
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    s = Add (q, k)
    out = MatMul (s, wo)
}}
"""


def separate() -> ir.Model:
    """q and k read one tensor, the projection another; all in one branch."""
    model = ir.from_onnx_text(SEPARATE)
    for node, name in zip(model.graph, ("to_q", "to_k", "sum", "to_out"), strict=True):
        node.metadata_props.update({PATH_KEY: f"layers.0.attn.{name}", BRANCH_KEY: "layers.0.attn"})
    return model


@pytest.mark.parametrize("by", GROUPINGS)
def test_groups_hold_every_linear_layer_exactly_once(by: str, bundles: dict[str, Bundle]) -> None:
    model = load_graph(bundles["cached"].reference_path("full"))
    names = Counter(name for group in groups_of(model, by) for name in group.names)
    assert names == Counter(linear.name for linear in linears_of(model))
    assert len(names) == 8


def test_groups_grow_from_layers_over_branches_to_blocks(bundles: dict[str, Bundle]) -> None:
    model = load_graph(bundles["cached"].reference_path("full"))
    assert [len(groups_of(model, by)) for by in ("layer", "branch", "block")] == [8, 4, 2]
    block = groups_of(model, "block")[1]
    assert block.branches == ("blocks.1.attn", "blocks.1.mlp")
    assert block.paths[0].startswith("blocks.1.attn.")


def test_layers_that_share_a_pair_are_one_group() -> None:
    first, second = groups_of(separate(), "layer")
    assert first.paths == ("layers.0.attn.to_q", "layers.0.attn.to_k")
    assert second.paths == ("layers.0.attn.to_out",)


def test_only_the_layers_of_a_group_are_quantized() -> None:
    model = separate()
    group = groups_of(model, "layer")[1]
    scales = {linear.path: 0.1 for linear in linears_of(model)}
    table = ScaleTable(method="max", segment_sha256="", calibration_digest="", scales=scales)
    assert insert_qdq(model, table, frozenset(group.names))
    assert [node.op_type for node in model.graph].count("QuantizeLinear") == 1
    for name in ("wq", "wk"):
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), np.ones((4, 4), np.float32))
    assert "wo" not in model.graph.initializers


def test_no_layers_is_the_segment_as_it_was() -> None:
    table = ScaleTable(method="max", segment_sha256="", calibration_digest="", scales={"none": 1.0})
    assert not insert_qdq(separate(), table, frozenset())


def test_an_unknown_grouping_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown grouping 'head'; choose one of: block, branch, layer"):
        groups_of(separate(), "head")
