"""A diffusers scheduler read off as a linear recurrence, with no look at its code.

    x_(i+1) = sum_k a[i, k] x_(i-k) + b[i, k] out_(i-k),  k = 0 to K

`x_i` is what the network saw at step i and `out_i` what it returned. The scheduler is driven over a basis: x_T and
every output are unit vectors, so that each sample it returns spells out what it was made of; least squares then finds
the shortest history that explains all steps. A random kick at each step stands for a compensation; a scheduler that
remembers samples by itself (UniPC's corrector) has a finite history without kicks only, and is read without.

Some schedulers (Euler, LMS) work on samples scaled by sqrt(sigma^2 + 1) and scale them down for the network. Samples
are kept here as the network sees them, so that nothing is scaled at run time: the scales are inside of a and b, and the
last sample, which no network sees, is the scheduler's own. x_T is noise of unit variance for every scheduler; where its
own differs (LMS with linspace spacing: by 2e-5), the run still begins with ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.errors import InputError

__all__ = ["MOST_PAIRS", "Recurrence", "read_recurrence"]

Array = NDArray[np.float64]
MakeScheduler = Callable[[], Any]  # a scheduler with its timesteps set, at the start of a run

MOST_PAIRS = 3  # that a recurrence may keep
RESIDUAL = 1e-6  # of a sample, in float64 with the scheduler's tables in float32
WHOLE_RUN = 1e-5  # relative error of a whole run of a nonlinear function in float32
NEGLIGIBLE = 1e-9  # a singular value below this share of the largest one holds rounding


@dataclass(frozen=True)
class Recurrence:
    """A recurrence as it was read off: `t` (steps,); `a` and `b` (steps, K + 1), newest first; `error` of a whole run.

    `sigmas` are the noise levels that the scheduler says its steps have, (steps,): noise over signal.
    """

    t: Array
    a: Array
    b: Array
    sigmas: Array
    error: float

    @property
    def memory(self) -> int:
        """The number of pairs that are kept: K."""
        return int(self.a.shape[1]) - 1


def read_recurrence(name: str, make: MakeScheduler, steps: int) -> Recurrence:
    """Read a scheduler off, and check it against its own run of a nonlinear function.

    Raises InputError with the reason for one that is no recurrence of at most MOST_PAIRS pairs.
    """
    calls = len(make().timesteps)
    if calls != steps:
        raise InputError(f"{name} can't be taken: it calls the network {calls} times in {steps} steps")
    residual = np.inf
    for kicks in (True, False):
        seen, outs, after = _driven(name, make, steps, kicks)
        for pairs in range(min(MOST_PAIRS, steps - 1) + 1):
            a, b, residual = _fitted(seen, outs, after, pairs)
            if residual < RESIDUAL:
                return _checked(name, make, a, b)
    raise InputError(
        f"{name} can't be taken: its steps are not linear in the last {MOST_PAIRS + 1} samples and outputs "
        f"(what is left is {residual:.0e})"
    )


def _driven(name: str, make: MakeScheduler, steps: int, kicks: bool) -> tuple[Array, Array, Array]:
    """Samples that the network saw, its outputs, and the samples after each step, (steps, width) in a basis.

    Coordinate 0 stays nothing: what a step puts there it has added by itself.
    """
    import torch

    scheduler, width = make(), 2 * steps + 2
    basis = np.eye(width)
    seen, outs, after = (np.zeros((steps, width)) for _ in range(3))
    scaled = _scales(make)
    x = basis[1]
    for i, t in enumerate(scheduler.timesteps):
        if kicks and i > 0:
            x = x + basis[steps + 1 + i]
        out = basis[i + 2]
        own, prediction = (torch.tensor(value.reshape(1, -1, 1, 1)) for value in (x / scaled[i], out))
        scheduler.scale_model_input(own, t)
        stepped = scheduler.step(prediction, t, own, return_dict=False)[0].double().numpy().reshape(-1)
        seen[i], outs[i] = x, out
        x = after[i] = stepped * scaled[i + 1]
    if np.abs(after[:, 0]).max() > 0:
        raise InputError(f"{name} can't be taken: it adds noise of its own")
    if not np.isfinite(after).all():
        raise InputError(f"{name} can't be taken: its steps are not finite with these settings")
    return seen, outs, after


def _scales(make: MakeScheduler) -> Array:
    """Return the network's samples over the scheduler's, (steps + 1,); the last one is taken as it is."""
    import torch

    scheduler, one = make(), torch.ones((1, 1, 1, 1), dtype=torch.float64)
    scales, shape = [], one.shape
    for t in scheduler.timesteps:
        scales.append(float(scheduler.scale_model_input(one, t)))
        scheduler.step(torch.zeros(shape, dtype=torch.float64), t, one, return_dict=False)
    return np.array([*scales, 1.0])


def _fitted(seen: Array, outs: Array, after: Array, pairs: int) -> tuple[Array, Array, float]:
    """a, b and the largest residual with so many pairs, relative to the sample; the least coefficients of many."""
    steps = len(seen)
    a, b, worst = np.zeros((steps, pairs + 1)), np.zeros((steps, pairs + 1)), 0.0
    for i in range(steps):
        count = min(pairs, i) + 1
        terms = np.concatenate([seen[i - count + 1 : i + 1][::-1], outs[i - count + 1 : i + 1][::-1]])
        solution = np.linalg.lstsq(terms.T, after[i], rcond=NEGLIGIBLE)[0]
        a[i, :count], b[i, :count] = solution[:count], solution[count:]
        worst = max(worst, float(np.abs(solution @ terms - after[i]).max() / np.abs(after[i]).max()))
    return a, b, worst


def _checked(name: str, make: MakeScheduler, a: Array, b: Array) -> Recurrence:
    error = _error_of_a_run(make, a, b)
    if not error < WHOLE_RUN:
        raise InputError(
            f"{name} can't be taken: a whole run of it differs from its recurrence by {error:.0e}, "
            f"expected less than {WHOLE_RUN:g}"
        )
    scheduler = make()
    t = np.array([float(value) for value in scheduler.timesteps])
    sigmas = np.array([float(value) for value in scheduler.sigmas[: len(t)]])
    return Recurrence(t, a, b, _as_ratios(scheduler, sigmas), error)


def _as_ratios(scheduler: Any, sigmas: Array) -> Array:
    """Noise over signal: what all these classes call sigma, those with flow sigmas apart."""
    if getattr(scheduler.config, "use_flow_sigmas", False):
        raise InputError(f"{type(scheduler).__name__} has flow sigmas, expected a process over betas")
    return sigmas


def _error_of_a_run(make: MakeScheduler, a: Array, b: Array) -> float:
    """Largest error of the recurrence in a whole run of a nonlinear function in float32, relative to the sample."""
    import torch

    scheduler, scaled = make(), _scales(make)
    random = np.random.default_rng(0)
    x: NDArray[np.float32] = random.standard_normal((2, 4, 4, 4)).astype(np.float32)
    weights = (random.standard_normal((4, 4)) / 2).astype(np.float32)
    theirs = torch.from_numpy(x / np.float32(scaled[0]))
    pairs: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    for i, t in enumerate(scheduler.timesteps):
        out = _nonlinear(weights, scheduler.scale_model_input(theirs, t).numpy(), float(t))
        theirs = scheduler.step(torch.from_numpy(out), t, theirs, return_dict=False)[0]
        pairs = [(x, _nonlinear(weights, x, float(t))), *pairs][: a.shape[1]]
        x = np.zeros_like(x)
        for k, (sample, output) in enumerate(pairs):
            x += np.float32(a[i, k]) * sample + np.float32(b[i, k]) * output
    return float(np.abs(x - theirs.numpy()).max() / np.abs(theirs.numpy()).max())


def _nonlinear(weights: NDArray[np.float32], x: NDArray[np.float32], t: float) -> NDArray[np.float32]:
    """A stand-in for a network, (n, 4, h, w) to the same."""
    mixed = np.einsum("cd,ndhw->nchw", weights, x)
    return np.asarray(np.tanh(mixed + np.sin(np.float32(t) / 100)), np.float32)
