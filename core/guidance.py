"""Classifier-free guidance: one prediction out of two network rows per image (arXiv 2207.12598).

    eps = eps_u + w (eps_c - eps_u)        on the guided channels; the others are the conditional row's

The rows of a batch are halves: all images conditional, then all of them unconditional. With a weight of 1 the second
half has no effect, so it isn't computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.errors import InputError
from ditc.requests import Request
from ditc.spec import Condition, ModelSpec

__all__ = ["Guidance", "Samples", "halves_of"]

Samples = NDArray[np.float32]  # (n, channels, *space)


def halves_of(weight: float) -> int:
    """Return the network rows of an image: 2 with guidance (conditional, unconditional), else 1."""
    return 1 if weight == 1 else 2


@dataclass(frozen=True)
class Guidance:
    """The rows that a network takes, and their combination into one prediction.

    `channels` are those of a sample, of which the first `guided_channels` are guided; with a `learned_variance` the
    network returns as many behind them. `conditions` are what the network takes of every row, each with the null that
    the unconditional half gets.
    """

    weight: float
    channels: int
    guided_channels: int
    learned_variance: bool
    conditions: tuple[Condition, ...]

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise InputError(f"guidance must be above 0 and finite, found {self.weight:g}; 1 means no guidance")
        if not 0 < self.guided_channels <= self.channels:
            raise InputError(f"guidance of {self.guided_channels} channels, expected 1 to {self.channels}")
        if self.halves == 2 and all(condition.null == "same" for condition in self.conditions):
            raise InputError(f"guidance must be 1 without an unconditional class, found {self.weight:g}; set --cfg 1")

    @staticmethod
    def of(spec: ModelSpec, weight: float) -> Guidance:
        """Return the guidance of a model. Raises InputError where a model without a null class is to be guided."""
        if halves_of(weight) == 2 and not spec.can_be_guided:
            what = "unconditional class" if spec.num_classes else "condition with a null"
            raise InputError(f"{spec.name} has no {what}, so guidance must be 1, found {weight:g}")
        return Guidance(
            weight=weight,
            channels=spec.in_channels,
            guided_channels=spec.cfg_channels,
            learned_variance=spec.diffusion.learned_sigma,
            conditions=spec.network_inputs,
        )

    @property
    def halves(self) -> int:
        """Network rows of an image."""
        return halves_of(self.weight)

    def rows(self, x: Samples) -> Samples:
        """Return what the network takes for samples (n, channels, *space): all of them for each half."""
        return np.concatenate([x] * self.halves)

    def row_conditions(self, request: Request) -> dict[str, NDArray[Any]]:
        """Return what the network takes of every condition: the images' own, then the null of each; (rows, *shape).

        Fresh noise is (steps, rows, *shape), the same for both halves.
        """
        rows = {}
        for condition in self.conditions:
            own, axis = request.rows(condition), int(condition.fresh)
            rows[condition.name] = own
            if self.halves == 2:
                rows[condition.name] = np.concatenate([own, _null(request, condition, own)], axis=axis)
        return rows

    def combine(self, out: Samples, count: int) -> tuple[Samples, Samples | None]:
        """Return (prediction, raw variance or None) of `count` images, each (count, channels, *space).

        `out` is what the network returned, (rows, out_channels, *space); it is left as it is.
        """
        raw_variance = out[:count, self.channels :] if self.learned_variance else None
        prediction = out[:count, : self.channels].copy()
        if self.halves == 2:
            guided = slice(0, self.guided_channels)
            unconditional = out[count:, guided]
            prediction[:, guided] = unconditional + np.float32(self.weight) * (out[:count, guided] - unconditional)
        return prediction, raw_variance

    def pulled_back(self, gradient: Samples) -> Samples:
        """Return the gradient of what the network returned, (rows, out_channels, *space), by that of the prediction.

        It is what the transpose of `combine` makes of (count, channels, *space). A raw variance gets zeros.
        """
        conditional = gradient.copy()
        halves = [conditional]
        if self.halves == 2:
            guided, unconditional = slice(0, self.guided_channels), np.zeros_like(gradient)
            conditional[:, guided] *= np.float32(self.weight)
            unconditional[:, guided] = np.float32(1 - self.weight) * gradient[:, guided]
            halves.append(unconditional)
        rows = np.concatenate(halves)
        return np.concatenate([rows, np.zeros_like(rows)], axis=1) if self.learned_variance else rows


def _null(request: Request, condition: Condition, own: NDArray[Any]) -> NDArray[Any]:
    """Return the unconditional half's rows of a condition, shaped as the images' own."""
    if condition.null_name is not None:
        return request.arrays[condition.null_name]
    return own if condition.null == "same" else np.full_like(own, condition.null)
