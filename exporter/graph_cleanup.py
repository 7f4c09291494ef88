"""The clean-up of a captured graph: names from the torch module tree, one MatMul per linear layer, no transposes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditc.exporter.graph_capture import scopes_of
from ditc.program import BRANCH_KEY, PATH_KEY

__all__ = ["CLEANUP", "OWN"]

OWN = "model."  # what torch's exporter puts before paths and parameters of the model inside a segment
BRANCH_SCOPE = re.compile(r"residual\.(\d+)\.compute")  # see Residual in segments.py


def _name_by_module(model: ir.Model, branches: tuple[str, ...]) -> None:
    """Name nodes by torch module path and operator, note the branch of each, and drop traces."""
    counts: dict[str, int] = {}
    for node in model.graph:
        scopes = scopes_of(node)
        branch = next((branches[int(match[1])] for s in scopes if (match := BRANCH_SCOPE.fullmatch(s))), "")
        modules = [s.removeprefix(OWN) for s in scopes if s.startswith(OWN)]
        path = modules[-1] if modules else branch
        node.metadata_props.clear()
        node.metadata_props[PATH_KEY] = path
        if branch:
            node.metadata_props[BRANCH_KEY] = branch
        name = f"{path}/{node.op_type}" if path else node.op_type
        counts[name] = counts.get(name, 0) + 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
        for value in node.outputs:
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.producer_name, model.producer_version = "ditc", None


def _split_gemms(model: ir.Model, branches: tuple[str, ...]) -> None:
    """Split Gemm, a linear layer on flattened tokens, into MatMul and Add, which integer kernels and Q/DQ want."""
    for node in list(model.graph):
        if node.op_type != "Gemm" or BRANCH_KEY not in node.metadata_props:
            continue
        alpha, beta, trans_a, trans_b = (
            node.attributes[name].value if name in node.attributes else default
            for name, default in (("alpha", 1.0), ("beta", 1.0), ("transA", 0), ("transB", 0))
        )
        if (alpha, beta, trans_a) != (1.0, 1.0, 0):
            continue
        weight, parts = node.inputs[1], []
        if trans_b:
            parts.append(ir.node("Transpose", [weight], attributes={"perm": [1, 0]}))
            weight = parts[-1].outputs[0]
        parts.append(ir.node("MatMul", [node.inputs[0], weight]))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            parts.append(ir.node("Add", [parts[-1].outputs[0], node.inputs[2]]))
        _replace(model, node, parts)


def _replace(model: ir.Model, node: ir.Node, parts: list[ir.Node]) -> None:
    """Put nodes in the place of one; the last one's output takes over its name, type and uses."""
    out, new = node.outputs[0], parts[-1].outputs[0]
    for number, part in enumerate(parts):
        part.name = f"{node.name.removesuffix('/Gemm')}/{part.op_type}" if node.name else None
        part.metadata_props.update(node.metadata_props)
        part.outputs[0].name = f"{out.name}.{number}"
        part.outputs[0].type = out.type
    new.shape = out.shape
    out.replace_all_uses_with(new, replace_graph_outputs=True)
    model.graph.insert_before(node, parts)
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
    """Return the transposed constant, made when it is written: all of a large model's would double its memory."""
    view = np.transpose(_array(source), permutation)
    name = f"transposed.{source.name}"
    dtype = ir.DataType.from_numpy(view.dtype)

    def contiguous() -> Any:
        return ir.Tensor(np.ascontiguousarray(view), name=name)

    return ir.LazyTensor(contiguous, dtype=dtype, shape=ir.Shape(view.shape), name=name)


def _array(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _name_values(model: ir.Model, branches: tuple[str, ...]) -> None:
    """Name values after their nodes, torch's parameters as torch names them, other constants after their readers.

    So a name says where a value belongs, and hangs on nothing but the graph. Constants are put in the order in which
    they are first read.
    """
    graph = model.graph
    borders = {*graph.inputs, *graph.outputs}
    for node in graph:
        for number, value in enumerate(node.outputs):
            if value not in borders:
                value.name = str(node.name) if len(node.outputs) == 1 else f"{node.name}.{number}"
    readers: dict[ir.Value, tuple[ir.Node, int]] = {}
    for node in graph:
        for place, read in enumerate(node.inputs):
            if read is not None and read.is_initializer():
                readers.setdefault(read, (node, place))
    names = {str(value.name).removeprefix(OWN) for value in readers if str(value.name).startswith(OWN)}
    graph.initializers.clear()
    for value, (node, place) in readers.items():
        if value not in borders:
            value.name = _constant_name(str(value.name), node, place, names)
            names.add(value.name)
        graph.register_initializer(value)


def _constant_name(old: str, reader: ir.Node, place: int, names: set[str]) -> str:
    """The name of a constant that `reader` reads first, as its input number `place`."""
    if old.startswith(OWN):
        return old.removeprefix(OWN)
    weight = f"{reader.metadata_props[PATH_KEY]}.weight"
    made_by_transposing = place == 1 and reader.op_type in ("MatMul", "Gemm")
    return weight if made_by_transposing and weight not in names else f"{reader.name}.input_{place}"


def _drop_unused_inputs(model: ir.Model, branches: tuple[str, ...]) -> None:
    """Forget inputs that nothing reads: a table of gates, where the gates are in the cached sums already."""
    read = [value for value in model.graph.inputs if value.uses() or value.is_graph_output()]
    model.graph.inputs.clear()
    model.graph.inputs.extend(read)


CLEANUP: tuple[Callable[[ir.Model, tuple[str, ...]], None], ...] = (  # each takes (model, names of the branches)
    _drop_unused_inputs,
    _name_by_module,  # before the others, which speak of paths
    _split_gemms,  # before the transposes that it may leave are folded
    _fold_weight_transposes,
    _name_values,  # last: every node is there
)
