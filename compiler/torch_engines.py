"""Segments as torch runs them, behind the interface of engines: for a look at the model before anything is exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from ditc.engines.backend import Buffer, Port
from ditc.exporter.protocol import TrajectoryModel
from ditc.exporter.seams import seams_of
from ditc.exporter.segments import Segment, own_names, segments_of
from ditc.program import CONDITION, FULL, REQUEST, Program
from ditc.streams import IMAGE

__all__ = ["TorchBinding", "TorchEngine", "sum_of", "watching_engines"]

Tensors = Mapping[str, Tensor]
Show = Callable[[Tensors, Tensors], None]  # (inputs, outputs) of a run


def _show_nobody(inputs: Tensors, outputs: Tensors) -> None:
    """Show nothing."""


@dataclass
class TorchBinding:
    """The buffers of one request, and the runs on them."""

    engine: TorchEngine
    buffers: dict[str, Buffer] = field(default_factory=dict)

    def bind(self, name: str, buffer: Buffer) -> None:
        self.buffers[name] = buffer

    @torch.no_grad()
    def run(self) -> None:
        segment = self.engine.segment
        inputs = {name: torch.from_numpy(self.buffers[name]) for name in segment.inputs}
        outputs = dict(zip(segment.outputs, segment.module(*inputs.values()), strict=True))
        for name in self.engine.outputs:
            self.buffers[name][...] = outputs[name].numpy()
        self.engine.show(inputs, outputs)


@dataclass(frozen=True, eq=False)
class TorchEngine:
    """A segment that torch runs. A caller binds `outputs`; `show` is handed every run's inputs and all that it gave.

    What is shown is new at each run, and as long alive as who is shown it wants it to be; only inputs are used again.
    """

    segment: Segment
    outputs: Mapping[str, Port]
    show: Show = _show_nobody

    @property
    def inputs(self) -> Mapping[str, Port]:
        """Every input, with its open dimensions by their names."""
        dims = self.segment.open_dims
        return {name: _port(name, tensor, dims[name]) for name, tensor in self.segment.inputs.items()}

    def binding(self) -> TorchBinding:
        return TorchBinding(self)

    def __enter__(self) -> TorchEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the model as it is: it is the caller's."""


def _port(name: str, like: Tensor, open_dims: Mapping[int, str]) -> Port:
    """Return a port with the type and shape of a tensor."""
    shape = tuple(open_dims.get(axis, size) for axis, size in enumerate(like.shape))
    return Port(name, str(like.dtype).removeprefix("torch."), shape)


@torch.no_grad()
def watching_engines(model: TrajectoryModel, program: Program, show: Show) -> dict[str, TorchEngine]:
    """Return the engines of a program that computes everything at every step; `show` is handed each step's runs.

    It is handed the outputs of every branch as well, as "cache.NAME", though the program writes none.
    """
    whole = program.segment(FULL).model_copy(update={"writes": tuple(program.wiring.values)})
    shown = program.model_copy(update={"segments": (whole,), "epilogue": ()})
    condition, full = segments_of(model, shown)
    examples = zip(condition.outputs, condition.module(*condition.inputs.values()), strict=True)
    tables = {name: _port(name, table, _dims_of_table(name)) for name, table in examples}
    out = Port("out", "float32", ("batch", *model.spec.prediction_shape))
    return {
        CONDITION: TorchEngine(condition, tables),
        FULL: TorchEngine(full, {out.name: out}, show),
    }


def _dims_of_table(name: str) -> Mapping[int, str]:
    return {0: "batch"} if name.startswith(REQUEST) else {0: "steps", 1: "batch"}


@torch.no_grad()
def sum_of(model: TrajectoryModel, outputs: Mapping[str, Buffer], tables: Tensors) -> Buffer:
    """Return the sum that branches with these outputs, by name, add to the stream of the head at such tables.

    (rows, *branch_shape), for a model whose branches add. Of `tables` others than the step's are passed over.
    """
    parts = model.unpack(own_names({name: table for name, table in tables.items() if name != "x"}))
    total = torch.zeros(())
    for seam in seams_of(model):
        for name, output in model.spec.wiring.outputs(seam.name).items():
            if output.stream == IMAGE:
                total = seam.merge(total, torch.from_numpy(outputs[name]), parts, output)
    return np.asarray(total.numpy())
