"""A torch module to an ONNX graph as torch's exporter leaves it: unfolded, nodes with the modules that they ran in."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

__all__ = ["OPSET", "captured", "scopes_of", "set_scopes"]

OPSET = 20
LARGEST_SIZE = 65536  # of an open dimension
SCOPES = "pkg.torch.onnx.name_scopes"


@torch.no_grad()
def captured(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    open_dims: Mapping[str, Mapping[int, str]],
    *,
    variadic: bool,
    outputs: Sequence[str] | None = None,
) -> ir.Model:
    """The graph of `module` on example inputs, with open dimensions; `variadic` says that it takes (x, *rest).

    Without `outputs` the outputs keep the names of the values they are, which may be inputs. Raises
    torch.onnx.errors.OnnxExporterError where the module can't be traced.
    """
    dims: dict[str, Any] = {}
    shapes = tuple(
        {
            axis: dims.setdefault(name, torch.export.Dim(name, min=1, max=LARGEST_SIZE))
            for axis, name in open_dims[key].items()
        }
        for key in inputs
    )
    dynamic: Any = (shapes[0], shapes[1:]) if variadic and len(shapes) > 1 else shapes
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic,
            input_names=list(inputs),
            output_names=None if outputs is None else list(outputs),
            verbose=False,
            optimize=False,
        )
    assert program is not None
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's reports on its own internals and missing optional packages; none concern a user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def scopes_of(node: ir.Node) -> list[str]:
    """The modules that a node ran in, outermost first, as paths from the captured module; last its own name."""
    return [str(scope) for scope in ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))]


def set_scopes(node: ir.Node, scopes: Sequence[str]) -> None:
    """Say which modules a node ran in."""
    node.metadata_props[SCOPES] = repr(list(scopes))
