"""The linear layers of a segment: the MatMuls with a constant weight inside a branch, where INT8 goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditc.program import BRANCH_KEY, PATH_KEY

__all__ = ["ROLE_KEY", "ROTATES", "Linear", "linear_count", "linears_of"]

ROLE_KEY = "ditc.role"  # metadata of nodes that quantization puts around a layer
ROTATES = "rotates"  # the role of a product with a fixed matrix in front of layers, which is no layer itself


@dataclass(frozen=True)
class Linear:
    """One linear layer: torch module path, MatMul, the activation it reads, its constant weight (in, out).

    `name` is the path, with a number where several nodes come from one layer that branches share.
    """

    path: str
    name: str
    node: ir.Node
    activation: ir.Value
    weight: ir.Value

    @property
    def branch(self) -> str:
        return str(self.node.metadata_props[BRANCH_KEY])

    def weight_array(self) -> NDArray[np.float32]:
        assert self.weight.const_value is not None
        return np.asarray(self.weight.const_value.numpy(), dtype=np.float32)


def linear_count(model: ir.Model) -> int:
    """Count the branches' layers with a constant float weight, in whatever operator they were traced."""
    return sum(
        node.op_type in ("MatMul", "Gemm")
        and _is_of_a_layer(node)
        and node.inputs[1] is not None
        and node.inputs[1].is_initializer()
        for node in model.graph
    )


def linears_of(model: ir.Model) -> Iterator[Linear]:
    """Every linear layer inside a branch, in graph order.

    Outside a branch nothing is quantized: patch embedding and final layer are small and touch the image directly.
    """
    met: dict[str, int] = {}
    for node in model.graph:
        if node.op_type != "MatMul" or not _is_of_a_layer(node):
            continue
        activation, weight = node.inputs
        if activation is not None and weight is not None and weight.is_initializer():
            path = node.metadata_props[PATH_KEY]
            met[path] = met.get(path, 0) + 1
            name = path if met[path] == 1 else f"{path}_{met[path]}"
            yield Linear(path, name, node, activation, weight)


def _is_of_a_layer(node: ir.Node) -> bool:
    return BRANCH_KEY in node.metadata_props and node.metadata_props.get(ROLE_KEY) != ROTATES
