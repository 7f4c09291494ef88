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
    """The values that nodes of a branch make for others, and that never lead back into it, in the order of the nodes.

    A branch of several outputs has them last. What may come before are constants and sizes that branches share; what
    leads back are nodes inside a branch that a rewrite of the graph has left without its name.
    """
    reached: dict[ir.Value, set[str | None]] = {}  # the branches of all nodes behind a value
    for node in reversed(list(model.graph)):
        behind = {node.metadata_props.get(BRANCH_KEY)}.union(*(reached.get(value, ()) for value in node.outputs))
        for value in filter(None, node.inputs):
            reached[value] = reached.get(value, set()) | behind
    outputs: dict[str, list[ir.Value]] = {}
    for node in model.graph:
        branch = node.metadata_props.get(BRANCH_KEY)
        for value in node.outputs:
            read = value.is_graph_output() or value.uses()
            if branch is not None and read and branch not in reached.get(value, ()):
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
