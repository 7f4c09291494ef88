"""Classifier-free guidance: one prediction out of two network rows per image (arXiv 2207.12598).

    eps = eps_u + w (eps_c - eps_u)        on the guided channels; the others are the conditional row's

The rows of a batch are halves: all images conditional, then all of them unconditional. With a weight of 1 the second
half has no effect, so it isn't computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditc.errors import InputError
from ditc.spec import ModelSpec

__all__ = ["Guidance", "Labels", "Samples", "halves_of", "row_labels"]

Samples = NDArray[np.float32]  # (n, channels, *space)
Labels = NDArray[np.int64]  # the class of each row or image


def halves_of(weight: float) -> int:
    """Return the network rows of an image: 2 with guidance (conditional, unconditional), else 1."""
    return 1 if weight == 1 else 2


def row_labels(labels: Sequence[int] | Labels, null_label: int | None) -> Labels:
    """Return the class of every row: the images' own, then the null class for each; None is without guidance."""
    own = np.asarray(labels, np.int64)
    return own if null_label is None else np.concatenate([own, np.full_like(own, null_label)])


@dataclass(frozen=True)
class Guidance:
    """The rows that a network takes, and their combination into one prediction.

    `channels` are those of a sample, of which the first `guided_channels` are guided; with a `learned_variance` the
    network returns as many behind them. `null_label` is what the unconditional half is asked for, None without one.
    """

    weight: float
    channels: int
    guided_channels: int
    learned_variance: bool
    null_label: int | None

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise InputError(f"guidance must be above 0 and finite, found {self.weight:g}; 1 means no guidance")
        if not 0 < self.guided_channels <= self.channels:
            raise InputError(f"guidance of {self.guided_channels} channels, expected 1 to {self.channels}")
        if (self.null_label is None) != (self.halves == 1):
            raise InputError(
                f"guidance must be 1 without an unconditional class, and only then, found {self.weight:g}; set --cfg 1"
            )

    @staticmethod
    def of(spec: ModelSpec, weight: float) -> Guidance:
        """Return the guidance of a model. Raises InputError where a model without a null class is to be guided."""
        if halves_of(weight) == 2 and spec.null_label is None:
            raise InputError(f"{spec.name} has no unconditional class, so guidance must be 1, found {weight:g}")
        return Guidance(
            weight=weight,
            channels=spec.in_channels,
            guided_channels=spec.cfg_channels,
            learned_variance=spec.diffusion.learned_sigma,
            null_label=spec.null_label if halves_of(weight) == 2 else None,
        )

    @property
    def halves(self) -> int:
        """Network rows of an image."""
        return halves_of(self.weight)

    def rows(self, x: Samples) -> Samples:
        """Return what the network takes for samples (n, channels, *space): all of them for each half."""
        return np.concatenate([x] * self.halves)

    def labels(self, labels: Sequence[int] | Labels) -> Labels:
        """Return the class of every row for the classes of the images."""
        return row_labels(labels, self.null_label)

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
