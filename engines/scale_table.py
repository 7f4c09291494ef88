"""The scale table: the activation scales of the linear layers, and what they were made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from ditc.engines.ranges import LEVELS
from ditc.spec import Record

__all__ = ["SCALES_INPUT", "SCALES_TABLE", "ScaleTable", "step_inputs"]

SCALES_INPUT = "scales"  # of a segment: the magnitudes of the current step, (columns,)
SCALES_TABLE = "scales.activation"  # in a bundle's tables: those of every step, (steps, columns)
LEAST_MAGNITUDE = 2.0**-14  # FP16 divides by it with full precision; what is smaller rounds to zero


class ScaleTable(Record):
    """Activation scales by linear layer (torch module path), with the range method and the digests they came from.

    `binding` is a row of `scale_binding.BINDINGS`. With "per-step", `steps` has each layer's scale at every step,
    `scales` the largest of them, and `columns` the layer's column of the table that the engines read; layers with one
    input share a column. With "dynamic" there are no scales. `tensors` names the activation that a layer reads in the
    FP segment, so that other calibrators can be compared.
    """

    method: str
    segment_sha256: str
    calibration_digest: str
    scales: dict[str, float]
    tensors: dict[str, str] = {}
    binding: str = "static"
    steps: dict[str, tuple[float, ...]] = {}
    columns: dict[str, int] = {}

    @model_validator(mode="after")
    def _positive(self) -> ScaleTable:
        if not self.scales:
            raise ValueError("no scales at all, expected one for every linear layer")
        every = {name: (scale, *self.steps.get(name, ())) for name, scale in self.scales.items()}
        for name, scales in every.items():
            wrong = [scale for scale in scales if not scale > 0 or not np.isfinite(scale)]
            if wrong:
                raise ValueError(f"scale of {name} is {wrong[0]}, expected a positive number")
        return self

    @property
    def width(self) -> int:
        """Columns of the table that the engines read."""
        return len(set(self.columns.values()))

    def magnitudes(self) -> NDArray[np.float32]:
        """The magnitude that maps to 127 at every step, (steps, columns): what the engines read."""
        found = np.empty((len(next(iter(self.steps.values()))), self.width), np.float32)
        for path, column in self.columns.items():
            found[:, column] = np.maximum(np.array(self.steps[path]) * LEVELS, LEAST_MAGNITUDE)
        return found

    def tables(self) -> dict[str, NDArray[np.float32]]:
        """What of this goes into a bundle's tables: nothing, where the graphs hold the scales."""
        return {SCALES_TABLE: self.magnitudes()} if self.steps else {}


def step_inputs(tables: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """What of a bundle's tables the segments take as an input, one row a step: name of the input -> (steps, ...)."""
    return {SCALES_INPUT: tables[SCALES_TABLE].astype(np.float32)} if SCALES_TABLE in tables else {}
