"""The scale table: one activation scale per linear layer, and what it was made from."""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from ditc.spec import Record

__all__ = ["ScaleTable"]


class ScaleTable(Record):
    """Activation scales by linear layer (torch module path), with the range method and the digests they came from.

    `tensors` names the activation that a layer reads in the FP segment, so that other calibrators can be compared.
    """

    method: str
    segment_sha256: str
    calibration_digest: str
    scales: dict[str, float] = Field(min_length=1)
    tensors: dict[str, str] = {}

    @model_validator(mode="after")
    def _positive(self) -> ScaleTable:
        wrong = [name for name, scale in self.scales.items() if not scale > 0 or not np.isfinite(scale)]
        if wrong:
            raise ValueError(f"scale of {wrong[0]} is {self.scales[wrong[0]]}, expected a positive number")
        return self
