"""Torch's operations in each branch of a trunk, to tell branches that are one computation with other weights.

Torch's own tracer runs the trunk on tensors without memory, and what it saw in each branch is compared: operators,
every constant among their arguments, who reads whom, the shapes of weights and of what a branch takes from `parts`.
Nothing is concluded from the names, types or settings of modules, so branches that count as equal are equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ditc.exporter.graph_capture import LARGEST_SIZE
from ditc.exporter.segments import Excerpt, Passing, Segment, Trunk

__all__ = ["BranchTrace", "trace_branches"]

# code may take another way at a small batch than at a large one, so both ends are traced
BATCHES = (2, LARGEST_SIZE)


@dataclass(frozen=True)
class BranchTrace:
    """The operations of one branch, equal for branches that are one computation, and what fills the holes in them.

    `weights` and `modules` are paths in the model, `leaves` are places among the tensors of `parts`; each in the order
    in which the branch comes to them.
    """

    operations: Hashable
    weights: tuple[str, ...]
    modules: tuple[str, ...]
    leaves: tuple[int, ...]


class UnclearError(Exception):
    """A branch does something that its trace can't vouch for."""


def trace_branches(segment: Segment) -> list[BranchTrace] | None:
    """A trace of every branch of a trunk, in its order. None where traces don't tell all.

    That is where a branch can't run without data, changes a tensor in place, or reads a tensor that is neither a stream
    nor a leaf of `parts` nor a weight of the model; and where a module serves two branches, or a weight
    or a module has two names.
    """
    try:
        names = _Names.of(cast(nn.Module, cast(Trunk, segment.module).model))
        small, large = (_traces_at(batch, segment, names) for batch in BATCHES)
    except Exception:  # a model's own code may fail in any way; whether it can be exported at all, others say
        return None
    if [_holes(trace) for trace in small] != [_holes(trace) for trace in large]:
        return None
    calls = Counter(path for trace in small for path in trace.modules)
    if any(count > 1 for count in calls.values()):
        return None
    pairs = zip(small, large, strict=True)
    return [BranchTrace((few.operations, many.operations), *_holes(few)) for few, many in pairs]


def _holes(trace: BranchTrace) -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]:
    return trace.weights, trace.modules, trace.leaves


@dataclass(frozen=True)
class _Names:
    """Paths of a model's modules, parameters and buffers by identity. Raises UnclearError where one thing has two."""

    weights: dict[int, str]
    modules: dict[int, str]

    @classmethod
    def of(cls, model: nn.Module) -> _Names:
        weights = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        modules = list(model.named_modules(remove_duplicate=False))
        paths = cls({id(weight): name for name, weight in weights}, {id(module): name for name, module in modules})
        if len(paths.weights) < len(weights) or len(paths.modules) < len(modules):
            raise UnclearError
        return paths


@torch.no_grad()
def _traces_at(batch: int, segment: Segment, names: _Names) -> list[BranchTrace]:
    trunk = cast(Trunk, segment.module)
    excerpt = Excerpt(trunk, range(len(trunk.residual)))  # all of it, for what passes between the branches
    with FakeTensorMode(allow_non_fake_inputs=True), _calls(trunk, names.modules) as calls:
        graph = make_fx(excerpt, pre_dispatch=True)(*(_empty(segment, name, batch) for name in segment.inputs))
    nodes = list(graph.graph.nodes)
    order = {node: number for number, node in enumerate(nodes)}
    passing = Passing.of(cast(Sequence[fx.Node], nodes[-1].args[0]), excerpt.counts, trunk.width)
    place_of = {leaf: place for place, leaf in enumerate(passing.leaves)}
    traces = []
    for before, outs, after, called in zip(passing.passed, passing.outs, passing.passed[1:], calls, strict=False):
        own = nodes[max(order[node] for node in before) + 1 : max(order[node] for node in after) + 1]
        if any(out not in own and out.op != "placeholder" for out in outs):
            raise UnclearError
        given = {out: f"cache {number}" for number, out in enumerate(outs)}
        given |= {node: f"stream {number}" for number, node in enumerate(before)}
        traces.append(_Reading(graph, names.weights, place_of).trace(own, given, [*outs, *after], called))
    return traces


