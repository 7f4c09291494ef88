"""Samplers as tables: every update is a few coefficients per step, so the loop is one small function.

    x0     = x0_x * x + x0_out * out                                            clipped to [-clip, clip]
    x_prev = prev_x0 * x0 + prev_x * x + prev_out * out + sigma * z
             + sum_k x.k * (x of k steps ago) + out.k * (out of k steps ago)    for a sampler with memory

`out` is the network's prediction after guidance (noise, v or clean sample), `z` fresh noise. With a learned variance
sigma = exp(log_var / 2), log_var between the rows `log_var_min` and `log_var_max` (Improved DDPM, arXiv 2102.09672).
Sources: DDPM arXiv 2006.11239, DDIM arXiv 2010.02502 eq. 12 and 16, v prediction arXiv 2202.00512.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.diffusion import alphas_cumprod
from ditc.errors import InputError
from ditc.guidance import Samples
from ditc.spec import DiffusionSpec, SamplerSpec
from ditc.tables import history_columns, memory_of

__all__ = ["UPDATES", "Pairs", "adds_noise", "needs_noise", "no_pairs", "sampler_table", "timesteps", "update"]

Column = NDArray[np.float64]  # (steps,)
Row = Mapping[str, float]
Pairs = deque[tuple[Samples, Samples]]  # samples that the network saw, its outputs after guidance; latest first


def timesteps(sampler: SamplerSpec, steps: int, train_steps: int) -> NDArray[np.int64]:
    """The timesteps of a trajectory, noisiest first, (steps,)."""
    if not 2 <= steps <= train_steps:
        raise InputError(f"steps must be 2 to {train_steps}, the model's training steps, found {steps}; set --steps")
    picked: NDArray[np.floating[Any]]
    if sampler.spacing == "linspace":
        picked = np.round(np.linspace(0, train_steps - 1, steps))[::-1]
    elif sampler.spacing == "leading":
        picked = (np.arange(steps) * float(train_steps // steps))[::-1] + sampler.offset
    else:
        picked = np.round(np.arange(train_steps, 0, -train_steps / steps)[:steps]) - 1  # arange may overshoot
    if picked[0] >= train_steps:
        raise InputError(f"offset {sampler.offset} moves the first timestep to {picked[0]:g}, past {train_steps - 1}")
    return picked.astype(np.int64)


def sampler_table(diffusion: DiffusionSpec, sampler: SamplerSpec, steps: int) -> dict[str, Column]:
    """All coefficients of a trajectory: name of the column -> (steps,). Column "t" holds the timesteps."""
    if sampler.name == "ddpm" and sampler.variance == "learned" and not diffusion.learned_sigma:
        raise InputError("the model has no learned variance; choose variance fixed-small or fixed-large")
    if sampler.name not in UPDATES:
        raise InputError(f"sampler {sampler.name} is read off diffusers; only ddim and ddpm have a formula here")
    if diffusion.prediction == "flow":
        raise InputError(
            f"{sampler.told} is for a process over betas, and the model predicts a flow; choose --sampler euler, "
            "dpm++2m, unipc or deis"
        )
    t = timesteps(sampler, steps, diffusion.train_steps)
    products = alphas_cumprod(diffusion)
    alpha_bar = products[t]
    before = np.append(alpha_bar[1:], _final_product(sampler, t, products))
    columns = {"t": t.astype(np.float64), "clip": np.full(steps, sampler.clip or np.inf)}
    columns.update(_clean_sample_columns(diffusion, alpha_bar))
    columns.update(UPDATES[sampler.name](sampler, alpha_bar, before, _noise_columns(diffusion, alpha_bar)))
    return columns


def _final_product(sampler: SamplerSpec, t: NDArray[np.int64], products: NDArray[np.float64]) -> float:
    """The cumulative product that the last step goes to."""
    if sampler.name == "ddpm":
        return 1.0  # always ends clean
    after = 2 * t[-1] - t[-2]
    if (
        sampler.spacing == "leading" and after >= 0
    ):  # an offset of a whole stride leaves room for one, as diffusers has it
        return float(products[after])
    return 1.0 if sampler.final_alpha_one else float(products[0])


def _clean_sample_columns(diffusion: DiffusionSpec, alpha_bar: Column) -> dict[str, Column]:
    """The clean sample as a combination of x and the network's output."""
    signal, noise, zero = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), np.zeros_like(alpha_bar)
    x0_x, x0_out = {
        "epsilon": (1 / signal, -noise / signal),
        "v": (signal, -noise),
        "sample": (zero, zero + 1),
    }[diffusion.prediction]
    return {"x0_x": x0_x, "x0_out": x0_out}


