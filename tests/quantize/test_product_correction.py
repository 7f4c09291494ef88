"""Corrections of integer products: least squares without the bias, in constants that are there anyway."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from pydantic import ValidationError

from ditc.bundle import Bundle
from ditc.cli.main import run
from ditc.compiler.calibrating import scales_of
from ditc.compiler.options import CompileOptions
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import InputError
from ditc.exporter.onnx_files import load_graph, save_graph
from ditc.precision import INT8, Bits
from ditc.program import BRANCH_KEY, PATH_KEY
from ditc.quantize.activation_pairs import CORRECTS, ROLE_KEY
from ditc.quantize.product_correction import (
    LayerCorrection,
    ProductMoments,
    correction_of,
    what_integers_stand_for,
)
from ditc.quantize.qdq import insert_qdq, quantize_weight
from ditc.quantize.scale_table import ScaleTable

IN, OUT, SCALE = 8, 4, 0.03
BIAS = np.array([5.0, -3.0, 0.25, 40.0], np.float32)
W4A8 = Bits(weights=4)


def layer(weight: np.ndarray, bias: np.ndarray | None) -> ir.Model:
    """x -> one linear layer of a branch."""
    last = "p = MatMul (x, w)\n out = Add (p, b)" if bias is not None else "out = MatMul (x, w)"
    declared = f", float[{OUT}] b = {{{','.join(map(str, bias.tolist()))}}}" if bias is not None else ""
    model = ir.from_onnx_text(
        f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, {IN}] x) => (float[batch, {OUT}] out)
        <float[{IN}, {OUT}] w = {{{",".join(["0"] * IN * OUT)}}}{declared}> {{
            {last}
        }}
        """
    )
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    for node in model.graph:
        node.metadata_props.update({PATH_KEY: "a", BRANCH_KEY: "a"})
    return model