def _empty(segment: Segment, name: str, batch: int) -> Tensor:
    """An input of a segment at another batch."""
    like, dims = segment.inputs[name], segment.open_dims[name]
    return torch.empty([batch if axis in dims else size for axis, size in enumerate(like.shape)], dtype=like.dtype)


@contextmanager
def _calls(trunk: Trunk, paths: Mapping[int, str]) -> Iterator[list[list[str]]]:
    """For each branch the paths of the modules that it calls, in order, filled while the block runs."""
    branches = {id(residual): number for number, residual in enumerate(trunk.residual)}
    calls: list[list[str]] = [[] for _ in branches]
    inside: list[int] = []

    def enter(module: nn.Module, _: object) -> None:
        if id(module) in branches:
            inside.append(branches[id(module)])
        elif inside and id(module) in paths:
            calls[inside[-1]].append(paths[id(module)])

    def leave(module: nn.Module, _: object, __: object) -> None:
        if id(module) in branches:
            inside.pop()

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave).remove)
        yield calls


@dataclass
class _Reading:
    """Reads the nodes of one branch as comparable lines; weights and leaves get numbers as they are met."""

    graph: fx.GraphModule
    names: Mapping[int, str]
    place_of: Mapping[fx.Node, int]  # among the leaves of `parts`
    known: dict[fx.Node, Hashable] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    leaves: dict[int, int] = field(default_factory=dict)

    def trace(
        self, own: Sequence[fx.Node], given: Mapping[fx.Node, str], results: Sequence[fx.Node], called: Sequence[str]
    ) -> BranchTrace:
        """The trace of the nodes `own`, which may read each other, those given, leaves and weights."""
        self.known = {**given, **{node: number for number, node in enumerate(own)}}
        modules = list(dict.fromkeys(called))
        operations = (
            *((name, _kind(node.meta["val"])) for node, name in given.items()),
            *(modules.index(path) for path in called),
            *(self._line(node) for node in own),
            *(self._comparable(node) for node in results),
        )
        return BranchTrace(operations, tuple(self.weights), tuple(modules), tuple(self.leaves))

    def _line(self, node: fx.Node) -> Hashable:
        if node.op == "get_attr":
            return self._weight(getattr(self.graph, str(node.target)))
        if node.op != "call_function" or (isinstance(node.target, OpOverload) and node.target._schema.is_mutable):
            raise UnclearError
        return node.target, self._comparable(node.args), self._comparable(node.kwargs)

    def _weight(self, tensor: object) -> Hashable:
        if not isinstance(tensor, Tensor) or id(tensor) not in self.names:
            raise UnclearError
        return "weight", self.weights.setdefault(self.names[id(tensor)], len(self.weights)), _kind(tensor)

    def _comparable(self, value: Any) -> Hashable:
        """An argument, equal to another only where type and value are, of floats the sign of zero too."""
        if isinstance(value, fx.Node):
            return self._read(value)
        if isinstance(value, (list, tuple)):
            return type(value), tuple(self._comparable(item) for item in value)
        if isinstance(value, dict):
            return dict, tuple((key, self._comparable(item)) for key, item in value.items())
        if isinstance(value, slice):
            return slice, self._comparable([value.start, value.stop, value.step])
        return type(value), repr(value) if isinstance(value, float) else value

    def _read(self, node: fx.Node) -> Hashable:
        if node in self.known:
            return "node", self.known[node]
        if node not in self.place_of:
            raise UnclearError
        number = self.leaves.setdefault(self.place_of[node], len(self.leaves))
        return "leaf", number, _kind(node.meta["val"])


def _kind(tensor: Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.dtype
