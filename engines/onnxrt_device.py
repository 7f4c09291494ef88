"""ONNX Runtime's GPU providers as device backends: the typed segments, bound to device memory on one stream.

`cuda`: the provider has no integer kernels behind Q/DQ for these layers, so the weights are unfolded to FP16 when the
session opens, and activations are rounded to their INT8 values by two small kernels: its numbers at FP16's speed.
`ort-tensorrt`: the provider builds its engines at the first run and keeps them in `cache`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ditc.bundle import Bundle
from ditc.engines.backend import DeviceEngine, Port, lowered_path
from ditc.engines.device import CudaDevice, Device, DeviceTensor, device_in_use
from ditc.engines.onnxrt import import_onnxruntime, port_of, translated
from ditc.engines.store import ENGINES, files_digest
from ditc.engines.trt_runtime import profile_sizes
from ditc.errors import InputError
from ditc.files import digest_of, writing
from ditc.openable import Links, check_utf8, openable

__all__ = ["CUDA", "TENSORRT", "OnnxRuntimeDeviceBackend", "Provider"]

GPU_ADVICE = "`ditc doctor` shows driver, GPU and providers"


@dataclass(frozen=True)
class Provider:
    """An execution provider: its name, the kind of memory that it binds, its options and the session's entries.

    Its sessions run on the device's stream where it `takes_stream`.
    """

    name: str
    memory: str = "cuda"
    options: Mapping[str, str] = field(default_factory=dict)
    session: Mapping[str, str] = field(default_factory=dict)
    caches_engines: bool = False
    takes_stream: bool = True


CUDA = Provider("CUDAExecutionProvider", session={"session.disable_quant_qdq": "1"})
TENSORRT = Provider(
    "TensorrtExecutionProvider",
    options={"trt_fp16_enable": "True", "trt_int8_enable": "True", "trt_layer_norm_fp32_fallback": "True"},
    caches_engines=True,
)


@dataclass(frozen=True)
class OnnxRuntimeDeviceBackend:
    """Sessions on a GPU provider. `cache` is where the provider keeps engines, None for the bundle's own folder."""

    provider: Provider
    cache: Path | None = None
    name: str = "trt"  # whose form of the segments it runs
    captures: bool = False  # a session waits inside its runs, which a capture can't hold

    def device(self) -> AbstractContextManager[CudaDevice]:
        return device_in_use()

    @contextmanager
    def engines(self, bundle: Bundle, names: Sequence[str], device: Device) -> Iterator[Mapping[str, DeviceEngine]]:
        ort = import_onnxruntime()
        if self.provider.name not in ort.get_available_providers():
            raise InputError(
                f"this onnxruntime has no {self.provider.name}; install one that has: pip install 'ditc[cuda]' "
                "(and uninstall onnxruntime, which hides it)"
            )
        yield {name: self._engine(ort, bundle, name, device) for name in names}
        device.synchronize()

    def _engine(self, ort: Any, bundle: Bundle, name: str, device: Device) -> DeviceEngine:
        file, sizes = self._file(bundle, name), profile_sizes(bundle, name)
        # the provider's own engine cache does not look at weights, so every segment and shape gets a folder of its own
        cache = (self.cache or bundle.path / ENGINES) / f"ort-{name}-{digest_of([files_digest(bundle, file), sizes])}"
        session = self._session(ort, file, device, cache)
        return OnnxRuntimeDeviceEngine(session, name, self.provider.memory, sizes, ort, device)

    def _file(self, bundle: Bundle, name: str) -> Path:
        portable = bundle.segment_path(name)
        typed = lowered_path(portable, self.name)
        return typed if typed.exists() else portable

    def _session(self, ort: Any, segment: Path, device: Device, cache: Path) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        for key, value in self.provider.session.items():
            options.add_session_config_entry(key, value)
        stream = {"user_compute_stream": str(device.stream)} if self.provider.takes_stream else {}
        chosen = {**stream, **self.provider.options}
        if self.provider.caches_engines:
            check_utf8(cache, self.provider.name)
            with writing(cache):
                cache.mkdir(parents=True, exist_ok=True)
            chosen |= {
                "trt_engine_cache_enable": "True",
                "trt_engine_cache_path": str(cache),
                "trt_timing_cache_enable": "True",
                "trt_timing_cache_path": str(cache),
            }
        with (
            openable(segment, Links.IN_ONE_FOLDER) as name,
            translated(f"opening {segment.name} with {self.provider.name}", GPU_ADVICE),
        ):
            # without the fallback, which would print and go on with the CPU's memory taken for the GPU's
            session = ort.InferenceSession(name, options, providers=[(self.provider.name, chosen)], enable_fallback=0)
        if session.get_providers()[0] != self.provider.name:
            raise InputError(f"{self.provider.name} does not take {segment.name}; {GPU_ADVICE}")
        return session


class OnnxRuntimeDeviceEngine:
    """One session whose inputs and outputs are bound to device memory."""

    def __init__(
        self, session: Any, name: str, memory: str, sizes: Mapping[str, int], ort: Any, device: Device
    ) -> None:
        self._session = session
        self._device = device
        self._name = name
        self._memory = memory
        self._binding = session.io_binding()
        self._options = ort.RunOptions()
        # the next call on the stream waits by itself; the host need not
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.inputs: Mapping[str, Port] = {port.name: _fixed(port, sizes) for port in session.get_inputs()}
        self.outputs: Mapping[str, Port] = {port.name: _fixed(port, sizes) for port in session.get_outputs()}
        self._bound: dict[str, DeviceTensor] = {}

    def bind(self, name: str, tensor: DeviceTensor) -> None:
        (self.inputs.get(name) or self.outputs[name]).check_takes(self._name, tensor)
        if self._bound.get(name) == tensor:
            return
        place = self._binding.bind_input if name in self.inputs else self._binding.bind_output
        place(name, self._memory, 0, np.dtype(tensor.dtype).type, list(tensor.shape), tensor.pointer)
        self._bound[name] = tensor

    def enqueue(self) -> None:
        self._device.hold(self, *self._bound.values())
        with translated(f"running segment {self._name}", GPU_ADVICE):
            self._session.run_with_iobinding(self._binding, self._options)


def _fixed(node_arg: Any, sizes: Mapping[str, int]) -> Port:
    port = port_of(node_arg)
    return Port(port.name, port.dtype, tuple(sizes[size] if isinstance(size, str) else size for size in port.shape))
