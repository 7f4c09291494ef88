"""Samplers with memory by name: each is a scheduler of diffusers over the model's own process, as a sampler's columns.

Making them takes diffusers; running a bundle doesn't.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.choices import Prediction
from ditc.diffusion import alphas_cumprod
from ditc.errors import InputError
from ditc.exporter.recurrence import Recurrence, read_recurrence
from ditc.sampler_checks import sampler_contradictions
from ditc.spec import DiffusionSpec, SamplerSpec
from ditc.tables import history_columns

__all__ = ["MULTISTEP", "multistep_recurrence", "multistep_table"]

Array = NDArray[np.float64]

# name of a sampler -> class of diffusers, and what of its configuration is not its default
MULTISTEP: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dpm++2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpm++3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 2}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
}
PREDICTIONS: dict[Prediction, str] = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}


def multistep_recurrence(diffusion: DiffusionSpec, sampler: SamplerSpec, steps: int) -> Recurrence:
    """Read the sampler's scheduler off for so many steps. Raises InputError where that can't be done."""
    try:
        import diffusers
    except ImportError as e:
        raise InputError(
            f"--sampler {sampler.name} is read off diffusers; install it with: pip install 'ditc[export]'"
        ) from e
    if not 2 <= steps <= diffusion.train_steps:
        raise InputError(
            f"steps must be 2 to {diffusion.train_steps}, the model's training steps, found {steps}; set --steps"
        )
    kind, config = MULTISTEP[sampler.name]
    products = alphas_cumprod(diffusion)
    betas = 1 - products / np.append(1.0, products[:-1])

    def scheduler() -> Any:
        ready = getattr(diffusers, kind)(
            num_train_timesteps=diffusion.train_steps,
            trained_betas=betas,
            prediction_type=PREDICTIONS[diffusion.prediction],
            timestep_spacing=sampler.spacing,
            steps_offset=sampler.offset,
            **config,
        )
        ready.set_timesteps(steps)
        return ready

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy, about how diffusers takes arrays from tensors
        return read_recurrence(f"--sampler {sampler.name} with --spacing {sampler.spacing}", scheduler, steps)


def multistep_table(diffusion: DiffusionSpec, sampler: SamplerSpec, steps: int) -> dict[str, Array]:
    """The sampler's columns, name -> (steps,), as `runtime.samplers.sampler_table` has them, and those of its history.

    Its own step is in `prev_x` and `prev_out`, so `prev_x0` is 0; `x0_x` and `x0_out` still say what the sample holds.
    Raises InputError where that can't be read off, or not well enough: squared cosine betas begin at a sigma of 24000.
    """
    read = multistep_recurrence(diffusion, sampler, steps)
    signal = 1 / np.sqrt(1 + read.sigmas**2)
    noise, zero = read.sigmas * signal, np.zeros(steps)
    x0_x, x0_out = {
        "epsilon": (1 / signal, -noise / signal),
        "v": (signal, -noise),
        "sample": (zero, zero + 1),
    }[diffusion.prediction]
    table = {
        "t": read.t,
        "clip": np.full(steps, np.inf),
        "x0_x": x0_x,
        "x0_out": x0_out,
        "prev_x0": zero,
        "prev_x": read.a[:, 0],
        "prev_out": read.b[:, 0],
        "sigma": zero,
    }
    for k, (of_x, of_out) in enumerate(history_columns(read.memory), 1):
        table |= {of_x: read.a[:, k], of_out: read.b[:, k]}
    for contradiction in sampler_contradictions(table, diffusion.prediction):
        raise InputError(
            f"--sampler {sampler.name} with --spacing {sampler.spacing} can't be taken over these betas, its own "
            f"tables in float32 are too rough: {contradiction}; choose another sampler or spacing"
        )
    return table
