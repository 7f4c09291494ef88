"""The stages of a compile. Each takes what earlier stages left in folders, and fills a folder of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import write_tables
from ditc.calib_data.pool import Pool, Visit, pool_from_visits
from ditc.calib_data.selection import select_points
from ditc.compiler.calibrating import OBSERVED, activation_scales, observation
from ditc.compiler.observing import ObservedPool, Observer, PeakObserver
from ditc.compiler.plan import LARGEST_BATCH, Plan, Segments
from ditc.engines.backend import Backend, lowered_path, runnable_path
from ditc.engines.onnxrt import INTEGER_KERNELS, OnnxRuntimeBackend, kernel_census
from ditc.errors import CheckError
from ditc.files import atomic_write
from ditc.guidance import row_labels
from ditc.host_memory import return_free_memory
from ditc.lowering.backend_forms import lower
from ditc.lowering.half_storage import half_storage
from ditc.lowering.segment_footprint import footprint_of
from ditc.lowering.tensorrt_rules import violations_of
from ditc.lowering.update_graph import update_model
from ditc.program import CONDITION, DECODE, FULL, UPDATE, Program
from ditc.quantize.linears import linear_count
from ditc.quantize.qdq import insert_qdq
from ditc.runtime.closeness import relative_error, trajectory_comparison
from ditc.runtime.compensation import ClosedLoopFit
from ditc.runtime.conditioning import condition_tables
from ditc.runtime.executor import Correction, Samples, StepEvent, seeded_noise
from ditc.runtime.host_executor import HostExecutor
from ditc.runtime.pipeline import open_engines
from ditc.tables import sampler_tables
from ditc.update_form import UpdateForm

__all__ = ["export", "fit", "model_digest", "quantize", "record_pool", "replaced", "select", "verify"]

Tables = Mapping[str, NDArray[Any]]
NO_TABLES: Tables = {}

LABELS_COMPARED = 4

# purposes with noise of their own, so that no image is used twice: calibration, compensation, verification
POOL_NOISE, FIT_NOISE, VERIFY_NOISE = 1_000_003, 2_000_003, 3_000_003


def model_digest(model: Any) -> str:
    """SHA-256 over the names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def behaviour_digest(model: Any) -> str:
    """A digest of what the model computes: of settings that leave no trace in its weights, as the number of heads."""
    import torch

    from ditc.exporter.protocol import example_inputs

    with torch.no_grad():
        out = model(*example_inputs(model.spec, 2))
    return hashlib.sha256(np.ascontiguousarray(out.numpy()).tobytes()).hexdigest()


def export(plan: Plan, model: Any, folder: Path) -> None:
    """Every FP segment as ONNX, each checked against torch; the errors go to parity.json."""
    from ditc.exporter.onnx_export import export_segment
    from ditc.exporter.segments import segments_of

    total = 1 + len(plan.cached_program.segments) + len(plan.cached_program.epilogue)
    parity = {}
    for done, segment in enumerate(segments_of(model, plan.cached_program)):
        plan.progress("export", done, total)
        path = folder / f"{segment.name}.onnx"
        export_segment(segment, path, plan.spec.branches)
        return_free_memory()
        parity[segment.name] = _parity(plan, segment, path)
    _write_json(folder / "parity.json", parity)


def _parity(plan: Plan, segment: Any, path: Path) -> float:
    """The error of an exported segment against torch; its session is gone before the next one is made."""
    from ditc.exporter.onnx_export import parity_error

    session, names = plan.backend.session(path), list(segment.outputs)
    taken = {port.name for port in session.get_inputs()}

    def run(feeds: dict[str, Any]) -> dict[str, Any]:
        own = {name: array for name, array in feeds.items() if name in taken}
        return dict(zip(names, session.run(names, own), strict=True))

    return parity_error(segment, run)


@contextmanager
def executor(
    plan: Plan,
    program: Program,
    segments: Segments,
    tables: Tables = NO_TABLES,
    backend: Backend | None = None,
    correction: Correction | None = None,
) -> Iterator[HostExecutor]:
    """An executor over segment files, engines closed at the end. `tables` are a bundle's beside the sampler's.

    With a `correction` of its own it is for one request of any size, whose images go through the engines in batches.
    """
    names = [name for name in program.calls if name != DECODE]
    together = None if correction is None else plan.batch_size(plan.served_at_once)
    with ExitStack() as stack:
        engines = open_engines(stack, backend or plan.backend, {name: segments[name] for name in names})
        every = {**sampler_tables(plan.table), **tables}
        yield HostExecutor(
            plan.spec, program, every, engines, plan.options.cfg, correction=correction, together=together
        )


