"""The policies that make a cache schedule: each is one row of POLICIES, and everything that it takes stands here.

A policy is a pure function of (model, steps, its own argument, statistics); it decides and does nothing else. Most of
them see no statistics. One that does says which, and a stage in front of the plan takes them on a few FP images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from ditc.errors import InputError, unknown_name
from ditc.schedule import CacheSchedule
from ditc.spec import ModelSpec

if TYPE_CHECKING:
    from ditc.step_statistics import StepStatistics

__all__ = ["POLICIES", "Policy", "Watching", "policy_forms", "schedule_for", "watching_of"]


@dataclass(frozen=True)
class Watching:
    """The statistics that a policy asks for, each as the number of steps that it looks back at; 0 asks for none.

    `distances` are those of every branch's output, `sums` the moments of the sums that the branches add up to
    (`step_statistics.py` has both).
    """

    distances: int = 0
    sums: int = 0

    @property
    def window(self) -> int:
        """The largest number of steps that anything looks back at."""
        return max(self.distances, self.sums)

    def within(self, steps: int) -> Watching:
        """Return the part of it that a trajectory of so many steps has."""
        return Watching(*(min(number, steps - 1) for number in (self.distances, self.sums)))


@dataclass(frozen=True)
class Policy:
    """A way to make a schedule.

    `make` is the pure function; `argument` is the form of what stands behind the colon, "" for none, and `about` says
    what it does where the form doesn't. `watches` returns the statistics that `make` needs for an argument; None is a
    policy that needs none. Both raise InputError for an argument that is not of the form.
    """

    make: Callable[[ModelSpec, int, str | None, StepStatistics | None], CacheSchedule]
    argument: str = ""
    about: str = ""
    watches: Callable[[str | None], Watching] | None = None


def no_reuse(
    spec: ModelSpec, steps: int, argument: str | None = None, statistics: StepStatistics | None = None
) -> CacheSchedule:
    """Every branch computes at every step."""
    if argument is not None:
        raise InputError(f"policy none takes no argument, found {argument!r}; write --policy none")
    return CacheSchedule(compute=((True,) * len(spec.branches),) * steps)


def fora(spec: ModelSpec, steps: int, argument: str | None, statistics: StepStatistics | None) -> CacheSchedule:
    """Recompute everything at every N-th step, reuse everything in between (FORA, arXiv 2407.01425)."""
    if argument is None or not argument.isdecimal() or int(argument) < 1:
        raise InputError(
            f"policy fora needs its interval N >= 1, found {argument!r}; write for example --policy fora:3"
        )
    interval = int(argument)
    return CacheSchedule(compute=tuple((step % interval == 0,) * len(spec.branches) for step in range(steps)))


def window(spec: ModelSpec, steps: int, argument: str | None, statistics: StepStatistics | None) -> CacheSchedule:
    """FORA, but the first and the last steps all compute: `N:FIRST:LAST`."""
    numbers = (argument or "").split(":")
    if len(numbers) != 3 or not all(number.isdecimal() for number in numbers) or int(numbers[0]) < 1:
        raise InputError(
            f"policy window needs N:FIRST:LAST, found {argument!r}; write for example --policy window:3:4:2 to compute "
            "the first 4 steps, the last 2, and every third in between"
        )
    interval, first, last = map(int, numbers)
    first = max(first, 1)  # the first step has nothing to reuse
    rows = (step < first or step >= steps - last or (step - first + 1) % interval == 0 for step in range(steps))
    return CacheSchedule(compute=tuple((row,) * len(spec.branches) for row in rows))


MOST_IN_A_ROW = 3  # steps of a branch that reuse, one after the other, under smoothcache; the paper's
NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def smoothcache(spec: ModelSpec, steps: int, argument: str | None, statistics: StepStatistics | None) -> CacheSchedule:
    """Reuse while the relative L1 change since the last computed step stays below ALPHA, at most 3 steps in a row.

    Branches of one kind, the last part of their names, do the same: their changes are averaged (SmoothCache,
    arXiv 2411.10510).
    """
    assert statistics is not None  # its row asks for them
    changes, alpha = statistics.relative_by_kind(), _alpha(argument)
    computes = {kind: _while_below(alpha, change.tolist()) for kind, change in changes.items()}
    return CacheSchedule(compute=tuple(zip(*(computes[kind] for kind in statistics.kinds), strict=True)))


def _changes_to_compare(argument: str | None) -> Watching:
    _alpha(argument)  # what is wrong with it is told before anything is watched
    return Watching(distances=MOST_IN_A_ROW)


def _alpha(argument: str | None) -> float:
    if argument is None or not NUMBER.fullmatch(argument) or float(argument) == math.inf:
        raise InputError(
            f"policy smoothcache needs ALPHA >= 0, the change below which a step reuses, found {argument!r}; write for "
            "example --policy smoothcache:0.1"
        )
    return float(argument)


def _while_below(alpha: float, change: Sequence[Sequence[float]]) -> list[bool]:
    """Return which steps compute; `change` is (steps, window), of each step since the one before, before that, ..."""
    computes, since = [True], 0
    for row in change[1:]:
        since = since + 1 if since < len(row) and row[since] < alpha else 0
        computes.append(since == 0)
    return computes


POLICIES: dict[str, Policy] = {
    "none": Policy(no_reuse),
    "fora": Policy(fora, "N"),
    "window": Policy(window, "N:FIRST:LAST", "fora, but the ends compute"),
    "smoothcache": Policy(
        smoothcache,
        "ALPHA",
        "reuse while outputs change by less",
        watches=_changes_to_compare,
    ),
}


def policy_forms() -> str:
    """Return the policies as they are typed, with what they do where the form doesn't say it."""
    forms = (
        f"{name}{f':{policy.argument}' if policy.argument else ''}{f' ({policy.about})' if policy.about else ''}"
        for name, policy in POLICIES.items()
    )
    return ", ".join(forms)


