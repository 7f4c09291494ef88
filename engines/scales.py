"""From activations at the calibration points to a scale table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditc.engines.linears import Linear, linears_of
from ditc.engines.outputs import keep_outputs
from ditc.engines.ranges import LEVELS, Histogram, clipping_range
from ditc.engines.scale_binding import BINDINGS, Groups
from ditc.engines.scale_table import ScaleTable

__all__ = ["Origin", "ScaleTable", "activation_probe", "histograms_of", "ranges_of", "scale_table"]

Feeds = Mapping[str, NDArray[Any]]
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


def histograms_of(run: RunProbe, points: Iterable[Feeds]) -> dict[str, Histogram]:
    """Histograms of the probed activations, in one streaming pass over the calibration points."""
    histograms: dict[str, Histogram] = {}
    for feeds in points:
        for name, values in run(feeds).items():
            histograms[name] = histograms.get(name, Histogram.empty()).add(values)
    return histograms


def ranges_of(histograms: Mapping[str, Histogram], method: str) -> dict[str, float]:
    """The magnitude of each activation that maps to 127."""
    return {name: clipping_range(method, histogram) for name, histogram in histograms.items()}


@dataclass(frozen=True)
class Origin:
    """What scales are made from and how: the range method, the row of BINDINGS, digests of segment and points."""

    method: str
    segment_sha256: str
    calibration_digest: str
    binding: str = "static"


def scale_table(
    ranges: Sequence[Mapping[str, float]],
    readers: Mapping[str, tuple[str, ...]],
    groups: Groups,
    origin: Origin,
) -> ScaleTable:
    """Scales of every linear layer, range / 127. `ranges` are those of each group of steps, `groups` is (steps,)."""
    columns: dict[str, int] = {}
    widest: dict[int, NDArray[np.float64]] = {}  # column -> (groups,)
    for name, paths in readers.items():
        column = next((columns[path] for path in paths if path in columns), len(widest))
        found = np.array([part[name] for part in ranges])
        widest[column] = np.maximum(found, widest.get(column, 0.0))  # a layer that two branches share
        columns |= {path: columns.get(path, column) for path in paths}
    scales = {path: widest[column] / LEVELS for path, column in columns.items()}
    by_step = BINDINGS[origin.binding].by_step
    return ScaleTable(
        method=origin.method,
        segment_sha256=origin.segment_sha256,
        calibration_digest=origin.calibration_digest,
        scales={path: float(found.max()) for path, found in scales.items()},
        tensors={path: name for name, paths in readers.items() for path in paths},
        binding=origin.binding,
        steps={path: tuple(found[groups].tolist()) for path, found in scales.items()} if by_step else {},
        columns=columns if by_step else {},
    )


def layers_without_scale(table: ScaleTable, linears: Iterable[Linear]) -> list[str]:
    """Paths of linear layers that a table knows nothing about."""
    return [linear.path for linear in linears if linear.path not in table.scales]
