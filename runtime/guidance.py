"""A denoising run around any network, in NumPy: guidance and the sampler's update, shared by all that ditc is held
against, so that they differ in the network alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import Bundle
from ditc.runtime.executor import NoiseSource, Samples
from ditc.runtime.samplers import needs_noise, update
from ditc.spec import ModelSpec

__all__ = ["Forward", "GuidedRun"]

Forward = Callable[[int, Samples], Samples]  # (step, (rows, channels, h, w)) -> (rows, out_channels, h, w), float32


@dataclass(frozen=True)
class GuidedRun:
    """What a run needs beside its network. `table` is the sampler's (`runtime.samplers.sampler_table`)."""

    spec: ModelSpec
    table: Mapping[str, NDArray[np.float64]]
    guidance: float

    @staticmethod
    def of(bundle: Bundle) -> GuidedRun:
        """The run that a bundle was compiled for."""
        tables = bundle.tables()
        columns = {name.removeprefix("sampler."): t for name, t in tables.items() if name.startswith("sampler.")}
        return GuidedRun(bundle.manifest.model, columns, bundle.manifest.guidance)

    @property
    def halves(self) -> int:
        """Network rows per image: 2 with guidance (conditional, unconditional), else 1."""
        return 1 if self.guidance == 1 else 2

    @property
    def steps(self) -> int:
        return len(self.table["t"])

    def rows(self, x: Samples) -> Samples:
        """What the network takes for samples (n, channels, height, width): all of them for each half."""
        return np.concatenate([x] * self.halves)

    def labels(self, labels: list[int]) -> NDArray[np.int64]:
        """The class of every row: the images' own, then the null class for each."""
        null = [] if self.halves == 1 else [self.spec.null_label] * len(labels)
        return np.array([*labels, *null], np.int64)

    def step(self, forward: Forward, index: int, x: Samples, fresh_noise: NoiseSource) -> Samples:
        """The samples after step `index`."""
        row = {name: float(column[index]) for name, column in self.table.items()}
        out, count, channels = forward(index, self.rows(x)), len(x), self.spec.in_channels
        prediction = out[:count, :channels].copy()
        if self.halves == 2:
            guided = slice(0, self.spec.cfg_channels)
            unconditional = out[count:, guided]
            prediction[:, guided] = unconditional + np.float32(self.guidance) * (out[:count, guided] - unconditional)
        raw_variance = out[:count, channels:] if self.spec.diffusion.learned_sigma else None
        return update(row, x, prediction, raw_variance, fresh_noise(index) if needs_noise(row) else None)

    def last(self, forward: Forward, noise: Samples, fresh_noise: NoiseSource) -> Samples:
        """The finished samples; `noise` is x_T, (n, channels, height, width)."""
        x = noise
        for index in range(self.steps):
            x = self.step(forward, index, x, fresh_noise)
        return x
