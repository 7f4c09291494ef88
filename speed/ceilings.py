"""This machine's own ceilings, measured: INT8 and float products, memory traffic, all through ONNX Runtime."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import onnx_ir as ir

from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.exporter.onnx_files import save_graph
from ditc.lowering.backend_forms import lower
from ditc.machine import processor
from ditc.program import BRANCH_KEY, PATH_KEY
from ditc.quantize.qdq import insert_qdq
from ditc.quantize.scale_table import ScaleTable
from ditc.speed.rates import HERE, Rates

__all__ = ["WIDEST", "measured_rates", "product_seconds"]

WIDEST = (512, 1152, 4608)  # (rows, in, out) of the widest layer of DiT-XL/2 at 256 pixels with guidance
CALLS = 12
STREAM_BYTES = 1 << 27  # far beyond any cache


def measured_rates() -> Rates:
    """Measure the rates that matter for a DiT, each the best of several calls; a few seconds."""
    operations = 2 * prod(WIDEST)
    return Rates(
        name=HERE,
        int8_operations=operations / product_seconds(WIDEST, quantized=True),
        float_operations=operations / product_seconds(WIDEST, quantized=False),
        bandwidth=_bandwidth(),
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        source=f"{processor()}, {os.cpu_count()} cores, measured just now",
        float_bytes=4,
    )


def product_seconds(shape: tuple[int, int, int], *, quantized: bool) -> float:
    """Time one linear layer by itself, (rows, in) @ (in, out): the best of several calls."""
    rows, inside, outside = shape
    rng = np.random.default_rng(0)
    model = _linear(rows, rng.standard_normal((inside, outside), dtype=np.float32))
    if quantized:
        insert_qdq(model, ScaleTable(method="max", segment_sha256="", calibration_digest="", scales={"probe": 0.03}))
        lower(model, "onnxrt")
    return _best_call(model, {"x": rng.standard_normal((rows, inside), dtype=np.float32)})


def _bandwidth() -> float:
    """Measure the bytes per second of an Add of two tensors that no cache holds: two read, one written."""
    count = STREAM_BYTES // 4
    a, b, y = (_value(name, (count,)) for name in ("a", "b", "y"))
    node = ir.node("Add", [a, b], name="stream", outputs=[y])
    arrays = {"a": np.ones(count, np.float32), "b": np.ones(count, np.float32)}
    return 3 * STREAM_BYTES / _best_call(_model([a, b], [y], [node], []), arrays)


def _linear(rows: int, weight: np.ndarray[Any, Any]) -> ir.Model:
    inside, outside = weight.shape
    x, y = _value("x", (rows, inside)), _value("y", (rows, outside))
    tensor = ir.tensor(weight, name="weight")
    constant = ir.Value(name="weight", shape=ir.Shape(weight.shape), type=x.type, const_value=tensor)
    node = ir.node("MatMul", [x, constant], name="probe", outputs=[y])
    node.metadata_props.update({BRANCH_KEY: "probe", PATH_KEY: "probe"})
    return _model([x], [y], [node], [constant])


def _value(name: str, shape: tuple[int, ...]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def _model(
    inputs: list[ir.Value], outputs: list[ir.Value], nodes: list[ir.Node], constants: list[ir.Value]
) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=constants, opset_imports={"": 20}, name="probe")
    return ir.Model(graph, ir_version=10)


def _best_call(model: ir.Model, feeds: dict[str, np.ndarray[Any, Any]]) -> float:
    with TemporaryDirectory() as folder:
        path = Path(folder).resolve() / "probe.onnx"
        save_graph(model, path)
        engine = OnnxRuntimeBackend().open(path)
        with engine:
            binding = engine.binding()
            for name, array in feeds.items():
                binding.bind(name, array)
            for port in engine.outputs.values():
                binding.bind(port.name, np.empty(port.fixed_shape, port.dtype))
            seconds = []
            for _ in range(CALLS):
                start = perf_counter()
                binding.run()
                seconds.append(perf_counter() - start)
    return min(seconds)
