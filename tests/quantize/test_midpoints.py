"""Ranges that do not lie about zero: the algebra of L1, as operators and as zero points, static and per step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from ditc.engines.onnxrt import OnnxRuntimeBackend, kernel_census
from ditc.exporter.onnx_files import save_graph
from ditc.lowering.backend_forms import lower
from ditc.lowering.tensorrt_rules import violations_of
from ditc.program import BRANCH_KEY, PATH_KEY
from ditc.quantize.midpoints import LOWER_BOUNDS, MIDPOINTS, centred_scales, lower_bounds, range_of
from ditc.quantize.qdq import insert_qdq
from ditc.quantize.ranges import RANGES, Histogram
from ditc.quantize.scale_table import ScaleTable
from ditc.quantize.scales import Origin, histograms_of, ranges_of, scale_table
from ditc.runtime.closeness import relative_error
from ditc.tables import MIDPOINTS_INPUT, MIDPOINTS_TABLE, SCALES_INPUT, SCALES_TABLE

MLP = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 4, 8] x) => (float[batch, 4, 8] out) {
    p1 = MatMul (x, w1)
    h = Add (p1, b1)
    g = Gelu <approximate = "tanh"> (h)
    p2 = MatMul (g, w2)
    out = Add (p2, b2)
}
"""
READERS = {"x": ("fc1",), "g": ("fc2",)}
RNG = np.random.default_rng(0)
POINTS = [RNG.standard_normal((16, 4, 8)).astype(np.float32) * scale for scale in (1.0, 3.0)]  # one for each of 2 steps


