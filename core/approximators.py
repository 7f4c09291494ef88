"""The ways to fill a reuse: one table of numbers, with which a step combines sums that earlier steps made for it.

    h = embed(x) + sum_j w[t, j] * S_j + shift[t]        S_j = sum_l gate_l(t) * out_l

S_j is made ahead by the j-th last step that computed, for this very step and with its gates (docs/adr/0013). A way is a
row of APPROXIMATORS and all of it: what to choose from, programs, segments, their checks and tables follow from it.

It loads no NumPy, since its names are those of a command line. A way that is fitted says how its numbers follow from
moments; the compiler gathers those (docs/adr/0029).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from ditc.hermite import hermite_weights

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["APPROXIMATORS", "Approximator", "canonical"]

RIDGE = 0.1  # of Spectrum, arXiv 2603.01623

# (place of a step, those of the steps that made its sums, the latest first) -> a weight for each of them
Weights = Callable[[float, Sequence[float]], list[float]]
# moments per channel of the sums that a step reads, the latest first, and last of the exact one: means (sums + 1,
# channels) and covariances (sums + 1, sums + 1, channels) -> a weight (channels,) for each sum, and perhaps a shift
Fit = Callable[["NDArray[np.float64]", "NDArray[np.float64]"], "list[NDArray[np.float64]]"]


@dataclass(frozen=True)
class Approximator:
    """A way to fill a reuse, by a combination of the sums of the last `looks_back` steps that computed.

    Early steps have fewer of them. Where it has `weights` these are known from the schedule alone, and a `fit` takes
    them from moments of what was seen; one with neither holds the last sum. With `shift` it adds a number as well. Seen
    are the sums of the compiled program, whose earlier steps carry the numbers fitted so far; those of FP's own
    trajectory where a fit is in an `open_loop`. `along` is where `weights` have a step's place: at its timestep, or at
    its number. Where it is `learned`, they are what least squares is drawn to (compiler/learning.py): on FP's
    trajectories, or on those that it makes itself.
    """

    looks_back: int = 1
    shift: bool = False
    weights: Weights | None = None
    fit: Fit | None = None
    open_loop: bool = False
    along: Literal["t", "index"] = "t"
    learned: Literal["open", "closed"] | None = None

    def __post_init__(self) -> None:
        assert self.looks_back > 0
        assert self.weights is None or (self.fit is None and not self.shift)
        assert self.learned is None or self.weights is not None
        assert self.fit is not None or not self.open_loop

    @property
    def rows(self) -> int:
        """The count of numbers per channel that a step takes: a weight for each sum, a shift; 0 where it holds."""
        return 0 if self.weights is None and self.fit is None else self.looks_back + self.shift


def _affine(means: Any, spreads: Any) -> list[Any]:
    """The least squares line, DEC of CacheQuant: its slope shrinks where the error is independent of what was seen."""
    slope = spreads[0, 1] / spreads[0, 0]
    return [slope, means[1] - slope * means[0]]


def _variance(means: Any, spreads: Any) -> list[Any]:
    """The exact spread about the mean that was seen: variance compensation, of the residual."""
    import numpy as np

    slope = np.sqrt(np.maximum(spreads[1, 1], 0) / spreads[0, 0])
    return [slope, (1 - slope) * means[0]]


def _polynomial(t: float, times: Sequence[float]) -> list[float]:
    """The polynomial through the sums of steps at `times`, read at `t`, for distances of any kind (Lagrange's form).

    With two of them that is S + w (S - S_before), and w = (t_near - t) / (t_before - t_near).
    """
    others = [
        prod((t - other) / (own - other) for at, other in enumerate(times) if at != place)
        for place, own in enumerate(times)
        if place
    ]
    return [1 - sum(others), *others]


def _line(t: float, times: Sequence[float]) -> list[float]:
    """The line through the last two sums, however many there are: those before them weigh nothing."""
    return _polynomial(t, times[:2])


def _chebyshev(t: float, times: Sequence[float]) -> list[float]:
    """A parabola nearest to the sums, read at `t`: a ridge on its Chebyshev coefficients keeps their noise down.

    Spectrum's forecast (arXiv 2603.01623) over a window: the earliest sum lies at -1 and `t` at 1, where all of its
    polynomials are 1. The constant bears no ridge, so that what does not move is forecast exactly.
    """
    import numpy as np

    span = (t - times[-1]) or 1.0  # some samplers visit a timestep twice
    places = [1 - 2 * (t - own) / span for own in times]
    basis = np.polynomial.chebyshev.chebvander(places, min(2, len(times) - 1))  # (sums, coefficients)
    ridge = RIDGE * np.diag([0.0, *(1.0 for _ in basis[0, 1:])])
    others = (basis @ np.linalg.solve(basis.T @ basis + ridge, np.ones(basis.shape[1])))[1:].tolist()
    return [1 - sum(others), *others]


APPROXIMATORS: dict[str, Approximator] = {
    "hold": Approximator(),  # FORA, arXiv 2407.01425
    "affine": Approximator(shift=True, fit=_affine),
    "affine:open": Approximator(shift=True, fit=_affine, open_loop=True),  # as in arXiv 2503.01323
    "variance": Approximator(shift=True, fit=_variance),
    "taylor": Approximator(looks_back=2, weights=_polynomial),  # TaylorSeer, arXiv 2503.06923
    "taylor:2": Approximator(looks_back=3, weights=_polynomial),
    "taylor:3": Approximator(looks_back=4, weights=_polynomial),
    "chebyshev": Approximator(looks_back=4, weights=_chebyshev),
    "hermite": Approximator(looks_back=3, weights=hermite_weights, along="index"),  # HiCache, arXiv 2508.16984
    "learned": Approximator(looks_back=3, weights=_line, learned="open"),  # after L2P, arXiv 2604.26365
    "learned:closed": Approximator(looks_back=3, weights=_line, learned="closed"),
}
SPELLINGS = {"taylor:1": "taylor", "affine:closed": "affine", "learned:open": "learned"}


def canonical(name: Any) -> Any:
    """Return the name of a row that may be spelled in another way; what is none comes back as it is."""
    return SPELLINGS.get(name, name) if isinstance(name, str) else name
