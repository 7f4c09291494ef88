"""Sites where a factor per channel folds: found by what a graph computes, and none that would change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from ditc.program import BRANCH_KEY, PATH_KEY
from ditc.quantize.fold_sites import (
    TableFold,
    ValuesFold,
    WeightFold,
    common_sites,
    fold_into_segment,
    shapes_of_rows,
    table_factors,
)

Make = Callable[..., ir.Model]
Run = Callable[..., dict[str, np.ndarray]]

DIM, TOKENS, HEADS = 8, 5, 2
RNG = np.random.default_rng(0)
CONSTANTS: dict[str, np.ndarray] = {
    "g": np.ones(DIM, np.float32),
    "wqkv": RNG.standard_normal((DIM, 3 * DIM)).astype(np.float32),
    "bqkv": RNG.standard_normal(3 * DIM).astype(np.float32),
    "wproj": RNG.standard_normal((DIM, DIM)).astype(np.float32),
    "heads": np.array([-1, TOKENS, HEADS, DIM // HEADS], np.int64),
    "flat": np.array([-1, TOKENS, DIM], np.int64),
}
INPUTS = f"float[batch, {TOKENS}, {DIM}] x, float[batch, 3, {DIM}] rows"
OUTPUTS = f"float[batch, {TOKENS}, {DIM}] out"
ATTENTION = """
shift, scale, gate = Split<axis = 1, num_outputs = 3>(rows)
n = LayerNormalization(x, g)
m = Mul(n, scale)
a = Add(m, shift)
p = MatMul(a, wqkv)
l = Add(p, bqkv)
q, k, v = Split<axis = 2, num_outputs = 3>(l)
q4 = Reshape(q, heads)
k4 = Reshape(k, heads)
v4 = Reshape(v, heads)
qt = Transpose<perm = [0, 2, 1, 3]>(q4)
kt = Transpose<perm = [0, 2, 3, 1]>(k4)
vt = Transpose<perm = [0, 2, 1, 3]>(v4)
s = MatMul(qt, kt)
w = Softmax<axis = -1>(s)
z = MatMul(w, vt)
zt = Transpose<perm = [0, 2, 1, 3]>(z)
zr = Reshape(zt, flat)
out = MatMul(zr, wproj)
"""
QKV, PROJ = ("wqkv",), ("wproj",)


def attention(
    make: Make, *changes: tuple[str, str], inputs: str = INPUTS, outputs: str = OUTPUTS, **more: np.ndarray
) -> ir.Model:
    """One attention branch, its text changed; a linear layer's path is the name of its weight."""
    body = ATTENTION
    for old, new in changes:
        assert old in body
        body = body.replace(old, new)
    used = {name: value for name, value in (CONSTANTS | more).items() if name in body}
    model = make(inputs, outputs, body, **used)
    for node in model.graph:
        node.metadata_props[BRANCH_KEY] = "attn"
        weight = node.inputs[-1]
        node.metadata_props[PATH_KEY] = str(weight.name) if weight is not None and node.op_type == "MatMul" else "attn"
    return model


def extra(shape: str) -> str:
    return f"{OUTPUTS}, float[{shape}] extra"


def folds(model: ir.Model) -> dict[tuple[str, ...], Any]:
    return {site.layers: site.fold for site in common_sites({"full": model})}


def test_modulation_and_values_are_found(make_graph: Make) -> None:
    folded = folds(attention(make_graph))
    scale, shift = tuple(range(DIM, 2 * DIM)), tuple(range(DIM))
    assert folded[QKV] == TableFold("rows", scale, shift)
    assert folded[PROJ] == WeightFold("wqkv", tuple(range(2 * DIM, 3 * DIM)))
    assert len(folded) == 2


TEXT_BODY = """
    q4 = Reshape(x, heads)
    q = Transpose<perm = [0, 2, 1, 3]>(q4)
    kt = Transpose<perm = [0, 1, 3, 2]>(request_keys)
    s = MatMul(q, kt)
    p = Softmax<axis = -1>(s)
    z = MatMul(p, request_values)
    zt = Transpose<perm = [0, 2, 1, 3]>(z)
    zr = Reshape(zt, flat)
    out = MatMul(zr, wproj)
"""
WORDS = 3


