"""A segment cut down to some of its values: what calibration and comparison look at."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ditc.program import BRANCH_KEY

__all__ = ["branch_outputs", "branch_values", "keep_outputs"]


def branch_outputs(model: ir.Model) -> dict[str, ir.Value]:
    """The output before the gate of every branch that a segment computes, FP or quantized.

    It is the last value that nodes of the branch make and others read.
    """
    return {branch: values[-1] for branch, values in branch_values(model).items()}


def branch_values(model: ir.Model) -> dict[str, list[ir.Value]]:
    """The values that nodes of a branch make and others read, in the order of the nodes.

    A branch of several outputs has them last. What may come before are constants and sizes that branches share.
    """
    outputs: dict[str, list[ir.Value]] = {}
    for node in model.graph:
        branch = node.metadata_props.get(BRANCH_KEY)
        for value in node.outputs:
            readers = {use.node.metadata_props.get(BRANCH_KEY) for use in value.uses()}
            if branch is not None and (value.is_graph_output() or readers - {branch}):
                outputs.setdefault(branch, []).append(value)
    return outputs


def keep_outputs(model: ir.Model, values: Sequence[ir.Value]) -> None:
    """Make `values` the only outputs, in place; nodes, constants and inputs that they don't need are gone."""
    model.graph.outputs.clear()
    model.graph.outputs.extend(values)
    RemoveUnusedNodesPass()(model)
    needed = [value for value in model.graph.inputs if value.uses() or value.is_graph_output()]
    model.graph.inputs.clear()
    model.graph.inputs.extend(needed)
