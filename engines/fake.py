"""A backend made of plain functions, and a device whose memory is the host's: a runtime without an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from ditc.engines.backend import Buffer, Engine, Port
from ditc.engines.device import ALIGNMENT, DeviceGraph, DeviceTensor

__all__ = ["FakeBackend", "FakeBinding", "FakeDevice", "FakeEngine"]

SegmentFunction = Callable[[Mapping[str, Buffer]], Mapping[str, Buffer]]


@dataclass
class FakeBinding:
    """The buffers of one request on a fake engine."""

    engine: FakeEngine
    bound: dict[str, Buffer] = field(default_factory=dict)

    def bind(self, name: str, buffer: Buffer) -> None:
        if name not in self.engine.inputs and name not in self.engine.outputs:
            raise KeyError(name)
        self.bound[name] = buffer

    def run(self) -> None:
        self.engine.runs += 1
        results = self.engine.function({name: self.bound[name] for name in self.engine.inputs})
        for name in self.engine.outputs:
            np.copyto(self.bound[name], results[name])


@dataclass
class FakeEngine:
    """An engine that calls `function` with the bound inputs and copies what it returns into the bound outputs."""

    function: SegmentFunction
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    runs: int = 0

    def binding(self) -> FakeBinding:
        return FakeBinding(self)

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close nothing: it owns nothing."""


@dataclass(frozen=True)
class FakeBackend:
    """Engines by the stem of the segment's file name."""

    engines: Mapping[str, FakeEngine]
    name: str = "fake"

    def open(self, segment: Path) -> Engine:
        return self.engines[segment.stem]


class FakeDevice:
    """A device whose memory is the host's, so that engines of a processor run on it. What is queued is done at once."""

    name = "fake"
    compute_capability = "0.0"
    stream = 0

    def memory_bytes(self) -> tuple[int, int]:
        return 1 << 40, 1 << 40

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
        memory = np.empty(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize + ALIGNMENT, np.uint8)
        return DeviceTensor(memory.ctypes.data + -memory.ctypes.data % ALIGNMENT, dtype, shape, memory)

    def upload(self, array: Buffer, tensor: DeviceTensor) -> None:
        if array.shape != tensor.shape:
            raise ValueError(f"expected {tensor.shape} to upload, found {array.shape}")
        _view(tensor)[...] = array

    def copy(self, source: DeviceTensor, target: DeviceTensor) -> None:
        _view(target)[...] = _view(source)

    def download(self, tensor: DeviceTensor) -> Buffer:
        return np.array(_view(tensor))

    def synchronize(self) -> None:
        """Nothing waits."""

    def hold(self, *things: object) -> None:
        """Nothing is left to be done."""

    def activate(self) -> None:
        """There is no other one."""

    def capture(self, queue_work: Callable[[], None]) -> DeviceGraph:
        return _FakeGraph(queue_work)


@dataclass(frozen=True)
class _FakeGraph:
    queue_work: Callable[[], None]

    def launch(self) -> None:
        self.queue_work()


def _view(tensor: DeviceTensor) -> Buffer:
    """The tensor's part of its memory as an array."""
    offset = tensor.pointer - tensor.memory.ctypes.data
    view: Buffer = np.ndarray(tensor.shape, tensor.dtype, tensor.memory, offset)
    return view
