"""An ONNX graph as text to be reviewed: its structure, and of its numbers those that no CPU decides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ditc.exporter.onnx_files import load_graph

MOST_SHOWN = 16  # whole numbers of a constant: shapes, axes, places


def graph_text(path: Path) -> str:
    """Return inputs, outputs, constants and nodes, a line each; floating-point constants by type and shape alone."""
    model = load_graph(path)
    graph = model.graph
    opsets = ", ".join(f"{name or 'ai.onnx'} {version}" for name, version in sorted(model.opset_imports.items()))
    lines = [f"opsets {opsets}"]
    lines += [f"metadata {name} = {text}" for name, text in sorted(model.metadata_props.items())]
    lines += [f"input {_declared(value)}" for value in graph.inputs]
    lines += [f"output {_declared(value)}" for value in graph.outputs]
    lines += [f"constant {_declared(value)}{_whole_numbers(value)}" for value in graph.initializers.values()]
    for node in graph:
        lines += _node(node)
    return "\n".join(lines) + "\n"


def _declared(value: ir.Value) -> str:
    constant = value.const_value
    dtype = value.dtype if constant is None else constant.dtype
    shape = value.shape if constant is None else constant.shape
    dims = "?" if shape is None else ",".join(str(dim) for dim in shape)
    return f"{value.name}: {dtype.name.lower() if dtype else '?'}[{dims}]"


def _whole_numbers(value: ir.Value) -> str:
    constant = value.const_value
    if constant is None or constant.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return ""
    numbers = constant.numpy()
    return f" = {np.array2string(numbers, separator=',')}" if numbers.size <= MOST_SHOWN else ""


def _node(node: ir.Node) -> Iterator[str]:
    outputs = ", ".join(value.name or "" for value in node.outputs)
    inputs = ", ".join("" if value is None else value.name or "" for value in node.inputs)
    kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    attributes = ", ".join(f"{name}={_attribute(value)}" for name, value in sorted(node.attributes.items()))
    yield f"{outputs} = {kind}({inputs})" + (f" {{{attributes}}}" if attributes else "")
    yield from (
        f"    {name} = {text}" for name, text in sorted(node.metadata_props.items()) if name.startswith("ditc.")
    )


def _attribute(value: ir.Attr) -> str:
    if value.type is ir.AttributeType.TENSOR:
        return f"{value.value.dtype.name.lower()}{list(value.value.shape)}"
    if value.type is ir.AttributeType.FLOAT:
        return f"{value.value:.7g}"
    return str(list(value.value) if isinstance(value.value, (tuple, list)) else value.value)