def start_requests(
    plan: Plan, runner: HostExecutor, count: int, purpose: int, at_most: int = LARGEST_BATCH
) -> list[tuple[range, Iterator[StepEvent]]]:
    """Requests over `count` images with a purpose's own noise, not yet run."""
    labels, requests = plan.labels(count), []
    for part in plan.batches(count, at_most):
        noise, fresh = seeded_noise(plan.options.seed + purpose, part.start, len(part), plan.spec.latent_shape)
        requests.append((part, runner.run(labels[part.start : part.stop], noise, fresh)))
    return requests


def replaced(segments: Segments, folder: Path) -> Segments:
    """The segments, with those that a stage made in its folder beside or in place of the ones it took."""
    made = {path.stem: path for path in folder.glob("*.onnx")}  # with a dot it is a backend's form of a segment
    return {**segments, **{name: path for name, path in made.items() if "." not in name}}


def record_pool(
    plan: Plan, segments: Segments, backend: Backend | None = None, observer: Observer | PeakObserver | None = None
) -> Pool:
    """The points that the FP program visits, cached as deployment will be, unless the options ask for the uncached.

    An `observer` keeps what the `backend` that it watches has shown it at each of them.
    """
    wanted = plan.recorded_steps
    at_most = LARGEST_BATCH if observer is None else plan.probed_at_once
    count = plan.options.pool_size(len(wanted))
    labels = np.array(plan.labels(count))

    def visits(runner: HostExecutor) -> Iterator[Visit]:
        for part, request in start_requests(plan, runner, count, POOL_NOISE, at_most):
            for event in request:
                plan.progress("pool", part.start * event.steps + event.index * len(part), count * event.steps)
                if event.index in wanted:
                    if observer is not None:
                        observer.keep(event.index, part.start)
                    yield Visit(event.index, event.t, part.start, labels[part.start : part.stop], event.before)

    with executor(plan, plan.recorded_program, segments, plan.reuse_tables, backend) as runner:
        return pool_from_visits(visits(runner))


def select(plan: Plan, segments: Segments, folder: Path) -> None:
    """Record the pool and pick the calibration set from it: calib.npz, and pool.json with its size.

    Where the histograms of all its points fit, they are taken on the way: observed.npz. A selector that needs it is
    told what linear layers read at each point.
    """
    watched = observation(plan, segments)
    if watched is None:
        pool = record_pool(plan, segments)
    else:
        backend, observer = watched
        try:
            pool = record_pool(plan, segments, backend, observer)
        finally:
            backend.probe.unlink()
        pool = pool.with_peaks(observer.peaks)
        if isinstance(observer, Observer):
            ObservedPool.of(observer).save(folder / OBSERVED)
    plan.progress("select", 0, 1)
    chosen = select_points(plan.options.select, pool, plan.options.selection())
    chosen.save(folder / "calib.npz")
    _write_json(folder / "pool.json", {"points": len(pool), "images": int(pool.sample.max()) + 1})


def quantize(plan: Plan, segments: Segments, calib_file: Path, folder: Path) -> None:
    """Scales, INT8 segments, and their form for ONNX Runtime, where every linear layer must run an integer kernel.

    What runs in floating point is a copy of the FP segment. `condition` keeps FP32 arithmetic and stores its weights as
    FP16; storage.json tells the error of its tables.
    """
    from ditc.exporter.onnx_files import load_graph, save_graph, save_sharing_data

    table = activation_scales(plan, segments, calib_file)
    atomic_write(folder / "scales.json", table.model_dump_json(indent=1).encode() + b"\n")
    write_tables(folder / "scales.safetensors", table.bundle_tables())
    kernels = {}
    for part in plan.program.segments:
        if part.in_float:
            save_graph(load_graph(segments[FULL]), folder / f"{part.name}.onnx")
        if not part.quantizes:
            continue
        model = load_graph(segments[part.name])
        expected = linear_count(model)
        insert_qdq(model, table)
        path = folder / f"{part.name}.onnx"
        save_graph(model, path)
        lowered = load_graph(path)
        if lower(lowered, plan.backend.name):
            save_sharing_data(lowered, lowered_path(path, plan.backend.name))
        kernels[part.name] = check_integer_kernels(plan.backend, path, expected)
    _write_json(folder / "kernels.json", kernels)
    store_condition(plan, segments[CONDITION], folder / f"{CONDITION}.onnx")


def store_condition(plan: Plan, segment: Path, path: Path) -> None:
    """`condition` with half the bytes, unless its weights are too few or too large; its tables are compared."""
    from ditc.exporter.onnx_files import load_graph, save_graph

    model = load_graph(segment)
    if not half_storage(model):
        return
    save_graph(model, path)
    labels = row_labels(plan.labels(LABELS_COMPARED), None)
    exact, found = (condition_tables(plan.backend.session(file), plan.table["t"], labels) for file in (segment, path))
    error = max(relative_error(found[name], table) for name, table in exact.items())
    _write_json(path.with_name("storage.json"), {CONDITION: {"relative_error": error}})


