"""The noise process of a diffusion: how much of a sample is signal at each training step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ditc.spec import DiffusionSpec

__all__ = ["alphas_cumprod"]


def alphas_cumprod(diffusion: DiffusionSpec) -> NDArray[np.float64]:
    """Cumulative products of 1 - beta, (train_steps,)."""
    count, start, end = diffusion.train_steps, diffusion.beta_start, diffusion.beta_end
    if diffusion.beta_schedule == "linear":
        betas = np.linspace(start, end, count)
    elif diffusion.beta_schedule == "scaled-linear":
        betas = np.linspace(start**0.5, end**0.5, count) ** 2
    else:  # squared-cosine, Improved DDPM eq. 17
        levels = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - levels[1:] / levels[:-1], 0.999)
    return np.asarray(np.cumprod(1 - betas), np.float64)
