"""The passes that compile a schedule to a program. Each is a pure function from a program to an equal or better one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from ditc.approximators import APPROXIMATORS
from ditc.choices import Caches
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
from ditc.program_checks import check_program
from ditc.schedule import CacheSchedule
from ditc.streams import BranchStreams, Wiring

__all__ = ["NoSumsError", "NothingQuantizedError", "ends_in_float", "program_from_schedule"]


class NoSumsError(InputError):
    """A reuse that works on sums made ahead, under a schedule or of a model that allows none."""


class NothingQuantizedError(InputError):
    """Steps in floating point under a schedule that has no other step to quantize."""


Pass = Callable[[Program], Program]


def naive_program(schedule: CacheSchedule, timesteps: Sequence[float], wiring: Wiring) -> Program:
    """One segment per step, each with its own conditioning, every output of a branch cached in a slot of its own."""
    slot_of = {value: slot for slot, value in enumerate(wiring.values)}
    steps, segments = [], []
    for index, (row, t) in enumerate(zip(schedule.compute, timesteps, strict=True)):
        writes = {value: slot_of[value] for value in wiring.computed_by(row)}
        reads = {value: slot_of[value] for value in wiring.read_by(row, writes)}
        name = f"step{index}"
        segments.append(SegmentPlan(name=name, compute=row, reads=tuple(reads), writes=tuple(writes)))
        steps.append(Step(index=index, t=t, segment=name, before=(CONDITION,), reads=reads, writes=writes))
    return Program(
        branches=wiring.branches,
        streams=dict(wiring.listed) or None,
        steps=tuple(steps),
        segments=tuple(segments),
        slots=len(slot_of),
        reuse=schedule.reuse,
    )


def hoist_condition(program: Program) -> Program:
    """Run the conditioning once for all steps: it depends on timesteps and labels, both known before the loop."""
    steps = tuple(
        step.model_copy(update={"before": tuple(c for c in step.before if c != CONDITION)}) for step in program.steps
    )
    return program.model_copy(update={"prologue": (CONDITION, *program.prologue), "steps": steps})


def drop_unread_caches(program: Program) -> Program:
    """Forget every write that is overwritten, or the trajectory over, before anything reads it."""
    wanted: set[str] = set()
    steps = []
    for step in reversed(program.steps):
        writes = {value: slot for value, slot in step.writes.items() if value in wanted}
        wanted -= step.writes.keys()
        wanted |= step.reads.keys()
        steps.append(step.model_copy(update={"writes": writes}))
    return _with_steps(program, tuple(reversed(steps)))


def merge_equal_segments(program: Program) -> Program:
    """One segment per distinct row of the schedule, returning every cache that any of its steps still needs."""
    masks: dict[tuple[bool, ...], set[str]] = {}
    mask_of = {plan.name: plan.compute for plan in program.segments}
    for step in program.steps:
        masks.setdefault(mask_of[step.segment], set()).update(step.writes)
    merged = {}
    for mask, needed in masks.items():
        reads = next(plan.reads for plan in program.segments if plan.compute == mask)
        writes = tuple(value for value in program.wiring.values if value in needed)
        merged[mask] = SegmentPlan(name=segment_name(mask), compute=mask, reads=reads, writes=writes)
    steps = []
    for step in program.steps:
        plan = merged[mask_of[step.segment]]
        writes_all = {value: step.writes.get(value, 0) for value in plan.writes}
        steps.append(step.model_copy(update={"segment": plan.name, "writes": writes_all}))
    return program.model_copy(update={"steps": tuple(steps), "segments": tuple(merged.values())})


def drop_dead_reads(program: Program) -> Program:
    """Read nothing that decides nothing, such as a text's stream in front of the head.

    What nobody reads is not written, and less is alive in a segment that writes less: again, until nothing changes.
    """
    plans = {
        plan.name: plan.model_copy(update={"reads": program.wiring.read_by(plan.compute, plan.writes)})
        for plan in program.segments
    }
    if tuple(plans.values()) == program.segments:
        return program
    steps = tuple(
        step.model_copy(update={"reads": {value: step.reads[value] for value in plans[step.segment].reads}})
        for step in program.steps
    )
    program = program.model_copy(update={"steps": steps, "segments": tuple(plans.values())})
    return drop_dead_reads(merge_equal_segments(drop_unread_caches(program)))


def fold_reuse(program: Program) -> Program:
    """Let the step that computes add up what each next step will reuse, gates and all: one sum per step is kept.

    The gates of later steps are known before the loop, and a residual stream that nothing else writes to is a sum. A
    step that extrapolates reads more of them, made by the steps that computed before the last: as many as its reuse
    looks back, or as there are by then. A program with other segments, or with more skips in a row than branches, keeps
    the outputs of the branches.
    """
    if [plan.name for plan in program.segments] != [FULL, REUSE]:
        return program
    looks_back = APPROXIMATORS[program.reuse].looks_back
    steps: list[Step] = []
    computed: list[int] = []
    for step in program.steps:
        computed += [step.index] if step.segment == FULL else []
        makers = [] if step.segment == FULL else computed[: -1 - looks_back : -1]  # the last one first
        name = EXTRAPOLATE if len(makers) > 1 else step.segment
        reads = {f"{AHEAD}.{step.index - maker}": 0 for maker in makers}
        steps.append(step.model_copy(update={"segment": name, "reads": reads}))
    if max(min(map(distance_of, step.reads), default=0) for step in steps) > len(program.branches):
        return program
    distances = sorted({distance_of(value) for step in steps for value in step.reads})
    sums = tuple(f"{AHEAD}.{distance}" for distance in distances)
    return program.model_copy(
        update={
            "steps": tuple(
                step if step.reads else step.model_copy(update={"writes": dict.fromkeys(sums, 0)}) for step in steps
            ),
            "segments": (
                program.segment(FULL).model_copy(update={"writes": sums, "ahead": distances[-1]}),
                *_reusing_segments(program, {step.segment for step in steps}),
            ),
        }
    )


def _reusing_segments(program: Program, called: Collection[str]) -> Iterator[SegmentPlan]:
    """The segments of steps that read sums, with the rows that the program's approximator takes.

    A step with one sum, where more are looked back at, holds it. One graph is for all others, however early they are.
    """
    approximator, plan = APPROXIMATORS[program.reuse], program.segment(REUSE)
    for name, count in ((REUSE, 1), (EXTRAPOLATE, approximator.looks_back)):
        if name in called:
            rows = approximator.rows if count == approximator.looks_back else 0
            yield plan.model_copy(update={"name": name, "reads": sum_ports(count), "rows": rows})


def assign_slots(program: Program) -> Program:
    """Give each cached value a slot from its step to its last reader; a branch keeps its slot where it can.

    A slot that a step reads is not free for that step's writes: an engine's outputs never alias its inputs. All
    values that a slot holds have one shape.
    """
    last_read: dict[tuple[str, int], int] = {}  # of a value, by the step that made it
    writers: dict[str, int] = {}
    for step in program.steps:
        for value in step.reads:
            last_read[value, _maker(value, step.index, writers)] = step.index
        writers |= dict.fromkeys(step.writes, step.index)
    busy_until: list[int] = []
    shapes = program.wiring.shapes
    slot_shapes: list[tuple[int, ...] | None] = []
    slot_of: dict[tuple[str, int], int] = {}
    writers, steps = {}, []
    for step in program.steps:
        reads = {value: slot_of[value, _maker(value, step.index, writers)] for value in step.reads}
        writes = {}
        for value in step.writes:
            fitting = [slot for slot, shape in enumerate(slot_shapes) if shape == shapes.get(value)]
            slot = _free_slot(busy_until, fitting, step.index, slot_of.get((value, writers.get(value, -1))))
            slot_shapes += [shapes.get(value)] * (slot == len(slot_shapes))
            busy_until[slot] = last_read.get((value, step.index), step.index)
            writes[value] = slot_of[value, step.index] = slot
        writers |= dict.fromkeys(step.writes, step.index)
        steps.append(step.model_copy(update={"reads": reads, "writes": writes}))
    return program.model_copy(update={"steps": tuple(steps), "slots": len(busy_until)})


def _maker(value: str, reader: int, writers: Mapping[str, int]) -> int:
    """The step that made what `reader` reads: a sum tells how far back, a branch's output is the last one."""
    return reader - distance_of(value) if is_sum(value) else writers[value]


