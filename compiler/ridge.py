"""Least squares over sums under a ridge towards weights that are known, its strength chosen on other noise.

    min_w |S_0 - sum_j w_j S_j|^2 + strength * size * |w - prior|^2        for each channel by itself

S_0 is exact, S_j are those that a step combines, `size` is their mean square: all from one Gram matrix (L2P,
arXiv 2604.26365, learns such weights for each step by descent).
"""

from __future__ import annotations

from math import inf

import numpy as np
from numpy.typing import NDArray

__all__ = ["STRENGTHS", "chosen_weights", "ridge_weights", "squared_error"]

Numbers = NDArray[np.float64]

# the strongest first, which wins where several do as well; an infinite one leaves the prior
STRENGTHS = (inf, *(10.0**-power for power in range(9)))
LEAST_SIZE = 1e-30  # a channel in which all sums are zero has no weights of its own


def ridge_weights(gram: Numbers, prior: Numbers, strength: float) -> Numbers:
    """Return the weights of the sums, (sums, channels), drawn towards `prior` (sums,).

    `gram` (sums + 1, sums + 1, channels) has the means of products of the sums, in front of them the exact one.
    """
    channels, sums = gram.shape[-1], len(prior)
    weights = np.repeat(np.asarray(prior, np.float64)[:, None], channels, axis=1)
    if strength == inf:
        return weights
    seen = gram[1:, 1:].transpose(2, 0, 1)  # (channels, sums, sums)
    left = gram[1:, 0].T - seen @ weights[:, 0]
    sizes = np.maximum(np.trace(seen, axis1=1, axis2=2) / sums, LEAST_SIZE)
    ridge = strength * sizes[:, None, None] * np.eye(sums)
    return np.asarray(weights + np.linalg.solve(seen + ridge, left[..., None])[..., 0].T)


def squared_error(gram: Numbers, weights: Numbers) -> float:
    """Return the squared error of a forecast over all channels, as a share of the exact sum's square."""
    both = np.concatenate([np.ones_like(weights[:1]), -weights])
    return float(np.einsum("ic,jc,ijc->", both, both, gram) / max(gram[0, 0].sum(), LEAST_SIZE))


def chosen_weights(fitted: Numbers, held_out: Numbers, prior: Numbers) -> tuple[Numbers, float]:
    """Return weights of the Gram matrix `fitted`, and their strength: the one that errs least on `held_out`."""
    tried = ((ridge_weights(fitted, prior, strength), strength) for strength in STRENGTHS)
    return min(tried, key=lambda pair: squared_error(held_out, pair[0]))
