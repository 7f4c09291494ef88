"""Writes the graphs of `integer_probes`: python -m ditc.compiler.probe_graphs."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from ditc import engines
from ditc.engines.integer_form import SEVEN_BITS
from ditc.engines.integer_probes import CASES, INSIDE, OUTSIDE, STEP, Case, bias, probe_name, probe_weight
from ditc.exporter.onnx_files import save_sharing_data
from ditc.lowering.backend_forms import LOWERINGS, lower
from ditc.precision import INT8, Bits
from ditc.program import BRANCH_KEY, PATH_KEY
from ditc.quantize.activation_pairs import add_constant
from ditc.quantize.qdq import insert_qdq
from ditc.quantize.scale_binding import BINDINGS
from ditc.quantize.scale_table import ScaleTable

__all__ = ["KINDS", "probe_graph", "write_probes"]

PORTABLE = "portable"
KINDS = (PORTABLE, "onnxrt")
FOLDER = Path(engines.__path__[0]) / "probes"


def write_probes(folder: Path = FOLDER) -> list[Path]:
    """Write every probe graph, each a file of its own, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind in KINDS:
        for bits in (INT8.weights, SEVEN_BITS):
            path = folder / probe_name(kind, bits)
            save_sharing_data(probe_graph(kind, bits), path)
            written.append(path)
    return written


def probe_graph(kind: str, bits: int) -> ir.Model:
    """Return all cases in one graph, quantized and lowered by what quantizes and lowers segments."""
    model = _float_graph(bits)
    for binding in BINDINGS:
        cases = [case for case in CASES if case.binding == binding]
        paths = {path for case in cases for path in case.outputs}
        insert_qdq(model, _scale_table(cases, binding, bits), paths)
    if kind in LOWERINGS:
        lower(model, kind)
    return model


def _float_graph(bits: int) -> ir.Model:
    """Return a linear layer for each output: MatMul, and Add where it has a bias."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="probe")
    model = ir.Model(graph, ir_version=10, producer_name="ditc")
    for case in CASES:
        x = _value(case.name, INSIDE)
        graph.inputs.append(x)
        for path, biased in zip(case.outputs, case.layers, strict=True):
            weight = add_constant(model, f"{path}.weight", probe_weight(bits))
            nodes = [ir.node("MatMul", [x, weight], name=path)]
            if biased:
                constant = add_constant(model, f"{path}.bias", bias())
                nodes.append(ir.node("Add", [nodes[0].outputs[0], constant], name=f"{path}/Add"))
                nodes[0].outputs[0].name = f"{path}.product"
            for node in nodes:
                node.metadata_props.update({BRANCH_KEY: "probe", PATH_KEY: path})
                graph.append(node)
            out = nodes[-1].outputs[0]
            out.name, out.type, out.shape = path, x.type, _value(path, OUTSIDE).shape
            graph.outputs.append(out)
    ShapeInferencePass()(model)
    return model


def _value(name: str, width: int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(["batch", "tokens", width]), type=ir.TensorType(ir.DataType.FLOAT))


def _scale_table(cases: list[Case], binding: str, bits: int) -> ScaleTable:
    """Return scales of STEP for the layers of a binding; a step of its own is the only one there is."""
    by_step, calibrated = BINDINGS[binding].by_step, BINDINGS[binding].time_groups is not None
    paths = {path: case for case in cases for path in case.outputs} if calibrated else {}
    return ScaleTable(
        method="max",
        segment_sha256="",
        calibration_digest="",
        scales=dict.fromkeys(paths, STEP),
        binding=binding,
        bits=Bits(weights=bits),
        steps=dict.fromkeys(paths, (STEP,)) if by_step else {},
        columns={path: cases.index(case) for path, case in paths.items()} if by_step else {},
        midpoints={path: (case.middle,) for path, case in paths.items() if case.middle},
    )


if __name__ == "__main__":
    sys.stdout.write("\n".join(str(path) for path in write_probes()) + "\n")
