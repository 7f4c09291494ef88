"""The stages of a compile. Each takes what earlier stages left in folders, and fills a folder of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import write_tables
from ditc.calib_data.calibset import CalibSet
from ditc.calib_data.pool import Pool, Visit, pool_from_visits
from ditc.calib_data.selection import select_points
from ditc.compiler.options import CompileOptions
from ditc.compiler.released import return_free_memory
from ditc.engines.backend import lowered_path, runnable_path
from ditc.engines.linears import linear_count
from ditc.engines.liveness import footprint_of
from ditc.engines.lowering import lower
from ditc.engines.midpoints import lower_bounds
from ditc.engines.onnxrt import INTEGER_KERNELS, OnnxRuntimeBackend, kernel_census
from ditc.engines.qdq import insert_qdq
from ditc.engines.scale_binding import BINDINGS, Groups
from ditc.engines.scale_table import ScaleTable, step_inputs
from ditc.engines.scales import (
    Origin,
    RunProbe,
    activation_probe,
    histograms_of,
    ranges_of,
    scale_table,
    uncalibrated_table,
)
from ditc.engines.storage import half_storage
from ditc.engines.tensorrt_rules import violations_of
from ditc.engines.update import UPDATE, UpdateForm
from ditc.engines.update_graph import update_model
from ditc.errors import CheckError
from ditc.files import atomic_write, sha256_of
from ditc.program import CONDITION, DECODE, REUSE_ROWS, Program
from ditc.runtime.approximation import first_rows
from ditc.runtime.compensation import TableCompensation, fit_closed_loop
from ditc.runtime.executor import Executor, Samples, StepEvent, seeded_noise
from ditc.runtime.pipeline import open_engines
from ditc.runtime.quality import relative_error, trajectory_comparison
from ditc.spec import ModelSpec

__all__ = ["Plan", "Segments", "export", "fit", "model_digest", "quantize", "record_pool", "select", "verify"]

Progress = Callable[[str, int, int], None]  # stage, done, of
Segments = Mapping[str, Path]
Tables = Mapping[str, NDArray[Any]]
NO_TABLES: Tables = {}

BUFFER_BYTES = 1 << 28  # cache slots, or probed activations, that one batch of compile-time work may take
LARGEST_BATCH = 64
LABELS_COMPARED = 4

# purposes with noise of their own, so that no image is used twice: calibration, compensation, verification
POOL_NOISE, FIT_NOISE, VERIFY_NOISE = 1_000_003, 2_000_003, 3_000_003


@dataclass(frozen=True)
class Plan:
    """What is decided before anything runs."""

    spec: ModelSpec
    options: CompileOptions
    program: Program
    reference_program: Program
    table: Mapping[str, NDArray[np.float64]]
    progress: Progress

    @property
    def halves(self) -> int:
        return 1 if self.options.cfg == 1 else 2

    @property
    def guidance_label(self) -> int | None:
        """The label of the unconditional half; None without guidance."""
        return self.spec.null_label if self.halves == 2 else None

    @property
    def backend(self) -> OnnxRuntimeBackend:
        return OnnxRuntimeBackend()

    @property
    def reuse_tables(self) -> dict[str, NDArray[np.float32]]:
        """The numbers with which steps combine what they reuse, as far as they are known before anything runs."""
        rows = first_rows(self.program, self.spec.branch_shape[-1])
        return {} if rows is None else {REUSE_ROWS: rows}

    @property
    def recorded_steps(self) -> set[int]:
        """The steps whose points enter the pool."""
        every = self.options.pool_steps == "all"
        return {s.index for s in self.program.steps if every or any(self.program.segment(s.segment).compute)}

    def scale_groups(self, calib: CalibSet) -> Groups | None:
        """Which steps share activation scales, (steps,); None where nothing is calibrated."""
        groups, steps = BINDINGS[self.options.scales].groups, self.program.steps
        computes = np.array([any(self.program.segment(step.segment).compute) for step in steps])
        return None if groups is None else groups(np.bincount(calib.step, minlength=len(steps)), computes)

    def labels(self, count: int) -> list[int]:
        """`count` classes, every class equally often, in a seeded order."""
        rng = np.random.default_rng(self.options.seed)
        rounds = -(-count // self.spec.num_classes)
        return [int(label) for _ in range(rounds) for label in rng.permutation(self.spec.num_classes)][:count]

    def batches(self, count: int) -> list[range]:
        """Image numbers in batches whose cache slots stay within bounds."""
        slots = len(self.spec.branches) * int(np.prod(self.spec.branch_shape)) * 4 * self.halves
        size = int(np.clip(BUFFER_BYTES // slots, 1, LARGEST_BATCH))
        return [range(first, min(first + size, count)) for first in range(0, count, size)]


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
    """Every segment of the program as FP ONNX, each checked against torch; the errors go to parity.json."""
    from ditc.exporter.onnx_export import export_segment
    from ditc.exporter.segments import segments_of

    total = 1 + len(plan.program.segments) + len(plan.program.epilogue)
    parity = {}
    for done, segment in enumerate(segments_of(model, plan.program)):
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
def executor(plan: Plan, program: Program, segments: Segments, tables: Tables = NO_TABLES) -> Iterator[Executor]:
    """An executor over segment files, engines closed at the end. `tables` are a bundle's beside the sampler's."""
    names = [name for name in program.calls if name != DECODE]
    with ExitStack() as stack:
        engines = open_engines(stack, plan.backend, {name: segments[name] for name in names})
        compensation = TableCompensation.from_tables(tables)
        yield Executor(
            plan.spec, program, plan.table, engines, plan.options.cfg, compensation, step_inputs=step_inputs(tables)
        )


def start_requests(plan: Plan, runner: Executor, count: int, purpose: int) -> list[tuple[range, Iterator[StepEvent]]]:
    """Requests over `count` images with a purpose's own noise, not yet run."""
    labels, requests = plan.labels(count), []
    for part in plan.batches(count):
        noise, fresh = seeded_noise(plan.options.seed + purpose, part.start, len(part), plan.spec.latent_shape)
        requests.append((part, runner.run(labels[part.start : part.stop], noise, fresh)))
    return requests


