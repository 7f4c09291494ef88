"""Small graphs, written as ONNX text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ditc.engines.onnxrt import import_onnxruntime

KINDS = {"float32": "float", "int64": "int64"}


def graph_from_text(inputs: str, outputs: str, body: str, **constants: np.ndarray) -> ir.Model:
    """A model with inferred shapes; `constants` are its initializers, by name."""
    declared = [f"{KINDS[str(v.dtype)]}[{', '.join(map(str, v.shape))}] {name}" for name, v in constants.items()]
    head = '<ir_version: 10, opset_import: ["" : 20]>'
    proto = onnx.parser.parse_model(f"{head} g ({', '.join([inputs, *declared])}) => ({outputs}) {{ {body} }}")
    for name, value in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        proto.graph.input.remove(next(port for port in proto.graph.input if port.name == name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def run_graph(model: ir.Model, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every output, by ONNX Runtime."""
    session = import_onnxruntime().InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.fixture
def make_graph() -> Callable[..., ir.Model]:
    return graph_from_text


@pytest.fixture
def run_model() -> Callable[..., dict[str, np.ndarray]]:
    return run_graph
