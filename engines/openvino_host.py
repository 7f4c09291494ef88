"""OpenVINO as a backend for the segments with integer layers; the others run on ONNX Runtime, as on the target cpu.

OpenVINO fuses more of what surrounds an INT8 product. It takes the portable Q/DQ segment as it is. Segments without
Q/DQ stay with ONNX Runtime: nothing is to be gained in them, and the conditioning's weights stay in their file there.

Its integer products saturate on x86 without integer dot products as ONNX Runtime's do, and it has no switch for exact
ones. What is not exact here is refused.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from ditc.engines.backend import Buffer, Engine, Port
from ditc.engines.cores import CoreGate, core_gate
from ditc.engines.integer_form import (
    SEVEN_BITS,
    Arithmetic,
    Exactness,
    IntegerForm,
    advise,
    find_exactness,
    once_per_process,
    weight_bits,
)
from ditc.engines.integer_probes import OUTSIDE, ROUNDING, Feeds, largest_error
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import BundleError, InputError
from ditc.openable import Links, openable
from ditc.precision import INT8

__all__ = [
    "OpenVinoBackend",
    "OpenVinoBinding",
    "OpenVinoEngine",
    "OpenVinoHere",
    "import_openvino",
    "integer_layers",
    "openvino_here",
    "reason",
    "type_around",
]

Shapes = tuple[tuple[str, tuple[int, ...]], ...]

NUMPY_TYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "boolean": "bool"}
PRODUCTS = ("FullyConnected", "MatMul")
MEASURES = "ReduceMax"  # the operator that finds an activation's scale as the tensor comes
# Of the weights in what an engine keeps compiled, for the shapes that came last; a compile takes as long as many runs
KEPT_BYTES = 1 << 30
MOST_SHAPES = 16
PLACES = ("Exception from", "Check '")  # how lines of its messages begin that only say where in its sources
INTEGERS = ("i8", "u8")


def import_openvino() -> Any:
    """The openvino module. Raises InputError where it is missing."""
    try:
        import openvino
    except ImportError as e:
        raise InputError("openvino is not installed; install it with: pip install 'ditc[openvino]'") from e
    return openvino


def reason(error: RuntimeError) -> str:
    """The line of OpenVINO's message that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if not line.startswith(PLACES)]
    return next(iter(reasons or lines[-1:]), "it gives no reason")


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
            engine.cores.run(engine.threads, self._request.infer)
        except RuntimeError as e:
            raise BundleError(
                f"OpenVINO failed running segment {engine.name}: {reason(e)}; run it with --target cpu"
            ) from e


