"""A denoising run around any network, in NumPy: guidance and the sampler's update, shared by all that ditc is held
against, so that they differ in the network alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import Bundle
from ditc.guidance import Guidance
from ditc.runtime.executor import NoiseSource, Samples
from ditc.runtime.samplers import Pairs, needs_noise, no_pairs, update
from ditc.spec import ModelSpec
from ditc.tables import sampler_columns

__all__ = ["Forward", "GuidedRun"]

Forward = Callable[[int, Samples], Samples]  # (step, (rows, channels, h, w)) -> (rows, out_channels, h, w), float32


@dataclass(frozen=True)
class GuidedRun:
    """A run but for its network. `columns` are the sampler's (`runtime.samplers.sampler_table`)."""

    spec: ModelSpec
    columns: Mapping[str, NDArray[np.float64]]
    guidance: Guidance

    @staticmethod
    def of(bundle: Bundle) -> GuidedRun:
        """The run that a bundle was compiled for."""
        spec, weight = bundle.manifest.model, bundle.manifest.guidance
        return GuidedRun(spec, sampler_columns(bundle.tables()), Guidance.of(spec, weight))

    @property
    def steps(self) -> int:
        return len(self.columns["t"])

    def step(
        self, forward: Forward, index: int, x: Samples, fresh_noise: NoiseSource, pairs: Pairs | None = None
    ) -> Samples:
        """Return the samples after step `index`; `pairs`, which the sampler looks back at, take this step's in."""
        row = {name: float(values[index]) for name, values in self.columns.items()}
        prediction, raw_variance = self.guidance.combine(forward(index, self.guidance.rows(x)), len(x))
        z = fresh_noise(index) if needs_noise(row) else None
        after = update(row, x, prediction, raw_variance, z, pairs or ())
        if pairs is not None:
            pairs.appendleft((x, prediction))
        return after

    def last(self, forward: Forward, noise: Samples, fresh_noise: NoiseSource) -> Samples:
        """The finished samples; `noise` is x_T, (n, channels, *space)."""
        x, pairs = noise, no_pairs(self.columns)
        for index in range(self.steps):
            x = self.step(forward, index, x, fresh_noise, pairs)
        return x
