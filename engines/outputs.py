"""A segment cut down to some of its values: what calibration and comparison look at."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["keep_outputs"]


def keep_outputs(model: ir.Model, values: Sequence[ir.Value]) -> None:
    """Make `values` the only outputs, in place; nodes, constants and inputs that they don't need are gone."""
    model.graph.outputs.clear()
    model.graph.outputs.extend(values)
    RemoveUnusedNodesPass()(model)
    needed = [value for value in model.graph.inputs if value.uses() or value.is_graph_output()]
    model.graph.inputs.clear()
    model.graph.inputs.extend(needed)