def attention_to_a_text(make: Make, *replaced: tuple[str, str], outputs: str = OUTPUTS) -> ir.Model:
    table = f"[batch, {HEADS}, {WORDS}, {DIM // HEADS}]"
    body = TEXT_BODY
    for old, new in replaced:
        assert old in body
        body = body.replace(old, new)
    used = {name: value for name, value in CONSTANTS.items() if name in ("heads", "flat", "wproj")}
    inputs = f"float[batch, {TOKENS}, {DIM}] x, float{table} request_keys, float{table} request_values"
    model = make(inputs, outputs, body, **used)
    for value in model.graph.inputs:
        value.name = str(value.name).replace("request_", "request.")
    for node in model.graph:
        node.metadata_props[BRANCH_KEY] = "attn2"
        node.metadata_props[PATH_KEY] = str(node.inputs[-1].name) if node.op_type == "MatMul" else "attn2"
    return model


def test_what_mixes_a_text_folds_into_its_values(make_graph: Make, run_model: Run) -> None:
    before, after = (attention_to_a_text(make_graph) for _ in range(2))
    (site,) = common_sites({"full": after})
    assert site.layers == PROJ
    assert site.fold == ValuesFold("request.values", tuple(range(DIM)))
    rng = np.random.default_rng(3)
    factors = {site: rng.uniform(0.1, 10, DIM)}
    assert fold_into_segment(after, factors)
    tables = table_factors(factors, shapes_of_rows(after))
    assert {name: factor.shape for name, factor in tables.items()} == {"request.values": (HEADS, 1, DIM // HEADS)}
    feeds = {"x": rng.standard_normal((2, TOKENS, DIM))}
    feeds |= {f"request.{name}": rng.standard_normal((2, HEADS, WORDS, DIM // HEADS)) for name in ("keys", "values")}
    expected = run_model(before, {key: np.float32(value) for key, value in feeds.items()})["out"]
    feeds["request.values"] = feeds["request.values"] * tables["request.values"]
    output = run_model(after, {key: np.float32(value) for key, value in feeds.items()})["out"]
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        ("z = MatMul(p, request_values)", "extra = Relu(request_values) z = MatMul(p, request_values)"),
        ("z = MatMul(p, request_values)", "extra = Relu(request_values) v = Neg(request_values) z = MatMul(p, v)"),
    ],
)
def test_values_of_a_text_that_are_read_otherwise_take_no_factor(change: tuple[str, str], make_graph: Make) -> None:
    outputs = f"{OUTPUTS}, float[batch, {HEADS}, {WORDS}, {DIM // HEADS}] extra"
    assert folds(attention_to_a_text(make_graph, change, outputs=outputs)) == {}
    whole = attention_to_a_text(make_graph)
    other = attention_to_a_text(make_graph, ("out = MatMul(zr, wproj)", "out = Relu(zr)"))
    assert folds(whole) != {}
    assert common_sites({"full": whole, "row": other}) == ()


WRITTEN_OTHERWISE: dict[str, tuple[list[tuple[str, str]], dict[str, np.ndarray]]] = {
    "as DiT": ([], {}),
    "operands the other way round": (
        [("Mul(n, scale)", "Mul(scale, n)"), ("Add(m, shift)", "Add(shift, m)"), ("Add(p, bqkv)", "Add(bqkv, p)")],
        {},
    ),
    "rows gathered and widened": (
        [
            (
                "shift, scale, gate = Split<axis = 1, num_outputs = 3>(rows)",
                "f = Gather<axis = 1>(rows, two) c = Gather<axis = 1>(rows, zero) "
                "shift = Unsqueeze(f, one) scale = Unsqueeze(c, one)",
            )
        ],
        {"two": np.array(2), "zero": np.array(0), "one": np.array([1])},
    ),
    "heads interleaved": (
        [
            ("v4 = Reshape(v, heads)", "v4 = Reshape(v, inter)"),
            ("vt = Transpose<perm = [0, 2, 1, 3]>(v4)", "vt = Transpose<perm = [0, 3, 1, 2]>(v4)"),
        ],
        {"inter": np.array([-1, TOKENS, DIM // HEADS, HEADS])},
    ),
    "no bias": ([("l = Add(p, bqkv)", "l = Identity(p)")], {}),
    "v from a layer of its own": (
        [("v4 = Reshape(v, heads)", "pv = MatMul(a, wv) v4 = Reshape(pv, heads)")],
        {"wv": RNG.standard_normal((DIM, DIM)).astype(np.float32)},
    ),
}


@pytest.mark.parametrize("name", WRITTEN_OTHERWISE)
def test_folding_changes_nothing_however_it_is_written(name: str, make_graph: Make, run_model: Run) -> None:
    changes, more = WRITTEN_OTHERWISE[name]
    before, after = (attention(make_graph, *changes, **more) for _ in range(2))
    rng = np.random.default_rng(3)
    factors = {site: rng.uniform(0.1, 10, DIM) for site in common_sites({"full": after})}
    assert len(factors) == 2
    assert fold_into_segment(after, factors)
    table = table_factors(factors, {"rows": (3, DIM)})["rows"]
    feeds = {"x": rng.standard_normal((2, TOKENS, DIM)), "rows": rng.standard_normal((2, 3, DIM))}
    expected = run_model(before, {key: np.float32(value) for key, value in feeds.items()})["out"]
    feeds["rows"] = feeds["rows"] * table
    output = run_model(after, {key: np.float32(value) for key, value in feeds.items()})["out"]
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layers", "read"), [(QKV, "a"), (PROJ, "zr")])
def test_the_layers_read_the_divided_input(
    layers: tuple[str, ...], read: str, make_graph: Make, run_model: Run
) -> None:
    rng = np.random.default_rng(3)
    factors, x = rng.uniform(0.1, 10, DIM), np.float32(rng.standard_normal((2, TOKENS, DIM)))
    rows, model = np.float32(rng.standard_normal((2, 3, DIM))), attention(make_graph)
    before = run_model(with_output(attention(make_graph), read), {"x": x, "rows": rows})[read]
    chosen = {site: factors for site in common_sites({"full": model}) if site.layers == layers}
    fold_into_segment(model, chosen)
    rows = np.float32(rows * table_factors(chosen, {"rows": (3, DIM)}).get("rows", np.float64(1)))
    divided = run_model(with_output(model, read), {"x": x, "rows": rows})[read]
    np.testing.assert_allclose(divided, before / factors, rtol=1e-4, atol=1e-6)


def with_output(model: ir.Model, name: str) -> ir.Model:
    model.graph.outputs.append(next(v for node in model.graph for v in node.outputs if v.name == name))
    return model


LEFT: dict[str, tuple[list[tuple[str, str]], str, dict[str, np.ndarray], set[tuple[str, ...]]]] = {
    "the scale row is read again": (
        [("out = ", "extra = Relu(scale) out = ")], extra(f"batch, 1, {DIM}"), {}, {PROJ},
    ),
    "the shift row leaves the graph": (
        [("shift, scale", "extra, scale"), ("Add(m, shift)", "Add(m, extra)")], extra(f"batch, 1, {DIM}"), {}, {PROJ},
    ),
    "the modulated input is read again": (
        [("out = ", "extra = Relu(a) out = ")], extra(f"batch, {TOKENS}, {DIM}"), {}, {PROJ},
    ),
    "the product is read again": ([("out = ", "extra = Relu(m) out = ")], extra(f"batch, {TOKENS}, {DIM}"), {}, {PROJ}),
    "something is added to the row": (
        [("m = Mul(n, scale)", "c = Add(scale, g) m = Mul(n, c)")], OUTPUTS, {}, {PROJ},
    ),
    "one number scales all channels": (
        [("m = Mul(n, scale)", "c = Gather<axis = 2>(scale, first) m = Mul(n, c)")],
        OUTPUTS, {"first": np.array([0])}, {PROJ},
    ),
    "the weight is read again": ([("out = ", "extra = Relu(wproj) out = ")], extra(f"{DIM}, {DIM}"), {}, {QKV}),
    "a nonlinearity comes between": ([("out = MatMul(zr", "zn = Relu(zr) out = MatMul(zn")], OUTPUTS, {}, {QKV}),
    "the values are read again": ([("out = ", "extra = Relu(v4) out = ")], extra("b, t, h, c"), {}, {QKV}),
    "the mixture is read again": ([("out = ", "extra = Relu(z) out = ")], extra("b, h, t, c"), {}, {QKV}),
    "heads share their values": (
        [("z = MatMul(w, vt)", "vs = Gather<axis = 1>(vt, first) z = MatMul(w, vs)")],
        OUTPUTS, {"first": np.array([0, 0])}, {QKV},
    ),
    "tokens are mixed with channels": (
        [("vt = Transpose<perm = [0, 2, 1, 3]>(v4)", "vt = Reshape(v4, mixed)")],
        OUTPUTS, {"mixed": np.array([-1, HEADS, TOKENS, DIM // HEADS])}, {QKV},
    ),
    "two layers share a weight": (
        [("out = MatMul(zr, wproj)", "o = MatMul(zr, wproj) out = MatMul(o, wproj)")], OUTPUTS, {}, {QKV},
    ),
    "the bias has another reader": (
        [("out = ", "extra = Relu(bqkv) out = ")], extra(f"{3 * DIM}"), {}, {QKV},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_a_layer_is_left_alone_where(name: str, make_graph: Make) -> None:
    changes, outputs, more, sites = LEFT[name]
    assert set(folds(attention(make_graph, *changes, outputs=outputs, **more))) == sites


def test_a_layer_that_is_computed_twice_is_left_alone(make_graph: Make) -> None:
    """Its name would mean the first of the two in one segment and the second in another."""
    more = {"wagain": CONSTANTS["wproj"]}
    model = attention(make_graph, ("out = MatMul(zr, wproj)", "o = MatMul(zr, wproj) out = MatMul(o, wagain)"), **more)
    assert set(folds(model)) == {QKV, PROJ}
    for node in model.graph:
        if node.metadata_props[PATH_KEY] == "wagain":
            node.metadata_props[PATH_KEY] = "wproj"
    assert set(folds(model)) == {QKV}


def test_another_segment_that_reads_the_rows_forbids_them(make_graph: Make) -> None:
    full = attention(make_graph)
    reuse = make_graph(
        INPUTS, OUTPUTS, "shift, scale, gate = Split<axis = 1, num_outputs = 3>(rows) out = Mul(x, gate)"
    )
    assert len(common_sites({"full": full, "reuse": reuse})) == 2
    reads = make_graph(
        INPUTS, OUTPUTS, "shift, scale, gate = Split<axis = 1, num_outputs = 3>(rows) out = Mul(x, scale)"
    )
    assert [site.layers for site in common_sites({"full": full, "reuse": reads})] == [PROJ]


def test_rows_of_later_steps_are_rows_of_the_same_table(make_graph: Make) -> None:
    """A step that adds up what the next steps reuse takes their tables too: their gates are fine, their scales not."""
    inputs = f"{INPUTS}, float[2, batch, 3, {DIM}] ahead_rows"
    for row, sites in (("2", [QKV, PROJ]), ("1", [PROJ])):
        split = "later = Gather<axis = 2>(ahead_rows, row) sums = ReduceSum<keepdims = 0>(later, axes)"
        constants = {"row": np.array(int(row)), "axes": np.array([0])}
        model = attention(make_graph, ("out = ", f"{split} extra = Relu(sums) out = "), inputs=inputs, **constants)
        model.graph.inputs[2].name = "ahead.rows"
        assert [site.layers for site in common_sites({"full": model})] == sites


def test_another_segment_that_computes_a_layer_otherwise_forbids_it(make_graph: Make) -> None:
    full, other = attention(make_graph), attention(make_graph, ("Mul(n, scale)", "Mul(n, gate)"))
    assert [site.layers for site in common_sites({"full": full, "row": other})] == [PROJ]
    other = attention(make_graph, ("v4 = Reshape(v, heads)", "v4 = Reshape(q, heads)"))
    assert [site.layers for site in common_sites({"full": full, "row": other})] == [QKV]
