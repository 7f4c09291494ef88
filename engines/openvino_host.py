"""OpenVINO as a backend for the segments with integer layers; the others run on ONNX Runtime, as on the target cpu.

OpenVINO fuses more of what surrounds an INT8 product. It takes the portable Q/DQ segment as it is. Segments without
Q/DQ stay with ONNX Runtime: nothing is to be gained in them, and the conditioning's weights stay in their file there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ditc.engines.backend import Buffer, Engine, Port
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import BundleError, InputError

__all__ = ["OpenVinoBackend", "OpenVinoEngine", "import_openvino", "integer_layers"]

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


class OpenVinoEngine:
    """One segment, compiled for the shapes that are bound at its first run, and again where they change."""

    def __init__(self, model: Any, name: str, rest: str) -> None:
        self._model, self._name = model, name
        self._settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": rest}
        self._bound: dict[str, Buffer] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._request: Any = None
        self._stale: set[str] = set()
        self.inputs: Mapping[str, Port] = {port.any_name: _port_of(port) for port in model.inputs}
        self.outputs: Mapping[str, Port] = {port.any_name: _port_of(port) for port in model.outputs}
        self.compiled: Any = None

    def bind(self, name: str, buffer: Buffer) -> None:
        if self._bound.get(name) is buffer:
            return
        port = self.inputs.get(name) or self.outputs[name]
        port.check_buffer(self._name, buffer)
        self._bound[name] = buffer
        self._stale.add(name)

    def run(self) -> None:
        openvino = import_openvino()
        shapes = {name: self._bound[name].shape for name in self.inputs}
        try:
            if shapes != self._shapes:
                self._compile(openvino, shapes)
            for name in self._stale:
                self._request.set_tensor(name, openvino.Tensor(self._bound[name], shared_memory=True))
            self._stale.clear()
            self._request.infer()
        except RuntimeError as e:
            first_line = str(e).strip().splitlines()[0]
            raise BundleError(
                f"OpenVINO failed running segment {self._name}: {first_line}; run it with --target cpu"
            ) from e

    def _compile(self, openvino: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        self._model.reshape({name: list(shape) for name, shape in shapes.items()})
        self.compiled = openvino.Core().compile_model(self._model, "CPU", self._settings)
        self._request, self._shapes = self.compiled.create_infer_request(), shapes
        self._stale = set(self._bound)

    def __enter__(self) -> OpenVinoEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._request = self.compiled = None
        self._shapes = {}
        self._bound.clear()


@dataclass(frozen=True)
class OpenVinoBackend:
    """The CPU plugin for segments that hold Q/DQ, ONNX Runtime for the others.

    `rest` is what is computed in around the integer products: "f32", or "bf16", whose error comes on top of INT8's.
    """

    rest: str = "f32"
    name: str = "openvino"

    def open(self, segment: Path) -> Engine:
        openvino = import_openvino()
        try:
            model = openvino.Core().read_model(segment)
        except RuntimeError as e:
            first_line = str(e).strip().splitlines()[0]
            raise BundleError(f"OpenVINO failed opening {segment.name}: {first_line}; run it with --target cpu") from e
        if not any(node.get_type_name() == "FakeQuantize" for node in model.get_ops()):
            return OnnxRuntimeBackend().open(segment)
        return OpenVinoEngine(model, segment.stem, self.rest)


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
