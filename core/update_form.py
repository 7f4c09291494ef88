"""The `update` segment: guidance, the sampler's update and the compensation of one step, for devices.

`update_graph` makes it at compile time; here is what both sides know of it, with no need of onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditc.spec import ModelSpec
from ditc.tables import history_columns, memory_of

__all__ = ["COLUMNS", "PREDICTED", "UpdateForm", "row_columns"]

# the sampler's columns in the order of a row; `noise` is 1 where the step adds noise, else 0
COLUMNS = ("x0_x", "x0_out", "clip", "prev_x0", "prev_x", "prev_out", "sigma", "log_var_min", "log_var_max", "noise")


PREDICTED = "predicted"  # the output with which a later step looks back at this one: the prediction after guidance


def row_columns(memory: int) -> tuple[str, ...]:
    """Return the columns of a row for a sampler that keeps so many pairs."""
    return (*COLUMNS, *(name for pair in history_columns(memory) for name in pair))


@dataclass(frozen=True)
class UpdateForm:
    """The parts of the update that a trajectory needs."""

    guidance: float
    clips: bool
    adds_noise: bool
    learned_variance: bool
    memory: int = 0  # pairs of earlier steps

    @staticmethod
    def of(columns: Mapping[str, NDArray[np.float64]], spec: ModelSpec, guidance: float) -> UpdateForm:
        """Return the form that a sampler's columns ask for."""
        adds_noise = bool((columns["sigma"] > 0).any())
        return UpdateForm(
            guidance=guidance,
            clips=bool(np.isfinite(columns["clip"]).any()),
            adds_noise=adds_noise,
            learned_variance=adds_noise and "log_var_min" in columns and spec.diffusion.learned_sigma,
            memory=memory_of(columns),
        )
