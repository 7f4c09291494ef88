"""Segments to ONNX files, each checked against torch.

The graph that leaves here is what every backend starts from: standard operators (opset 20), one MatMul per linear layer
with its weight as a constant second operand, node and weight names that carry the torch module path, nothing of the
machine it was made on.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnxscript.optimizer import optimize_ir
from torch import Tensor

from ditc.errors import CheckError, CheckpointError
from ditc.exporter.onnx_files import save_model
from ditc.exporter.protocol import relative_error
from ditc.exporter.segments import Segment
from ditc.program import BRANCH_KEY, CONDITION, DECODE, PATH_KEY

__all__ = ["OPSET", "export_segment", "parity_error"]

OPSET = 20
SCOPES = "pkg.torch.onnx.name_scopes"


def export_segment(segment: Segment, path: Path, branches: tuple[str, ...]) -> None:
    """Trace, clean and save one segment as `path` with its weights in `path`.data beside it."""
    model = _traced(segment)
    traced = list(model.graph.initializers.values())
    for transform in CLEANUP:
        transform(model, branches)
    save_model(model, path)
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
    found = run({name: value.numpy() for name, value in segment.inputs.items()})
    worst = 0.0
    for name, tensor in zip(segment.outputs, expected, strict=True):
        error = relative_error(torch.from_numpy(np.asarray(found[name])), tensor)
        if not error < tolerance:
            raise CheckError(
                f"segment {segment.name}: output {name} differs from torch by {error:.2g}, expected below {tolerance:g}"
            )
        worst = max(worst, error)
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports deprecations of its own internals and missing optional packages; none concern a user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def _traced(segment: Segment) -> ir.Model:
    dims: dict[str, Any] = {}
    shapes = tuple(
        {
            axis: dims.setdefault(name, torch.export.Dim(name, min=1, max=65536))
            for axis, name in segment.open_dims[key].items()
        }
        for key in segment.inputs
    )
    dynamic: Any = shapes
    if segment.name not in (CONDITION, DECODE):
        dynamic = (shapes[0], shapes[1:])  # x, then the variadic rest
    try:
        with _quiet():
            program = torch.onnx.export(
                segment.module.eval(),
                tuple(segment.inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=dynamic,
                input_names=list(segment.inputs),
                output_names=list(segment.outputs),
                verbose=False,
                optimize=False,
            )
            assert program is not None
            optimize_ir(program.model, should_fold=_small_enough)
    except torch.onnx.errors.OnnxExporterError as e:
        cause = str(e.__cause__ or e).strip().splitlines()[0]
        raise CheckpointError(
            f"segment {segment.name} can't be traced: {cause}; see docs/models.md for what a model may do"
        ) from e
    fixed = [name for name in segment.inputs if not _is_open(program.model, name, segment.open_dims[name])]
    if fixed:
        raise CheckpointError(
            f"segment {segment.name} works at one size of {fixed[0]} only; "
            "write reshapes with -1 for the batch, see docs/models.md"
        )
    return program.model


def _small_enough(node: ir.Node) -> bool | None:
    """Constant folding, but not of the weights' transposes: all at once they would double a large model's memory."""
    return False if node.op_type == "Transpose" else None


def _is_open(model: ir.Model, name: str, dims: dict[int, str]) -> bool:
    """Did the dimensions that were meant to stay open do so?"""
    shape = next(value.shape for value in model.graph.inputs if value.name == name)
    return shape is not None and all(not isinstance(shape[axis], int) for axis in dims)


def _name_by_module(model: ir.Model, branches: tuple[str, ...]) -> None:
    """Node names become the torch module path plus the operator; each node knows its branch; traces are dropped."""
    taken: dict[str, int] = {}
    for node in model.graph:
        scopes = _scopes(node)
        branch = next((s for s in scopes if s.startswith("branch.")), None)
        modules = [s.removeprefix("model.") for s in scopes if s.startswith("model.")]
        path = modules[-1] if modules else (branches[int(branch.split(".")[1])] if branch else "")
        node.metadata_props.clear()
        node.metadata_props[PATH_KEY] = path
        if branch:
            node.metadata_props[BRANCH_KEY] = branches[int(branch.split(".")[1])]
        name = f"{path}/{node.op_type}" if path else node.op_type
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        for value in node.outputs:
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.producer_name, model.producer_version = "ditc", None


def _scopes(node: ir.Node) -> list[str]:
    import ast

    text = node.metadata_props.get(SCOPES, "[]")
    return [str(scope) for scope in ast.literal_eval(text)]


def _split_gemms(model: ir.Model, branches: tuple[str, ...]) -> None:
    """A linear layer on flattened tokens is traced as Gemm; integer kernels and Q/DQ want MatMul and Add."""
    for node in list(model.graph):
        if node.op_type != "Gemm" or BRANCH_KEY not in node.metadata_props:
            continue
        alpha, beta, trans_a, trans_b = (
            node.attributes[name].value if name in node.attributes else default
            for name, default in (("alpha", 1.0), ("beta", 1.0), ("transA", 0), ("transB", 0))
        )
        if (alpha, beta, trans_a) != (1.0, 1.0, 0):
            continue
        weight, made = node.inputs[1], []
        if trans_b:
            made.append(ir.node("Transpose", [weight], attributes={"perm": [1, 0]}))
            weight = made[-1].outputs[0]
        made.append(ir.node("MatMul", [node.inputs[0], weight]))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            made.append(ir.node("Add", [made[-1].outputs[0], node.inputs[2]]))
        _replace(model, node, made)


def _replace(model: ir.Model, node: ir.Node, made: list[ir.Node]) -> None:
    """Put nodes in the place of one; the last one's output takes over its name, type and uses."""
    out, new = node.outputs[0], made[-1].outputs[0]
    for number, part in enumerate(made):
        part.name = f"{node.name.removesuffix('/Gemm')}/{part.op_type}" if node.name else None
        part.metadata_props.update(node.metadata_props)
        part.outputs[0].name = f"{out.name}.{number}"
        part.outputs[0].type = out.type
    new.shape = out.shape
    out.replace_all_uses_with(new, replace_graph_outputs=True)
    model.graph.insert_before(node, made)
    model.graph.remove(node, safe=True)
    new.name = out.name


