"""The policies that make a cache schedule: each is one row of POLICIES, and everything that it takes stands here.

A policy is a pure function of (model, steps, its own argument, sources); it decides and does nothing else. Most of them
look at no source. One that looks at statistics says which, and a stage in front of the plan takes them on a few FP
images.
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
from ditc.policy_sources import NO_SOURCES, ReadRouters, Sources
from ditc.routed_policy import l2c, settled_l2c
from ditc.schedule import CacheSchedule
from ditc.spec import ModelSpec
from ditc.step_groups import cheapest_starts, noise_from_json

if TYPE_CHECKING:
    from ditc.step_statistics import StepStatistics

__all__ = [
    "POLICIES",
    "Policy",
    "Watching",
    "check_policy",
    "policy_forms",
    "schedule_for",
    "settled_policy",
    "watching_of",
]


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
    policy that needs none. Both raise InputError for an argument that is not of the form, and `check` for one that
    makes no sense for a model and its steps, before anything is watched. `takes_file` is of an argument that may end in
    the name of a file. `settled` spells out what an argument leaves open.
    """

    make: Callable[[ModelSpec, int, str | None, Sources], CacheSchedule]
    argument: str = ""
    about: str = ""
    watches: Callable[[str | None], Watching] | None = None
    check: Callable[[ModelSpec, int, str | None], None] | None = None
    takes_file: bool = False
    settled: Callable[[str | None], str] | None = None


def no_reuse(spec: ModelSpec, steps: int, argument: str | None = None, sources: Sources = NO_SOURCES) -> CacheSchedule:
    """Every branch computes at every step."""
    if argument is not None:
        raise InputError(f"policy none takes no argument, found {argument!r}; write --policy none")
    return CacheSchedule(compute=((True,) * len(spec.branches),) * steps)


def fora(spec: ModelSpec, steps: int, argument: str | None, sources: Sources) -> CacheSchedule:
    """Recompute everything at every N-th step, reuse everything in between (FORA, arXiv 2407.01425)."""
    if argument is None or not argument.isdecimal() or int(argument) < 1:
        raise InputError(
            f"policy fora needs its interval N >= 1, found {argument!r}; write for example --policy fora:3"
        )
    interval = int(argument)
    return CacheSchedule(compute=tuple((step % interval == 0,) * len(spec.branches) for step in range(steps)))


def window(spec: ModelSpec, steps: int, argument: str | None, sources: Sources) -> CacheSchedule:
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


def smoothcache(spec: ModelSpec, steps: int, argument: str | None, sources: Sources) -> CacheSchedule:
    """Reuse while the relative L1 change since the last computed step stays below ALPHA, at most 3 steps in a row.

    Branches of one kind, the last part of their names, do the same: their changes are averaged (SmoothCache,
    arXiv 2411.10510).
    """
    statistics = sources.statistics
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


def dps(spec: ModelSpec, steps: int, argument: str | None, sources: Sources) -> CacheSchedule:
    """Compute as often as `fora:N`, at the steps from which the others lie nearest (CacheQuant, arXiv 2503.01323).

    Near is the absolute L1 change, a mean over all branches, which do the same. With `N:FILE` a step that computes
    counts its noise too: shares of that file times the size of outputs here, Euclidean ones taken for those of L1.
    """
    statistics = sources.statistics
    assert statistics is not None  # its row asks for them
    interval, file = _interval_and_file(argument)
    noise = None
    if file is not None:
        noise = (noise_from_json(file, spec, steps) * statistics.sizes()).mean(axis=-1).tolist()
    starts = set(cheapest_starts(interval, statistics.absolute_over_branches().tolist(), noise))
    return CacheSchedule(compute=tuple((step in starts,) * len(spec.branches) for step in range(steps)))


def _group_changes(argument: str | None) -> Watching:
    interval, _ = _interval_and_file(argument)
    return Watching(distances=2 * interval - 1)  # from the last step of the longest group to its first


def _check_dps(spec: ModelSpec, steps: int, argument: str | None) -> None:
    interval, file = _interval_and_file(argument)
    if interval >= steps:
        raise InputError(
            f"policy dps:{interval} puts all {steps} steps into one group, so there is nothing to choose; give an N "
            f"below {steps}"
        )
    if file is not None:
        noise_from_json(file, spec, steps)


def _interval_and_file(argument: str | None) -> tuple[int, Path | None]:
    interval, colon, file = (argument or "").partition(":")
    if not re.fullmatch(r"[1-9]\d{0,3}", interval, re.ASCII) or (colon and not file):
        raise InputError(
            f"policy dps needs N or N:FILE, an interval N >= 1 and perhaps measured noise, found {argument!r}; write "
            "for example --policy dps:3"
        )
    return int(interval), Path(file) if colon else None


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
    "dps": Policy(
        dps,
        "N[:FILE]",
        "as many steps as fora, where least changes",
        watches=_group_changes,
        check=_check_dps,
        takes_file=True,
    ),
    "l2c": Policy(
        l2c,
        "FILE[:THETA[:SEGMENTS]]",
        "by trained routers",
        takes_file=True,
        settled=settled_l2c,
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


def schedule_for(
    policy: str,
    spec: ModelSpec,
    steps: int,
    statistics: StepStatistics | None = None,
    read_routers: ReadRouters | None = None,
) -> CacheSchedule:
    """The schedule that a policy (`none`, `fora:3`, or the path of a .json file) makes for a model.

    Raises InputError for one that needs `statistics` and has none, or those of another trajectory; and for one of
    trained routers without what reads their file.
    """
    if _is_file(policy):
        return schedule_from_json(Path(policy), steps).checked(spec)
    row, argument = _row_of(policy)
    if row.watches is not None:
        row.watches(argument)  # what is wrong with the argument is told before what is missing
        check_policy(policy, spec, steps)
        if statistics is None:
            raise InputError(f"policy {policy} decides by statistics of FP images; compile a model with it")
        statistics.check_fits(spec, steps)
    return row.make(spec, steps, argument, Sources(statistics, read_routers)).checked(spec)


def settled_policy(policy: str) -> str:
    """Return a policy as it is typed, with what its argument leaves open spelled out."""
    if _is_file(policy):
        return policy
    row, argument = _row_of(policy)
    return policy if row.settled is None else f"{policy.partition(':')[0]}:{row.settled(argument)}"


def watching_of(policy: str) -> Watching | None:
    """Return the statistics that a policy needs, None where it needs none. Raises InputError for an unknown one."""
    if _is_file(policy):
        return None
    row, argument = _row_of(policy)
    return None if row.watches is None else row.watches(argument)


def check_policy(policy: str, spec: ModelSpec, steps: int) -> None:
    """Raise InputError where a policy makes no sense for a model and its steps, as far as that hangs on no statistics.

    A schedule's file is checked when it is read, by `schedule_for`.
    """
    if not _is_file(policy):
        row, argument = _row_of(policy)
        if row.check is not None:
            row.check(spec, steps, argument)


def _is_file(policy: str) -> bool:
    name, colon, _ = policy.partition(":")
    return policy.endswith(".json") and not (colon and name in POLICIES and POLICIES[name].takes_file)


def _row_of(policy: str) -> tuple[Policy, str | None]:
    name, colon, argument = policy.partition(":")
    if name not in POLICIES:
        raise unknown_name("policy", policy, [*POLICIES, "FILE.json"])
    return POLICIES[name], argument if colon else None