def record_pool(plan: Plan, segments: Segments) -> Pool:
    """The points that the cached FP program visits: what deployment will see, before quantization."""
    wanted = plan.recorded_steps
    count = plan.options.pool_size(len(wanted))
    labels = np.array(plan.labels(count))

    def visits(runner: Executor) -> Iterator[Visit]:
        for part, request in start_requests(plan, runner, count, POOL_NOISE):
            for event in request:
                plan.progress("pool", part.start * event.steps + event.index * len(part), count * event.steps)
                if event.index in wanted:
                    yield Visit(event.index, event.t, part.start, labels[part.start : part.stop], event.before)

    with executor(plan, plan.program, segments, plan.reuse_tables) as runner:
        return pool_from_visits(visits(runner))


def select(plan: Plan, segments: Segments, folder: Path) -> None:
    """Record the pool and pick the calibration set from it: calib.npz, and pool.json with its size."""
    pool = record_pool(plan, segments)
    plan.progress("select", 0, 1)
    chosen = select_points(plan.options.select, pool, plan.options.selection())
    chosen.save(folder / "calib.npz")
    _write_json(folder / "pool.json", {"points": len(pool), "images": int(pool.sample.max()) + 1})


def calibration_feeds(
    condition: Any, calib: CalibSet, null_label: int | None, points_at_once: int
) -> Iterator[dict[str, Any]]:
    """Inputs of the `full` segment at every calibration point, points of one step together, in the order of steps.

    `condition` is the ONNX Runtime session of that segment. With a `null_label` every point has two rows, those of
    both guidance halves; None is a model that runs without guidance.
    """
    names = [port.name for port in condition.get_outputs()]
    for step in np.unique(calib.step):
        at_step = np.flatnonzero(calib.step == step)
        for start in range(0, len(at_step), points_at_once):
            part = at_step[start : start + points_at_once]
            halves = [calib.label[part]]
            if null_label is not None:
                halves.append(np.full(len(part), null_label))
            t = np.array([calib.t[part[0]]], np.float32)
            tables = condition.run(names, {"t": t, "y": np.concatenate(halves).astype(np.int64)})
            x = np.concatenate([calib.x[part]] * len(halves))
            yield {"x": x, **{name: table[0] for name, table in zip(names, tables, strict=True)}}


