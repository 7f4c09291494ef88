"""Two looks at what a model predicts: weights and their keys can't tell noise from velocity.

At the largest timestep the sample is noise and little else, so a predictor of noise returns nearly what it is given.
One of v returns nearly the negated clean sample there, one of samples the clean sample: neither resembles the noise.
What a flow-matching model gives for a timestep far outside of its [0, 1] resembles nothing.

A flow-matching model whose timesteps are scaled to the same range returns noise minus a clean sample there, which does
resemble the noise. It is told by its size further down: where nine tenths of a sample are noise a predictor of noise
returns about as much as it is given, and one of a flow divides that by its time, and takes a sample off.

A model that is said to predict a flow is looked at in `exporter.flow_check`.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditc.diffusion import alphas_cumprod
from ditc.exporter.flow_check import FlowLook, doubts_of_flow
from ditc.exporter.protocol import example_inputs
from ditc.spec import LABEL, DiffusionSpec, ModelSpec

__all__ = ["doubts_about", "noise_gain", "noise_resemblance", "noisy_timestep"]

ALIKE = 0.5  # cosine: a trained predictor of noise has nearly 1, unrelated outputs have 0 +- 0.03
LOUD = 1.4  # gain: trained predictors of noise had 0.9 to 1.2, models of flows 1.7 to 3.3
LEVEL = 0.1  # cumulative product of 1 - beta where the gain is looked at
STRENGTH = 0.5  # of the noise there, so that a predictor of noise can't take it for what it was trained on
NUMBERS = 1024  # in all rows of a forward pass, at least


@torch.no_grad()
def noise_resemblance(model: Any) -> float:
    """The cosine between noise and what the model makes of it at the largest timestep; NaN where that is not finite."""
    noise, out = _answer(model, model.spec.diffusion.train_steps - 1, 1.0)
    return float(torch.nn.functional.cosine_similarity(out.flatten(), noise.flatten(), dim=0))


@torch.no_grad()
def noise_gain(model: Any) -> float | None:
    """Return the size of the model's output over that of weak noise; None for a process that hardly adds any."""
    t = noisy_timestep(model.spec.diffusion)
    if t is None:
        return None
    noise, out = _answer(model, t, STRENGTH)
    return float(out.norm() / noise.norm())


def _answer(model: Any, timestep: float, strength: float) -> tuple[Tensor, Tensor]:
    """(noise, what the model predicts for it), both (rows, channels, *space)."""
    spec = model.spec
    rows = -(-NUMBERS // prod(spec.latent_shape))
    noise = strength * torch.randn(rows, *spec.latent_shape, generator=torch.Generator().manual_seed(0))
    out = model(noise, torch.full((rows,), float(timestep)), *_conditions(spec, rows))
    return noise, out[:, : spec.in_channels]


def _conditions(spec: ModelSpec, rows: int) -> list[Tensor]:
    """Examples of every condition, (rows, *shape): of the classes those that come first."""
    _, _, *conditions = example_inputs(spec, rows)
    pairs = zip(spec.inputs, conditions, strict=True)
    return [torch.arange(rows) % (each.classes or 1) if each.name == LABEL else given for each, given in pairs]


def noisy_timestep(diffusion: DiffusionSpec) -> int | None:
    """The first timestep where no more than LEVEL of a sample's power is signal; None where there is none."""
    noisy = np.flatnonzero(alphas_cumprod(diffusion) <= LEVEL)
    return int(noisy[0]) if len(noisy) else None


def doubts_about(model: Any, corrected_by: str) -> tuple[str, ...]:
    """A line where the model does not do what its spec says that it predicts; `corrected_by` is where that is said."""
    prediction, steps = model.spec.diffusion.prediction, model.spec.diffusion.train_steps
    if prediction == "flow":
        times = getattr(model, "flow_times", (float(steps), 0.0))
        return doubts_of_flow(FlowLook(partial(_answer, model), times, steps), corrected_by)
    cosine = noise_resemblance(model)
    if prediction == "epsilon":
        if cosine > ALIKE:
            return _doubts_of_gain(noise_gain(model), corrected_by)
        return (_unlike_noise(cosine, corrected_by),)
    if abs(cosine) <= ALIKE:
        return ()
    return (
        f"given noise at the largest timestep the model returns much like it (cosine {cosine:.2f}): it seems to "
        f"predict noise, not {'v' if prediction == 'v' else 'the clean sample'} ({corrected_by})",
    )


def _unlike_noise(cosine: float, corrected_by: str) -> str:
    return (
        f"given noise at the largest timestep the model returns nothing like it (cosine {cosine:.2f}, a predictor of "
        f"noise has nearly 1): it may predict something else, or be made for flow matching ({corrected_by})"
    )


def _doubts_of_gain(gain: float | None, corrected_by: str) -> tuple[str, ...]:
    if gain is None or gain <= LOUD:
        return ()
    return (
        f"given weak noise at a middle timestep the model returns {gain:.1f} times as much (a predictor of noise about "
        f"as much): it may be made for flow matching with timesteps of the same range ({corrected_by})",
    )
