"""A device engine behind the host's interface: NumPy in and out, a copy each way. For measuring, not for serving."""

from __future__ import annotations

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

__all__ = ["DeviceEngineOnHost", "tensorrt_opener"]


class DeviceEngineOnHost:
    """Runs a device engine on NumPy buffers of its fixed shapes."""

    def __init__(self, inside: DeviceEngine, device: Device) -> None:
        self._inside = inside
        self._device = device
        self._host: dict[str, Buffer] = {}
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

    def bind(self, name: str, buffer: Buffer) -> None:
        self._inside.bind(name, self._tensors[name])
        self._host[name] = buffer

    def run(self) -> None:
        for name in self.inputs:
            self._device.upload(self._host[name], self._tensors[name])
        for name in self.outputs.keys() - self._host.keys():  # nobody reads it, the engine writes it
            self._inside.bind(name, self._tensors[name])
        self._inside.enqueue()
        for name in self.outputs.keys() & self._host.keys():
            np.copyto(self._host[name], self._device.download(self._tensors[name]))

    def __enter__(self) -> DeviceEngineOnHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device.synchronize()
        self._host.clear()


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