def check_integer_kernels(backend: OnnxRuntimeBackend, segment: Path, expected: int) -> dict[str, int]:
    """{"linears", "integer"} of the graph that ONNX Runtime runs. Raises CheckError where a layer stayed float."""
    census = kernel_census(backend, runnable_path(segment, backend.name), segment.parent)
    integer = sum(census[kind] for kind in INTEGER_KERNELS)
    if integer != expected:
        raise CheckError(
            f"segment {segment.stem}: {integer} of {expected} linear layers run an integer kernel here; "
            "report this with the versions that `ditc doctor` prints"
        )
    return {"linears": expected, "integer": integer}


def lower_for_devices(plan: Plan, compiled: Segments, folder: Path) -> None:
    """What GPUs need beside the portable segments.

    `update` keeps the sample on the device. With FP16 or INT8 every segment gets its strongly typed form;
    tensorrt.json holds what TensorRT's rules say of it, footprints.json what each segment needs of a device's memory.
    """
    from ditc.exporter.onnx_files import load_graph, save_derived, save_graph

    broken: dict[str, list[str]] = {}
    needs: dict[str, Any] = {}
    update = update_model(plan.spec, UpdateForm.of(plan.table, plan.spec, plan.options.cfg), plan.options.batch)
    save_graph(update, folder / f"{UPDATE}.onnx")
    for name, path in {**compiled, UPDATE: folder / f"{UPDATE}.onnx"}.items():
        model = load_graph(path)
        if name != UPDATE and plan.options.precision != "fp32":
            lower(model, "trt")
            save_derived(model, lowered_path(folder / path.name, "trt"))
        rows = plan.options.batch * (1 if name == DECODE else plan.halves)
        sizes = {"batch": rows, "steps": len(plan.program.steps)}
        needs[name] = footprint_of(model, sizes).model_dump(mode="json")
        if plan.options.precision != "fp32":
            broken[name] = [str(violation) for violation in violations_of(model)]
    _write_json(folder / "footprints.json", needs)
    if plan.options.precision != "fp32":
        _write_json(folder / "tensorrt.json", broken)


def exact_trajectory(plan: Plan, segments: Segments, count: int, purpose: int, stage: str) -> list[Samples]:
    """FP, uncached: the samples after every step, each (count, channels, height, width)."""
    steps: list[list[Samples]] = [[] for _ in plan.reference_program.steps]
    with executor(plan, plan.reference_program, segments) as runner:
        for part, request in start_requests(plan, runner, count, purpose):
            for event in request:
                plan.progress(stage, part.start * event.steps + event.index * len(part), count * event.steps)
                steps[event.index].append(event.x)
    return [np.concatenate(parts) for parts in steps]


def fit(plan: Plan, segments: Segments, compiled: Segments, tables: Tables, folder: Path) -> None:
    """The compensation table, fitted in a closed loop against the FP program: compensation.safetensors."""
    count = plan.options.vc_images
    correction = ClosedLoopFit(exact_trajectory(plan, segments, count, FIT_NOISE, "fit"), plan.options.vc)
    noise, fresh = seeded_noise(plan.options.seed + FIT_NOISE, 0, count, plan.spec.latent_shape)
    with executor(plan, plan.program, compiled, tables, correction=correction) as runner:
        runner.last(plan.labels(count), noise, fresh)
    table = correction.table
    write_tables(folder / "compensation.safetensors", {"compensation.k": table.k, "compensation.mu": table.mu})


def verify(plan: Plan, segments: Segments, compiled: Segments, tables: Tables, folder: Path) -> None:
    """The compiled program against the FP one on fresh noise: verify.json."""
    count = plan.options.verify_images
    exact = exact_trajectory(plan, segments, count, VERIFY_NOISE, "verify")
    found: list[list[Samples]] = [[] for _ in exact]
    with executor(plan, plan.program, compiled, tables) as runner:
        for _, request in start_requests(plan, runner, count, VERIFY_NOISE, plan.served_at_once):
            for event in request:
                found[event.index].append(event.x)
    verification = trajectory_comparison([np.concatenate(parts) for parts in found], exact)
    _write_json(folder / "verify.json", verification.model_dump(mode="json"))


def _write_json(path: Path, value: Mapping[str, Any] | Iterable[Any]) -> None:
    atomic_write(path, json.dumps(value, indent=1).encode() + b"\n")
