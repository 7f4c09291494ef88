"""The result of `ditc bisect`: groups of layers by the error they cause."""

from __future__ import annotations

from ditc.spec import Record

__all__ = ["Bisection", "GroupError", "StepError"]


class StepError(Record):
    """Relative error of the predictions at one step of the trajectory; `t` is its timestep."""

    step: int
    t: float
    error: float


class GroupError(Record):
    """The measured errors of one group of layers.

    `layers` are torch module paths. `error` is over all points: with mode "only" the error that the group causes,
    with "without" the error that is left when it is not quantized. `worst` is the step where it causes most. `share`
    is its part of the sum of squares that the groups account for; below 0 where leaving a group out makes it worse.
    """

    layers: tuple[str, ...]
    branches: tuple[str, ...]
    error: float
    share: float
    worst: StepError
    steps: tuple[StepError, ...]


class Bisection(Record):
    """Groups by the error they cause, worst first.

    `together` is the error with everything quantized, `together_steps` that of each step. `squares_ratio` is the sum
    of the squares that the groups account for over the square of `together`: 1 where errors are independent.
    """

    model: str
    backend: str
    by: str
    mode: str
    points: int
    together: float
    together_steps: tuple[StepError, ...]
    squares_ratio: float
    groups: tuple[GroupError, ...]
