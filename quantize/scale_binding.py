"""Ways for a scale to its Q/DQ pair: which steps share one, and whether the graph holds it or reads it as an input.

A row of BINDINGS. "static" is one constant for all steps. "time-groups" is the time-grouped quantization of TQ-DiT
(arXiv 2502.04056): the step's magnitude s is an input of the segment, u = x / s is quantized with the constant scale
1/127, and the product gets its size back before the bias, y = s (W u) + b. So the Q/DQ scales stay constants, which
TensorRT asks for, and all steps share one engine. "per-step" is that with a group for each step. "dynamic" is the same
with s = max |x| of the tensor itself: nothing is calibrated, and the images of a batch share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditc.calib_data.time_groups import time_groups_of
from ditc.quantize.linears import Linear
from ditc.quantize.scale_sources import largest_magnitude, step_magnitude
from ditc.quantize.scale_table import ScaleTable
from ditc.tables import DYNAMIC

__all__ = ["BINDINGS", "LEAST_POINTS", "ScaleBinding", "neighbouring_steps", "steps_in_time_groups"]

Groups = NDArray[np.int64]  # the group of each step, (steps,), numbered from 0 in the order of steps
LEAST_POINTS = 8  # of a group; fewer say little about the tail of an activation


@dataclass(frozen=True)
class ScaleBinding:
    """`time_groups` takes the number of steps and that of time groups asked for, and returns the one to make.

    It is None where nothing is calibrated. `magnitude` gives the value that an activation is divided by in front of a
    pair of constant scale; None where the pair's own scale is the layer's. `by_step` is whether that value comes from
    a table of the bundle.
    """

    time_groups: Callable[[int, int], int] | None
    magnitude: Callable[[ir.Model, Linear, ScaleTable], ir.Value] | None = None
    by_step: bool = False


def steps_in_time_groups(points: NDArray[np.int64], quantizes: NDArray[np.bool_], count: int) -> Groups:
    """Cut the steps into `count` time groups of the same length.

    `points` are the calibration points of each step, `quantizes` whether it does, both (steps,). A group without a step
    that quantizes belongs to the one before, and one with too few points is joined with its neighbours.
    """
    quantizing = np.flatnonzero(quantizes)
    time = time_groups_of(quantizing, len(points), count)
    begins = np.zeros(len(points), np.bool_)
    begins[quantizing[np.diff(time, prepend=-1) > 0]] = True
    return neighbouring_steps(points, begins)


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


def one_of_all(steps: int, asked: int) -> int:
    """One time group."""
    return 1


def one_of_each(steps: int, asked: int) -> int:
    """As many time groups as steps."""
    return steps


def as_many_as_asked(steps: int, asked: int) -> int:
    """The time groups of --time-groups."""
    return asked


BINDINGS: dict[str, ScaleBinding] = {
    "static": ScaleBinding(one_of_all),
    "per-step": ScaleBinding(one_of_each, step_magnitude, by_step=True),
    "time-groups": ScaleBinding(as_many_as_asked, step_magnitude, by_step=True),
    DYNAMIC: ScaleBinding(None, largest_magnitude),
}