def mlp() -> ir.Model:
    rng = np.random.default_rng(1)
    shapes = {"w1": (8, 32), "b1": (32,), "w2": (32, 8), "b2": (8,)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model = ir.from_onnx_text(MLP, [ir.tensor(array, name=name) for name, array in weights.items()])
    for node in model.graph:
        node.metadata_props[BRANCH_KEY] = "a"
        node.metadata_props[PATH_KEY] = {"p1": "fc1", "p2": "fc2"}.get(str(node.outputs[0].name), "a")
    ShapeInferencePass()(model)
    return model


def session(model: ir.Model, folder: Path, name: str) -> object:
    save_graph(model, folder / f"{name}.onnx")
    return OnnxRuntimeBackend().session(folder / f"{name}.onnx")


def calibrated(folder: Path, binding: str, midpoint: str) -> ScaleTable:
    """The scales of the MLP over POINTS, one group of steps for each of them unless the binding is static."""
    model = mlp()
    bounds = lower_bounds(model, midpoint)
    model.graph.outputs.append(next(node for node in model.graph if node.op_type == "Gelu").outputs[0])
    run = session(model, folder, "probe")

    def probe(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"x": feeds["x"], "g": run.run(["g"], feeds)[0]}

    parts = [[{"x": x}] for x in POINTS] if binding == "per-step" else [[{"x": x} for x in POINTS]]
    ranges = [ranges_of(histograms_of(probe, part, bounds), "max", bounds) for part in parts]
    return scale_table(ranges, READERS, np.arange(len(parts)), Origin("max", "", "", binding))


def feeds(table: ScaleTable, step: int) -> dict[str, np.ndarray]:
    names = {SCALES_TABLE: SCALES_INPUT, MIDPOINTS_TABLE: MIDPOINTS_INPUT}
    return {"x": POINTS[step]} | {names[name]: rows[step] for name, rows in table.bundle_tables().items()}


def outputs(folder: Path, table: ScaleTable, backend: str) -> list[np.ndarray]:
    """Return the quantized MLP's output at both steps, in a backend's form."""
    model = mlp()
    assert insert_qdq(model, table)
    lower(model, backend)
    run = session(model, folder, f"{table.binding}.{backend}")
    return [run.run(None, feeds(table, step))[0] for step in (0, 1)]


@pytest.mark.parametrize("binding", ["static", "per-step"])
def test_a_zero_point_and_operators_take_off_the_same_midpoint(binding: str, tmp_path: Path) -> None:
    table = calibrated(tmp_path, binding, "bounded")
    for output, expected in zip(outputs(tmp_path, table, "onnxrt"), outputs(tmp_path, table, "none"), strict=True):
        assert relative_error(output, expected) < 1e-5


@pytest.mark.parametrize("binding", ["static", "per-step"])
def test_a_bounded_range_is_nearer_to_fp_than_a_symmetric_one(binding: str, tmp_path: Path) -> None:
    exact = [session(mlp(), tmp_path, "fp").run(None, {"x": x})[0] for x in POINTS]
    errors = {}
    for midpoint in MIDPOINTS:
        samples = outputs(tmp_path, calibrated(tmp_path, binding, midpoint), "none")
        errors[midpoint] = [relative_error(a, b) for a, b in zip(samples, exact, strict=True)]
    assert max(errors["zero"]) < 0.1
    assert sum(errors["bounded"]) < 0.9 * sum(errors["zero"])


@pytest.mark.parametrize("binding", ["static", "per-step"])
def test_the_typed_form_of_a_midpoint_breaks_no_rule_and_stays_near(binding: str, tmp_path: Path) -> None:
    table = calibrated(tmp_path, binding, "bounded")
    model = mlp()
    insert_qdq(model, table)
    lower(model, "trt")
    assert [str(violation) for violation in violations_of(model)] == []
    run = session(model, tmp_path, "typed")
    kinds = {port.name: port.type for port in run.get_inputs()}
    for step, expected in enumerate(outputs(tmp_path, table, "none")):
        given = {n: a.astype(np.float16 if "16" in kinds[n] else np.float32) for n, a in feeds(table, step).items()}
        assert relative_error(run.run(None, given)[0], expected) < 0.02


def test_a_static_midpoint_costs_tensorrt_one_subtraction() -> None:
    """Its product is part of the bias."""
    kinds = []
    for midpoints in ({}, {"fc2": (100,)}):
        scales = {"fc1": 0.03, "fc2": 0.02}
        table = ScaleTable(method="", segment_sha256="", calibration_digest="", scales=scales, midpoints=midpoints)
        model = mlp()
        insert_qdq(model, table)
        lower(model, "trt")
        kinds.append(Counter(node.op_type for node in model.graph))
    assert kinds[1] - kinds[0] == Counter({"Sub": 1})


def test_onnx_runtime_pays_nothing_for_a_midpoint(tmp_path: Path) -> None:
    censuses = []
    for midpoint in MIDPOINTS:
        model = mlp()
        insert_qdq(model, calibrated(tmp_path, "per-step", midpoint))
        lower(model, "onnxrt")
        save_graph(model, tmp_path / "lowered.onnx")
        censuses.append(kernel_census(OnnxRuntimeBackend(), tmp_path / "lowered.onnx"))
    zero, bounded = censuses
    assert zero["MatMulIntegerToFloat"] == bounded["MatMulIntegerToFloat"] == 2
    assert bounded - zero == Counter({"Split": 1, "Sub": 1, "Cast": 1})  # midpoints of all layers to zero points


def test_only_what_an_operator_bounds_has_a_midpoint(tmp_path: Path) -> None:
    assert lower_bounds(mlp(), "bounded") == {"g": LOWER_BOUNDS["Gelu"]}
    assert lower_bounds(mlp(), "zero") == {}
    table = calibrated(tmp_path, "static", "bounded")
    assert set(table.midpoints) == {"fc2"}
    assert calibrated(tmp_path, "per-step", "zero").midpoints == {}


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_stays_above_its_bound(approximate: str) -> None:
    import torch

    x = torch.linspace(-2, 0, 200_001)
    least = float(torch.nn.functional.gelu(x, approximate=approximate).min())
    assert LOWER_BOUNDS["Gelu"] < least < LOWER_BOUNDS["Gelu"] + 2e-4


@given(st.floats(-10, 0), st.floats(1e-3, 100))
def test_a_range_fits_its_levels(low: float, high: float) -> None:
    (midpoint,), (scale,) = centred_scales(np.array([low]), np.array([high]))
    top = max(high, -low)
    assert (127 + midpoint) * scale == pytest.approx(top)
    assert -low <= (127 - midpoint) * scale + 1e-9 * top
    assert 0 <= midpoint <= 127


@given(st.floats(1e-6, 1e6))
def test_a_symmetric_range_has_no_midpoint_and_the_scale_it_always_had(high: float) -> None:
    (midpoint,), (scale,) = centred_scales(np.array([-high]), np.array([high]))
    assert midpoint == 0
    assert scale == high / 127


@pytest.mark.parametrize("method", sorted(RANGES))
def test_every_range_method_takes_a_bounded_activation(method: str) -> None:
    x = np.abs(np.random.default_rng(0).standard_normal(100_000)).astype(np.float32) - np.float32(0.17)
    limits = range_of(Histogram.empty().add(x + np.float32(0.17)), method, -0.17)
    assert limits.low == -0.17
    assert 1.5 < limits.high <= x.max() + 1e-6


def test_an_activation_that_is_always_zero_after_gelu_has_a_scale() -> None:
    limits = range_of(Histogram.empty().add(np.full(10, 0.17005, np.float32)), "mse", LOWER_BOUNDS["Gelu"])
    (midpoint,), (scale,) = centred_scales(np.array([limits.low]), np.array([limits.high]))
    assert midpoint == 0
    assert scale > 0
