"""Traces of a bundle's layers in the two files that analysers of TensorRT engines read.

layers_SEGMENT.json   {"Layers": [{"Name", "LayerType", "Inputs", "Outputs", "Metadata"}], "Bindings": [...]}, as
                      TensorRT's engine inspector prints it at detailed verbosity
profile_SEGMENT.json  [{"count": runs}, {"name", "timeMs", "averageMs", "medianMs", "percentage"}, ...], as
                      `trtexec --exportProfile` writes it

On ONNX Runtime they are made from the graph that really runs and from its profiler, so one viewer serves both.
`Metadata` is the torch module path where the layer still has one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ditc.bundle import Bundle
from ditc.engines.backend import runnable_path
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.engines.recording import RecordedRun, RecordingBackend
from ditc.engines.trt_runtime import TensorRTEngine
from ditc.errors import InputError
from ditc.files import atomic_write
from ditc.program import PATH_KEY
from ditc.runtime.options import Place
from ditc.runtime.pipeline import Pipeline

__all__ = ["profile_rows", "trace_bundle"]

RUNS = 5  # of each segment under ONNX Runtime's profiler


def trace_bundle(bundle: Path, folder: Path, place: Place) -> list[str]:
    """Trace every segment into `folder`; returns the files' names. Raises InputError for a target without layers."""
    closed = place.model_copy(update={"graphs": "none"}).load(bundle)  # a profiler waits inside a run, a capture can't
    if not closed.on_device:
        return _trace_onnxruntime(closed.bundle, folder, OnnxRuntimeBackend(place.threads or 0))
    with closed as pipe:
        if all(isinstance(engine, TensorRTEngine) for engine in pipe.engines.values()):
            return _trace_tensorrt(pipe, folder)
    raise InputError("--trace works on the targets cpu and tensorrt; run it on one of them")


def _trace_tensorrt(pipe: Pipeline, folder: Path) -> list[str]:
    """Trace one observed request with TensorRT's profiler on every context."""
    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in pipe.engines}
    manifest = pipe.bundle.manifest
    engines = {name: e for name, e in pipe.engines.items() if isinstance(e, TensorRTEngine)}
    with ExitStack() as stack:
        for name, engine in engines.items():
            stack.enter_context(engine.layer_times(_collector(times[name])))
        *_, _ = pipe.generate(manifest.model.labels_in_turn(0, manifest.batch), seed=0)
    written = []
    for name, engine in engines.items():
        written += _write(folder, name, engine.layers(), profile_rows(times[name]))
    return written


def _collector(times: dict[str, list[float]]) -> Callable[[str, float], None]:
    return lambda layer, ms: times[layer].append(ms)


def _trace_onnxruntime(bundle: Bundle, folder: Path, backend: OnnxRuntimeBackend) -> list[str]:
    """Trace every segment by itself with ONNX Runtime's profiler, on the inputs of its first call in a real request."""
    manifest = bundle.manifest
    recorder = RecordingBackend(backend, {name: {0} for name in manifest.program.calls})
    with Pipeline(bundle, backend=recorder) as recorded:
        request = bundle.examples().in_turn(0, manifest.batch)
        (recorded.images if recorded.makes_images else recorded.latents)(request)
    written = []
    for name, runs in recorder.runs.items():
        segment = runnable_path(bundle.segment_path(name), recorder.name)
        layers, times = _profiled(segment, runs[0], backend)
        written += _write(folder, name, layers, profile_rows(times))
    return written


def _profiled(
    segment: Path, run: RecordedRun, backend: OnnxRuntimeBackend
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return (layers of the graph that really runs, milliseconds by layer)."""
    import onnx

    with TemporaryDirectory(prefix="ditc-trace-") as scratch:
        optimized, prefix = Path(scratch) / "optimized.onnx", str(Path(scratch) / "profile")
        session = backend.session(segment, optimized, profile_prefix=prefix)
        for _ in range(RUNS + 1):
            session.run(None, dict(run.inputs))
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx.load(str(optimized), load_external_data=False).graph
    given = onnx.load(str(segment), load_external_data=False).graph
    paths = {
        output: entry.value
        for node in given.node
        for entry in node.metadata_props
        if entry.key == PATH_KEY
        for output in node.output
    }
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"].removesuffix("_kernel_time")].append(event["dur"] / 1e3)
    return _layers_of(graph, paths), {
        name: layer_ms[1:] if len(layer_ms) > 1 else layer_ms for name, layer_ms in times.items()
    }


def _layers_of(graph: Any, paths: Mapping[str, str]) -> dict[str, Any]:
    """Return the layers of a graph. `paths` knows the module of each value; a fused layer still makes the value that it
    ends in, or is named after the module."""
    modules = set(paths.values())

    def module_of(node: Any) -> str:
        prefix = node.name.split("/")[0]
        output_path = next((paths[name] for name in node.output if name in paths), "")
        return output_path or (prefix if prefix in modules else "")

    shapes = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}

    def described(names: Sequence[str]) -> list[dict[str, Any]]:
        return [{"Name": name, **_tensor_facts(shapes.get(name))} for name in names if name]

    return {
        "Layers": [
            {
                "Name": node.name,
                "LayerType": node.op_type,
                "Inputs": described(node.input),
                "Outputs": described(node.output),
                "Metadata": module_of(node),
            }
            for node in graph.node
        ],
        "Bindings": [value.name for value in (*graph.input, *graph.output)],
    }


def _tensor_facts(value: Any) -> dict[str, Any]:
    import onnx

    if value is None:
        return {}
    tensor = value.type.tensor_type
    sizes = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim]
    return {"Dimensions": sizes, "Format/Datatype": onnx.TensorProto.DataType.Name(tensor.elem_type)}


def profile_rows(times: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return milliseconds by layer as rows of a profile: a count, then each layer with its share of the whole."""
    whole = sum(sum(layer_ms) for layer_ms in times.values()) or 1.0
    rows = [
        {
            "name": name,
            "timeMs": float(np.sum(layer_ms)),
            "averageMs": float(np.mean(layer_ms)),
            "medianMs": float(np.median(layer_ms)),
            "percentage": float(100 * np.sum(layer_ms) / whole),
        }
        for name, layer_ms in times.items()
    ]
    return [{"count": max((len(layer_ms) for layer_ms in times.values()), default=0)}, *rows]


def _write(folder: Path, name: str, layers: Any, profile: Any) -> list[str]:
    files = {f"layers_{name}.json": layers, f"profile_{name}.json": profile}
    for file, content in files.items():
        atomic_write(folder / file, json.dumps(content, indent=1).encode() + b"\n")
    return list(files)
