"""The stage that rotates: the form of FP segments that is quantized, the same function to rounding."""

from __future__ import annotations

from pathlib import Path

from ditc.calibset import CalibSet
from ditc.checks import Rotated
from ditc.compiler.changed_segments import parity_of
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.work import replaced, write_json
from ditc.files import atomic_write
from ditc.program import FULL
from ditc.quantize.linears import linears_of
from ditc.quantize.rotated_graphs import check_groups, foldable_layers, rotate
from ditc.quantize.rotation import Rotation

__all__ = ["check_rotatable", "rotate_segments", "rotation_of"]

ROTATION = "rotation.json"  # of the stage's folder: what was done to its segments


def check_rotatable(plan: Plan, full: Path) -> None:
    """Raise InputError where the groups of a rotation don't divide what a layer reads, before anything is lost."""
    from ditc.exporter.onnx_files import load_graph

    if plan.options.rotate is not None:
        check_groups(load_graph(full), plan.options.rotate)


def rotate_segments(plan: Plan, segments: Segments, calib_file: Path, folder: Path) -> None:
    """Write the rotated form of every FP segment that has linear layers; rotate.json says which inputs cost a product.

    The forms are for Q/DQ: in floating point they compute more and gain nothing, so FP segments stay beside them.
    Raises CheckError where a segment's outputs differ.
    """
    from ditc.exporter.onnx_files import load_graph, save_graph

    assert plan.options.rotate is not None
    models = {part.name: load_graph(segments[part.name]) for part in plan.cached_program.segments}
    layers = [linear.name for linear in linears_of(models[FULL])]
    activations = {linear.activation: linear.name for linear in linears_of(models[FULL])}
    rotation = Rotation(size=plan.options.rotate, folded=foldable_layers(models, plan.options.rotate))
    for name, model in models.items():
        if rotate(model, rotation):
            save_graph(model, folder / f"{name}.onnx")
    atomic_write(folder / ROTATION, rotation.model_dump_json(indent=1).encode() + b"\n")
    rotated = Rotated(
        size=rotation.size,
        linears=len(layers),
        folded=rotation.folded,
        products=sum(layer not in rotation.folded for layer in activations.values()),
        parity=parity_of(
            (plan, segments), (plan, replaced(segments, folder)), CalibSet.load(calib_file), ("rotation", "no --rotate")
        ),
    )
    write_json(folder / "rotate.json", rotated.model_dump(mode="json"))


def rotation_of(segments: Segments) -> Rotation | None:
    """Return the rotation of segments that `rotate_segments` wrote, None for others."""
    path = segments[FULL].with_name(ROTATION)
    return Rotation.model_validate_json(path.read_bytes()) if path.is_file() else None
