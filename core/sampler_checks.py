"""Checks of a sampler's columns, whichever it is: given the exact prediction, a step leads to the mix of the next.

    x = signal * x0 + noise * e,  signal^2 + noise^2 = 1        (a process that keeps the variance)
                                  signal + noise = 1            (a flow)

`x0_x` and `x0_out` tell signal and noise of a step; the other columns take x and the prediction to the next x, whose
signal must be the next step's, and whose noise, with what is drawn afresh, must make up the rest. A sampler with memory
takes earlier x and predictions too, each with the shares of its own step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditc.tables import history_columns, memory_of

__all__ = ["MIXES", "sampler_contradictions"]

Column = NDArray[Any]  # (steps,)

ROUNDING = 1e-6
ROUNDING_READ_OFF = 3e-4  # of a sampler that was read off: tables in float32, coefficients by numerical integration


class Mix(NamedTuple):
    """Shares of the clean sample and of noise, each (steps,): in x, and in what the network predicts."""

    signal: Column
    noise: Column
    predicted_signal: Column
    predicted_noise: Column


def _of_noise(x0_x: Column, x0_out: Column) -> Mix:
    return Mix(1 / x0_x, -x0_out / x0_x, np.zeros_like(x0_x), np.ones_like(x0_x))


def _of_v(x0_x: Column, x0_out: Column) -> Mix:
    return Mix(x0_x, -x0_out, x0_out, x0_x)


def _of_flow(x0_x: Column, x0_out: Column) -> Mix:
    return Mix(x0_x + x0_out, -x0_out, -np.ones_like(x0_x), np.ones_like(x0_x))


MIXES: Mapping[str, Callable[[Column, Column], Mix]] = {"epsilon": _of_noise, "v": _of_v, "flow": _of_flow}


def _earlier(share: Column, back: int) -> Column:
    """Return the share of so many steps ago, 0 where there was none."""
    return np.concatenate([np.zeros(min(back, len(share))), share[:-back]])


def sampler_contradictions(columns: Mapping[str, Column], prediction: str) -> Iterator[str]:
    """A sentence for each step whose columns don't fit; none for predictions that say nothing of signal and noise."""
    if prediction not in MIXES:
        return
    past_columns = history_columns(memory_of(columns))
    with np.errstate(all="ignore"):
        mix = MIXES[prediction](columns["x0_x"], columns["x0_out"])
        # coefficients that cancel carry the rounding of a scheduler's tables, relative to their size
        weights = ("prev_x", "prev_out", *(name for pair in past_columns for name in pair))
        size = np.max([np.ones(len(mix.signal)), *(abs(columns[name]) for name in weights)], axis=0)
        read_off = not columns["prev_x0"].any()  # then its own step is all in prev_x and prev_out
        rounding = (ROUNDING_READ_OFF if read_off else ROUNDING) * size
        left = columns["prev_x0"] + columns["prev_x"] * mix.signal + columns["prev_out"] * mix.predicted_signal
        noise = columns["prev_x"] * mix.noise + columns["prev_out"] * mix.predicted_noise
        for back, (of_x, of_out) in enumerate(past_columns, 1):
            past = Mix(*(_earlier(share, back) for share in mix))
            left = left + columns[of_x] * past.signal + columns[of_out] * past.predicted_signal
            noise = noise + columns[of_x] * past.noise + columns[of_out] * past.predicted_noise
        flow = prediction == "flow"
        rest = (1 - left) ** 2 if flow else 1 - left**2
        spread, fresh = noise**2 + columns["sigma"] ** 2, columns["sigma"] > 0
        # what is drawn afresh may be more than what is missing: the larger of DDPM's fixed variances
        more_is_fine = fresh & (not read_off)
        fits = np.isclose(spread, rest, atol=rounding) | (more_is_fine & (spread > rest))
        total = mix.signal + mix.noise if flow else mix.signal**2 + mix.noise**2
        whole = np.isclose(total, 1, atol=ROUNDING) & (mix.signal >= 0)
        landed = np.append(np.isclose(left[:-1], mix.signal[1:], atol=rounding[:-1]), 0 < left[-1] <= 1 + rounding[-1])
    for wrong, contradiction in (
        (~whole, "'x0_x' and 'x0_out' are of no mix of sample and noise"),
        (~landed, "what it leaves of the clean sample is not what the next step starts from"),
        (~fits, "what it leaves of the noise, with what it adds, is not the rest"),
    ):
        for step in np.flatnonzero(wrong):
            yield f"the sampler's columns of step {step} don't fit: {contradiction}"