class OpenVinoEngine:
    """One segment, compiled for the shapes of a run when they first come; those that came last stay compiled."""

    def __init__(self, model: Any, name: str, rest: str, threads: int, cores: CoreGate) -> None:
        self._model, self.name, self.threads, self.cores = model, name, threads, cores
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": rest,
            "INFERENCE_NUM_THREADS": threads,
        }
        self._compiling = threading.Lock()  # it reshapes the one model
        self._models: OrderedDict[Shapes, Any] = OrderedDict()
        weights = sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")
        self._most_models = min(MOST_SHAPES, max(1, KEPT_BYTES // max(1, weights)))
        self.inputs: Mapping[str, Port] = {port.any_name: _port_of(port) for port in model.inputs}
        self.outputs: Mapping[str, Port] = {port.any_name: _port_of(port) for port in model.outputs}
        self.compiled: Any = None

    def binding(self) -> OpenVinoBinding:
        return OpenVinoBinding(self)

    @property
    def rest(self) -> str:
        """The type around its integers, once it has run."""
        return type_around(self)

    @property
    def shapes(self) -> tuple[Shapes, ...]:
        """The shapes that stay compiled, those of the last run at the end."""
        return tuple(self._models)

    def compiled_for(self, shapes: Shapes) -> Any:
        """The model compiled for inputs of these shapes."""
        with self._compiling:
            if shapes not in self._models:
                self._model.reshape({name: list(shape) for name, shape in shapes})
                self._models[shapes] = import_openvino().Core().compile_model(self._model, "CPU", self._settings)
                if len(self._models) > self._most_models:
                    self._models.popitem(last=False)
            self._models.move_to_end(shapes)
            self.compiled = self._models[shapes]
            return self.compiled

    def __enter__(self) -> OpenVinoEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Forget compiled models; each goes with the last binding that runs it."""
        with self._compiling:
            self.compiled = None
            self._models.clear()


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
        """The engine of a segment. Raises InputError where its integer products are not exact on this machine."""
        model = _read(segment)
        if not any(node.get_type_name() == "FakeQuantize" for node in model.get_ops()):
            return OnnxRuntimeBackend(self.threads, cores=self.cores).open(segment)
        if self.rest != "f32" and any(node.get_type_name() == MEASURES for node in model.get_ops()):
            raise InputError(
                f"{segment.name}: OpenVINO has no {self.rest} beside activation scales that are measured at run time; "
                "run it with --target openvino"
            )
        here, bits = openvino_here(self.rest), weight_bits(segment) or INT8.weights
        if here.exactness.form(bits) is None:
            seven = ", or compile with --precision w7a8" if here.exactness.form(SEVEN_BITS) is not None else ""
            raise InputError(
                f"{segment.name}: OpenVINO's products with {bits}-bit weights are not exact on this CPU, it adds two "
                f"in 16 bits; run it with --target cpu{seven}"
            )
        if here.rest != self.rest:
            advise(
                f"this CPU has no {self.rest}, so --target openvino-bf16 computes in {here.rest} around the integers, "
                "as --target openvino does"
            )
        return OpenVinoEngine(model, segment.stem, self.rest, self.threads or self.cores.cores, self.cores)

    def arithmetic(self, bits: int) -> Arithmetic:
        """Return the arithmetic of segments with weights of `bits` on this machine."""
        here = openvino_here(self.rest)
        remark = f"{here.rest} around it" + (f", since this CPU has no {self.rest}" if here.rest != self.rest else "")
        return Arithmetic.of(here.exactness, bits, here.rest, remark)


def _read(segment: Path) -> Any:
    try:
        with openable(segment, Links.NONE) as name:
            return import_openvino().Core().read_model(name)
    except RuntimeError as e:
        raise BundleError(f"OpenVINO failed opening {segment.name}: {reason(e)}; run it with --target cpu") from e


class OpenVinoHere(NamedTuple):
    """OpenVINO's arithmetic on this machine: the exactness of integer products, and the type around them."""

    exactness: Exactness
    rest: str


@once_per_process
def openvino_here(rest: str) -> OpenVinoHere:
    """Probe OpenVINO with graphs, opened as segments are, that are asked to compute in `rest` around the integers."""
    types: list[str] = []

    def open_probe(graph: Path) -> Callable[[Feeds], dict[str, Buffer]]:
        engine = OpenVinoEngine(_read(graph), graph.stem, rest, 1, core_gate())

        def run(feeds: Feeds) -> dict[str, Buffer]:
            outputs = _run(engine, feeds)
            types.append(type_around(engine))
            return outputs

        return run

    def is_exact(bits: int, form: IntegerForm) -> bool:
        return largest_error(open_probe, ("portable",), bits) <= ROUNDING[rest]

    return OpenVinoHere(find_exactness(is_exact, (IntegerForm.PLAIN,)), types[0])


def _run(engine: OpenVinoEngine, feeds: Feeds) -> dict[str, Buffer]:
    """The outputs of a probe graph."""
    rows = next(array.shape[1] for array in feeds.values() if array.ndim == 3)
    outputs = {name: np.empty((1, rows, OUTSIDE), port.dtype) for name, port in engine.outputs.items()}
    binding = engine.binding()
    for name, buffer in ({name: feeds[name] for name in engine.inputs} | outputs).items():
        binding.bind(name, buffer)
    binding.run()
    return outputs


def type_around(engine: OpenVinoEngine) -> str:
    """Return the type around the integers of an engine that has run, whatever it was asked for: "f32" or "bf16"."""
    return str(engine.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())


def integer_layers(engine: OpenVinoEngine) -> int:
    """Count the linear layers that multiply integers in an engine that has run."""
    count = 0
    for node in engine.compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        kind, precision = (getattr(facts[name], "value", facts[name]) for name in ("layerType", "runtimePrecision"))
        count += kind in PRODUCTS and precision in INTEGERS
    return count


def _port_of(port: Any) -> Port:
    shape = tuple("batch" if size.is_dynamic else int(size.get_length()) for size in port.partial_shape)
    return Port(name=port.any_name, dtype=NUMPY_TYPES[port.element_type.get_type_name()], shape=shape)
