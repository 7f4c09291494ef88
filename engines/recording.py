"""A backend that looks on: another backend's engines, and what they were bound to at chosen runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ditc.engines.backend import Backend, Buffer, Engine, Port
from ditc.engines.wrapping_engine import WrappingBinding, WrappingEngine

__all__ = ["RecordedRun", "RecordingBackend", "RecordingEngine"]


@dataclass(frozen=True)
class RecordedRun:
    """Copies of everything an engine was bound to at its run number `call`: inputs before it, outputs after it."""

    call: int
    inputs: Mapping[str, Buffer]
    outputs: Mapping[str, Buffer]


@dataclass
class RecordingBinding(WrappingBinding):
    """A binding of a recording engine, which counts the runs of all of them."""

    engine: RecordingEngine

    def bind(self, name: str, buffer: Buffer) -> None:
        self.inside.bind(name, buffer)
        self.buffers[name] = buffer

    def run(self) -> None:
        engine = self.engine
        call, engine.runs = engine.runs, engine.runs + 1
        if call not in engine.calls:
            self.inside.run()
            return
        inputs = self._copies(engine.inputs)  # before the run: the caller's buffers are used again
        self.inside.run()
        engine.keep(RecordedRun(call, inputs, self._copies(engine.outputs)))

    def _copies(self, ports: Mapping[str, Port]) -> dict[str, Buffer]:
        return {name: np.array(self.buffers[name]) for name in ports}


@dataclass
class RecordingEngine(WrappingEngine):
    """An engine that hands `keep` a copy of each run whose number is in `calls`."""

    calls: Collection[int]
    keep: Callable[[RecordedRun], None]
    runs: int = 0

    def binding(self) -> RecordingBinding:
        return RecordingBinding(self.inside.binding(), self)


@dataclass
class RecordingBackend:
    """Opens segments as `inside` does. `calls` names, for each segment, the runs to record; `runs` collects them.

    It has the name of the backend inside, so that a segment is opened in that backend's own form.
    """

    inside: Backend
    calls: Mapping[str, Collection[int]]
    runs: dict[str, list[RecordedRun]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.inside.name

    def open(self, segment: Path) -> Engine:
        name = segment.name.split(".")[0]  # full.onnxrt.onnx is ONNX Runtime's form of segment "full"
        recorded = self.runs.setdefault(name, [])
        return RecordingEngine(self.inside.open(segment), self.calls.get(name, ()), recorded.append)