def schedule_from_json(path: Path, steps: int) -> CacheSchedule:
    """A schedule from a file: {"compute": [[true, ...], ...]}, one row per step, one entry per branch."""
    try:
        schedule = CacheSchedule.model_validate_json(path.read_bytes())
    except OSError as e:
        raise InputError(f"can't read the schedule {path}: {e.strerror}") from e
    except ValidationError as e:
        reason = e.errors()[0]
        raise InputError(
            f'{path} is not a schedule ({reason["msg"]}); expected {{"compute": [[true, ...], ...]}}'
        ) from e
    if schedule.steps != steps:
        raise InputError(
            f"{path} has {schedule.steps} rows, the sampler takes {steps} steps; set --steps {schedule.steps}"
        )
    return schedule


def schedule_for(policy: str, spec: ModelSpec, steps: int, statistics: StepStatistics | None = None) -> CacheSchedule:
    """The schedule that a policy (`none`, `fora:3`, or the path of a .json file) makes for a model.

    Raises InputError for one that needs `statistics` and has none, or those of another trajectory.
    """
    if policy.endswith(".json"):
        return schedule_from_json(Path(policy), steps).checked(spec)
    row, argument = _row_of(policy)
    if row.watches is not None:
        row.watches(argument)  # what is wrong with the argument is told before what is missing
        if statistics is None:
            raise InputError(f"policy {policy} decides by statistics of FP images; compile a model with it")
        statistics.check_fits(spec, steps)
    return row.make(spec, steps, argument, statistics).checked(spec)


def watching_of(policy: str) -> Watching | None:
    """Return the statistics that a policy needs, None where it needs none. Raises InputError for an unknown one."""
    if policy.endswith(".json"):
        return None
    row, argument = _row_of(policy)
    return None if row.watches is None else row.watches(argument)


def _row_of(policy: str) -> tuple[Policy, str | None]:
    name, colon, argument = policy.partition(":")
    if name not in POLICIES:
        raise unknown_name("policy", policy, [*POLICIES, "FILE.json"])
    return POLICIES[name], argument if colon else None
