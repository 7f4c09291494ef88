"""The baseline: the same trajectory in plain torch, the way a user runs a DiT without ditc."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ditc.guidance import Guidance
from ditc.requests import Request
from ditc.runtime.executor import NoiseSource, Samples
from ditc.runtime.reference_run import Forward, GuidedRun

__all__ = ["eager_forward", "eager_images"]


def eager_images(
    model: Any,
    table: Mapping[str, NDArray[np.float64]],
    request: Request,
    noise: Samples,
    fresh_noise: NoiseSource,
    guidance: float,
) -> Samples:
    """Return finished samples of a torch model: eager, every step computed, conditional and null class in one batch.

    The network computes in the type of its weights, the sampler in float32. `table` is the sampler's
    (`runtime.samplers.sampler_table`); `noise` is x_T, (n, channels, *space).
    """
    run = GuidedRun(model.spec, table, Guidance.of(model.spec, guidance))
    forward = eager_forward(model, table["t"], run.guidance.row_conditions(request), next(model.parameters()).dtype)
    return run.last(forward, noise, fresh_noise)


def eager_forward(
    model: Any, t: NDArray[np.float64], conditions: Mapping[str, NDArray[Any]], kind: torch.dtype
) -> Forward:
    """Return a torch network on rows (rows, channels, *space) of step `index`, with weights of type `kind`.

    `t` are the timesteps of all steps, `conditions` those of every row, in the order of
    the model's.
    """
    fresh = {condition.name for condition in model.spec.conditions if condition.fresh}
    given = {each.name: torch.from_numpy(conditions[each.name]) for each in model.spec.inputs}
    given = {name: rows.to(kind) if rows.is_floating_point() else rows for name, rows in given.items()}

    @torch.inference_mode()
    def forward(index: int, rows: Samples) -> Samples:
        own = [array[index] if name in fresh else array for name, array in given.items()]
        out = model(torch.from_numpy(rows).to(kind), torch.full((len(rows),), float(t[index])), *own)
        return out.float().numpy()  # type: ignore[no-any-return]

    return forward