PASSES: tuple[Pass, ...] = (
    hoist_condition,  # first: afterwards two steps with equal rows are equal calls
    drop_unread_caches,  # before merging, so that a schedule without reuse has a segment without cache outputs
    merge_equal_segments,
    drop_dead_reads,  # after merging: which values are dead depends on all that a segment returns
)
FOLDING: dict[Caches, tuple[Pass, ...]] = {
    "branches": (assign_slots,),
    "sums": (fold_reuse, assign_slots),  # slots last: they need the final reads and writes
}


def program_from_schedule(
    schedule: CacheSchedule,
    timesteps: Sequence[float],
    branches: Sequence[str],
    *,
    streams: Mapping[str, BranchStreams] | None = None,
    decode: bool = False,
    caches: Caches = "branches",
) -> Program:
    """The compiled program of a schedule. With "sums" every branch of the model has to add to the residual stream.

    `branches` and `streams` are those of the model's spec.

    Raises NoSumsError where a schedule asks for more than to hold what is reused, and can't have sums.
    """
    program = naive_program(schedule, timesteps, Wiring(tuple(branches), streams or {}))
    for transform in (*PASSES, *FOLDING[caches]):
        program = transform(program)
    if schedule.reuse != "hold" and not any(AHEAD in plan.reads for plan in program.segments):
        raise NoSumsError(
            f"--reuse {schedule.reuse} works on sums made ahead: it needs a policy that reuses, under which steps "
            "compute everything or nothing, with no more skips in a row than branches, branches that add, and no "
            "--caches branches; choose another --policy, or --reuse hold"
        )
    program = program.model_copy(update={"epilogue": (DECODE,) if decode else ()})
    check_program(program)
    return program


