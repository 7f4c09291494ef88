"""The weights of the reuse `hermite`: HiCache's forecast (arXiv 2508.16984), in contracted Hermite polynomials.

    S(k) = sum_i S[0..i] * P_i(k)        P_i(x) = SIGMA^i H_i(SIGMA x), H_i the physicists' polynomials

k counts steps since the last one that computed, and S[0..i] are divided differences of the sums there. Where steps that
compute are equally far apart these are HiCache's differences over i!; elsewhere it divides all of them by the last
distance, and no longer has derivatives.

It loads no NumPy, as `ditc.approximators` does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

__all__ = ["SIGMA", "hermite_weights"]

SIGMA = 0.5  # HiCache's contraction factor


def hermite_weights(step: float, steps: Sequence[float]) -> list[float]:
    """Return a weight for each of the sums that `steps` made, numbers of steps, the latest first, for one at `step`.

    Of a line it goes 2 SIGMA^2 of the way, half of it, whatever the order. Constants are all that it forecasts exactly.
    """
    values = contracted(len(steps) - 1, step - steps[0])
    others = [
        sum(
            values[degree] / prod(own - other for at, other in enumerate(steps[: degree + 1]) if at != place)
            for degree in range(place, len(steps))
        )
        for place, own in enumerate(steps)
        if place
    ]
    return [1 - sum(others), *others]


def contracted(degree: int, x: float) -> list[float]:
    """Return P_0(x) to P_degree(x), by the recurrence of Hermite's polynomials."""
    share = 2 * SIGMA**2
    values = [1.0, share * x]
    for n in range(1, degree):
        values.append(share * (x * values[n] - n * values[n - 1]))
    return values[: degree + 1]
