"""Corrections of integer products: every layer's product in floating point beside that of its integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ditc.calibset import CalibSet
from ditc.compiler.calibrating import calibration_feeds, probe_runner, spread_points
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.point_conditions import PointConditions
from ditc.precision import INT8
from ditc.program import CONDITION, FULL
from ditc.quantize.linears import linears_of
from ditc.quantize.product_correction import (
    LayerCorrection,
    ProductMoments,
    correction_of,
    what_integers_stand_for,
)
from ditc.quantize.qdq import quantize_weight
from ditc.quantize.scale_table import ScaleTable
from ditc.quantize.scales import activation_probe

__all__ = ["POINTS", "product_corrections"]

POINTS = 256  # of the calibration set, spread over the steps: a layer's own tokens are many more


def product_corrections(
    plan: Plan, segments: Segments, calib_file: Path, scales: ScaleTable
) -> dict[str, LayerCorrection]:
    """Return the correction of every linear layer, by path: of what FP gives it to read at calibration points.

    Both products are of the same activations, so a layer answers for its own rounding and not for that of others. The
    points are of steps that quantize, all together.
    """
    from ditc.exporter.onnx_files import load_graph

    method, bits = plan.options.correct, plan.options.bits or INT8
    assert method is not None
    model = load_graph(segments[FULL])
    linears = [(each.path, str(each.activation.name), each.weight_array()) for each in linears_of(model)]
    weights = {path: quantize_weight(weight, bits.weights).dequantized() for path, _, weight in linears}
    activation_probe(model)
    run, condition = probe_runner(plan, segments, model), plan.backend.session(segments[CONDITION])
    moments = {path: ProductMoments.empty(weight.shape[1]) for path, _, weight in linears}
    calib = CalibSet.load(calib_file)
    quantizing = [step.index for step in plan.program.steps if plan.program.segment(step.segment).quantizes]
    calib = calib.take(np.flatnonzero(np.isin(calib.step, quantizing)))
    points, seen = calib.take(spread_points(calib.step, POINTS)), 0
    for feeds in calibration_feeds(condition, points, PointConditions.of_plan(plan), plan.probed_at_once):
        plan.progress("correct", seen, len(points))
        seen += len(feeds["x"]) // plan.halves
        values = run(feeds)
        for path, name, weight in linears:
            rounded = what_integers_stand_for(
                values[name], scales.scales[path], scales.midpoints.get(path, (0,))[0], bits
            )
            moments[path] = moments[path].add(values[name] @ weight, rounded @ weights[path])
    return {path: correction_of(method, each) for path, each in moments.items()}
