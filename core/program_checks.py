"""Checks that every whole program passes, so that one that contradicts itself is refused before anything runs.

A check yields a sentence for each contradiction that it finds. Each may take for granted what those in front of it in
CHECKS have found to hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from ditc.approximators import APPROXIMATORS
from ditc.errors import InputError
from ditc.program import (
    AHEAD,
    CONDITION,
    DECODE,
    EXTRAPOLATE,
    FLOAT,
    FULL,
    REUSE,
    Program,
    SegmentPlan,
    Step,
    distance_of,
    is_sum,
    segment_name,
    sum_ports,
)

__all__ = ["check_program", "contradictions", "reads_get_the_newest", "repeated"]

Check = Callable[[Program], Iterator[str]]

LEAST_STEPS = 2  # of a trajectory, as a schedule has
# the segments that compute all branches, and those that compute none
ALL_COMPUTE, NONE_COMPUTES = (FULL, FLOAT), (REUSE, EXTRAPOLATE)


def check_program(program: Program) -> None:
    """Raise InputError, naming the first contradiction, unless a program is whole."""
    for contradiction in contradictions(program):
        raise InputError(f"the program contradicts itself: {contradiction}")


def contradictions(program: Program) -> Iterator[str]:
    """Every contradiction that is found before a check can't go on; the first one is all that is sure."""
    return (text for check in CHECKS for text in check(program))


def repeated(names: Sequence[str]) -> list[str]:
    """The names that occur more than once, each once."""
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def names_are_distinct(program: Program) -> Iterator[str]:
    """Each branch and each segment has a name of its own, and none that stands for a sum."""
    for name in repeated(program.branches):
        yield f"two branches are called {name!r}"
    for name in repeated([plan.name for plan in program.segments]):
        yield f"two segments are called {name!r}"
    for name in dict.fromkeys((*program.branches, *program.wiring.values)):
        if name in _ports_of_sums(program) or is_sum(name):
            yield f"a branch is called {name!r}, as sums made ahead are"
    yield from program.wiring.contradictions()


def calls_frame_the_loop(program: Program) -> Iterator[str]:
    """The conditioning runs once, in front of the loop; behind it at most the decoder."""
    if program.prologue != (CONDITION,):
        yield f"calls before the loop are {list(program.prologue)}, expected ['{CONDITION}']"
    if program.epilogue not in ((), (DECODE,)):
        yield f"calls after the loop are {list(program.epilogue)}, expected ['{DECODE}'] or none"
    for place, step in enumerate(program.steps):
        if step.before:
            yield f"step {place} has calls of its own, {list(step.before)}, expected none"


def steps_count_up(program: Program) -> Iterator[str]:
    """Steps are numbered by their place, and their timesteps fall."""
    if len(program.steps) < LEAST_STEPS:
        yield f"it has {len(program.steps)} steps, expected at least {LEAST_STEPS}"
    for place, step in enumerate(program.steps):
        if step.index != place:
            yield f"step {place} says that it is step {step.index}"
        if not (math.isfinite(step.t) and step.t >= 0):
            yield f"step {place} has t = {step.t:g}, expected a number from 0 on"
    for before, step in pairwise(program.steps):
        if step.t > before.t:
            yield f"t rises from {before.t:g} to {step.t:g} at step {step.index}"


def segments_are_named_by_what_they_compute(program: Program) -> Iterator[str]:
    """A mask has an entry for each branch, and decides the segment's name."""
    for plan in program.segments:
        if len(plan.compute) != len(program.branches):
            yield (
                f"segment {plan.name!r} has {len(plan.compute)} entries of what computes, "
                f"and there are {len(program.branches)} branches"
            )
        elif plan.name not in names_for(plan.compute):
            expected = " or ".join(names_for(plan.compute))
            yield f"segment {plan.name!r} computes what {expected} does"