def ends_in_float(program: Program, first: int, last: int) -> Program:
    """Let the first and the last steps that compute everything call FLOAT instead of FULL.

    Steps that reuse have no branch to quantize and stay as they are. Raises InputError where such a step computes only
    some branches, where none computes, or NothingQuantizedError where no other step is left.
    """
    program = program.model_copy(update={"float_ends": (first, last)})
    ends = program.unquantized
    quantized = {plan.name for plan in program.segments if plan.quantizes}
    asked, called = f"--float-steps {first}:{last}", {step.segment for step in program.steps if step.index in ends}
    if partial := (called & quantized) - {FULL}:
        index = next(step.index for step in program.steps if step.index in ends and step.segment in partial)
        raise InputError(f"{asked} needs steps that compute everything or nothing; step {index} computes some branches")
    if FULL not in called:
        raise InputError(f"{asked} names no step that computes; name more steps, or leave it out")
    steps = tuple(
        step.model_copy(update={"segment": FLOAT}) if step.index in ends and step.segment == FULL else step
        for step in program.steps
    )
    if FULL not in {step.segment for step in steps}:
        raise NothingQuantizedError(
            f"{asked} leaves no step that computes everything to quantize; name fewer steps, or compile with "
            "--precision fp16"
        )
    segments = {plan.name: plan for plan in program.segments}
    segments[FLOAT] = segments[FULL].model_copy(update={"name": FLOAT, "in_float": True})
    calls = dict.fromkeys(step.segment for step in steps)  # in the order of their first call
    program = program.model_copy(update={"steps": steps, "segments": tuple(segments[name] for name in calls)})
    check_program(program)
    return program


def _with_steps(program: Program, steps: tuple[Step, ...]) -> Program:
    """The program with new steps, each segment's writes following its step's."""
    by_segment = {step.segment: tuple(step.writes) for step in steps}
    segments = tuple(
        plan
        if set(plan.writes) == set(by_segment[plan.name])
        else plan.model_copy(update={"writes": by_segment[plan.name]})
        for plan in program.segments
    )
    return program.model_copy(update={"steps": steps, "segments": segments})


def _free_slot(busy_until: list[int], fitting: Sequence[int], step: int, preferred: int | None) -> int:
    """A slot among those `fitting` whose value nobody reads at or after `step`; a new one where all are taken."""
    if preferred is not None and busy_until[preferred] < step:
        return preferred
    for slot in fitting:
        if busy_until[slot] < step:
            return slot
    busy_until.append(-1)
    return len(busy_until) - 1
