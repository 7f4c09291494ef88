"""Runtime, engine and execution context, played in Python: running a plan means ONNX Runtime on the CPU."""

from __future__ import annotations

import functools
import json
import struct
from typing import Any

import onnx
import simulation
import tensorrt_bindings as real
from cuda.core import STREAMS, is_held
from tensorrt_bindings import __version__

from tensorrt.interface import MAGIC, ONNX_TYPES, Played, at, numpy_type_of, platform, session_of


class Runtime(Played):
    REAL = real.Runtime

    def __init__(self, log: Any) -> None:
        assert isinstance(log, real.ILogger)
        self._log = log
        object.__setattr__(self, "engine_host_code_allowed", False)

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
        data = bytes(serialized_engine)
        if not data.startswith(MAGIC) or simulation.plays("refuse"):
            self._log.log(real.ILogger.Severity.ERROR, "Magic tag does not match")
            return None
        size = struct.unpack_from("<I", data, len(MAGIC))[0]
        start = len(MAGIC) + 4
        header = json.loads(data[start : start + size])
        if header["tensorrt"] != __version__ or header["compute_capability"] != platform()["compute_capability"]:
            self._log.log(real.ILogger.Severity.ERROR, "The engine plan file is not compatible with this version")
            return None
        return Engine(header, onnx.ModelProto.FromString(data[start + size :]), self._log)


class Inspector(Played):
    REAL = real.EngineInspector

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model

    def get_engine_information(self, format: Any) -> str:
        assert format == real.LayerInformationFormat.JSON
        layers = [
            {
                "Name": node.name,
                "LayerType": node.op_type,
                "Inputs": [{"Name": name} for name in node.input],
                "Outputs": [{"Name": name} for name in node.output],
            }
            for node in self._model.graph.node
        ]
        return json.dumps({"Layers": layers, "Bindings": [value.name for value in self._model.graph.input]})


class Engine(Played):
    REAL = real.ICudaEngine

    def __init__(self, header: dict[str, Any], model: onnx.ModelProto, log: Any) -> None:
        self._header, self._model, self._log = header, model, log
        self._session = session_of(model)
        ports = [*self._session.get_inputs(), *self._session.get_outputs()]
        self._ports = {port.name: port for port in ports}
        self._input_names = [port.name for port in self._session.get_inputs()]
        object.__setattr__(self, "num_io_tensors", len(ports))
        object.__setattr__(self, "device_memory_size_v2", 4096)

    def get_tensor_name(self, index: int) -> str:
        return list(self._ports)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return real.TensorIOMode.INPUT if name in self._input_names else real.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return ONNX_TYPES[self._ports[name].type][1]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        assert name in self._input_names
        return [tuple(self._ports[name].shape)] * 3

    def create_execution_context(self, strategy: Any) -> Context:
        assert isinstance(strategy, real.ExecutionContextAllocationStrategy)
        return Context(self, managed=strategy == real.ExecutionContextAllocationStrategy.USER_MANAGED)

    def create_engine_inspector(self) -> Inspector:
        return Inspector(self._model)


class Context(Played):
    REAL = real.IExecutionContext

    def __init__(self, engine: Engine, managed: bool) -> None:
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, Any] = {}
        self._scratch = 0 if managed else 1
        object.__setattr__(self, "profiler", None)

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self._shapes[name] = tuple(shape)
        return tuple(shape) == tuple(self._engine._ports[name].shape)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert set(self._shapes) == set(self._engine._input_names), "output shapes follow from all input shapes"
        return tuple(self._engine._ports[name].shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % 256 == 0, f"{name} is not aligned to 256 bytes"
        self._addresses[name] = memory
        return name in self._engine._ports

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self._engine.device_memory_size_v2
        self._scratch = memory

    def execute_async_v3(self, stream_handle: int) -> bool:
        missing = set(self._engine._ports) - set(self._addresses)
        if missing or not self._scratch or simulation.plays("not-enqueued"):
            self._engine._log.log(real.ILogger.Severity.ERROR, f"no address for {sorted(missing)}")
            return False
        STREAMS[stream_handle].queue(functools.partial(self._execute, dict(self._addresses)))
        if self.profiler is not None:
            STREAMS[stream_handle].sync()
            for node in self._engine._model.graph.node:
                self.profiler.report_layer_time(node.name, 0.01)
        return True

    def _execute(self, addresses: dict[str, int]) -> None:
        assert all(map(is_held, addresses.values())), "a queued run reaches device memory that has been let go"
        session = self._engine._session
        feeds = {
            port.name: at(addresses[port.name], port.shape, numpy_type_of(port.type)) for port in session.get_inputs()
        }
        names = [port.name for port in session.get_outputs()]
        for name, values in zip(names, session.run(names, feeds), strict=True):
            at(addresses[name], values.shape, str(values.dtype))[...] = values
