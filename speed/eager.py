"""The baseline: the same trajectory in plain torch, the way a user runs a DiT without ditc."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ditc.guidance import Guidance
from ditc.runtime.executor import NoiseSource, Samples
from ditc.runtime.reference_run import Forward, GuidedRun

__all__ = ["eager_forward", "eager_images"]


def eager_images(
    model: Any,
    table: Mapping[str, NDArray[np.float64]],
    labels: Sequence[int],
    noise: Samples,
    fresh_noise: NoiseSource,
    guidance: float,
) -> Samples:
    """Return finished samples of a torch model: eager, every step computed, conditional and null class in one batch.

    The network computes in the type of its weights, the sampler in float32. `table` is the sampler's
    (`runtime.samplers.sampler_table`); `noise` is x_T, (n, channels, *space).
    """
    run = GuidedRun(model.spec, table, Guidance.of(model.spec, guidance))
    forward = eager_forward(model, table["t"], run.guidance.labels(labels), next(model.parameters()).dtype)
    return run.last(forward, noise, fresh_noise)


def eager_forward(model: Any, t: NDArray[np.float64], labels: NDArray[np.int64], kind: torch.dtype) -> Forward:
    """Return a torch network on rows (rows, channels, *space) of step `index`, with weights of type `kind`.

    `t` are the timesteps of all steps, `labels` the class of every row.
    """
    y = torch.from_numpy(labels)

    @torch.inference_mode()
    def forward(index: int, rows: Samples) -> Samples:
        out = model(torch.from_numpy(rows).to(kind), torch.full((len(y),), float(t[index])), y)
        return out.float().numpy()  # type: ignore[no-any-return]

    return forward
