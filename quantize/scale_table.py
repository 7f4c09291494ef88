"""The scale table: the activation scales of the linear layers, and what they were made from."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from ditc.precision import INT8, LEVELS, Bits, levels_of
from ditc.quantize.product_correction import LayerCorrection
from ditc.quantize.rotation import Rotation
from ditc.spec import PartialRecord
from ditc.tables import MIDPOINTS_TABLE, SCALES_TABLE

__all__ = [
    "LEAST_MAGNITUDE",
    "ScaleTable",
]

LEAST_MAGNITUDE = 2.0**-14  # FP16 divides by it with full precision; what is smaller rounds to zero


class ScaleTable(PartialRecord):
    """Activation scales by linear layer (torch module path), with the range method and the digests they came from.

    `binding` is a row of `scale_binding.BINDINGS`. With "per-step", `steps` has each layer's scale at every step,
    `scales` the largest of them, and `columns` the layer's column of the table that the engines read; layers with one
    input share a column. With "dynamic" there are no scales. `midpoints` are the middles of ranges that do not lie
    about zero, in steps of the scale: one number, or one for every step. `bits` are those of weights and activations.
    `tensors` names the activation that a layer
    reads in the FP segment, so that other calibrators can be compared. `corrections` are of the products, by layer,
    where there are any, and `rotation` the one of what all layers read.
    """

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"corrections", "rotation"})

    method: str
    segment_sha256: str
    calibration_digest: str
    scales: dict[str, float]
    tensors: dict[str, str] = {}
    binding: str = "static"
    bits: Bits = INT8
    steps: dict[str, tuple[float, ...]] = {}
    columns: dict[str, int] = {}
    midpoints: dict[str, tuple[int, ...]] = {}
    corrections: dict[str, LayerCorrection] | None = None
    rotation: Rotation | None = None

    @model_validator(mode="after")
    def _positive(self) -> ScaleTable:
        every = {name: (scale, *self.steps.get(name, ())) for name, scale in self.scales.items()}
        for name, scales in every.items():
            wrong = [scale for scale in scales if not scale > 0 or not np.isfinite(scale)]
            if wrong:
                raise ValueError(f"scale of {name} is {wrong[0]}, expected a positive number")
        return self

    def reach(self, path: str, step: int) -> float:
        """The largest magnitude that the integers stand for at a layer and a step; what is beyond it clips."""
        scale = self.steps[path][step] if self.steps else self.scales[path]
        middles = self.midpoints.get(path, (0,))
        middle = middles[step] if self.steps and path in self.midpoints else middles[0]
        return scale * (levels_of(self.bits.activations) + abs(middle))

    @property
    def midpoint_columns(self) -> list[int]:
        """The columns of layers that have a midpoint, in order."""
        return sorted({self.columns[path] for path in self.midpoints})

    def magnitudes(self) -> NDArray[np.float32]:
        """The magnitude that maps to 127 at every step, (steps, columns): what the engines read."""
        by_column = {column: np.array(self.steps[path]) * LEVELS for path, column in self.columns.items()}
        magnitudes = np.stack([by_column[column] for column in sorted(by_column)], axis=1)
        return np.asarray(np.maximum(magnitudes, LEAST_MAGNITUDE), np.float32)

    def bundle_tables(self) -> dict[str, NDArray[np.float32]]:
        """Return the rows for a bundle's tables: none, where the graphs hold the scales."""
        if not self.steps:
            return {}
        by_column = {self.columns[path]: np.array(middles, np.float32) for path, middles in self.midpoints.items()}
        midpoints = [by_column[column] for column in self.midpoint_columns]
        return {SCALES_TABLE: self.magnitudes()} | ({MIDPOINTS_TABLE: np.stack(midpoints, axis=1)} if midpoints else {})