def names_for(mask: tuple[bool, ...]) -> tuple[str, ...]:
    """The names that a segment with a mask may have."""
    if all(mask):
        return ALL_COMPUTE
    return (segment_name(mask),) if any(mask) else NONE_COMPUTES


def steps_call_the_segments(program: Program) -> Iterator[str]:
    """Every segment that a step calls is there, and each one is called."""
    known, called = {plan.name for plan in program.segments}, {step.segment for step in program.steps}
    for step in program.steps:
        if step.segment not in known:
            yield f"step {step.index} calls segment {step.segment!r}, which is none of: {', '.join(sorted(known))}"
    for name in sorted(known - called):
        yield f"no step calls segment {name!r}"


def segments_take_what_they_skip(program: Program) -> Iterator[str]:
    """A segment reads what it needs of branches that it skips, or sums in place of all; it writes what it computes."""
    for plan in program.segments:
        expected = _reads_of(program, plan)
        if plan.reads not in expected:
            choices = " or ".join(str(list(reads)) for reads in expected)
            yield f"segment {plan.name!r} reads {list(plan.reads)}, expected {choices}"
        yield from _writes_that_fail(program, plan)


def _reads_of(program: Program, plan: SegmentPlan) -> list[tuple[str, ...]]:
    """Return the choices of values that a segment may read."""
    skipped = program.wiring.read_by(plan.compute, plan.writes)
    if plan.name == EXTRAPOLATE:
        return [_ports_of_sums(program)]
    return [skipped, (AHEAD,)] if plan.name == REUSE else [skipped]


def _ports_of_sums(program: Program) -> tuple[str, ...]:
    """Return the ports of the segment that extrapolates; it reads at least two sums."""
    return sum_ports(max(APPROXIMATORS[program.reuse].looks_back, 2))


def _writes_that_fail(program: Program, plan: SegmentPlan) -> Iterator[str]:
    sums = [value for value in plan.writes if is_sum(value)]
    own = program.wiring.computed_by(plan.compute)
    for value in repeated(plan.writes):
        yield f"segment {plan.name!r} writes {value!r} twice"
    for value in plan.writes:
        if value not in own and not (is_sum(value) and plan.name in ALL_COMPUTE):
            yield f"segment {plan.name!r} writes {value!r}, which it does not compute"
    if sums and len(sums) != len(plan.writes):
        yield f"segment {plan.name!r} writes branches and sums, expected one kind: {list(plan.writes)}"
    if plan.ahead != max(map(distance_of, sums), default=0):
        yield f"segment {plan.name!r} looks {plan.ahead} steps ahead, and writes {list(plan.writes)}"


def rows_are_those_of_the_reuse(program: Program) -> Iterator[str]:
    """A segment takes as many numbers per channel as what a reuse returns needs; only sums have any."""
    approximator = APPROXIMATORS[program.reuse]
    if program.reuse != "hold" and not any(AHEAD in plan.reads for plan in program.segments):
        yield f"reuse is {program.reuse!r}, which works on sums, and no segment reads one"
    for plan in program.segments:
        fits = AHEAD in plan.reads and len(plan.reads) == approximator.looks_back
        expected = approximator.rows if fits else 0
        if plan.rows != expected:
            yield f"segment {plan.name!r} takes {plan.rows} rows, and reuse {program.reuse!r} gives it {expected}"


def steps_bind_the_ports_of_their_segment(program: Program) -> Iterator[str]:
    """A step reads and writes what its segment does, a sum for each port of one."""
    for step in program.steps:
        plan = program.segment(step.segment)
        bound = sorted(port for port, _ in program.cache_ports(step))
        ports = sorted(f"cache.{value}" for value in (*plan.reads, *plan.writes))
        if bound != ports:
            yield f"step {step.index} binds {bound}, and segment {plan.name!r} has {ports}"
        if set(step.writes) != set(plan.writes):
            yield f"step {step.index} writes {sorted(step.writes)}, and segment {plan.name!r} {sorted(plan.writes)}"


