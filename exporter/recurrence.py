"""A diffusers scheduler read off as a linear recurrence, with no look at its code.

    x_(i+1) = sum_k a[i, k] x_(i-k) + b[i, k] out_(i-k)  + c[i] z_i,  k = 0 to K

`x_i` is what the network saw at step i, `out_i` what it returned, and `z_i` fresh noise, where the scheduler draws any.
The scheduler is driven over a basis: x_T, every output and all noise that it draws are unit vectors, so that each
sample it returns spells out what it was made of; least squares then finds the shortest history that explains all steps.
A kick at each step stands for a compensation; a scheduler that remembers samples by itself (UniPC's corrector) has a
finite history without kicks only, and is read without.

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
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from ditc.errors import InputError

__all__ = ["MOST_PAIRS", "Recurrence", "error_of_a_run", "read_recurrence"]

Array = NDArray[np.float64]
Samples = NDArray[np.float32]
# (step, sample, output, noise, pairs of earlier steps with the latest first) -> the next sample
Advance = Callable[[int, Samples, Samples, Samples, list[tuple[Samples, Samples]]], Samples]
MakeScheduler = Callable[[], Any]  # a scheduler with its timesteps set, at the start of a run

MOST_PAIRS = 3  # that a recurrence may keep
RESIDUAL = 1e-6  # of a sample, in float64 with the scheduler's tables in float32
WHOLE_RUN = 1e-5  # relative error of a whole run of a nonlinear function in float32
NEGLIGIBLE = 1e-9  # a singular value below this share of the largest one holds rounding


@dataclass(frozen=True)
class Recurrence:
    """A recurrence as it was read off: `t` (steps,); `a` and `b` (steps, K + 1), newest first; `c` (steps,), 0 or more.

    `signal` and `noise` are the shares of the clean sample and of noise in what a step begins with, (steps,), as the
    scheduler has them. `error` is that of a whole run.
    """

    t: Array
    a: Array
    b: Array
    c: Array
    signal: Array
    noise: Array
    error: float

    @property
    def memory(self) -> int:
        """The number of pairs that are kept: K."""
        return int(self.a.shape[1]) - 1


class _GivenNoise(TorchFunctionMode):
    """Answers `torch.randn` with a given array while it is entered, and counts how often it is asked."""

    def __init__(self, given: NDArray[Any]) -> None:
        super().__init__()
        self.given = given
        self.draws = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.randn:
            return func(*args, **kwargs)
        self.draws += 1
        return torch.from_numpy(self.given).to(kwargs.get("dtype") or torch.float32)


@dataclass(frozen=True)
class _Drive:
    """A run over a basis, each (steps, width): samples that the network saw, its outputs, samples after each step.

    `drawn` is the noise, (steps, width), a unit vector for each step whether or not it was drawn.
    """

    seen: Array
    outs: Array
    after: Array
    drawn: Array


def read_recurrence(name: str, make: MakeScheduler, steps: int, *, flow: bool = False) -> Recurrence:
    """Read a scheduler off, and check it against its own run of a nonlinear function.

    `flow` says that its sigmas are those of a flow: a sample is sigma parts noise and 1 - sigma parts signal. Raises
    InputError with the reason for one that is no recurrence of at most MOST_PAIRS pairs.
    """
    calls = len(make().timesteps)
    if calls != steps:
        raise InputError(f"{name} can't be taken: it calls the network {calls} times in {steps} steps")
    residual = np.inf
    for kicks in (True, False):
        drive = _driven(name, make, steps, kicks)
        c = (drive.after * drive.drawn).sum(axis=1)
        for pairs in range(min(MOST_PAIRS, steps - 1) + 1):
            a, b, residual = _fitted(drive, c, pairs)
            if residual < RESIDUAL:
                error = _checked_error(name, make, a, b, c)
                t = np.array([float(value) for value in make().timesteps])
                return Recurrence(t, a, b, c, *_shares(make(), steps, flow), error)
    raise InputError(
        f"{name} can't be taken: its steps are not linear in the last {MOST_PAIRS + 1} samples and outputs "
        f"(what is left is {residual:.0e})"
    )


def _driven(name: str, make: MakeScheduler, steps: int, kicks: bool) -> _Drive:
    """Run a scheduler over a basis: nothing, x_T, the outputs, the kicks of all steps but the first, the noise.

    Coordinate 0 stays nothing: what a step puts there it has added by itself.
    """
    scheduler, width = make(), 3 * steps + 1
    basis = np.eye(width)
    outs, kick, drawn = basis[2 : steps + 2], basis[steps + 1 : 2 * steps + 1], basis[2 * steps + 1 :]
    seen, after = np.zeros((steps, width)), np.zeros((steps, width))
    scaled = _scales(make)
    x = basis[1]
    for i, t in enumerate(scheduler.timesteps):
        if kicks and i > 0:
            x = x + kick[i]
        own, prediction = (torch.tensor(value.reshape(1, -1, 1, 1)) for value in (x / scaled[i], outs[i]))
        _seen_by_network(scheduler, own, t)
        with _GivenNoise(drawn[i].reshape(1, -1, 1, 1)) as noise:
            stepped = scheduler.step(prediction, t, own, return_dict=False)[0].double().numpy().reshape(-1)
        if noise.draws > 1:
            raise InputError(f"{name} can't be taken: it draws noise {noise.draws} times in a step")
        seen[i] = x
        x = after[i] = stepped * scaled[i + 1]
    if np.abs(after[:, 0]).max() > 0:
        raise InputError(f"{name} can't be taken: it adds something of its own to the samples")
    if not np.isfinite(after).all():
        raise InputError(f"{name} can't be taken: its steps are not finite with these settings")
    if (after * drawn).sum(axis=1).min() < 0:
        raise InputError(f"{name} can't be taken: it subtracts noise")
    return _Drive(seen, outs, after, drawn)


def _seen_by_network(scheduler: Any, x: torch.Tensor, t: Any) -> torch.Tensor:
    """Return a sample as the network sees it; of a class that scales none, as it is."""
    scaled: torch.Tensor = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
    return scaled


def _scales(make: MakeScheduler) -> Array:
    """Return the network's samples over the scheduler's, (steps + 1,); the last one is taken as it is."""
    scheduler, one = make(), torch.ones((1, 1, 1, 1), dtype=torch.float64)
    scales = []
    with _GivenNoise(np.zeros((1, 1, 1, 1))):
        for t in scheduler.timesteps:
            scales.append(float(_seen_by_network(scheduler, one, t)))
            scheduler.step(torch.zeros_like(one), t, one, return_dict=False)
    return np.array([*scales, 1.0])


def _fitted(drive: _Drive, c: Array, pairs: int) -> tuple[Array, Array, float]:
    """a, b and the largest residual with so many pairs, relative to the sample; the least coefficients of many."""
    seen, outs, after = drive.seen, drive.outs, drive.after - c[:, None] * drive.drawn
    steps = len(seen)
    a, b, worst = np.zeros((steps, pairs + 1)), np.zeros((steps, pairs + 1)), 0.0
    for i in range(steps):
        count = min(pairs, i) + 1
        terms = np.concatenate([seen[i - count + 1 : i + 1][::-1], outs[i - count + 1 : i + 1][::-1]])
        solution = np.linalg.lstsq(terms.T, after[i], rcond=NEGLIGIBLE)[0]
        a[i, :count], b[i, :count] = solution[:count], solution[count:]
        worst = max(worst, float(np.abs(solution @ terms - after[i]).max() / np.abs(drive.after[i]).max()))
    return a, b, worst


def _checked_error(name: str, make: MakeScheduler, a: Array, b: Array, c: Array) -> float:
    """Return the error of a whole run over the recurrence. Raises InputError unless it is rounding."""
    error = error_of_a_run(make, _advance(a, b, c), memory=a.shape[1] - 1)
    if not error < WHOLE_RUN:
        raise InputError(
            f"{name} can't be taken: a whole run of it differs from its recurrence by {error:.0e}, "
            f"expected less than {WHOLE_RUN:g}"
        )
    return error


def _shares(scheduler: Any, steps: int, flow: bool) -> tuple[Array, Array]:
    """Return the shares of signal and noise in front of each step, (steps,).

    What these classes call sigma is noise over signal, that of a flow apart; those that have none keep a table.
    """
    if not hasattr(scheduler, "sigmas"):
        products = np.array([float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps])
        return np.sqrt(products), np.sqrt(1 - products)
    sigmas = np.array([float(value) for value in scheduler.sigmas[:steps]])
    if flow:
        return 1 - sigmas, sigmas
    signal = 1 / np.sqrt(1 + sigmas**2)
    return signal, sigmas * signal


def error_of_a_run(make: MakeScheduler, advance: Advance, memory: int) -> float:
    """Return the largest error of a whole run of a nonlinear function in float32, relative to the sample.

    `advance` takes the place of the scheduler's step, with as many earlier pairs as it keeps; both have the same noise.
    """
    scheduler, scaled = make(), _scales(make)
    random = np.random.default_rng(0)
    x: Samples = random.standard_normal((2, 4, 4, 4)).astype(np.float32)
    weights = (random.standard_normal((4, 4)) / 2).astype(np.float32)
    theirs = torch.from_numpy(x / np.float32(scaled[0]))
    pairs: list[tuple[Samples, Samples]] = []
    for i, t in enumerate(scheduler.timesteps):
        z = random.standard_normal(x.shape).astype(np.float32)
        out = _nonlinear(weights, _seen_by_network(scheduler, theirs, t).numpy(), float(t))
        with _GivenNoise(z):
            theirs = scheduler.step(torch.from_numpy(out), t, theirs, return_dict=False)[0]
        own = _nonlinear(weights, x, float(t))
        x, pairs = advance(i, x, own, z, pairs), [(x, own), *pairs][:memory]
    return float(np.abs(x - theirs.numpy()).max() / np.abs(theirs.numpy()).max())


def _advance(a: Array, b: Array, c: Array) -> Advance:
    """Return the recurrence as a step, in float32."""

    def advance(i: int, x: Samples, out: Samples, z: Samples, pairs: list[tuple[Samples, Samples]]) -> Samples:
        after: Samples = np.float32(c[i]) * z
        for k, (sample, output) in enumerate([(x, out), *pairs]):
            after += np.float32(a[i, k]) * sample + np.float32(b[i, k]) * output
        return after

    return advance


def _nonlinear(weights: Samples, x: Samples, t: float) -> Samples:
    """A stand-in for a network, (n, 4, h, w) to the same."""
    mixed = np.einsum("cd,ndhw->nchw", weights, x)
    return np.asarray(np.tanh(mixed + np.sin(np.float32(t) / 100)), np.float32)
