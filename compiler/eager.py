"""The baseline: the same trajectory in plain torch, the way a user runs a DiT without ditc."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ditc.runtime.executor import NoiseSource, Samples
from ditc.runtime.samplers import needs_noise, update

__all__ = ["eager_images"]


@torch.inference_mode()
def eager_images(
    model: Any,
    table: Mapping[str, NDArray[np.float64]],
    labels: Sequence[int],
    noise: Samples,
    fresh_noise: NoiseSource,
    guidance: float,
) -> Samples:
    """Finished samples of a torch model: eager, every step computed, conditional and null class in one batch.

    The network computes in the type of its weights, the sampler in float32. `table` is the sampler's
    (`runtime.samplers.sampler_table`); `noise` is x_T, (n, channels, height, width).
    """
    kind = next(model.parameters()).dtype
    spec, count = model.spec, len(labels)
    halves = 1 if guidance == 1 else 2
    y = torch.tensor([*labels, *([spec.null_label] * count if halves == 2 else [])])
    x = noise
    for i in range(len(table["t"])):
        row = {name: float(column[i]) for name, column in table.items()}
        rows = torch.from_numpy(np.concatenate([x] * halves)).to(kind)
        out = model(rows, torch.full((len(y),), row["t"]), y).float().numpy()
        prediction = out[:count, : spec.in_channels].copy()
        if halves == 2:
            guided = slice(0, spec.cfg_channels)
            unconditional = out[count:, guided]
            prediction[:, guided] = unconditional + np.float32(guidance) * (out[:count, guided] - unconditional)
        raw_variance = out[:count, spec.in_channels :] if spec.diffusion.learned_sigma else None
        x = update(row, x, prediction, raw_variance, fresh_noise(i) if needs_noise(row) else None)
    return x
