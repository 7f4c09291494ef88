"""The gain of factors in front of an MLP's second layer, where GELU lets nothing fold: an explicit product.

    python benchmarks/quality/smoothing_fc2.py

The reference model with --smooth smooth, and then one Mul more in front of every fc2, its factors chosen as those of
the other layers; error as in smoothing.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
from smoothing import OPTIONS, compiled, errors, evaluation_points, predictions

from ditc.calibset import CalibSet
from ditc.compiler.exporting import export
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.planning import make_plan
from ditc.compiler.pooling import select
from ditc.compiler.smoothing import choose, smooth, statistics_of
from ditc.exporter.models import builtin_digits
from ditc.exporter.onnx_files import load_graph, save_graph
from ditc.machine import machine
from ditc.quantize.fold_sites import Site, WeightFold
from ditc.quantize.linears import linears_of

HERE = Path(__file__).parent
NOWHERE = WeightFold("", ())


def with_products(plan: Plan, segments: Segments, calib: Path, folder: Path) -> Segments:
    """The segments with x * (1 / s) in front of every fc2, and its weight times s."""
    model = load_graph(segments["full"])
    layers = [linear for linear in linears_of(model) if linear.path.endswith("fc2")]
    sites = [Site((linear.name,), str(linear.activation.name), NOWHERE) for linear in layers]
    choices = choose(plan, model, statistics_of(plan, segments, CalibSet.load(calib), sites))
    for linear, choice in zip(layers, choices.values(), strict=True):
        share = ir.tensor(np.float32(1 / choice.factors), name=f"{linear.name}.share")
        constant = ir.Value(
            name=share.name, shape=ir.Shape(share.shape.numpy()), type=ir.TensorType(share.dtype), const_value=share
        )
        model.graph.register_initializer(constant)
        product = ir.node("Mul", [linear.activation, constant], name=f"{linear.name}/Mul")
        product.outputs[0].name, product.outputs[0].dtype = f"{linear.name}.divided", ir.DataType.FLOAT
        product.outputs[0].shape = linear.activation.shape
        model.graph.insert_before(linear.node, product)
        linear.node.replace_input_with(0, product.outputs[0])
        linear.weight.const_value = ir.tensor(linear.weight_array() * np.float32(choice.factors)[:, None])
    folder.mkdir()
    save_graph(model, folder / "full.onnx")
    return {**segments, "full": folder / "full.onnx"}


def main() -> None:
    rows = []
    with TemporaryDirectory() as temporary:
        folder, model = Path(temporary), builtin_digits()
        plan = make_plan(model, OPTIONS)
        export(plan, model, folder)
        segments = {call: folder / f"{call}.onnx" for call in plan.program.calls}
        points = evaluation_points(plan, segments)
        exact = predictions(plan, segments, points)
        select(plan, segments, folder)
        calib = folder / "calib.npz"
        for ranges in ("max", "mse", "percentile"):
            smoothed = replace(plan, options=OPTIONS.model_copy(update={"smooth": "smooth", "ranges": ranges}))
            place = folder / ranges
            place.mkdir()
            smooth(smoothed, segments, calib, place)
            base = {name: new if (new := place / path.name).is_file() else path for name, path in segments.items()}
            for fc2 in ("none", "smooth", "balance"):
                options = smoothed.options.model_copy(update={"smooth": fc2})
                fc2_plan = replace(plan, options=options)
                with_factors = base if fc2 == "none" else with_products(fc2_plan, base, calib, place / f"fc2-{fc2}")
                (place / f"int8-{fc2}").mkdir()
                quantized = compiled(
                    replace(plan, options=options.model_copy(update={"smooth": "none"})),
                    with_factors,
                    calib,
                    place / f"int8-{fc2}",
                )
                rows.append({"ranges": ranges, "fc2": fc2, **errors(predictions(plan, quantized, points), exact)})
                print(rows[-1], flush=True)
    report = {"machine": machine().model_dump(), "settings": OPTIONS.model_dump(), "rows": rows}
    (HERE / "smoothing_fc2.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