def drawn(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(weight, activations), the latter within what the scale reaches, and about a mean."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 3.5, (500, IN)).astype(np.float32)
    return rng.standard_normal((IN, OUT)).astype(np.float32), x


def table(correction: LayerCorrection | None, bits: Bits = W4A8, midpoint: int = 0) -> ScaleTable:
    return ScaleTable(
        method="max",
        segment_sha256="",
        calibration_digest="",
        scales={"a": SCALE},
        bits=bits,
        midpoints={"a": (midpoint,)} if midpoint else {},
        corrections=None if correction is None else {"a": correction},
    )


def ran(model: ir.Model, x: np.ndarray, folder: Path) -> np.ndarray:
    save_graph(model, folder / "layer.onnx")
    return np.asarray(OnnxRuntimeBackend().session(folder / "layer.onnx").run(["out"], {"x": x})[0])


def products(weight: np.ndarray, x: np.ndarray, bits: Bits = W4A8, midpoint: int = 0) -> tuple[np.ndarray, np.ndarray]:
    integer = what_integers_stand_for(x, SCALE, midpoint, bits) @ quantize_weight(weight, bits.weights).dequantized()
    return x @ weight, integer


def fitted(exact: np.ndarray, integer: np.ndarray) -> LayerCorrection:
    return correction_of("dec-quant", ProductMoments.empty(OUT).add(exact, integer))


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("midpoint", [0, 40])
def test_a_corrected_layer_is_the_line_of_its_integer_product_and_its_own_bias(
    bias: np.ndarray | None, midpoint: int, tmp_path: Path
) -> None:
    weight, x = drawn()
    exact, integer = products(weight, x, midpoint=midpoint)
    correction = fitted(exact, integer)
    model = layer(weight, bias)
    assert insert_qdq(model, table(correction, midpoint=midpoint))
    expected = integer * np.float32(correction.slope) + np.float32(correction.shift)
    expected = expected if bias is None else expected + bias
    np.testing.assert_allclose(ran(model, x, tmp_path), expected, rtol=1e-4, atol=1e-4)


def test_the_bias_of_a_layer_changes_no_correction_and_none_of_its_errors(tmp_path: Path) -> None:
    """The released code fits outputs that hold the bias and scales the product alone: (slope - 1) * bias is left."""
    weight, x = drawn()
    exact, integer = products(weight, x)
    correction = fitted(exact, integer)
    model = layer(weight, BIAS)
    insert_qdq(model, table(correction))
    errors = ran(model, x, tmp_path) - (exact + BIAS)
    np.testing.assert_allclose(errors.mean(axis=0), 0, atol=1e-4)
    released = fitted(exact + BIAS, integer + BIAS)
    np.testing.assert_allclose(released.slope, correction.slope, rtol=1e-4)
    applied = integer * np.float32(released.slope) + np.float32(released.shift) + BIAS
    left = (applied - (exact + BIAS)).mean(axis=0)
    np.testing.assert_allclose(left, (1 - np.array(released.slope)) * BIAS, atol=1e-3)
    assert np.abs(left).max() > 0.1


def test_the_line_has_the_least_squared_error_of_all(tmp_path: Path) -> None:
    exact, integer = products(*drawn())
    correction = fitted(exact, integer)
    for channel in range(OUT):
        line = np.polyfit(integer[:, channel].astype(float), exact[:, channel].astype(float), 1)
        assert (correction.slope[channel], correction.shift[channel]) == pytest.approx(line, rel=1e-4, abs=1e-5)
    corrected = integer * np.array(correction.slope) + np.array(correction.shift)
    assert (((corrected - exact) ** 2).mean(axis=0) < ((integer - exact) ** 2).mean(axis=0)).all()


def test_a_slope_of_one_and_no_shift_change_no_bit(tmp_path: Path) -> None:
    weight, x = drawn()
    plain, same = (layer(weight, BIAS) for _ in range(2))
    insert_qdq(plain, table(None))
    insert_qdq(same, table(LayerCorrection(slope=(1.0,) * OUT, shift=(0.0,) * OUT)))
    assert np.array_equal(ran(plain, x, tmp_path), ran(same, x, tmp_path))


def test_a_correction_adds_no_operator_where_there_is_a_bias() -> None:
    weight, x = drawn()
    correction = fitted(*products(weight, x))
    plain, corrected, bare = layer(weight, BIAS), layer(weight, BIAS), layer(weight, None)
    insert_qdq(plain, table(None))
    for model in (corrected, bare):
        insert_qdq(model, table(correction))
    assert [node.op_type for node in corrected.graph] == [node.op_type for node in plain.graph]
    assert [node.op_type for node in bare.graph if node.metadata_props.get(ROLE_KEY) == CORRECTS] == ["Add"]
    assert "b" not in corrected.graph.initializers
    assert not insert_qdq(corrected, table(correction))  # quantizing twice changes nothing


@pytest.mark.parametrize(("bits", "midpoint"), [(INT8, 0), (INT8, 100), (Bits(activations=6), 0)])
def test_what_integers_stand_for_is_what_the_graph_rounds_to(bits: Bits, midpoint: int, tmp_path: Path) -> None:
    """Beyond what the scale reaches too."""
    x = np.linspace(-9, 9, 400, dtype=np.float32).reshape(-1, IN)
    weight = np.eye(IN, OUT, dtype=np.float32)
    model = layer(weight, None)
    insert_qdq(model, table(None, bits, midpoint))
    rounded = what_integers_stand_for(x, SCALE, midpoint, bits)[:, :OUT]
    np.testing.assert_allclose(ran(model, x, tmp_path), rounded, atol=1e-4)


def test_a_channel_that_stands_still_or_falls_is_shifted_alone() -> None:
    rng = np.random.default_rng(0)
    integer = rng.standard_normal((100, 2))
    exact = np.stack([rng.standard_normal(100) + 1, 3 - integer[:, 1]], axis=1)
    integer[:, 0] = 0.5
    correction = correction_of("dec-quant", ProductMoments.empty(2).add(exact, integer))
    assert correction.slope == (1.0, 1.0)
    assert correction.shift == pytest.approx((exact - integer).mean(axis=0), rel=1e-5)


@pytest.mark.parametrize("slope", [0.0, -1.0, np.inf])
def test_a_slope_that_no_scale_can_have_is_refused(slope: float) -> None:
    with pytest.raises(ValidationError, match="slopes above 0"):
        LayerCorrection(slope=(slope,), shift=(0.0,))


def test_moments_of_parts_are_those_of_the_whole() -> None:
    exact, integer = products(*drawn())
    parts = ProductMoments.empty(OUT).add(exact[:100], integer[:100]).add(exact[100:], integer[100:])
    whole = ProductMoments.empty(OUT).add(exact, integer)
    np.testing.assert_allclose(parts.mixed, whole.mixed)
    assert parts.rows == whole.rows == 500


def test_a_bundle_has_its_corrections_in_constants_and_in_its_scales_and_nowhere_else(
    bundles: dict[str, Bundle],
) -> None:
    plain, corrected = bundles["w4a8"], bundles["w4a8-corrected"]
    assert plain.manifest.program == corrected.manifest.program
    differing = {
        name for name, file in corrected.manifest.files.items() if plain.manifest.files[name].sha256 != file.sha256
    }
    assert {name.split(".")[0] for name in differing} == {"segments/full", "calib/scales", "fingerprint"}
    graphs = [load_graph(bundle.segment_path("full")) for bundle in (plain, corrected)]
    assert [node.op_type for node in graphs[0].graph] == [node.op_type for node in graphs[1].graph]
    again = load_graph(corrected.reference_path("full"))
    insert_qdq(again, scales_of(corrected))  # as `ditc bisect` does
    for name, value in graphs[1].graph.initializers.items():
        assert np.array_equal(again.graph.initializers[name].const_value.numpy(), value.const_value.numpy())
    assert corrected.manifest.settings["correct"] == "dec-quant"
    assert "correct" not in plain.manifest.settings


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--precision fp32 --correct dec-quant", "--correct dec-quant is for products of integers, and --precision"),
        ("--scales per-step --correct dec-quant", "--correct dec-quant is one line for all steps, folded"),
        ("--scales dynamic --correct dec-quant", "--correct dec-quant is one line for all steps, folded"),
        ("--correct dec", "unknown --correct 'dec'; choose one of: dec-quant"),
    ],
)
def test_what_cannot_be_corrected_is_one_line(
    arguments: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compile", "digits", "-o", str(tmp_path / "b"), *arguments.split()]) == 2
    refused = capsys.readouterr().err
    assert said in refused
    assert refused.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_corrections_are_asked_for_by_a_setting() -> None:
    assert CompileOptions().correct is None
    with pytest.raises(InputError, match="--precision fp16 has none"):
        CompileOptions(correct="dec-quant", precision="fp16")
