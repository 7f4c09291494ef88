"""Segments to ONNX files, each checked against torch.

The graph that leaves here is what every backend starts from: standard operators (opset 20), one MatMul per linear layer
with its weight as a constant second operand, node and weight names that carry the torch module path, nothing of the
machine it was made on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir
from torch import Tensor

from ditc.errors import CheckError, CheckpointError
from ditc.exporter.graph_assembly import assembled
from ditc.exporter.graph_capture import captured
from ditc.exporter.graph_cleanup import CLEANUP
from ditc.exporter.onnx_files import save_graph
from ditc.exporter.protocol import relative_error
from ditc.exporter.segments import Condition, Segment, Trunk

__all__ = ["export_segment", "parity_error", "whole_graph"]

Capture = Callable[[Segment], ir.Model]


def whole_graph(segment: Segment) -> ir.Model:
    """The graph of a segment with every branch traced by torch's exporter."""
    return captured(
        segment.module,
        segment.inputs,
        segment.open_dims,
        variadic=isinstance(segment.module, (Condition, Trunk)),
        outputs=segment.outputs,
    )


def shortest_graph(segment: Segment) -> ir.Model:
    """The same graph: from one branch of each kind where branches repeat, else with every branch traced."""
    return assembled(segment) or whole_graph(segment)


def export_segment(segment: Segment, path: Path, branches: tuple[str, ...], capture: Capture = shortest_graph) -> None:
    """Trace, clean and save one segment as `path` with its weights in `path`.data beside it."""
    model = _optimized(segment, capture)
    traced = list(model.graph.initializers.values())
    for transform in CLEANUP:
        transform(model, branches)
    save_graph(model, path)
    # the optimizer's pattern matcher keeps the last graph it saw, and with it every weight of the torch model
    for value in (*traced, *model.graph.initializers.values()):
        value.const_value = None


@torch.no_grad()
def parity_error(segment: Segment, run: Callable[[dict[str, Any]], dict[str, Any]], tolerance: float = 1e-4) -> float:
    """The largest relative error of any output of `run` against torch. Raises CheckError from `tolerance` on.

    `run` is fed every input of the torch module; the exported graph may lack those that nothing reads.
    """
    expected = segment.module(*segment.inputs.values())
    expected = (expected,) if isinstance(expected, Tensor) else expected
    outputs = run({name: value.numpy() for name, value in segment.inputs.items()})
    worst = 0.0
    for name, tensor in zip(segment.outputs, expected, strict=True):
        error = relative_error(torch.from_numpy(np.asarray(outputs[name])), tensor)
        if not error < tolerance:
            raise CheckError(
                f"segment {segment.name}: output {name} differs from torch by {error:.2g}, expected below {tolerance:g}"
            )
        worst = max(worst, error)
    return worst


def _optimized(segment: Segment, capture: Capture) -> ir.Model:
    try:
        model = capture(segment)
        # what is folded may be what no one takes: T5 looks up the logarithm of a distance, of none too
        with np.errstate(all="ignore"):
            optimize_ir(model, should_fold=_small_enough)
    except torch.onnx.errors.OnnxExporterError as e:
        cause = str(e.__cause__ or e).strip().splitlines()[0]
        raise CheckpointError(
            f"segment {segment.name} can't be traced: {cause}; see docs/models.md for what a model may do"
        ) from e
    fixed = [name for name in segment.inputs if not _is_open(model, name, segment.open_dims[name])]
    if fixed:
        raise CheckpointError(
            f"segment {segment.name} works at one size of {fixed[0]} only; "
            "write reshapes with -1 for the batch, see docs/models.md"
        )
    return model


def _small_enough(node: ir.Node) -> bool | None:
    """Allow constant folding, save of the weights' transposes: at once they would double a large model's memory."""
    return False if node.op_type == "Transpose" else None


def _is_open(model: ir.Model, name: str, dims: dict[int, str]) -> bool:
    """Did the dimensions that were meant to stay open do so?"""
    shape = next(value.shape for value in model.graph.inputs if value.name == name)
    return shape is not None and all(not isinstance(shape[axis], int) for axis in dims)
