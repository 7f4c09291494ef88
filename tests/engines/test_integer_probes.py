"""The probe graphs: as the generator writes them, of every form that segments have, and they saturate where one can."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from ditc.bundle import Bundle
from ditc.compiler.probe_graphs import FOLDER, KINDS, write_probes
from ditc.engines.backend import runnable_path
from ditc.engines.integer_form import SEVEN_BITS, IntegerForm
from ditc.engines.integer_probes import (
    CASES,
    STEP,
    WEIGHT_STEP,
    bias,
    exact_outputs,
    largest_error,
    probe_name,
    probe_weight,
)
from ditc.engines.onnxrt import INTEGER_KERNELS, OnnxRuntimeBackend
from ditc.exporter.onnx_files import save_graph
from ditc.lowering.backend_forms import lower
from ditc.precision import PRECISIONS, Bits
from ditc.program import BRANCH_KEY, PATH_KEY
from ditc.quantize.midpoints import MIDPOINTS
from ditc.quantize.qdq import insert_qdq
from ditc.quantize.scale_binding import BINDINGS
from ditc.quantize.scale_table import ScaleTable

UNSIGNED_ZERO = 128
LAYERS = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 4, 8] x) => (float[batch, 4, 8] out, float[batch, 4, 8] k) {
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    h = Add (q, b)
    p = MatMul (h, wp)
    a = Relu (p)
    f = MatMul (a, wf)
    out = Add (f, b)
}
"""
PATHS = ("q", "k", "p", "f")


def test_the_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    """After a change: python -m ditc.compiler.probe_graphs."""
    written = {path.name: path.read_bytes() for path in write_probes(tmp_path)}
    assert written == {path.name: path.read_bytes() for path in FOLDER.iterdir()}


