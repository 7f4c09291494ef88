"""The stage that quantizes: scales, INT8 segments, and a condition of half the bytes."""

from __future__ import annotations

from pathlib import Path

from ditc.bundle import write_tables
from ditc.compiler.calibrating import activation_scales
from ditc.compiler.correcting import product_corrections
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.rotating import rotation_of
from ditc.compiler.teaching import taught_ranges
from ditc.compiler.trajectories import VERIFY_NOISE, purposed_request
from ditc.compiler.work import write_json
from ditc.engines.backend import lowered_path, runnable_path
from ditc.engines.onnxrt import INTEGER_KERNELS, OnnxRuntimeBackend, kernel_census
from ditc.errors import CheckError
from ditc.files import atomic_write
from ditc.lowering.backend_forms import lower
from ditc.lowering.half_storage import half_storage
from ditc.program import CONDITION, FULL
from ditc.quantize.linears import linear_count
from ditc.quantize.qdq import insert_qdq
from ditc.runtime.closeness import relative_error
from ditc.runtime.conditioning import condition_tables

__all__ = ["check_integer_kernels", "quantize", "store_condition"]

IMAGES_COMPARED = 4


def quantize(
    plan: Plan,
    segments: Segments,
    calib_file: Path,
    folder: Path,
    taught: Path | None = None,
    rotated: Segments | None = None,
) -> None:
    """Write scales, INT8 segments, and their form for ONNX Runtime, whose linear layers must all run integer kernels.

    What runs in floating point is a copy of the FP segment. `condition` keeps FP32 arithmetic and stores its weights as
    FP16; storage.json tells the error of its tables. `taught` is the file of ranges that `teach` leaves,
    `rotated` are the forms to quantize that `rotate_segments` leaves.
    """
    from ditc.exporter.onnx_files import load_graph, save_graph, save_sharing_data

    sources = segments if rotated is None else rotated
    scales = activation_scales(plan, sources, calib_file, None if taught is None else taught_ranges(taught))
    scales = scales.model_copy(update={"rotation": rotation_of(sources)})
    if plan.options.correct is not None:
        corrections = product_corrections(plan, sources, calib_file, scales)
        scales = scales.model_copy(update={"corrections": corrections})
    atomic_write(folder / "scales.json", scales.model_dump_json(indent=1).encode() + b"\n")
    write_tables(folder / "scales.safetensors", scales.bundle_tables())
    kernels = {}
    for part in plan.program.segments:
        if part.in_float:
            save_graph(load_graph(segments[FULL]), folder / f"{part.name}.onnx")
        if not part.quantizes:
            continue
        model = load_graph(sources[part.name])
        expected = linear_count(model)
        insert_qdq(model, scales)
        path = folder / f"{part.name}.onnx"
        save_graph(model, path)
        lowered = load_graph(path)
        if lower(lowered, plan.backend.name):
            save_sharing_data(lowered, lowered_path(path, plan.backend.name))
        kernels[part.name] = check_integer_kernels(plan.backend, path, expected)
    write_json(folder / "kernels.json", kernels)
    store_condition(plan, segments[CONDITION], folder / f"{CONDITION}.onnx")


def store_condition(plan: Plan, segment: Path, path: Path) -> None:
    """Write `condition` with half the bytes, unless its weights are too few or too large, and compare its tables."""
    from ditc.exporter.onnx_files import load_graph, save_graph

    model = load_graph(segment)
    if not half_storage(model):
        return
    save_graph(model, path)
    request, _, _ = purposed_request(plan, range(IMAGES_COMPARED), VERIFY_NOISE)
    conditions = {each.name: request.rows(each) for each in plan.spec.network_inputs}
    exact, halved = (
        condition_tables(plan.backend.session(file), plan.columns["t"], conditions) for file in (segment, path)
    )
    error = max(relative_error(halved[name], table) for name, table in exact.items())
    write_json(path.with_name("storage.json"), {CONDITION: {"relative_error": error}})


def check_integer_kernels(backend: OnnxRuntimeBackend, segment: Path, expected: int) -> dict[str, int]:
    """Count {"linears", "integer"} of the graph that ONNX Runtime runs. Raises CheckError where one stayed float."""
    census = kernel_census(backend, runnable_path(segment, backend.name), segment.parent)
    integer = sum(census[kind] for kind in INTEGER_KERNELS)
    if integer != expected:
        raise CheckError(
            f"segment {segment.stem}: {integer} of {expected} linear layers run an integer kernel here; "
            "report this with the versions that `ditc doctor` prints"
        )
    return {"linears": expected, "integer": integer}