def slots_are_apart(program: Program) -> Iterator[str]:
    """Slots are numbered from 0 without gaps, and no step has two values in one: engines never write what they read."""
    used = set()
    for step in program.steps:
        slots = [*step.reads.values(), *step.writes.values()]
        if len(set(slots)) != len(slots):
            yield f"step {step.index} has two values in one slot: reads {step.reads}, writes {step.writes}"
        used |= set(slots)
    if used != set(range(len(used))) or len(used) != program.slots:
        yield f"it says {program.slots} slots, and its steps use {sorted(used)}"


def slots_have_one_shape(program: Program) -> Iterator[str]:
    """All values that a slot holds in turn have one shape."""
    shapes, first = program.wiring.shapes, dict[int, str]()
    for step in program.steps:
        for value, slot in step.writes.items():
            other = first.setdefault(slot, value)
            if shapes.get(value) != shapes.get(other):
                yield f"slot {slot} holds {other!r} and {value!r}, which have different shapes"


def reads_get_the_newest(program: Program) -> Iterator[str]:
    """Every read gets what the last step that computed has left: caches live and die with a request."""
    holds: dict[int, tuple[str, int]] = {}  # slot -> (value, the step that wrote it)
    computed: dict[str, int] = {}  # output of a branch -> the last step that computed it
    everything: list[int] = []  # steps that computed all branches
    for step in program.steps:
        plan = program.segment(step.segment)
        for value, slot in step.reads.items():
            maker = step.index - distance_of(value) if is_sum(value) else computed.get(value)
            if holds.get(slot) != (value, maker):
                yield f"step {step.index} reads {value} from slot {slot}, which holds {_described(holds.get(slot))}"
        yield from _sums_of_other_steps(program, step, everything)
        computed |= dict.fromkeys(program.wiring.computed_by(plan.compute), step.index)
        everything += [step.index] if all(plan.compute) else []
        holds |= {slot: (value, step.index) for value, slot in step.writes.items()}


def _described(held: tuple[str, int] | None) -> str:
    return "nothing" if held is None else f"{held[0]} of step {held[1]}"


def _sums_of_other_steps(program: Program, step: Step, computed: Sequence[int]) -> Iterator[str]:
    """A step that reads sums takes those of the last steps that computed, as many as its reuse looks back."""
    makers = sorted(step.index - distance_of(value) for value in step.reads if is_sum(value))
    expected = list(computed[-APPROXIMATORS[program.reuse].looks_back :])
    if makers and makers != expected:
        yield f"step {step.index} reads sums of the steps {makers}, and reuse {program.reuse!r} takes {expected}"


def ends_are_in_float(program: Program) -> Iterator[str]:
    """Where the first and last steps are to compute in floating point, they do, and no others."""
    first, last = program.float_ends
    if min(first, last) < 0 or (first + last and first + last >= len(program.steps)):
        yield f"{first} and {last} steps at its ends are in floating point, of {len(program.steps)}"
    for plan in program.segments:
        if plan.in_float != (plan.name == FLOAT):
            yield f"segment {plan.name!r} says in_float = {plan.in_float}"
    if first + last and not any(plan.in_float for plan in program.segments):
        yield f"{first} and {last} steps at its ends are in floating point, and none of them computes"
    for step in program.steps:
        inside = step.index in program.unquantized
        if program.segment(step.segment).quantizes if inside else step.segment == FLOAT:
            yield f"step {step.index} calls {step.segment!r}, and float_ends are {first} and {last}"


CHECKS: tuple[Check, ...] = (
    names_are_distinct,  # first: the others look things up by name
    calls_frame_the_loop,
    steps_count_up,
    segments_are_named_by_what_they_compute,  # masks are as long as there are branches from here on
    steps_call_the_segments,  # every step has a segment from here on
    segments_take_what_they_skip,
    rows_are_those_of_the_reuse,
    steps_bind_the_ports_of_their_segment,
    slots_are_apart,
    slots_have_one_shape,
    reads_get_the_newest,
    ends_are_in_float,
)
