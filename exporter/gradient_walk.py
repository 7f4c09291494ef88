"""Gradients of what linear layers read, branch by branch from the head backwards: autograd holds one branch at a time.

A first pass keeps the streams in front of every branch and nothing else. Then each branch is computed again on
its own, and its vector-Jacobian product takes the gradients of the streams from behind it to its front.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditc.errors import CheckpointError
from ditc.exporter.protocol import TrajectoryModel, step_tables, timestep_tables
from ditc.exporter.seams import Seam, Streams, first_streams, seams_of
from ditc.streams import IMAGE

__all__ = ["Layers", "Reading", "Walk", "layers_at"]

Layers = Mapping[str, Mapping[str, nn.Linear]]  # branch -> path in the model -> layer
REMEDY = "choose --ranges without gradients"


@dataclass(frozen=True)
class Reading:
    """The tensor that a linear layer read, (rows, ..., in), and its gradient as far as this layer alone reads it."""

    branch: str
    path: str
    x: Tensor
    gradient: Tensor


def layers_at(model: Any, paths: Mapping[str, Sequence[str]]) -> Layers:
    """Return the linear layers at some paths of each branch. Raises CheckpointError where one is none, or named twice.

    Two products of one layer in a branch can't be told apart.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[str, dict[str, nn.Linear]] = {}
    for branch, own in paths.items():
        for path in own:
            layer = modules.get(path)
            if not isinstance(layer, nn.Linear):
                there = "nothing" if layer is None else type(layer).__name__
                raise CheckpointError(
                    f"gradients need a torch.nn.Linear at {path} of {model.spec.name}, found {there}; {REMEDY}"
                )
            if own.count(path) > 1:
                raise _not_once(model, path, branch, own.count(path))
            layers.setdefault(branch, {})[path] = layer
    return layers


@dataclass(frozen=True)
class Walk:
    """A model and those of its linear layers that are to be shown."""

    model: TrajectoryModel
    layers: Layers

    def readings(self, x: Tensor, t: Tensor, conditions: Sequence[Tensor], out_gradient: Tensor) -> Iterator[Reading]:
        """Yield what each layer read at one timestep t (1,), and its gradient: the last branch first.

        x is (rows, channels, *space), a condition (rows, *shape), and `out_gradient` the gradient of what the network
        returns, (rows, out_channels, *space). The model is as before after the last one. Raises CheckpointError where
        a branch doesn't call a layer once, or lets no gradient pass.
        """
        with _frozen(self.model), _as_refusals(self.model):
            with torch.no_grad():
                parts = self.model.unpack(self._tables(x, t, conditions))
                streams = self._streams(x, parts)
            behind = self._through_head(streams.pop(), parts, out_gradient)
            for seam in reversed(seams_of(self.model)):
                behind, own = self._through_branch(seam, streams.pop(), parts, behind)
                yield from own

    def _tables(self, x: Tensor, t: Tensor, conditions: Sequence[Tensor]) -> dict[str, Tensor]:
        tables = step_tables(self.model, t, conditions)
        if self.model.spec.inputs:
            return tables
        alone = timestep_tables(self.model, t)
        rows = {name: table.expand(len(x), *table.shape[1:]) for name, table in tables.items() if name not in alone}
        return tables | rows

    def _streams(self, x: Tensor, parts: Any) -> list[Streams]:
        """The streams in front of every branch, and behind the last; copies, as a merge may write in place."""
        h = first_streams(self.model, x, parts)
        streams = []
        for seam in seams_of(self.model):
            streams.append(_copies(h))
            h = _merged(seam, h, h, parts)
        return [*streams, h]

    def _through_head(self, streams: Streams, parts: Any, out_gradient: Tensor) -> Streams:
        """Return the gradients of the streams behind the last branch: nothing but IMAGE reaches the head."""
        h = streams[IMAGE].detach().requires_grad_()
        with torch.enable_grad():
            out = self.model.head(h.clone(), parts)
        (gradient,) = self._gradients([out], [h], [out_gradient], "head()")
        return {name: torch.zeros_like(stream) for name, stream in streams.items()} | {IMAGE: gradient}

    def _through_branch(
        self, seam: Seam, streams: Streams, parts: Any, behind: Streams
    ) -> tuple[Streams, list[Reading]]:
        """Return (the gradients of the streams in front of a branch, the readings of its layers)."""
        layers = self.layers.get(seam.name, {})
        h = {name: stream.detach().requires_grad_() for name, stream in streams.items()}
        with torch.enable_grad(), _watched(layers) as reads:
            after = _merged(seam, _copies(h), _copies(h), parts)  # copies, as both may write in place
        for path in layers:
            if len(reads[path]) != 1:
                raise _not_once(self.model, path, seam.name, len(reads[path]))
        inputs, names = [reads[path][0] for path in layers], list(h)
        gradients = self._gradients(
            [after[name] for name in names],
            [*h.values(), *inputs],
            [behind[name] for name in names],
            f"a layer of branch {seam.name}",
        )
        front = dict(zip(names, gradients, strict=False))
        return front, [
            Reading(seam.name, path, read.detach(), gradient)
            for path, read, gradient in zip(layers, inputs, gradients[len(names) :], strict=True)
        ]

    def _gradients(
        self, outs: Sequence[Tensor], inputs: Sequence[Tensor], behind: Sequence[Tensor], place: str
    ) -> tuple[Tensor, ...]:
        """The vector-Jacobian product of a part of the network; what autograd kept of the part is gone then."""
        pairs = [(out, given) for out, given in zip(outs, behind, strict=True) if out.requires_grad]
        own, given = ([pair[side] for pair in pairs] for side in (0, 1))
        asked = torch.autograd.grad(own, inputs, given, allow_unused=True) if pairs else ()
        gradients = tuple(gradient for gradient in asked if gradient is not None)
        if len(gradients) < len(inputs):
            raise CheckpointError(f"{self.model.spec.name} lets no gradient pass through {place}; {REMEDY}")
        return gradients


def _copies(streams: Streams) -> Streams:
    return {name: stream.clone() for name, stream in streams.items()}


def _merged(seam: Seam, read: Streams, h: Streams, parts: Any) -> Streams:
    """Return the streams `h` with the outputs of a branch merged, which it computes from `read`."""
    after = dict(h)
    for output, out in zip(seam.outputs, seam.compute(read, parts), strict=True):
        after[output.stream] = seam.merge(after[output.stream], out, parts, output)
    return after


def _not_once(model: Any, path: str, branch: str, times: int) -> CheckpointError:
    return CheckpointError(
        f"gradients need {path} of {model.spec.name} to be called once in branch {branch}, found {times} calls; "
        f"{REMEDY}"
    )


@contextmanager
def _as_refusals(model: Any) -> Iterator[None]:
    """Raise CheckpointError for what autograd can't do, as behind a write in place."""
    try:
        yield
    except RuntimeError as e:
        reason = str(e).splitlines()[0]
        raise CheckpointError(f"gradients of {model.spec.name} can't be taken: {reason}; {REMEDY}") from e


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Parameters without gradients, which nobody asks for here; as they were afterwards."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def _watched(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what each layer reads, by path: a view of its own, so that its gradient is that of this reading alone."""
    reads: dict[str, list[Tensor]] = {path: [] for path in layers}

    def watch(path: str) -> Any:
        def read(_: nn.Module, args: tuple[Any, ...]) -> Any:
            if not args:
                return None
            x = args[0]
            reads[path].append(x.view_as(x) if x.requires_grad else x.detach().requires_grad_())
            return (reads[path][-1], *args[1:])

        return read

    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(watch(path)).remove)
        yield reads
