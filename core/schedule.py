"""The cache schedule, branches that compute at each step, and the policies that make one.

A policy is a pure function of (model, steps, its own argument); it decides and does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, StrictBool, ValidationError

from ditc.approximators import canonical
from ditc.choices import Reuse
from ditc.errors import InputError, unknown_name
from ditc.spec import ModelSpec, Record

__all__ = ["POLICIES", "CacheSchedule", "schedule_for"]


class CacheSchedule(Record):
    """A boolean matrix [steps][branches], True where the branch computes, False where its cached output is reused.

    `reuse` says what a reuse returns, a row of APPROXIMATORS: "hold" is the branch output (before the gate) of the
    last step that computed; docs/approximators.md has the others.
    """

    compute: tuple[tuple[StrictBool, ...], ...]
    reuse: Annotated[Reuse, BeforeValidator(canonical)] = Field(default="hold")

    @property
    def steps(self) -> int:
        return len(self.compute)

    @property
    def computed_fraction(self) -> float:
        """Share of branch evaluations that compute."""
        cells = [cell for row in self.compute for cell in row]
        return sum(cells) / len(cells)

    def checked(self, spec: ModelSpec) -> CacheSchedule:
        """Self, or InputError where it can't run on this model."""
        if self.steps < 2:
            raise InputError(f"a trajectory needs at least 2 steps, found {self.steps}; set --steps 2 or more")
        for index, row in enumerate(self.compute):
            if len(row) != len(spec.branches):
                raise InputError(
                    f"schedule row {index} has {len(row)} entries; {spec.name} has {len(spec.branches)} branches"
                )
        if not all(self.compute[0]):
            missing = spec.branches[self.compute[0].index(False)]
            raise InputError(
                f"step 0 has nothing to reuse, yet the schedule skips {missing} there; compute all of row 0"
            )
        return self


Policy = Callable[[ModelSpec, int, str | None], CacheSchedule]


def no_reuse(spec: ModelSpec, steps: int, argument: str | None) -> CacheSchedule:
    """Every branch computes at every step."""
    if argument is not None:
        raise InputError(f"policy none takes no argument, found {argument!r}; write --policy none")
    return CacheSchedule(compute=((True,) * len(spec.branches),) * steps)


def fora(spec: ModelSpec, steps: int, argument: str | None) -> CacheSchedule:
    """Recompute everything at every N-th step, reuse everything in between (FORA, arXiv 2407.01425)."""
    if argument is None or not argument.isdecimal() or int(argument) < 1:
        raise InputError(
            f"policy fora needs its interval N >= 1, found {argument!r}; write for example --policy fora:3"
        )
    interval = int(argument)
    return CacheSchedule(compute=tuple((step % interval == 0,) * len(spec.branches) for step in range(steps)))


def window(spec: ModelSpec, steps: int, argument: str | None) -> CacheSchedule:
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


POLICIES: dict[str, Policy] = {"none": no_reuse, "fora": fora, "window": window}


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


def schedule_for(policy: str, spec: ModelSpec, steps: int) -> CacheSchedule:
    """The schedule that a policy (`none`, `fora:3`, or the path of a .json file) makes for a model."""
    if policy.endswith(".json"):
        return schedule_from_json(Path(policy), steps).checked(spec)
    name, colon, argument = policy.partition(":")
    if name not in POLICIES:
        raise unknown_name("policy", policy, [*POLICIES, "FILE.json"])
    return POLICIES[name](spec, steps, argument if colon else None).checked(spec)
