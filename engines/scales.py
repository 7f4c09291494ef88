"""From activations at the calibration points to a scale table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditc.engines.linears import Linear, linears_of
from ditc.engines.outputs import keep_outputs
from ditc.engines.ranges import LEVELS, Histogram, clipping_range
from ditc.engines.scale_table import ScaleTable

__all__ = ["ScaleTable", "activation_probe", "histograms_of", "scale_table"]

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


def scale_table(
    histograms: Mapping[str, Histogram],
    readers: Mapping[str, tuple[str, ...]],
    *,
    method: str,
    segment_sha256: str,
    calibration_digest: str,
) -> ScaleTable:
    """Scales of every linear layer: clipping range / 127."""
    scales: dict[str, float] = {}
    for name, paths in readers.items():
        scale = clipping_range(method, histograms[name]) / LEVELS
        for path in paths:  # a layer that two branches share takes the wider range
            scales[path] = max(scale, scales.get(path, 0.0))
    return ScaleTable(
        method=method,
        segment_sha256=segment_sha256,
        calibration_digest=calibration_digest,
        scales=scales,
        tensors={path: name for name, paths in readers.items() for path in paths},
    )


def layers_without_scale(table: ScaleTable, linears: Iterable[Linear]) -> list[str]:
    """Paths of linear layers that a table knows nothing about."""
    return [linear.path for linear in linears if linear.path not in table.scales]
