"""Checks of a model's streams against its spec: each branch gives the outputs that are named, from what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ditc.errors import CheckpointError
from ditc.exporter.seams import Seam, Streams
from ditc.spec import ModelSpec
from ditc.streams import IMAGE, BranchStreams, Output

__all__ = ["check_context", "checked_merge", "checked_outputs"]


def checked_outputs(seam: Seam, h: Streams, parts: Any, spec: ModelSpec) -> tuple[Tensor, ...]:
    """The outputs of a branch; raises CheckpointError where they are others than the spec says."""
    try:
        outs = seam.compute(h, parts)
    except KeyError as e:
        reads = ", ".join((seam.streams or BranchStreams()).reads)
        raise CheckpointError(f"compute() of {seam.name} asks for {e}, and reads {reads} by spec.streams") from e
    if seam.streams is None:
        if outs[0].shape[1:] != spec.branch_shape:
            raise CheckpointError(
                f"{seam.name} gives {tuple(outs[0].shape[1:])}, expected spec.branch_shape {spec.branch_shape}"
            )
        return outs
    if len(outs) != len(seam.outputs):
        names = ", ".join(output.name for output in seam.outputs)
        raise CheckpointError(f"{seam.name} gives {len(outs)} outputs, spec.streams names {len(seam.outputs)}: {names}")
    for output, out in zip(seam.outputs, outs, strict=True):
        shape = output.shape or spec.branch_shape
        if out.shape[1:] != shape:
            raise CheckpointError(
                f"output {output.name} of {seam.name} is {tuple(out.shape[1:])}, spec.streams says {shape}"
            )
    _check_reads(seam, seam.streams, h, parts)
    return outs


def _check_reads(seam: Seam, streams: BranchStreams, h: Streams, parts: Any) -> None:
    """Raise CheckpointError unless each stream that a branch says it reads decides what it leaves for others.

    A cached output that nothing depends on is no input of a graph, so a program has to know. What goes to the image
    decides in every step, each other output only where its own stream is read.
    """
    with torch.enable_grad():
        given = {name: h[name].detach().requires_grad_() for name in streams.reads}
        outs = zip(seam.outputs, seam.compute(given, parts), strict=True)
        to_image, others = list[Tensor](), list[Tensor]()
        for output, out in outs:
            (to_image if output.stream == IMAGE else others).append(out)
        for name, stream in given.items():
            groups = [to_image] if to_image else [[out] for out in others]
            if not all(_depends(group, stream) for group in groups):
                raise CheckpointError(
                    f"{seam.name} says that it reads the stream {name!r}, and what it gives to "
                    f"{IMAGE if to_image else 'another one'} does not depend on it; correct spec.streams, or split it "
                    "into two branches"
                )


def _depends(outs: Sequence[Tensor], stream: Tensor) -> bool:
    """Is there a way from a stream to one of the outputs, whatever the weights?"""
    ways = [out.sum() for out in outs if out.requires_grad]
    return bool(ways) and torch.autograd.grad(ways, [stream], allow_unused=True, retain_graph=True)[0] is not None


def checked_merge(seam: Seam, h: Tensor, out: Tensor, parts: Any, output: Output) -> Tensor:
    """The stream after an output; raises CheckpointError where a listed branch makes another shape of it."""
    merged = seam.merge(h, out, parts, output)
    if seam.streams is not None and merged.shape != h.shape:
        raise CheckpointError(
            f"merge() of {seam.name} makes {tuple(merged.shape[1:])} of the stream {output.stream!r} with output "
            f"{output.name}, expected {tuple(h.shape[1:])}"
        )
    return merged


def check_context(model: Any, parts: Any) -> None:
    """Raise CheckpointError unless `context` begins the streams beside the image's that the spec names."""
    expected = [name for name in model.spec.wiring.streams if name != IMAGE]
    if not expected:
        return
    begun = list(model.context(parts)) if hasattr(model, "context") else []
    if sorted(begun) != sorted(expected):
        raise CheckpointError(
            f"context(parts) must begin the streams {expected} that spec.streams names, found {begun or 'none'}"
        )
