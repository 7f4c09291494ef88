"""Scales of their own at every step: the same numbers as constants, integer kernels, and nothing left to pay."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from ditc.bundle import Bundle
from ditc.engines.backend import lowered_path, runnable_path
from ditc.engines.onnxrt import OnnxRuntimeBackend, kernel_census
from ditc.errors import DitcError
from ditc.exporter.onnx_files import load_graph, save_graph
from ditc.lowering.backend_forms import lower
from ditc.lowering.modulation_folding import fold_magnitudes_into_tables
from ditc.lowering.segment_footprint import footprint_of
from ditc.lowering.tensorrt_rules import violations_of
from ditc.program import BRANCH_KEY, PATH_KEY
from ditc.quantize.activation_pairs import activation_pairs
from ditc.quantize.qdq import insert_qdq
from ditc.quantize.scale_table import ScaleTable
from ditc.runtime.closeness import relative_error
from ditc.tables import SCALES_INPUT, SCALES_TABLE

BRANCH = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 4, 8] x, float[batch, 3, 8] modulation) => (float[batch, 4, 8] out) {
    shift, scale, gate = Split <axis = 1, num_outputs = 3> (modulation)
    n = LayerNormalization <axis = -1> (x, ones)
    nm = Mul (n, scale)
    a = Add (nm, shift)
    p1 = MatMul (a, w1)
    h = Add (p1, b1)
    g = Gelu <approximate = "tanh"> (h)
    p2 = MatMul (g, w2)
    f = Add (p2, b2)
    gated = Mul (gate, f)
    out = Add (x, gated)
}
"""
SCALES = {"a.fc1": 0.03, "a.fc2": 0.02}


def branch(text: str = BRANCH) -> ir.Model:
    """A modulated branch: norm, scale and shift from a table, fc1, GELU, fc2, gate and residual."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (8, 16), "b1": (16,), "w2": (16, 8), "b2": (8,)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    constants = {"ones": np.ones(8, np.float32), **weights}
    used = {name: array for name, array in constants.items() if f"{name})" in text}
    model = ir.from_onnx_text(text, [ir.tensor(array, name=name) for name, array in used.items()])
    for node in model.graph:
        node.metadata_props[BRANCH_KEY] = "a"
        node.metadata_props[PATH_KEY] = {"p1": "a.fc1", "p2": "a.fc2"}.get(str(node.outputs[0].name), "a")
    ShapeInferencePass()(model)
    return model


def table(binding: str, steps: int = 2, scales: dict[str, float] | None = None) -> ScaleTable:
    """Scales that are the same at every step."""
    scales = scales or SCALES
    by_step = binding == "per-step"
    return ScaleTable(
        method="max",
        segment_sha256="",
        calibration_digest="",
        scales=scales,
        binding=binding,
        steps={path: (scale,) * steps for path, scale in scales.items()} if by_step else {},
        columns={path: column for column, path in enumerate(scales)} if by_step else {},
    )


def quantized(binding: str, text: str = BRANCH) -> ir.Model:
    model = branch(text)
    assert insert_qdq(model, table(binding))
    return model


def feeds(scales: dict[str, float] | None = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    arrays = {"x": rng.standard_normal((3, 4, 8)), "modulation": rng.standard_normal((3, 3, 8))}
    if scales:
        arrays[SCALES_INPUT] = table("per-step", scales=scales).magnitudes()[0]
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def run(model: ir.Model, path: Path, given: dict[str, np.ndarray], output: str = "out") -> np.ndarray:
    save_graph(model, path)
    return OnnxRuntimeBackend().session(path).run([output], given)[0]


def without_rounding(model: ir.Model) -> ir.Model:
    """The same graph in FP: every Q/DQ pair of an activation taken out."""
    for quantize in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
        (dequantize,) = quantize.outputs[0].consumers()
        dequantize.outputs[0].replace_all_uses_with(quantize.inputs[0])
        model.graph.remove([dequantize, quantize], safe=True)
    return model


def divided(model: ir.Model) -> list[str]:
    """The layers whose activation is divided by a node of its own."""
    return [pair.divide.name.split("/")[0] for pair in activation_pairs(model) if pair.divide is not None]


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_scales_that_are_equal_at_all_steps_are_the_static_ones(tmp_path: Path) -> None:
    """Portable form and ONNX Runtime's: a value on the border of two integers may go either way, no more."""
    expected = run(quantized("static"), tmp_path / "static.onnx", feeds())
    portable = quantized("per-step")
    assert relative_error(run(portable, tmp_path / "portable.onnx", feeds(SCALES)), expected) < 1e-5
    assert lower(portable, "onnxrt")
    assert relative_error(run(portable, tmp_path / "lowered.onnx", feeds(SCALES)), expected) < 1e-5


