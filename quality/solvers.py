"""The solvers of a search: samplers with a spacing of timesteps, those that a model takes, and the numbers of steps.

The first one is the base's own. All are held to the same images, those of the base in floating point
(`quality/anchor.py`), so that one with fewer steps is not judged by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from ditc.compiler.options import INTEGERS, CompileOptions
from ditc.compiler.planning import trajectory_table
from ditc.errors import InputError
from ditc.quality.options import TuneOptions
from ditc.quality.trials import Changes, settings_text
from ditc.settings import options_of
from ditc.spec import FORMULAS, ModelSpec
from ditc.tables import Tables

__all__ = ["SOLVER_SETTINGS", "Solver", "Solvers", "falling_counts", "in_floats", "solvers_of"]

SAMPLERS = ("dpm++2m", "unipc")
SPACINGS = ("leading", "trailing")
SHRINKING = 0.75  # each number of steps over the one before: all of them together cost four runs of the first
FEWEST = 5  # steps that are tried without being asked for

# settings of a compile that are of formulas alone, and of samplers that are read off alone
OF_FORMULAS, OF_READ_OFF = ("variance", "eta", "clip"), ("sigmas", "shift")
SOLVER_SETTINGS = ("sampler", "spacing", "steps", *OF_FORMULAS, *OF_READ_OFF)
# settings that a compile without integers refuses, as it has them: those that are of integers, at their defaults
WITHOUT_INTEGERS: Mapping[str, str | None] = {
    "precision": "fp32",
    **{name: field.default for name, field, option in options_of(CompileOptions) if option.group == INTEGERS},
}


@dataclass(frozen=True)
class Solver:
    """A sampler with a spacing: `settings` are those that differ from the base's, none for its own."""

    settings: tuple[tuple[str, str | None], ...] = ()

    @property
    def changes(self) -> dict[str, str | None]:
        """The settings by name."""
        return dict(self.settings)

    @property
    def name(self) -> str:
        """The solver as messages name it."""
        return settings_text(self.changes) or "the base's own"

    def at(self, steps: int, base: CompileOptions) -> Changes:
        """Return the changes of so many steps; none where that is the base itself."""
        return {**self.changes, **({} if steps == base.steps else {"steps": steps})}


@dataclass(frozen=True)
class Solvers:
    """The solvers of a search, the base's own first.

    `counts` are the numbers of steps that each is tried at, falling; with `between` others among them may be tried too.
    `refusal` says why a solver can't be taken at so many steps, None where it can.
    """

    every: tuple[Solver, ...]
    counts: tuple[int, ...]
    between: bool
    refusal: Callable[[Solver, int], str | None]

    def takes(self, solver: Solver, steps: int) -> bool:
        """Can a solver be taken at so many steps?"""
        return self.refusal(solver, steps) is None

    @property
    def falling(self) -> Iterator[int]:
        """All numbers of steps that may be tried, the largest first."""
        return iter(range(self.counts[0], self.counts[-1] - 1, -1) if self.between else self.counts)


def solvers_of(spec: ModelSpec, base: CompileOptions, options: TuneOptions) -> tuple[Solvers | None, tuple[str, ...]]:
    """Return the solvers that a model takes, and a line for those that are left out; None for the base's steps alone.

    Raises InputError where a sampler, a spacing or a number of steps was asked for that the model does not take.
    """
    table_of = _table_of(spec, base)

    def refusal(solver: Solver, steps: int) -> str | None:
        table = table_of(solver, steps)
        return table if isinstance(table, str) else None

    if (reason := refusal(Solver(), base.steps)) is not None:
        raise InputError(reason)
    wanted = options.step_counts
    counts = falling_counts(base.steps) if wanted is None else tuple(sorted({base.steps, *wanted}, reverse=True))
    accepted: list[Solver] = []
    reasons: dict[Solver, str] = {}
    for solver in _asked_for(base, options):
        # few steps first: reading a scheduler off takes the longer the more there are
        steps = next((count for count in reversed(counts) if refusal(solver, count) is None), None)
        if steps is None:
            reasons[solver] = refusal(solver, counts[-1]) or ""
        elif not any(_same(table_of(solver, steps), table_of(other, steps)) for other in accepted):
            accepted.append(solver)
    _check_names(options, accepted, reasons)
    for steps in wanted or ():
        if all(refusal(solver, steps) for solver in accepted):
            raise InputError(f"--step-counts {steps} can't be taken: {refusal(accepted[0], steps)}")
    if len(accepted) == len(counts) == 1:
        return None, _left_out(reasons)
    return Solvers(tuple(accepted), counts, wanted is None, refusal), _left_out(reasons)


def _table_of(spec: ModelSpec, base: CompileOptions) -> Callable[[Solver, int], Tables | str]:
    """Return a function that makes the columns of a solver at so many steps, or says why there are none."""

    @cache
    def table_of(solver: Solver, steps: int) -> Tables | str:
        try:
            changed = base.model_copy(update={**solver.changes, "steps": steps})
            return trajectory_table(spec.diffusion, changed.sampler_spec(spec.sampler), steps)
        except InputError as e:
            return str(e)

    return table_of


def falling_counts(steps: int) -> tuple[int, ...]:
    """Return the numbers of steps that are tried without being asked for, from those of the base down."""
    counts = [steps]
    while (fewer := int(counts[-1] * SHRINKING)) >= FEWEST:
        counts.append(fewer)
    return tuple(counts)


def in_floats(base: CompileOptions) -> Changes:
    """Return the changes that make a base run in floating point, without a cache."""
    unlike = {} if base.bits is None else WITHOUT_INTEGERS
    changed = {name: value for name, value in unlike.items() if getattr(base, name) != value}
    return {"policy": "none", "vc": "none", **changed}


def _asked_for(base: CompileOptions, options: TuneOptions) -> Iterator[Solver]:
    """Yield every sampler with every spacing, the base's own first."""
    samplers = SAMPLERS if options.samplers is None else options.samplers
    spacings = SPACINGS if options.spacings is None else options.spacings
    for sampler, spacing in product((None, *samplers), (None, *spacings)):
        changes: dict[str, str | None] = {}
        if sampler is not None:
            others = OF_READ_OFF if sampler in FORMULAS else OF_FORMULAS
            changes = {"sampler": sampler, **{name: None for name in others if getattr(base, name) is not None}}
        if spacing is not None:
            changes["spacing"] = spacing
        yield Solver(tuple(changes.items()))


def _same(a: Tables | str, b: Tables | str) -> bool:
    """Do two solvers do the same?"""
    if isinstance(a, str) or isinstance(b, str):
        return False
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def _check_names(options: TuneOptions, accepted: list[Solver], reasons: Mapping[Solver, str]) -> None:
    """Raise InputError for a name that was asked for and is in no solver that can be taken."""
    asked = {"sampler": options.samplers or (), "spacing": options.spacings or ()}
    for setting, names in asked.items():
        for name in names:
            refused = [reason for solver, reason in reasons.items() if solver.changes.get(setting) == name]
            if refused and not any(solver.changes.get(setting) == name for solver in accepted):
                raise InputError(f"--{setting}s {name} can't be tried: {refused[0]}")


def _left_out(reasons: Mapping[Solver, str]) -> tuple[str, ...]:
    if not reasons:
        return ()
    names = "; ".join(solver.name for solver in reasons)
    return (f"not tried, since this model does not take them: {names} ({next(iter(reasons.values()))})",)