def layers(binding: str, midpoint: str, bits: Bits) -> ir.Model:
    """Layers that share an activation or not, with a bias or not, quantized one way."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("wq", "wk", "wp", "wf")}
    arrays["b"] = np.ones(8, np.float32)
    model = ir.from_onnx_text(LAYERS, [ir.tensor(array, name=name) for name, array in arrays.items()])
    for node in model.graph:
        node.metadata_props.update({BRANCH_KEY: "a", PATH_KEY: str(node.outputs[0].name)})
    ShapeInferencePass()(model)
    by_step, calibrated = BINDINGS[binding].by_step, BINDINGS[binding].time_groups is not None
    table = ScaleTable(
        method="max",
        segment_sha256="",
        calibration_digest="",
        scales=dict.fromkeys(PATHS, 0.1) if calibrated else {},
        binding=binding,
        bits=bits,
        steps=dict.fromkeys(PATHS, (0.1, 0.2)) if by_step else {},
        columns={"q": 0, "k": 0, "p": 1, "f": 2} if by_step else {},
        midpoints={"f": (100, 90) if by_step else (100,)} if midpoint != "zero" else {},
    )
    insert_qdq(model, table)
    return model


def ways() -> Iterator[tuple[str, str, Bits]]:
    """Every way to quantize that a compile allows."""
    for binding, midpoint, bits in product(BINDINGS, MIDPOINTS, PRECISIONS.values()):
        simulated = bits is not None and bits.activations < 8 and (binding, midpoint) != ("static", "zero")
        if bits is not None and not simulated and (binding, midpoint) != ("dynamic", "bounded"):
            yield binding, midpoint, bits


def kernels(path: Path, folder: Path) -> set[tuple[str, int, tuple[bool, ...]]]:
    """The integer kernels of the graph that ONNX Runtime runs: kind, number of inputs, which of them are constant."""
    optimized = folder / "optimized.onnx"
    OnnxRuntimeBackend().session(path, optimized)
    graph = onnx.load(str(optimized), load_external_data=False).graph
    constants = {value.name for value in graph.initializer}
    return {
        (node.op_type, len(node.input), tuple(name in constants for name in node.input))
        for node in graph.node
        if node.op_type in INTEGER_KERNELS
    }


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, set[Any]]:
    """The kernels of the probe graphs, by the bits of their weights: the form depends on those."""
    folder = tmp_path_factory.mktemp("probed")
    return {
        bits: set.union(*(kernels(FOLDER / probe_name(kind, bits), folder) for kind in KINDS))
        for bits in (8, SEVEN_BITS)
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("binding", "midpoint", "bits"), list(ways()))
def test_every_kernel_that_quantizing_leads_to_is_probed(
    binding: str, midpoint: str, bits: Bits, kind: str, probed: dict[int, set[Any]], tmp_path: Path
) -> None:
    model = layers(binding, midpoint, bits)
    lower(model, kind)
    save_graph(model, tmp_path / "full.onnx")
    own_kernels = kernels(tmp_path / "full.onnx", tmp_path)
    assert own_kernels
    assert own_kernels <= probed[max(bits.weights, SEVEN_BITS)]


def test_every_kernel_of_a_compiled_segment_is_probed(
    bundles: dict[str, Bundle], probed: dict[int, set[Any]], tmp_path: Path
) -> None:
    paths = [
        runnable_path(bundle.segment_path(part.name), "onnxrt")
        for bundle in bundles.values()
        for part in bundle.manifest.program.segments
        if part.quantizes
    ]
    assert len(paths) >= 3
    for path in paths:
        assert kernels(path, tmp_path) <= probed[8]


def saturating(activation: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """u8 x s8 with the sum of two neighbours kept in 16 bits, as on a CPU without integer dot products."""
    products = activation[..., np.newaxis].astype(np.int64) * weight  # (rows, inside, outside)
    pairs = products.reshape(*products.shape[:-2], -1, 2, products.shape[-1]).sum(axis=-2)
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=-2)


@pytest.mark.parametrize(("bits", "least", "most"), [(8, 0.1, 2.0), (7, 0.0, 0.0)])
def test_what_saturates_is_far_off_and_seven_bits_never_do(bits: int, least: float, most: float) -> None:
    weight = (probe_weight(bits) / WEIGHT_STEP).astype(np.int64)
    for case in CASES:
        steps = np.round(case.activation(3)[0] / STEP).astype(np.int64)
        zero = UNSIGNED_ZERO - case.middle if case.binding != "dynamic" else 0
        assert {int((steps + zero).max()), int((steps + zero).min())} <= {255, 1, 0}
        integers = saturating(steps + zero, weight) - zero * weight.sum(axis=0)
        for name, biased in zip(case.outputs, case.layers, strict=True):
            exact = exact_outputs(3, bits)[name][0]
            output = integers * STEP * WEIGHT_STEP + (bias() if biased else 0)
            error = float(np.abs(output - exact).max() / np.abs(exact).max())
            assert least <= error <= most, name


def test_a_probe_that_is_not_a_number_is_not_exact() -> None:
    def opened(graph: Path) -> Any:
        return lambda feeds: {
            name: exact * np.nan for name, exact in exact_outputs(feeds["static"].shape[1], 8).items()
        }

    assert not largest_error(opened, KINDS, 8) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_one_wrong_case_is_noticed(kind: str) -> None:
    """Outputs of a correct library, but for one number of one case at 64 rows."""

    def opened(graph: Path) -> Any:
        def run(feeds: Any) -> Any:
            rows = feeds["static"].shape[1]
            outputs = exact_outputs(rows, 8)
            if rows == 64 and kind in graph.name:
                outputs["dynamic_alone.0"][0, 5, 7] *= 1.01
            return outputs

        return run

    assert largest_error(opened, (kind,), 8) > 1e-3
    assert largest_error(opened, [other for other in KINDS if other != kind], 8) == 0


@pytest.mark.parametrize("bits", [8, 7])
def test_this_machine_runs_segments_in_a_form_whose_probes_are_exact(bits: int) -> None:
    """True on every CPU: with VNNI as it is, without it with the switch."""
    assert OnnxRuntimeBackend().arithmetic(bits).integers in [form.value for form in IntegerForm]
