"""A device engine behind the host's interface: NumPy in and out, a copy each way. For measuring, not for serving."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ditc.engines.backend import Buffer, DeviceEngine, Engine, Port
from ditc.engines.building import build_file
from ditc.engines.device import Device, DeviceTensor, open_device
from ditc.engines.store import BuildSettings
from ditc.engines.trt import import_tensorrt, open_runtime
from ditc.engines.trt_runtime import TensorRTEngine, share_scratch

__all__ = ["DeviceEngineOnHost", "HostBinding", "tensorrt_opener"]


class HostBinding:
    """NumPy buffers of a request; one run at a time has the engine's tensors."""

    def __init__(self, engine: DeviceEngineOnHost) -> None:
        self._engine = engine
        self._host: dict[str, Buffer] = {}

    def bind(self, name: str, buffer: Buffer) -> None:
        self._host[name] = buffer

    def run(self) -> None:
        self._engine.run(self._host)


class DeviceEngineOnHost:
    """Runs a device engine on NumPy buffers of its fixed shapes."""

    def __init__(self, inside: DeviceEngine, device: Device) -> None:
        self._inside = inside
        self._device = device
        self._running = threading.Lock()
        ports = {**inside.inputs, **inside.outputs}
        self._tensors: dict[str, DeviceTensor] = {
            name: device.empty(port.fixed_shape, port.dtype) for name, port in ports.items()
        }

    @property
    def inputs(self) -> Mapping[str, Port]:
        return self._inside.inputs

    @property
    def outputs(self) -> Mapping[str, Port]:
        return self._inside.outputs

    def binding(self) -> HostBinding:
        return HostBinding(self)

    def run(self, host: Mapping[str, Buffer]) -> None:
        """Run once on these buffers, by port; an output that is not among them is computed and left."""
        with self._running:
            self._device.activate()
            for name in self.inputs:
                self._device.upload(host[name], self._tensors[name])
            for name, tensor in self._tensors.items():
                self._inside.bind(name, tensor)
            self._inside.enqueue()
            for name in self.outputs.keys() & host.keys():
                np.copyto(host[name], self._device.download(self._tensors[name]))

    def __enter__(self) -> DeviceEngineOnHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device.synchronize()


@contextmanager
def tensorrt_opener(sizes: Mapping[str, int]) -> Iterator[Any]:
    """A function that builds an ONNX file of TensorRT's form and opens the engine; plans are kept nowhere.

    `sizes` gives a number to each open dimension.
    """
    trt = import_tensorrt()
    device = open_device()
    runtime, log = open_runtime(trt)
    blocks: list[DeviceTensor] = []

    def open_engine(segment: Path) -> Engine:
        plan = build_file(segment, sizes, BuildSettings())
        engine = TensorRTEngine(trt, runtime, log, plan, segment.stem, device)
        blocks[:] = [share_scratch([engine], device)]
        return DeviceEngineOnHost(engine, device)

    yield open_engine
    device.synchronize()
