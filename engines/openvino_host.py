"""OpenVINO as a backend for the segments with integer layers; the others run on ONNX Runtime, as on the target cpu.

OpenVINO fuses more of what surrounds an INT8 product. It takes the portable Q/DQ segment as it is. Segments without
Q/DQ stay with ONNX Runtime: nothing is to be gained in them, and the conditioning's weights stay in their file there.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ditc.engines.backend import Buffer, Engine, Port
from ditc.engines.cores import CoreGate, core_gate
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import BundleError, InputError

__all__ = ["OpenVinoBackend", "OpenVinoBinding", "OpenVinoEngine", "import_openvino", "integer_layers"]

Shapes = tuple[tuple[str, tuple[int, ...]], ...]

NUMPY_TYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "boolean": "bool"}
PRODUCTS = ("FullyConnected", "MatMul")
INTEGERS = ("i8", "u8")


def import_openvino() -> Any:
    """The openvino module. Raises InputError where it is missing."""
    try:
        import openvino
    except ImportError as e:
        raise InputError("openvino is not installed; install it with: pip install 'ditc[openvino]'") from e
    return openvino


class OpenVinoBinding:
    """NumPy buffers on one inference request, made for the shapes that are bound at its run."""

    def __init__(self, engine: OpenVinoEngine) -> None:
        self._engine = engine
        self._bound: dict[str, Buffer] = {}
        self._stale: set[str] = set()
        self._shapes: Shapes = ()
        self._request: Any = None

    def bind(self, name: str, buffer: Buffer) -> None:
        if self._bound.get(name) is buffer:
            return
        engine = self._engine
        port = engine.inputs.get(name) or engine.outputs[name]
        port.check_buffer(engine.name, buffer)
        self._bound[name] = buffer
        self._stale.add(name)

    def run(self) -> None:
        openvino, engine = import_openvino(), self._engine
        shapes = tuple((name, self._bound[name].shape) for name in engine.inputs)
        try:
            if shapes != self._shapes:
                self._request, self._shapes = engine.compiled_for(shapes).create_infer_request(), shapes
                self._stale = set(self._bound)
            for name in self._stale:
                self._request.set_tensor(name, openvino.Tensor(self._bound[name], shared_memory=True))
            self._stale.clear()
            with engine.cores.taken(engine.threads):
                self._request.infer()
        except RuntimeError as e:
            first_line = str(e).strip().splitlines()[0]
            raise BundleError(
                f"OpenVINO failed running segment {engine.name}: {first_line}; run it with --target cpu"
            ) from e


class OpenVinoEngine:
    """One segment, compiled for the shapes of a run when they first come, and again where they change."""

    def __init__(self, model: Any, name: str, rest: str, threads: int, cores: CoreGate) -> None:
        self._model, self.name, self.threads, self.cores = model, name, threads, cores
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": rest,
            "INFERENCE_NUM_THREADS": threads,
        }
        self._compiling = threading.Lock()  # it reshapes the one model
        self._shapes: Shapes = ()
        self.inputs: Mapping[str, Port] = {port.any_name: _port_of(port) for port in model.inputs}
        self.outputs: Mapping[str, Port] = {port.any_name: _port_of(port) for port in model.outputs}
        self.compiled: Any = None

    def binding(self) -> OpenVinoBinding:
        return OpenVinoBinding(self)

    def compiled_for(self, shapes: Shapes) -> Any:
        """The model compiled for inputs of these shapes. Of several shapes the last one stays."""
        with self._compiling:
            if self.compiled is None or shapes != self._shapes:
                self._model.reshape({name: list(shape) for name, shape in shapes})
                self.compiled = import_openvino().Core().compile_model(self._model, "CPU", self._settings)
                self._shapes = shapes
            return self.compiled

    def __enter__(self) -> OpenVinoEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What is compiled goes with the last binding that runs it."""
        with self._compiling:
            self.compiled, self._shapes = None, ()


@dataclass(frozen=True)
class OpenVinoBackend:
    """The CPU plugin for segments that hold Q/DQ, ONNX Runtime for the others.

    `rest` is what is computed in around the integer products: "f32", or "bf16", whose error comes on top of INT8's.
    `threads` and `cores` are as of OnnxRuntimeBackend.
    """

    rest: str = "f32"
    threads: int = 0
    name: str = "openvino"
    cores: CoreGate = field(default_factory=core_gate, repr=False)

    def open(self, segment: Path) -> Engine:
        openvino = import_openvino()
        try:
            model = openvino.Core().read_model(segment)
        except RuntimeError as e:
            first_line = str(e).strip().splitlines()[0]
            raise BundleError(f"OpenVINO failed opening {segment.name}: {first_line}; run it with --target cpu") from e
        if not any(node.get_type_name() == "FakeQuantize" for node in model.get_ops()):
            return OnnxRuntimeBackend(self.threads, cores=self.cores).open(segment)
        return OpenVinoEngine(model, segment.stem, self.rest, self.threads or self.cores.cores, self.cores)


def integer_layers(engine: OpenVinoEngine) -> int:
    """How many linear layers of an engine that has run multiply integers."""
    found = 0
    for node in engine.compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        kind, precision = (getattr(facts[name], "value", facts[name]) for name in ("layerType", "runtimePrecision"))
        found += kind in PRODUCTS and precision in INTEGERS
    return found


def _port_of(port: Any) -> Port:
    shape = tuple("batch" if size.is_dynamic else int(size.get_length()) for size in port.partial_shape)
    return Port(name=port.any_name, dtype=NUMPY_TYPES[port.element_type.get_type_name()], shape=shape)
