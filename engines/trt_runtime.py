"""TensorRT engines at run time: vouched-for plans, device buffers, one stream, one block of shared scratch memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditc.bundle import Bundle
from ditc.engines.backend import DeviceEngine, Port
from ditc.engines.device import ALIGNMENT, CudaDevice, Device, DeviceTensor, device_in_use
from ditc.engines.store import AGAIN, EXPLICIT, BuildSettings, EngineKey, EngineStore, Platform, segment_digest
from ditc.engines.trt import import_tensorrt, numpy_type, open_runtime, platform_of
from ditc.errors import CheckError, DitcError, InputError
from ditc.files import digest_of
from ditc.program import DECODE

__all__ = ["TensorRTBackend", "TensorRTEngine", "profile_sizes", "wanted_key"]


def profile_sizes(bundle: Bundle, segment: str) -> dict[str, int]:
    """The fixed sizes of a segment's open dimensions: rows of the network, images for the decoder."""
    manifest = bundle.manifest
    rows = manifest.batch if segment == DECODE else manifest.batch * manifest.halves
    return {"batch": rows, "steps": len(manifest.program.steps)}


def wanted_key(bundle: Bundle, segment: str, platform: Platform, settings: BuildSettings) -> EngineKey:
    """The key of a segment's engine on a platform."""
    return EngineKey(
        segment=segment,
        graph=segment_digest(bundle, segment, settings.calibration),
        platform=platform,
        sizes=profile_sizes(bundle, segment),
        settings=settings,
    )


def calibration_cache(store: EngineStore, bundle: Bundle, segment: str, method: str) -> Path:
    """Return a calibrator's cache file, named by a digest of network, points, shapes and method."""
    key = digest_of([segment_digest(bundle, segment, method), profile_sizes(bundle, segment), method])
    return store.folder / f"calibration-{segment}-{method}-{key}.cache"


@dataclass(frozen=True)
class TensorRTBackend:
    """Engines from a store, built earlier by `ditc build`. `store` of None is the bundle's own folder."""

    store: Path | None = None
    name: str = "tensorrt"
    captures: bool = True

    def device(self) -> AbstractContextManager[CudaDevice]:
        return device_in_use()

    @contextmanager
    def engines(self, bundle: Bundle, names: Sequence[str], device: Device) -> Iterator[Mapping[str, DeviceEngine]]:
        trt = import_tensorrt()
        runtime, log = open_runtime(trt)
        store = EngineStore.of(bundle, self.store)
        opened: dict[str, TensorRTEngine] = {}
        for key in self._wanted(bundle, names, store, platform_of(trt, device)):
            plan, _ = store.read(key)
            opened[key.segment] = TensorRTEngine(trt, runtime, log, plan, key.segment, device)
        share_scratch(list(opened.values()), device)
        yield opened
        device.synchronize()

    def _wanted(self, bundle: Bundle, names: Sequence[str], store: EngineStore, platform: Platform) -> list[EngineKey]:
        """The keys of one whole set of engines: the explicit one, else one that a calibrator of TensorRT 10 made.

        The two must not be mixed, because they hand over caches of different types.
        """
        explicit = [wanted_key(bundle, name, platform, BuildSettings()) for name in names]
        if all(map(store.serves, explicit)):
            return explicit
        for method in sorted({record.key.settings.calibration for record in store.records()} - {EXPLICIT}):
            try:
                calibrated = [wanted_key(bundle, n, platform, BuildSettings(calibration=method)) for n in names]
            except InputError:  # this bundle can't be calibrated; the records are another's
                continue
            if all(map(store.serves, calibrated)):
                return calibrated
        return explicit


def share_scratch(engines: Sequence[TensorRTEngine], device: Device) -> DeviceTensor:
    """Give all engines one block for the largest: they run one after the other on one stream."""
    block = device.empty((max(engine.scratch_bytes for engine in engines),), "uint8")
    for engine in engines:
        engine.use_scratch(block)
    return block


class TensorRTEngine:
    """One deserialized plan with its execution context, at the fixed shapes it was built for."""

    def __init__(self, trt: Any, runtime: Any, log: Any, plan: bytes, name: str, device: Device) -> None:
        self.name = name
        self._trt = trt
        self._log = log
        self._device = device
        self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise InputError(
                f"TensorRT {trt.__version__} does not take the engine of segment {name}: {log.last_error}; {AGAIN}"
            )
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._context = self._engine.create_execution_context(strategy)
        if self._context is None:
            raise DitcError(f"TensorRT made no context for segment {name}: {log.last_error}; free memory on the GPU")
        self.inputs: Mapping[str, Port] = {}
        self.outputs: Mapping[str, Port] = {}
        self._read_ports()
        self._bound: dict[str, DeviceTensor] = {}
        self._scratch: DeviceTensor | None = None

    @property
    def scratch_bytes(self) -> int:
        """Device memory that a run needs beside weights and bound tensors."""
        return max(1, int(self._engine.device_memory_size_v2))

    def use_scratch(self, block: DeviceTensor) -> None:
        """Work in this block from the next run on."""
        self._context.set_device_memory(block.pointer, block.size_bytes)
        self._scratch = block

    def bind(self, name: str, tensor: DeviceTensor) -> None:
        (self.inputs.get(name) or self.outputs[name]).check_takes(self.name, tensor)
        if tensor.pointer % ALIGNMENT:
            raise ValueError(f"{self.name}: the address of {name!r} is not a multiple of {ALIGNMENT} bytes")
        if not self._context.set_tensor_address(name, tensor.pointer):
            raise DitcError(f"TensorRT does not bind {name!r} of segment {self.name}: {self._log.last_error}")
        self._bound[name] = tensor

    def enqueue(self) -> None:
        self._device.hold(self, *self._bound.values())
        if not self._context.execute_async_v3(self._device.stream):
            raise CheckError(f"TensorRT failed running segment {self.name}: {self._log.last_error}")

    def layers(self) -> Any:
        """TensorRT's own description of the engine's layers, as the JSON that analysers of engines read."""
        inspector = self._engine.create_engine_inspector()
        return json.loads(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    @contextmanager
    def layer_times(self, report: Callable[[str, float], None]) -> Iterator[None]:
        """Inside the block every run reports (layer, milliseconds), and is waited for."""
        trt = self._trt

        class Profiler(trt.IProfiler):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                report(layer_name, ms)

        profiler = Profiler()
        self._context.profiler = profiler
        try:
            yield
        finally:
            self._context.profiler = None

    def _read_ports(self) -> None:
        """Read inputs at the profile's one shape, outputs as they follow from it."""
        engine, context, trt = self._engine, self._context, self._trt
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        kinds = {name: engine.get_tensor_mode(name) for name in names}
        types = {name: numpy_type(engine.get_tensor_dtype(name)) for name in names}
        inputs, outputs = {}, {}
        for name in (n for n in names if kinds[n] == trt.TensorIOMode.INPUT):
            shape = tuple(engine.get_tensor_profile_shape(name, 0)[2])
            if not context.set_input_shape(name, shape):
                raise DitcError(f"TensorRT refuses the shape {shape} of {name!r} in segment {self.name}")
            inputs[name] = Port(name, types[name], shape)
        for name in (n for n in names if kinds[n] == trt.TensorIOMode.OUTPUT):
            outputs[name] = Port(name, types[name], tuple(context.get_tensor_shape(name)))
        self.inputs, self.outputs = inputs, outputs