def _noise_columns(diffusion: DiffusionSpec, alpha_bar: Column) -> tuple[Column, Column]:
    """The predicted noise as a combination of x and the network's output."""
    signal, noise, zero = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), np.zeros_like(alpha_bar)
    return {
        "epsilon": (zero, zero + 1),
        "v": (noise, signal),
        "sample": (1 / noise, -signal / noise),
    }[diffusion.prediction]


def _ddim(sampler: SamplerSpec, alpha_bar: Column, before: Column, noise: tuple[Column, Column]) -> dict[str, Column]:
    """DDIM eq. 12, with sigma of eq. 16."""
    sigma = sampler.eta * np.sqrt((1 - before) / (1 - alpha_bar) * (1 - alpha_bar / before))
    direction = np.sqrt(np.maximum(1 - before - sigma**2, 0))
    return {
        "prev_x0": np.sqrt(before),
        "prev_x": direction * noise[0],
        "prev_out": direction * noise[1],
        "sigma": sigma,
    }


def _ddpm(sampler: SamplerSpec, alpha_bar: Column, before: Column, noise: tuple[Column, Column]) -> dict[str, Column]:
    """DDPM eq. 6 and 7: the posterior mean, plus noise at every step but the last."""
    alpha = alpha_bar / before
    beta = 1 - alpha
    posterior = beta * (1 - before) / (1 - alpha_bar)
    posterior[-1] = posterior[-2]  # 0 at the last step, which adds no noise; its logarithm must exist
    added = np.append(np.ones(len(alpha_bar) - 1), 0.0)
    columns = {
        "prev_x0": beta * np.sqrt(before) / (1 - alpha_bar),
        "prev_x": (1 - before) * np.sqrt(alpha) / (1 - alpha_bar),
        "prev_out": np.zeros_like(alpha_bar),
        "sigma": added * np.sqrt(beta if sampler.variance == "fixed-large" else posterior),
    }
    if sampler.variance == "learned":
        columns |= {"log_var_min": np.log(posterior), "log_var_max": np.log(beta)}
    return columns


UPDATES: dict[str, Callable[[SamplerSpec, Column, Column, tuple[Column, Column]], dict[str, Column]]] = {
    "ddim": _ddim,
    "ddpm": _ddpm,
}


def needs_noise(row: Row) -> bool:
    """Does this step add fresh noise?"""
    return row["sigma"] > 0


def adds_noise(columns: Mapping[str, Column]) -> bool:
    """Does any step of a trajectory add fresh noise?"""
    return bool((columns["sigma"] > 0).any())


def no_pairs(columns: Mapping[str, Any]) -> Pairs:
    """Return where a run keeps what its sampler looks back at: `appendleft` after each step, empty at its start."""
    return deque(maxlen=memory_of(columns))


def update(
    row: Row,
    x: Samples,
    out: Samples,
    raw_variance: Samples | None,
    z: Samples | None,
    pairs: Iterable[tuple[Samples, Samples]] = (),
) -> Samples:
    """The next sample; all arrays are (batch, channels, *space) and `row` is one row of the table.

    `pairs` are those of earlier steps, latest first; one that is not there counts as nothing.
    """
    x0 = np.float32(row["x0_x"]) * x + np.float32(row["x0_out"]) * out
    if row["clip"] < np.inf:
        np.clip(x0, -row["clip"], row["clip"], out=x0)
    prev: Samples = np.float32(row["prev_x0"]) * x0 + np.float32(row["prev_x"]) * x + np.float32(row["prev_out"]) * out
    for (earlier_x, earlier_out), (of_x, of_out) in zip(pairs, history_columns(memory_of(row)), strict=False):
        prev = prev + np.float32(row[of_x]) * earlier_x + np.float32(row[of_out]) * earlier_out
    if z is None or not needs_noise(row):
        return prev
    if raw_variance is None or "log_var_min" not in row:
        return np.asarray(prev + np.float32(row["sigma"]) * z)
    fraction = (raw_variance + 1) / 2
    log_var = fraction * np.float32(row["log_var_max"]) + (1 - fraction) * np.float32(row["log_var_min"])
    return np.asarray(prev + np.exp(np.float32(0.5) * log_var) * z)
