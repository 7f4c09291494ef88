"""Groups of steps, one that computes and those behind it that reuse what it left: the cheapest by dynamic programming.

    D(b, e) = sum of change[t][t - b] over b < t < e        of a group of steps b to e - 1, DPS (arXiv 2503.01323)
    D(b, e) + (e - b) noise[b]                              with the noise that INT8 leaves in what step b computes

change[t][k] is how far step t lies from step t - k. Step b passes its noise on to all of its group, so by the triangle
inequality the second cost bounds what they err by. Noise that is the same at every step changes no schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, ValidationError, model_validator

from ditc.errors import InputError
from ditc.spec import ModelSpec, Record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BranchNoise", "cheapest_starts", "cost_of", "lengths_of", "noise_from_json"]

Changes = Sequence[Sequence[float]]  # [t][k - 1], of steps t and t - k; what has no step t - k is not read
_Starts = tuple[int, "_Starts"] | None  # the last one, and those before it
_Reached = dict[int, tuple[float, _Starts]]  # end of the groups so far -> the least cost, and the starts that have it


def lengths_of(interval: int) -> range:
    """Return the numbers of steps that a group may have, all but the last one: half of `interval` to twice of it."""
    return range(-(-interval // 2), 2 * interval + 1)


def cheapest_starts(interval: int, changes: Changes, noise: Sequence[float] | None = None) -> list[int]:
    """Return the steps that begin the groups, ceil(steps / interval) of them, as many as `fora` computes.

    The last group has what is left, 1 to 2 `interval` steps: so `fora`'s own groups are among those compared.
    `changes` look back at 2 `interval` - 1 steps.
    """
    steps, lengths = len(changes), lengths_of(interval)
    costs = [_costs_from(start, changes, noise, lengths[-1]) for start in range(steps)]
    reached: _Reached = {0: (0.0, None)}
    for _ in range(-(-steps // interval) - 1):
        reached = _one_group_on(reached, costs, lengths)
    last = min(
        (start for start in reached if steps - start <= lengths[-1]),
        key=lambda start: reached[start][0] + costs[start][-1],  # of all that is left
    )
    starts, (_, earlier) = [last], reached[last]
    while earlier is not None:
        start, earlier = earlier
        starts.append(start)
    return starts[::-1]


def _one_group_on(reached: _Reached, costs: Sequence[Sequence[float]], lengths: range) -> _Reached:
    """Return where one group more may end, in front of the last step at the latest."""
    further: _Reached = {}
    for start, (before, earlier) in reached.items():
        for length in lengths:
            end = start + length
            if end >= len(costs):
                break
            cost = before + costs[start][length - 1]
            if end not in further or cost < further[end][0]:
                further[end] = cost, (start, earlier)
    return further


def cost_of(starts: Sequence[int], changes: Changes, noise: Sequence[float] | None = None) -> float:
    """Return the cost of the groups that begin at `starts`, the first of which is 0."""
    ends = pairwise([*starts, len(changes)])
    return sum(_costs_from(start, changes, noise, end - start)[end - start - 1] for start, end in ends)


def _costs_from(start: int, changes: Changes, noise: Sequence[float] | None, longest: int) -> list[float]:
    """Return the costs of groups of 1, 2, ... steps from `start` on."""
    own = 0.0 if noise is None else noise[start]
    reused = (changes[step][step - start - 1] + own for step in range(start + 1, min(start + longest, len(changes))))
    return list(accumulate(reused, initial=own))


class BranchNoise(Record):
    """The part that is read of `ditc evaluate --veto --json`: |q - y| / |y| of branches at each step, None of zeros."""

    model_config = ConfigDict(extra="ignore")

    branches: tuple[str, ...]
    noise: tuple[tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)] | None, ...], ...]

    @model_validator(mode="after")
    def _a_share_of_each(self) -> BranchNoise:
        if any(len(row) != len(self.branches) for row in self.noise):
            raise ValueError(f"a step has not {len(self.branches)} shares, one of each branch")
        return self


class _Evaluation(Record):
    model_config = ConfigDict(extra="ignore")

    veto: BranchNoise


def noise_from_json(path: Path, spec: ModelSpec, steps: int) -> NDArray[np.float64]:
    """Return a file's noise of every branch at every step, (steps, branches): shares of the branch's own size.

    Raises InputError for a file that holds none, or that of another model or trajectory.
    """
    try:
        veto = _Evaluation.model_validate_json(path.read_bytes()).veto
    except OSError as e:
        raise InputError(f"can't read the noise {path}: {e.strerror}") from e
    except ValidationError as e:
        raise InputError(f"{path} has no veto ({_first(e)}); write it with: ditc evaluate B --veto 8 --json") from e
    if veto.branches != spec.branches or len(veto.noise) != steps:
        raise InputError(
            f"{path} is of {len(veto.noise)} steps and {len(veto.branches)} branches, and {spec.name} takes {steps} "
            f"steps and has {len(spec.branches)}; measure a bundle of this model at {steps} steps"
        )
    import numpy as np

    return np.array([[share or 0.0 for share in row] for row in veto.noise])


def _first(error: ValidationError) -> str:
    first: dict[str, Any] = dict(error.errors()[0])
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