def test_the_input_decides_the_scale(tmp_path: Path) -> None:
    """One graph, two steps: each is the static graph of its own scales."""
    other = {"a.fc1": 0.06, "a.fc2": 0.005}
    static = branch()
    insert_qdq(static, table("static", scales=other))
    expected = run(static, tmp_path / "static.onnx", feeds())
    output = run(quantized("per-step"), tmp_path / "step.onnx", feeds(other))
    assert relative_error(output, expected) < 1e-5
    assert relative_error(output, run(quantized("static"), tmp_path / "first.onnx", feeds())) > 1e-3


def test_the_portable_form_has_constant_scales_and_breaks_no_rule_of_tensorrt() -> None:
    model = quantized("per-step")
    scales = [node.inputs[1] for node in model.graph if node.op_type == "QuantizeLinear"]
    assert [float(scale.const_value.numpy()) for scale in scales] == [np.float32(1 / 127)] * 2
    assert [str(violation) for violation in violations_of(model)] == []
    lower(model, "trt")
    assert [str(violation) for violation in violations_of(model)] == []


def test_quantizing_twice_changes_nothing_with_steps_too(tmp_path: Path) -> None:
    model = quantized("per-step")
    save_graph(model, tmp_path / "once.onnx")
    assert not insert_qdq(model, table("per-step"))
    save_graph(model, tmp_path / "twice.onnx")
    assert (tmp_path / "once.onnx").read_bytes() == (tmp_path / "twice.onnx").read_bytes()


@pytest.mark.parametrize("backend", ["onnxrt", "trt"])
def test_lowering_scales_twice_is_lowering_them_once(backend: str) -> None:
    model = quantized("per-step")
    assert lower(model, backend)
    assert not lower(model, backend)


def test_onnx_runtime_pays_nothing_for_a_step_but_one_cut_of_the_input() -> None:
    static, step = quantized("static"), quantized("per-step")
    for model in (static, step):
        lower(model, "onnxrt")
    assert kinds(step) - kinds(static) == Counter({"Split": 1, "Div": 1})


def test_a_modulated_layer_is_scaled_through_its_table_and_others_by_a_division(tmp_path: Path) -> None:
    model = quantized("per-step")
    assert divided(model) == ["a.fc1", "a.fc2"]
    assert fold_magnitudes_into_tables(model)
    assert divided(model) == ["a.fc2"]
    expected = run(quantized("per-step"), tmp_path / "plain.onnx", feeds(SCALES))
    assert relative_error(run(model, tmp_path / "folded.onnx", feeds(SCALES)), expected) < 1e-5


def test_folding_a_scale_changes_nothing_in_fp(tmp_path: Path) -> None:
    plain = run(without_rounding(quantized("per-step")), tmp_path / "plain.onnx", feeds(SCALES))
    model = quantized("per-step")
    fold_magnitudes_into_tables(model)
    folded = run(without_rounding(model), tmp_path / "folded.onnx", feeds(SCALES))
    assert relative_error(folded, plain) < 1e-6


def test_folding_passes_over_the_table_instead_of_the_tokens() -> None:
    """At DiT-XL/2's 256 tokens the table of a block, 6 rows, is small beside the two activations that it saves."""
    text = BRANCH.replace("[batch, 4, 8]", "[batch, 256, 8]")
    plain, folded = quantized("per-step", text), quantized("per-step", text)
    fold_magnitudes_into_tables(folded)
    before, after = (footprint_of(model, {"batch": 2}).moved_bytes for model in (plain, folded))
    division = 2 * 2 * 256 * 8 * 4  # read and write, batch, tokens, width, float32
    assert division * 0.95 < before - after <= division


@pytest.mark.parametrize(
    ("change", "to"),
    [
        ("gated = Mul (gate, f)", "gated = Mul (scale, f)"),  # the row has another reader
        ("out = Add (x, gated)", "y = Add (x, gated)\n out = Add (y, a)"),  # the activation has
        ("nm = Mul (n, scale)", "nm = Mul (n, x)"),  # no row at all
        ("a = Add (nm, shift)", "a = Sub (nm, shift)"),
    ],
)
def test_what_is_not_a_modulation_alone_keeps_its_division(change: str, to: str, tmp_path: Path) -> None:
    text = BRANCH.replace(change, to)
    model = quantized("per-step", text)
    assert not fold_magnitudes_into_tables(model)
    assert divided(model) == ["a.fc1", "a.fc2"]