def _fold_weight_transposes(model: ir.Model, branches: tuple[str, ...]) -> None:
    """Store each linear layer's weight as MatMul wants it, (in, out), instead of transposing it at run time."""
    for node in list(model.graph):
        if node.op_type != "Transpose" or node.inputs[0] is None or node.inputs[0].const_value is None:
            continue
        source, target = node.inputs[0], node.outputs[0]
        if not source.is_initializer():
            continue
        permutation = node.attributes.get_ints("perm") if "perm" in node.attributes else None
        turned = _transposed(source, permutation)
        weight = ir.Value(name=turned.name, shape=turned.shape, type=source.type, const_value=turned)
        model.graph.register_initializer(weight)
        target.replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)
        if not source.uses():
            model.graph.initializers.pop(str(source.name))


def _transposed(source: ir.Value, permutation: Sequence[int] | None) -> ir.LazyTensor:
    """The transposed constant, made when it is written: all of a large model's at once would double its memory."""
    view = np.transpose(_array(source), permutation)
    name = f"{source.name}_t"
    dtype = ir.DataType.from_numpy(view.dtype)

    def made() -> Any:
        return ir.Tensor(np.ascontiguousarray(view), name=name)

    return ir.LazyTensor(made, dtype=dtype, shape=ir.Shape(view.shape), name=name)


def _array(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _name_weights(model: ir.Model, branches: tuple[str, ...]) -> None:
    """Constants get the path of the layer that uses them; torch's own parameters lose the wrapper's prefix."""
    for value in list(model.graph.initializers.values()):
        old = str(value.name)
        new = old.removeprefix("model.")
        uses = list(value.uses())
        if _made_up(old) and len(uses) == 1 and uses[0].node.op_type in ("MatMul", "Gemm"):
            new = f"{uses[0].node.metadata_props[PATH_KEY]}.weight"
        if new != old and new not in model.graph.initializers:
            model.graph.initializers.pop(old)
            value.name = new
            model.graph.register_initializer(value)


def _made_up(name: str) -> bool:
    """Is this a name that the exporter's constant folding made up?"""
    return name.startswith("val_") or name.endswith("_t")


def _drop_unused_inputs(model: ir.Model, branches: tuple[str, ...]) -> None:
    """Forget inputs that nothing reads: a table of gates, where the gates are in the cached sums already."""
    read = [value for value in model.graph.inputs if value.uses() or value.is_graph_output()]
    model.graph.inputs.clear()
    model.graph.inputs.extend(read)


CLEANUP = (
    _drop_unused_inputs,
    _name_by_module,  # before the others, which speak of paths
    _split_gemms,  # before the transposes that it may leave are folded
    _fold_weight_transposes,
    _name_weights,
)
