"""Requests that begin in the middle: the steps that may be the first, and samples at the noise level of a step.

A step may be the first where nothing from it on reads what an earlier step has left: cached outputs, or the pairs that
a sampler with memory looks back at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditc.diffusion import alphas_cumprod
from ditc.errors import InputError
from ditc.program import Program, is_sum
from ditc.requests import Request, whole_numbers
from ditc.runtime.executor import NoiseSource, Samples, streamed_request
from ditc.runtime.request_inputs import check_noise
from ditc.sampler_checks import MIXES
from ditc.spec import DiffusionSpec, ModelSpec
from ditc.tables import history_columns, memory_of

__all__ = ["Starting"]

Columns = Mapping[str, NDArray[np.float64]]  # the sampler's, each (steps,)

ROUNDING = 1e-9  # a weight that least squares gave where the scheduler has none is about 1e-14, its own above 1e-7

MOST_LISTED = 6  # steps in a message


@dataclass(frozen=True)
class Starting:
    """The beginnings of requests over one program; `columns` are the sampler's, each (steps,)."""

    spec: ModelSpec
    program: Program
    columns: Columns

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that a request may begin with; step 0 is always one."""
        return first_steps(self.program, self.columns)

    def nearest(self, strength: float) -> int:
        """Return the step that a request of some strength begins with, as `start_for_strength`."""
        return start_for_strength(self.program, self.columns, strength)

    def samples(self, noise: Samples | None, latents: Samples | None, start: int, count: int) -> Samples | None:
        """Return what a request of `count` images begins with, None for its own x_T.

        Raises InputError for what doesn't fit, and for a step that can't be the first.
        """
        check_noise(noise, count)
        if latents is None:
            if start != 0:
                raise InputError(
                    f"start={start} needs latents, the samples in front of that step; pipe.noised(finished, "
                    f"start={start}) makes them"
                )
            return noise
        if noise is not None:
            raise InputError("give noise, which is x_T, or latents with start; found both")
        self._check(latents, start, count)
        return latents

    def noised(self, latents: Samples, noise: Samples, start: int) -> Samples:
        """Return finished samples with as much of `noise` as there is in front of step `start`, each (n, *latent)."""
        self._check(latents, start, len(latents))
        signal, share = (np.float32(column[start]) for column in noise_shares(self.spec.diffusion, self.columns))
        return np.asarray(signal * np.asarray(latents, np.float32) + share * noise)

    def streamed(
        self, request: Request, streams: Sequence[tuple[int, int]], start: int
    ) -> tuple[Request, Samples, NoiseSource]:
        """(request, x_T, source of fresh noise) of some images; what steps before `start` take is drawn and let go."""
        request, drawn, fresh = streamed_request(self.spec, request, streams, len(self.program.steps))
        for step in np.flatnonzero(self.columns["sigma"][:start] > 0):
            fresh(int(step))
        return request, drawn, fresh

    def _check(self, latents: Samples, start: int, count: int) -> None:
        check_noise(latents, count, "latents")
        expected = (count, *self.spec.latent_shape)
        if latents.shape != expected:
            raise InputError(f"latents must have shape {expected}, found {latents.shape}")
        if not np.isfinite(latents).all():
            raise InputError("latents hold NaN or infinite numbers; give finite ones")
        check_start(self.program, self.columns, *whole_numbers("start", [start], "20"))


def first_steps(program: Program, columns: Columns) -> tuple[int, ...]:
    """Return the steps that a request may begin with; step 0 is always one."""
    return tuple(
        start for start in range(len(program.steps)) if not (_reuses(program, start) or _looks_back(columns, start))
    )


def start_for_strength(program: Program, columns: Columns, strength: float) -> int:
    """Return the step to begin with so that about a share `strength` of all steps is run: the nearest that may be.

    Of two that are equally near it is the later one. Raises InputError where the nearest is step 0 and others were
    meant: then nothing would be left of what the request begins with.
    """
    if not 0 < strength <= 1:
        raise InputError(f"strength must be above 0 and at most 1, found {strength:g}; 1 runs every step")
    steps, allowed = len(program.steps), first_steps(program, columns)
    wanted = min(steps - int(steps * strength), steps - 1)
    start = min(allowed, key=lambda step: (abs(step - wanted), -step))
    if start == 0 < wanted:
        listed = [f"{step} (strength {(steps - step) / steps:.2g})" for step in allowed[:MOST_LISTED]]
        more = [f"{len(allowed) - MOST_LISTED} more"] * (len(allowed) > MOST_LISTED)
        raise InputError(
            f"strength {strength:g} begins with step {wanted} of {steps}, and this bundle can't: "
            f"{_reuses(program, wanted) or _looks_back(columns, wanted)}; it may begin with: {', '.join(listed + more)}"
        )
    return start


def check_start(program: Program, columns: Columns, start: int) -> None:
    """Raise InputError unless a request may begin with step `start`, naming what it lacks and the nearest that may."""
    steps = len(program.steps)
    if not 0 <= start < steps:
        raise InputError(f"start must be a step of this bundle, 0 to {steps - 1}, found {start}")
    lack = _reuses(program, start) or _looks_back(columns, start)
    if not lack:
        return
    allowed = first_steps(program, columns)
    below, above = max(k for k in allowed if k < start), min((k for k in allowed if k > start), default=None)
    nearest = f"{below}" if above is None else f"{below} or {above}"
    raise InputError(f"a request can't begin with step {start}: {lack}; start at {nearest}")


def _reuses(program: Program, start: int) -> str:
    """Say which step from `start` on reads a cache that an earlier one has written; nothing if none does."""
    writer = {slot: step.index for step in program.steps[:start] for slot in step.writes.values()}
    for step in program.steps[start:]:
        for value, slot in step.reads.items():
            if slot in writer:
                extrapolates = sum(map(is_sum, step.reads)) > 1
                advice = (
                    ", and a bundle compiled with --reuse hold needs one step that computes" if extrapolates else ""
                )
                return f"step {step.index} takes {value!r} from what step {writer[slot]} left{advice}"
        for slot in step.writes.values():
            writer.pop(slot, None)
    return ""


def _looks_back(columns: Columns, start: int) -> str:
    """Say which step from `start` on looks back at one before it; nothing if none does."""
    for back, pair in enumerate(history_columns(memory_of(columns)), 1):
        for step in range(start, min(start + back, len(columns["t"]))):
            if step >= back and any(abs(columns[name][step]) > ROUNDING for name in pair):
                return f"the sampler looks back from step {step} at step {step - back}"
    return ""


def noise_shares(diffusion: DiffusionSpec, columns: Columns) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the shares of the clean sample and of noise in front of each step, (steps,) each.

    The columns of a model that predicts the sample don't tell them; they are those of its betas, between two timesteps
    those of the noise over signal in between.
    """
    if diffusion.prediction in MIXES:
        mix = MIXES[diffusion.prediction](columns["x0_x"], columns["x0_out"])
        return mix.signal, mix.noise
    products = alphas_cumprod(diffusion)
    sigmas = np.interp(columns["t"], np.arange(len(products)), np.sqrt((1 - products) / products))
    return 1 / np.sqrt(1 + sigmas**2), sigmas / np.sqrt(1 + sigmas**2)
