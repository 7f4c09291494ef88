"""A stress variant of a DiT: the same function with outlier channels in front of its linear layers.

Activations of large diffusion transformers have a few channels that are many times larger than the rest, at some steps
more than at others (PTQ4DiT, arXiv 2405.16005). The reference model has none, so INT8 is easy on it. Here some
channels after LayerNorm and modulation are multiplied and the columns of the next weight that read them divided.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ditc.exporter.dit import DiT, DiTBranch
from ditc.exporter.models import builtin_digits

__all__ = ["Stress", "digits", "stressed"]

TIMESTEPS = 50  # spread over the process, to see which channels move


@dataclass(frozen=True)
class Stress:
    """`share` of the channels are multiplied by `least` to `largest`, spread evenly in the logarithm."""

    share: float = 0.04
    least: float = 10.0
    largest: float = 40.0
    seed: int = 0


def digits() -> DiT:
    """The built-in reference model under stress: `ditc compile ditc.exporter.stress:digits`."""
    return stressed(builtin_digits())


@torch.no_grad()
def stressed(model: DiT, stress: Stress | None = None) -> DiT:
    """A copy that computes the same, to rounding, through larger and unequal activations.

    Of the channels that read one modulation, those are taken that move most with t, half of them largest early in the
    trajectory and half late. So no one step shows every outlier.
    """
    stress = stress or Stress()
    variant = copy.deepcopy(model)
    variant.name = f"{model.name}-stressed"
    rng = np.random.default_rng(stress.seed)
    sizes = _modulation_sizes(variant)
    for branch in variant.branches:
        factors = _factors(sizes[:, branch.first_row : branch.first_row + 2], stress, rng)
        _scale_modulation(variant.blocks[branch.first_row // 6].adaLN_modulation[1], branch.first_row % 6, factors)
        _reader(branch).weight /= factors
    return variant.eval()


def _modulation_sizes(model: DiT) -> Tensor:
    """Root mean square of every modulation row over the classes, (timesteps, rows, dim), noise first."""
    t = torch.linspace(model.diffusion.train_steps - 1, 0, TIMESTEPS)
    labels = torch.arange(model.config.num_classes)
    return model.condition(t, labels)["modulation"].square().mean(dim=1).sqrt()


def _factors(rows: Tensor, stress: Stress, rng: np.random.Generator) -> Tensor:
    """(dim,) from the shift and scale rows (timesteps, 2, dim): x = n * scale + shift, with n of unit size."""
    size = rows.square().sum(dim=1).sqrt()  # (timesteps, dim)
    half = len(size) // 2
    trend = (size[:half].mean(dim=0) / size[half:].mean(dim=0)).log()  # above 0: larger early, where the noise is
    count = max(2, round(stress.share * len(trend)))
    order = torch.argsort(trend)
    outliers = torch.cat([order[: count // 2], order[len(order) - (count - count // 2) :]])
    spread = np.exp(rng.permutation(np.linspace(np.log(stress.least), np.log(stress.largest), count)))
    factors = torch.ones(len(trend))
    factors[outliers] = torch.from_numpy(spread).float()
    return factors


def _scale_modulation(layer: nn.Linear, row: int, factors: Tensor) -> None:
    """Multiply shift and 1 + scale, rows `row` and `row` + 1 of a block's six; the layer makes scale alone."""
    dim = len(factors)
    shift, scale = slice(row * dim, (row + 1) * dim), slice((row + 1) * dim, (row + 2) * dim)
    for part in (shift, scale):
        layer.weight[part] *= factors[:, None]
        layer.bias[part] *= factors
    layer.bias[scale] += factors - 1


def _reader(branch: DiTBranch) -> nn.Linear:
    """The linear layer that reads a branch's modulated input."""
    layer = branch.layer.qkv if branch.name.endswith(".attn") else branch.layer.fc1
    assert isinstance(layer, nn.Linear)
    return layer
