"""Time groups of steps (TQ-DiT, arXiv 2502.04056), the same for what selects points and for what shares scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["TIME_GROUPS", "time_groups_of"]

TIME_GROUPS = 10  # unless another number is asked for


def time_groups_of(steps: NDArray[np.int64], total: int, groups: int) -> NDArray[np.int64]:
    """Return the group of each of some steps, shaped as they are: step i of `total` is in i * groups // total."""
    return steps * groups // total
