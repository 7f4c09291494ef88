"""The cache schedule, branches that compute at each step, and what a reuse returns; `policies.py` makes schedules."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, StrictBool

from ditc.approximators import canonical
from ditc.choices import Reuse
from ditc.errors import InputError
from ditc.spec import ModelSpec, Record

__all__ = ["CacheSchedule"]


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
        return sum(cells) / len(cells) if cells else 1.0

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
