"""The stage that lowers for GPUs, and tells what TensorRT's rules and a device's memory say of each segment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditc.compiler.plan import Plan, Segments
from ditc.compiler.work import write_json
from ditc.engines.backend import lowered_path
from ditc.lowering.backend_forms import lower
from ditc.lowering.segment_footprint import footprint_of
from ditc.lowering.tensorrt_rules import violations_of
from ditc.lowering.update_graph import update_model
from ditc.program import DECODE, UPDATE
from ditc.update_form import UpdateForm

__all__ = ["lower_for_devices"]


def lower_for_devices(plan: Plan, compiled: Segments, folder: Path) -> None:
    """Write what GPUs need beside the portable segments.

    `update` keeps the sample on the device. With FP16 or INT8 every segment gets its strongly typed form;
    tensorrt.json holds what TensorRT's rules say of it, footprints.json what each segment needs of a device's memory.
    """
    from ditc.exporter.onnx_files import load_graph, save_derived, save_graph

    broken: dict[str, list[str]] = {}
    needs: dict[str, Any] = {}
    update = update_model(plan.spec, UpdateForm.of(plan.columns, plan.spec, plan.options.cfg), plan.options.batch)
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
    write_json(folder / "footprints.json", needs)
    if plan.options.precision != "fp32":
        write_json(folder / "tensorrt.json", broken)
