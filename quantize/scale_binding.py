"""Ways for a scale to its Q/DQ pair: which steps share one, and whether the graph holds it or reads it as an input.

A row of BINDINGS. "static" is one constant for all steps. "per-step" is time-grouped quantization (TQ-DiT) with as
many groups as the calibration set can fill: the step's magnitude s is an input of the segment, u = x / s is quantized
with the constant scale 1/127, and the product gets its size back before the bias, y = s (W u) + b. So the Q/DQ scales
stay constants, which TensorRT asks for, and all steps share one engine. "dynamic" is the same with s = max |x| of the
tensor itself: nothing is calibrated, and the images of a batch share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditc.quantize.linears import Linear
from ditc.quantize.scale_sources import largest_magnitude, step_magnitude
from ditc.quantize.scale_table import ScaleTable
from ditc.tables import DYNAMIC

__all__ = ["BINDINGS", "LEAST_POINTS", "ScaleBinding", "neighbouring_steps", "one_group"]

Groups = NDArray[np.int64]  # the group of each step, (steps,), numbered from 0 in the order of steps
LEAST_POINTS = 8  # of a group; fewer say little about the tail of an activation


@dataclass(frozen=True)
class ScaleBinding:
    """`groups` takes the calibration points of each step and whether it quantizes, both (steps,).

    It is None where nothing is calibrated. `magnitude` gives the value that an activation is divided by in front of a
    pair of constant scale; None where the pair's own scale is the layer's. `by_step` is whether that value comes from
    a table of the bundle.
    """

    groups: Callable[[NDArray[np.int64], NDArray[np.bool_]], Groups] | None
    magnitude: Callable[[ir.Model, Linear, ScaleTable], ir.Value] | None = None
    by_step: bool = False


def one_group(points: NDArray[np.int64], quantizes: NDArray[np.bool_]) -> Groups:
    """All steps together."""
    return np.zeros(len(points), np.int64)


def neighbouring_steps(points: NDArray[np.int64], quantizes: NDArray[np.bool_], least: int = LEAST_POINTS) -> Groups:
    """Each step that quantizes is a group of its own, joined with its neighbours until it has `least` points.

    A step that does not belongs to the last one before it that does, or to the first: it needs no scales, and where it
    has points nevertheless they count there. What is left over at the end joins the last group.
    """
    runs = np.maximum(np.cumsum(quantizes) - 1, 0)  # (steps,), the run of each step
    filled = np.bincount(runs, weights=points)
    group_of_run, group, held = [], 0, 0
    for count in filled:
        if held >= least:
            group, held = group + 1, 0
        group_of_run.append(group)
        held += int(count)
    groups = np.array(group_of_run, np.int64)
    if group and held < least:
        groups[groups == group] = group - 1
    return np.asarray(groups[runs])


BINDINGS: dict[str, ScaleBinding] = {
    "static": ScaleBinding(one_group),
    "per-step": ScaleBinding(neighbouring_steps, step_magnitude, by_step=True),
    DYNAMIC: ScaleBinding(None, largest_magnitude),
}
