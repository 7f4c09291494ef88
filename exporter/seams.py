"""Branches and streams of a model as the exporter goes through them, whichever of the two forms a branch has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditc.streams import IMAGE, BranchStreams, Output

__all__ = ["Seam", "Streams", "first_streams", "seams_of"]

Streams = dict[str, Tensor]  # by name; IMAGE is the residual stream


@dataclass(frozen=True)
class Seam:
    """A branch as the exporter calls it, with one form for both kinds; `streams` is None for one that isn't listed."""

    branch: Any
    streams: BranchStreams | None = None

    @property
    def name(self) -> str:
        return str(self.branch.name)

    @property
    def outputs(self) -> tuple[Output, ...]:
        return (self.streams or BranchStreams()).outputs

    def compute(self, h: Mapping[str, Tensor], parts: Any) -> tuple[Tensor, ...]:
        """Return a tensor for each output."""
        if self.streams is None:
            return (self.branch.compute(h[IMAGE], parts),)
        outs = self.branch.compute({name: h[name] for name in self.streams.reads}, parts)
        return (outs,) if isinstance(outs, Tensor) else tuple(outs)

    def merge(self, h: Tensor, out: Tensor, parts: Any, output: Output) -> Tensor:
        """Return the output's stream with `out` added."""
        merged: Tensor = self.branch.merge(h, out, parts, *(() if self.streams is None else (output.name,)))
        return merged


def seams_of(model: Any) -> list[Seam]:
    """Return the branches of a model in the order they run."""
    listed = model.spec.streams or {}
    return [Seam(branch, listed.get(branch.name)) for branch in model.branches]


def first_streams(model: Any, x: Tensor, parts: Any) -> Streams:
    """Return the streams in front of the branches."""
    image = model.embed(x)
    return {IMAGE: image} if len(model.spec.wiring.streams) == 1 else {IMAGE: image, **model.context(parts)}
