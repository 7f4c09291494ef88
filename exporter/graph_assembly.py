"""A trunk's graph from one captured branch of each kind: the others are copies of it with their own weights.

A diffusion transformer repeats two or three branches tens of times, and capturing them is most of what an export takes.
So an excerpt with the first branch of each kind is captured, and its nodes are copied for every branch: the residual
stream led through, each copy with its own leaves of `parts`, weights and module paths. The graph is the one that
capturing everything gives, byte for byte once it is cleaned up; docs/adr/0014 has the reasons.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from onnxscript.rewriter import rewrite
from torch import nn
from torch.onnx.errors import OnnxExporterError

from ditc.exporter.branch_traces import BranchTrace, trace_branches
from ditc.exporter.graph_capture import captured, scopes_of, set_scopes
from ditc.exporter.graph_cleanup import OWN
from ditc.exporter.segments import Excerpt, Passing, Segment, Trunk
from ditc.program import AHEAD

__all__ = ["assembled"]

RESIDUAL = re.compile(r"residual\.(\d+)(\..+)?")  # the scopes of Residual in segments.py


class UnexpectedFormError(Exception):
    """The captured excerpt does not fall into the pieces that copies are made of."""


def assembled(segment: Segment) -> ir.Model | None:
    """The graph of a segment, as capturing all of it gives, from an excerpt with one branch of each kind.

    None where no branch repeats, where traces don't tell all, or where the excerpt is not of the expected form.
    """
    trunk = segment.module
    if not isinstance(trunk, Trunk) or AHEAD in trunk.plan.reads:  # a step that reads a sum has no branches
        return None
    traces = trace_branches(segment)
    if traces is None:
        return None
    first: dict[Hashable, int] = {}
    kinds = [first.setdefault(trace.operations, number) for number, trace in enumerate(traces)]
    if len(first) == len(traces):
        return None
    try:
        return _Assembly(segment, trunk, tuple(first.values())).grown(traces, kinds)
    except (UnexpectedFormError, OnnxExporterError):
        return None


@dataclass(frozen=True)
class _Piece:
    """A captured branch: its trace and nodes, the values that it takes and gives; `caches` where it computes none."""

    trace: BranchTrace
    nodes: list[ir.Node]
    before: list[ir.Value]
    caches: list[ir.Value]
    outs: list[ir.Value]
    after: list[ir.Value]


class _Assembly:
    """The captured excerpt of a segment, and the graph of the segment that grows out of it."""

    def __init__(self, segment: Segment, trunk: Trunk, chosen: Sequence[int]) -> None:
        excerpt = Excerpt(trunk, chosen)
        unread = {f"cache.{name}" for name in trunk.plan.reads if name not in excerpt.reads}
        inputs = {name: value for name, value in segment.inputs.items() if name not in unread}
        self.segment, self.chosen = segment, chosen
        # of each branch the outputs that there are, which are its caches where it computes nothing
        self.values = [[name for name in trunk.values(number) if name] for number in range(len(trunk.residual))]
        self.computes = trunk.plan.compute
        self.streams = len(trunk.wiring.streams)
        self.model = captured(excerpt, inputs, segment.open_dims, variadic=True)
        _simplify(self.model)
        self.graph = self.model.graph
        self.inputs = {str(value.name): value for value in self.graph.inputs}
        self.passing = Passing.of(self.graph.outputs, excerpt.counts, trunk.width)
        torch_model = cast(nn.Module, trunk.model)
        self.weights = {**dict(torch_model.named_parameters()), **dict(torch_model.named_buffers())}

    def grown(self, traces: Sequence[BranchTrace], kinds: Sequence[int]) -> ir.Model:
        """The whole graph: branch i has the trace `traces[i]` and becomes a copy of the captured branch `kinds[i]`."""
        pieces = {number: self._piece(place, traces[number]) for place, number in enumerate(self.chosen)}
        originals = {node for piece in pieces.values() for node in piece.nodes}
        place = [node for node in self.graph if node in originals][-1]
        passed, named = self.passing.passed[0], dict[str, ir.Value]()
        for number, (trace, kind) in enumerate(zip(traces, kinds, strict=True)):
            piece = pieces[kind]
            known = self._fillings(piece, trace, passed, self.values[number])
            paths = dict(zip(piece.trace.modules, trace.modules, strict=True))
            for node in piece.nodes:
                copy = _copy(node, number, known, paths)
                self.graph.insert_after(place, copy)
                place = copy
            named |= zip(self.values[number], (known[out] for out in piece.outs), strict=True)
            passed = [known[value] for value in piece.after]
        named |= {f"{AHEAD}.{number}": total for number, total in enumerate(passed[self.streams :], 1)}
        self.passing.passed[-1][0].replace_all_uses_with(passed[0], replace_graph_outputs=True)
        self._set_borders(named)
        remove_unused_nodes(self.model)
        if any(node.graph is not None for node in originals):  # something else reads what a branch made
            raise UnexpectedFormError
        return self.model

    def _piece(self, place: int, trace: BranchTrace) -> _Piece:
        """The captured branch number `place`: all that leads from what it takes to what it gives."""
        before, after = self.passing.passed[place : place + 2]
        outs, number = self.passing.outs[place], self.chosen[place]
        caches = [] if self.computes[number] else [self.inputs[f"cache.{name}"] for name in self.values[number]]
        weights = {self.graph.initializers.get(f"{OWN}{name}") for name in trace.weights}
        given = {*before, *caches, *(self.passing.leaves[leaf] for leaf in trace.leaves), *weights}
        nodes = _nodes_between(given, [*outs, *after])
        return _Piece(trace, [node for node in self.graph if node in nodes], before, caches, outs, after)

    def _fillings(
        self, piece: _Piece, trace: BranchTrace, passed: Sequence[ir.Value], names: Sequence[str]
    ) -> dict[ir.Value, ir.Value]:
        """Map the inputs of the captured branch to those of a copy."""
        leaves = self.passing.leaves
        known = {leaves[a]: leaves[b] for a, b in zip(piece.trace.leaves, trace.leaves, strict=True)}
        for a, b in zip(piece.trace.weights, trace.weights, strict=True):
            if f"{OWN}{a}" in self.graph.initializers:
                known[self.graph.initializers[f"{OWN}{a}"]] = self._weight(b)
        for cache, name in zip(piece.caches, names, strict=False):  # none where the branch computes
            known[cache] = self._cache_input(f"cache.{name}", cache)
        return known | dict(zip(piece.before, passed, strict=True))

    def _weight(self, name: str) -> ir.Value:
        """A parameter or buffer of the model as a constant of the graph."""
        full = f"{OWN}{name}"
        if full not in self.graph.initializers:
            tensor = TorchTensor(self.weights[name], name=full)
            value = ir.Value(name=full, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))
            value.const_value = tensor
            self.graph.register_initializer(value)
        return self.graph.initializers[full]

    def _cache_input(self, name: str, like: ir.Value) -> ir.Value:
        """A cached output as an input of the graph."""
        if name not in self.inputs:
            self.inputs[name] = ir.Value(name=name, shape=like.shape, type=like.type)
        return self.inputs[name]

    def _set_borders(self, named: Mapping[str, ir.Value]) -> None:
        """Set inputs and outputs as the segment declares them."""
        self.graph.inputs[:] = [self.inputs[name] for name in self.segment.inputs]
        outputs = [self.graph.outputs[0], *(named[name.removeprefix("cache.")] for name in self.segment.outputs[1:])]
        self.graph.outputs[:] = outputs
        for name, value in zip(self.segment.outputs, outputs, strict=True):
            value.name = name


def _simplify(model: ir.Model) -> None:
    """Fold and rewrite what is the same in every copy: all that doesn't hang on the values of weights.

    The weights are inputs meanwhile, so nothing can be concluded from them.
    """
    graph = model.graph
    weights = [value for name, value in graph.initializers.items() if name.startswith(OWN)]
    contents = [value.const_value for value in weights]
    inputs = list(graph.inputs)
    for value in weights:
        graph.initializers.pop(str(value.name))
        value.const_value = None
        graph.inputs.append(value)
    fold_constants(model, onnx_shape_inference=True)
    rewrite(model)
    graph.inputs[:] = inputs
    for value, content in zip(weights, contents, strict=True):
        value.const_value = content
        graph.register_initializer(value)


def _nodes_between(given: Collection[ir.Value | None], results: Sequence[ir.Value]) -> set[ir.Node]:
    """The nodes that lead from the values `given` to `results`, save those that only handle constants and sizes.

    Raises UnexpectedFormError where something else leads there too.
    """
    nodes: set[ir.Node] = set()
    left: list[ir.Value | None] = list(results)
    while left:
        value = left.pop()
        if value is None or value in given or _is_common(value):
            continue
        node = value.producer()
        if node is None or any(attribute.type in SUBGRAPHS for attribute in node.attributes.values()):
            raise UnexpectedFormError
        if node not in nodes:
            nodes.add(node)
            left += node.inputs
    return nodes


SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _is_common(value: ir.Value) -> bool:
    """Is this the same for every branch: a literal, or a number computed from nothing but the sizes of inputs?"""
    node = value.producer()
    if node is None:
        return value.is_initializer() and not str(value.name).startswith(OWN)
    if node.op_type == "Shape":
        return node.inputs[0] is not None and node.inputs[0].is_graph_input()
    return all(read is not None and _is_common(read) for read in node.inputs)


def _copy(node: ir.Node, number: int, known: dict[ir.Value, ir.Value], paths: Mapping[str, str]) -> ir.Node:
    """The node for branch `number`, reading what `known` says; what it makes comes to be known."""
    outputs = [ir.Value(name=f"{value.name}.{number}", shape=value.shape, type=value.type) for value in node.outputs]
    copy = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else known.get(value, value) for value in node.inputs],
        node.attributes.values(),
        overload=node.overload,
        outputs=outputs,
        version=node.version,
        metadata_props=dict(node.metadata_props),
    )
    known.update(zip(node.outputs, outputs, strict=True))
    set_scopes(copy, [_moved(scope, number, paths) for scope in scopes_of(node)])
    return copy


def _moved(scope: str, number: int, paths: Mapping[str, str]) -> str:
    """A scope of the captured branch as one of another branch; raises UnexpectedFormError for an unknown module."""
    if RESIDUAL.fullmatch(scope):
        return RESIDUAL.sub(rf"residual.{number}\2", scope)
    if not scope.startswith(OWN):
        return scope
    if scope.removeprefix(OWN) not in paths:
        raise UnexpectedFormError
    return f"{OWN}{paths[scope.removeprefix(OWN)]}"
