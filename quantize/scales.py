"""From activations at the calibration points to a scale table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditc.precision import INT8, LEVELS, Bits, levels_of
from ditc.quantize.linears import Linear, linears_of
from ditc.quantize.midpoints import Range, centred_scales, range_of
from ditc.quantize.ranges import Histogram
from ditc.quantize.scale_binding import BINDINGS, Groups
from ditc.quantize.scale_table import ScaleTable
from ditc.quantize.segment_outputs import keep_outputs

__all__ = [
    "Origin",
    "RunProbe",
    "ScaleTable",
    "activation_probe",
    "histograms_of",
    "ranges_of",
    "scale_table",
    "uncalibrated_scale_table",
]

Feeds = Mapping[str, NDArray[Any]]
NO_BOUNDS: Mapping[str, float] = {}
RunProbe = Callable[[Feeds], Mapping[str, NDArray[np.float32]]]


def activation_probe(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """Make every activation that a linear layer reads an output of `model`, and drop what none of them needs.

    Returns the output's name -> the layers that read it: layers with one input (q, k and v) share one scale.
    """
    readers: dict[str, list[str]] = {}
    values: dict[str, ir.Value] = {}
    for linear in linears_of(model):
        name = str(linear.activation.name)
        readers.setdefault(name, []).append(linear.path)
        values[name] = linear.activation
    keep_outputs(model, list(values.values()))
    return {name: tuple(paths) for name, paths in readers.items()}


def histograms_of(
    run: RunProbe, points: Iterable[Feeds], bounds: Mapping[str, float] = NO_BOUNDS
) -> dict[str, Histogram]:
    """Histograms of the probed activations x, in one streaming pass over the calibration points.

    They count |x|, and x - bound for those that have a lower bound.
    """
    histograms: dict[str, Histogram] = {}
    for feeds in points:
        for name, values in run(feeds).items():
            counted = values - np.float32(bounds[name]) if name in bounds else values
            histograms[name] = histograms.get(name, Histogram.empty()).add(counted)
    return histograms


def ranges_of(
    histograms: Mapping[str, Histogram], method: str, bounds: Mapping[str, float] = NO_BOUNDS, levels: int = LEVELS
) -> dict[str, Range]:
    """Return each activation's clipping range. `levels` is the integer that the largest magnitude will map to."""
    return {name: range_of(histogram, method, bounds.get(name), levels) for name, histogram in histograms.items()}


@dataclass(frozen=True)
class Origin:
    """The origin of scales: the range method, digests of segment and points, the row of BINDINGS, bits."""

    method: str
    segment_sha256: str
    calibration_digest: str
    binding: str = "static"
    bits: Bits = INT8


def scale_table(
    ranges: Sequence[Mapping[str, Range]],
    readers: Mapping[str, tuple[str, ...]],
    groups: Groups,
    origin: Origin,
) -> ScaleTable:
    """Scales of every linear layer. `ranges` are those of each group of steps, `groups` is (steps,)."""
    columns = _columns(readers)
    centred = {}
    for column in set(columns.values()):
        names = [name for name, paths in readers.items() if columns[paths[0]] == column]
        low = np.array([min(part[name].low for name in names) for part in ranges])
        high = np.array([max(part[name].high for name in names) for part in ranges])
        centred[column] = centred_scales(low, high, levels_of(origin.bits.activations))
    scales = {path: centred[column][1] for path, column in columns.items()}
    midpoints = {path: centred[column][0] for path, column in columns.items()}
    by_step = BINDINGS[origin.binding].by_step
    return ScaleTable(
        method=origin.method,
        segment_sha256=origin.segment_sha256,
        calibration_digest=origin.calibration_digest,
        scales={path: float(by_group.max()) for path, by_group in scales.items()},
        tensors={path: name for name, paths in readers.items() for path in paths},
        binding=origin.binding,
        bits=origin.bits,
        steps={path: tuple(by_group[groups].tolist()) for path, by_group in scales.items()} if by_step else {},
        columns=columns if by_step else {},
        midpoints={
            path: tuple((by_group[groups] if by_step else by_group).tolist())
            for path, by_group in midpoints.items()
            if by_group.any()
        },
    )


def uncalibrated_scale_table(readers: Mapping[str, tuple[str, ...]], origin: Origin) -> ScaleTable:
    """The table of a binding that needs no scales."""
    return ScaleTable(
        method=origin.method,
        segment_sha256=origin.segment_sha256,
        calibration_digest=origin.calibration_digest,
        scales={},
        tensors={path: name for name, paths in readers.items() for path in paths},
        binding=origin.binding,
        bits=origin.bits,
    )


def _columns(readers: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """Give layers with one input one column, and the inputs of a layer that branches share too."""
    columns: dict[str, int] = {}
    for paths in readers.values():
        column = next((columns[path] for path in paths if path in columns), len(set(columns.values())))
        columns |= {path: columns.get(path, column) for path in paths}
    return columns


def layers_without_scale(table: ScaleTable, linears: Iterable[Linear]) -> list[str]:
    """Paths of linear layers that a table knows nothing about."""
    if BINDINGS[table.binding].time_groups is None:
        return []
    return [linear.path for linear in linears if linear.path not in table.scales]