def watched(plan: Plan, feeds: Iterable[dict[str, Any]], done: int, points: int) -> Iterator[dict[str, Any]]:
    """The same feeds, each reported as progress of `quantize`."""
    for feed in feeds:
        plan.progress("quantize", done, points)
        done += len(feed["x"]) // plan.halves
        yield feed


@dataclass(frozen=True)
class Probe:
    """The FP `full` segment with what its linear layers read as outputs: `readers` names them, and who reads each.

    `bounds` are what is known of an output without running it; `run` takes feeds of `points_at_once` points at most.
    """

    readers: Mapping[str, tuple[str, ...]]
    bounds: Mapping[str, float]
    run: RunProbe
    points_at_once: int


def open_probe(plan: Plan, segments: Segments) -> Probe:
    """The probe of a compile, as one session of ONNX Runtime."""
    from ditc.exporter.onnx_files import load_model

    model = load_model(segments["full"])
    bounds, readers = lower_bounds(model, plan.options.midpoint), activation_probe(model)
    # every block probes 3 inputs of the model's width and one of the MLP's: 7 widths in a standard block
    point_bytes = 4 * plan.halves * 7 * int(np.prod(plan.spec.branch_shape)) * len(plan.spec.branches) // 2
    return Probe(
        readers=readers,
        bounds=bounds,
        run=probe_runner(plan, segments, model),
        points_at_once=int(np.clip(BUFFER_BYTES // point_bytes, 1, LARGEST_BATCH)),
    )


def probe_runner(plan: Plan, segments: Segments, probe: Any) -> RunProbe:
    """A function that runs the `full` segment cut down to `probe`, an onnx_ir model, on the inputs of a step."""
    from ditc.exporter.onnx_files import save_sharing_data

    path = segments["full"].with_name("full.probe.onnx")  # its weights lie in that folder
    save_sharing_data(probe, path)
    try:
        session = plan.backend.session(path)
    finally:
        path.unlink()
    names = [port.name for port in session.get_outputs()]
    taken = {port.name for port in session.get_inputs()}  # tables for the head alone are not among them

    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: array for name, array in feeds.items() if name in taken}
        return dict(zip(names, session.run(names, own), strict=True))

    return run


def activation_scales(plan: Plan, segments: Segments, calib: CalibSet) -> ScaleTable:
    """Run the FP `full` segment at the calibration points, and turn what its linear layers read into scales."""
    from ditc.exporter.onnx_files import load_model

    origin = Origin(plan.options.ranges, sha256_of(segments["full"]), calib.digest, plan.options.scales)
    groups = plan.scale_groups(calib)
    if groups is None:
        return uncalibrated_table(activation_probe(load_model(segments["full"])), origin)
    probe, condition = open_probe(plan, segments), plan.backend.session(segments[CONDITION])
    ranges, done = [], 0
    for group in range(groups.max() + 1):
        part = calib.take(np.flatnonzero(groups[calib.step] == group))
        feeds = calibration_feeds(condition, part, plan.guidance_label, probe.points_at_once)
        histograms = histograms_of(probe.run, watched(plan, feeds, done, len(calib)), probe.bounds)
        ranges.append(ranges_of(histograms, plan.options.ranges, probe.bounds))
        done += len(part)
    return scale_table(ranges, probe.readers, groups, origin)


def quantize(plan: Plan, segments: Segments, calib_file: Path, folder: Path) -> None:
    """Scales, INT8 segments, and their form for ONNX Runtime, where every linear layer must run an integer kernel.

    `condition` keeps FP32 arithmetic and stores its weights as FP16; storage.json tells the error of its tables.
    """
    from ditc.exporter.onnx_files import load_model, save_model, save_sharing_data

    table = activation_scales(plan, segments, CalibSet.load(calib_file))
    atomic_write(folder / "scales.json", table.model_dump_json(indent=1).encode() + b"\n")
    write_tables(folder / "scales.safetensors", table.tables())
    kernels = {}
    for part in plan.program.segments:
        if not any(part.compute):
            continue
        model = load_model(segments[part.name])
        expected = linear_count(model)
        insert_qdq(model, table)
        path = folder / f"{part.name}.onnx"
        save_model(model, path)
        lowered = load_model(path)
        if lower(lowered, plan.backend.name):
            save_sharing_data(lowered, lowered_path(path, plan.backend.name))
        kernels[part.name] = check_integer_kernels(plan.backend, path, expected)
    _write_json(folder / "kernels.json", kernels)
    store_condition(plan, segments[CONDITION], folder / f"{CONDITION}.onnx")


def store_condition(plan: Plan, segment: Path, path: Path) -> None:
    """`condition` with half the bytes, unless its weights are too few or too large; its tables are compared."""
    from ditc.exporter.onnx_files import load_model, save_model

    model = load_model(segment)
    if not half_storage(model):
        return
    save_model(model, path)
    feeds = {
        "t": plan.table["t"].astype(np.float32),
        "y": np.array(plan.labels(LABELS_COMPARED), np.int64),
    }
    exact, found = (plan.backend.session(file).run(None, feeds) for file in (segment, path))
    error = max(relative_error(f, e) for f, e in zip(found, exact, strict=True))
    _write_json(path.with_name("storage.json"), {CONDITION: {"relative_error": error}})


def check_integer_kernels(backend: OnnxRuntimeBackend, segment: Path, expected: int) -> dict[str, int]:
    """{"linears", "integer"} of the graph that ONNX Runtime runs. Raises CheckError where a layer stayed float."""
    census = kernel_census(backend, runnable_path(segment, backend.name))
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
    from ditc.exporter.onnx_files import load_model, save_derived, save_model

    broken: dict[str, list[str]] = {}
    needs: dict[str, Any] = {}
    update = update_model(plan.spec, UpdateForm.of(plan.table, plan.spec, plan.options.cfg), plan.options.batch)
    save_model(update, folder / f"{UPDATE}.onnx")
    for name, path in {**compiled, UPDATE: folder / f"{UPDATE}.onnx"}.items():
        model = load_model(path)
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
    exact = exact_trajectory(plan, segments, count, FIT_NOISE, "fit")
    with executor(plan, plan.program, compiled, tables) as runner:
        requests = [request for _, request in start_requests(plan, runner, count, FIT_NOISE)]
        table = fit_closed_loop(requests, exact, plan.options.vc)
    write_tables(folder / "compensation.safetensors", {"compensation.k": table.k, "compensation.mu": table.mu})


def verify(plan: Plan, segments: Segments, compiled: Segments, tables: Tables, folder: Path) -> None:
    """The compiled program against the FP one on fresh noise: verify.json."""
    count = plan.options.verify_images
    exact = exact_trajectory(plan, segments, count, VERIFY_NOISE, "verify")
    found: list[list[Samples]] = [[] for _ in exact]
    with executor(plan, plan.program, compiled, tables) as runner:
        for _, request in start_requests(plan, runner, count, VERIFY_NOISE):
            for event in request:
                found[event.index].append(event.x)
    _write_json(folder / "verify.json", trajectory_comparison([np.concatenate(parts) for parts in found], exact))


def _write_json(path: Path, value: Mapping[str, Any] | Iterable[Any]) -> None:
    atomic_write(path, json.dumps(value, indent=1).encode() + b"\n")