def test_layers_that_share_an_input_share_its_column_and_are_restored_each(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, 4, 8] x) => (float[batch, 4, 16] p1, float[batch, 4, 16] p2) {
        p1 = MatMul (x, w1)
        p2 = MatMul (x, w1)
    }
    """
    shared = table("per-step").model_copy(update={"columns": {"a.fc1": 0, "a.fc2": 0}})
    model = branch(text)
    insert_qdq(model, shared)
    assert kinds(model)["QuantizeLinear"] == kinds(model)["Div"] == 1
    assert kinds(model)["Mul"] == 2
    save_graph(model, tmp_path / "portable.onnx")
    lower(model, "onnxrt")
    save_graph(model, tmp_path / "lowered.onnx")
    given = {"x": feeds()["x"], SCALES_INPUT: shared.magnitudes()[0]}
    assert given[SCALES_INPUT].shape == (1,)
    census = kernel_census(OnnxRuntimeBackend(), tmp_path / "lowered.onnx")
    assert census["MatMulIntegerToFloat"] == 2
    outputs, expected = (
        OnnxRuntimeBackend().session(tmp_path / f"{name}.onnx").run(None, given) for name in ("lowered", "portable")
    )
    for output, other in zip(outputs, expected, strict=True):  # both products are graph outputs, and keep their names
        assert relative_error(output, other) < 1e-5


def test_a_table_of_the_model_with_the_name_of_the_scales_is_refused() -> None:
    with pytest.raises(DitcError, match="the model has a table named 'scales'"):
        quantized("per-step", BRANCH.replace("modulation", SCALES_INPUT))


def test_a_magnitude_that_fp16_can_not_divide_by_is_raised() -> None:
    magnitudes = table("per-step", scales={"a.fc1": 1e-9, "a.fc2": 0.02}).magnitudes()
    assert magnitudes.min() == np.float32(2.0**-14)
    assert magnitudes.max() == pytest.approx(127 * 0.02)


def test_a_scale_of_one_step_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale of a\.fc1 is 0\.0"):
        ScaleTable.model_validate(table("per-step").model_dump() | {"steps": {"a.fc1": (0.1, 0.0)}})


def test_every_layer_of_a_bundle_with_step_scales_runs_an_integer_kernel(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["per-step"]
    census, static = (
        kernel_census(OnnxRuntimeBackend(), runnable_path(bundles[name].segment_path("full"), "onnxrt"))
        for name in ("per-step", "cached")
    )
    assert bundle.manifest.checks["kernels"] == {"full": {"linears": 8, "integer": 8}}
    assert census["MatMulIntegerToFloat"] == census["QuantizeLinear"] == 8
    assert census["DequantizeLinear"] == 0
    assert census - static == Counter({"Split": 2, "Div": 1, "Sub": 1, "Cast": 1})  # scales and zero points of all


def test_the_scales_of_a_bundle_are_an_input_and_a_table(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["per-step"]
    magnitudes = bundle.tables()[SCALES_TABLE]
    assert magnitudes.shape == (6, 8)
    assert magnitudes.dtype == np.float32
    scales = ScaleTable.model_validate_json((bundle.path / "calib" / "scales.json").read_bytes())
    for path, column in scales.columns.items():
        np.testing.assert_allclose(magnitudes[:, column], 127 * np.array(scales.steps[path]), rtol=1e-6)
    with OnnxRuntimeBackend().open(bundle.segment_path("full")) as engine:
        assert engine.inputs[SCALES_INPUT].shape == (8,)
    with OnnxRuntimeBackend().open(bundle.segment_path("reuse")) as engine:
        assert SCALES_INPUT not in engine.inputs


def test_the_typed_form_folds_what_it_can_and_keeps_the_names_of_its_tensors(bundles: dict[str, Bundle]) -> None:
    segment = bundles["per-step"].segment_path("full")
    typed, portable = load_graph(lowered_path(segment, "trt")), load_graph(segment)
    onnx.checker.check_model(str(lowered_path(segment, "trt")), full_check=True)
    assert divided(typed) == [f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.proj", "mlp.fc2")]
    assert bundles["per-step"].manifest.checks["tensorrt"] == {n: [] for n in ("condition", "full", "reuse", "update")}
    quantized_in = {
        name: {str(node.inputs[0].name) for node in model.graph if node.op_type == "QuantizeLinear"}
        for name, model in (("typed", typed), ("portable", portable))
    }
    assert quantized_in["typed"] == quantized_in["portable"]  # and what is not the same tensor has another name:
    same = {str(value.name) for node in typed.graph for value in node.outputs}
    split = next(n for n in portable.graph if n.op_type == "Split" and n.inputs[0].name == "modulation")  # type: ignore[union-attr]
    rows = [str(value.name) for value in split.outputs]
    assert not same & {rows[place] for place in (0, 1, 3, 4)}
    assert {rows[2], rows[5]} <= same  # the gates


def test_a_typed_trajectory_with_step_scales_stays_near_the_portable_one(bundles: dict[str, Bundle]) -> None:
    import ditc

    path = bundles["per-step"].path
    with ditc.load(path) as portable, ditc.load(path, backend=OnnxRuntimeBackend(name="trt")) as typed:
        expected, events = (list(pipe.generate([0, 1, 2, 3], seed=0)) for pipe in (portable, typed))
    assert relative_error(events[0].x, expected[0].x) < 5e-3
    assert relative_error(events[-1].x, expected[-1].x) < 0.1
