"""The program: a denoising trajectory as straight-line code, and the passes that compile it.

The schedule is known before the first step runs, so a trajectory has no branches: it is a list of calls. A pass is a
pure function from a program to an equal or better one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from ditc.errors import InputError
from ditc.files import digest_of
from ditc.schedule import CacheSchedule
from ditc.spec import Record

__all__ = [
    "AHEAD",
    "BRANCH_KEY",
    "CONDITION",
    "DECODE",
    "FULL",
    "PATH_KEY",
    "Caches",
    "Program",
    "SegmentPlan",
    "Step",
    "program_from_schedule",
]

CONDITION, DECODE = "condition", "decode"
FULL, REUSE = "full", "reuse"

# a segment with `ahead` takes the tables of the next steps as inputs AHEAD.NAME, and returns their sums as AHEAD.1, ...
AHEAD = "ahead"

# what a step that computes leaves for the steps that don't: the output of each branch, or one sum for each such step
Caches = Literal["branches", "sums"]

# metadata of every ONNX node of a segment: the branch it belongs to, and the torch module path it came from
BRANCH_KEY, PATH_KEY = "ditc.branch", "ditc.path"


class SegmentPlan(Record):
    """One pass through the network: which branches compute, and which cached outputs it takes and returns.

    With `ahead` it also adds up all branches with the gates of that many next steps, for those that compute nothing.
    """

    name: str
    compute: tuple[bool, ...]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    ahead: int = 0


class Step(Record):
    """One denoising step. `reads` and `writes` name the slot of each cached value; `before` are calls of its own.

    A cached value is a branch's output under its name, or AHEAD.k, the sum that the k-th step after the writer adds.
    """

    index: int
    t: float
    segment: str
    before: tuple[str, ...] = ()
    reads: dict[str, int] = {}
    writes: dict[str, int] = {}

    @property
    def cache_ports(self) -> Iterator[tuple[str, int]]:
        """(port of the segment, slot) of every cache that the step binds. A sum is read as AHEAD, whichever it is."""
        for value, slot in self.reads.items():
            yield f"cache.{AHEAD if value.startswith(f'{AHEAD}.') else value}", slot
        for value, slot in self.writes.items():
            yield f"cache.{value}", slot


class Program(Record):
    """Calls before the loop, the steps, calls after it, and how many cache slots they need."""

    branches: tuple[str, ...]
    prologue: tuple[str, ...] = ()
    steps: tuple[Step, ...]
    epilogue: tuple[str, ...] = ()
    segments: tuple[SegmentPlan, ...]
    slots: int = 0

    @property
    def calls(self) -> list[str]:
        """Names of all segments that the program calls, in the order of their first call."""
        return [*self.prologue, *(plan.name for plan in self.segments), *self.epilogue]

    def segment(self, name: str) -> SegmentPlan:
        return next(plan for plan in self.segments if plan.name == name)

    def check(self) -> None:
        """Raise InputError unless every slot is written before it is read: caches live and die with a request."""
        holds: dict[int, str] = {}
        for step in self.steps:
            for branch, slot in step.reads.items():
                if holds.get(slot) != branch:
                    raise InputError(
                        f"step {step.index} reads {branch} from slot {slot}, which holds {holds.get(slot)}"
                    )
            for branch, slot in step.writes.items():
                holds[slot] = branch


Pass = Callable[[Program], Program]


def naive_program(schedule: CacheSchedule, timesteps: Sequence[float], branches: Sequence[str]) -> Program:
    """One segment per step, each with its own conditioning, every branch output cached in a slot of its own."""
    slot_of = {branch: slot for slot, branch in enumerate(branches)}
    steps, segments = [], []
    for index, (row, t) in enumerate(zip(schedule.compute, timesteps, strict=True)):
        reads = {b: slot_of[b] for b, computes in zip(branches, row, strict=True) if not computes}
        writes = {b: slot_of[b] for b, computes in zip(branches, row, strict=True) if computes}
        name = f"step{index}"
        segments.append(SegmentPlan(name=name, compute=row, reads=tuple(reads), writes=tuple(writes)))
        steps.append(Step(index=index, t=t, segment=name, before=(CONDITION,), reads=reads, writes=writes))
    return Program(branches=tuple(branches), steps=tuple(steps), segments=tuple(segments), slots=len(branches))


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
        kept = {branch: slot for branch, slot in step.writes.items() if branch in wanted}
        wanted -= step.writes.keys()
        wanted |= step.reads.keys()
        steps.append(step.model_copy(update={"writes": kept}))
    return _with_steps(program, tuple(reversed(steps)))


def merge_equal_segments(program: Program) -> Program:
    """One segment per distinct row of the schedule, returning every cache that any of its steps still needs."""
    masks: dict[tuple[bool, ...], set[str]] = {}
    mask_of = {plan.name: plan.compute for plan in program.segments}
    for step in program.steps:
        masks.setdefault(mask_of[step.segment], set()).update(step.writes)
    merged = {}
    for mask, writes in masks.items():
        reads = next(plan.reads for plan in program.segments if plan.compute == mask)
        kept = tuple(branch for branch in program.branches if branch in writes)
        merged[mask] = SegmentPlan(name=_segment_name(mask), compute=mask, reads=reads, writes=kept)
    steps = []
    for step in program.steps:
        plan = merged[mask_of[step.segment]]
        writes_all = {branch: step.writes.get(branch, 0) for branch in plan.writes}
        steps.append(step.model_copy(update={"segment": plan.name, "writes": writes_all}))
    return program.model_copy(update={"steps": tuple(steps), "segments": tuple(merged.values())})


def fold_reuse(program: Program) -> Program:
    """Let the step that computes add up what each next step will reuse, gates and all: one sum per step is kept.

    The gates of later steps are known before the loop, and a residual stream that nothing else writes to is a sum. A
    program with other segments, or with more sums than branches, keeps the outputs of the branches.
    """
    if [plan.name for plan in program.segments] != [FULL, REUSE]:
        return program
    steps, ahead, distance = [], 0, 0
    for step in program.steps:
        distance = 0 if step.segment == FULL else distance + 1
        ahead = max(ahead, distance)
        steps.append(step.model_copy(update={"reads": {f"{AHEAD}.{distance}": 0} if distance else {}}))
    if ahead > len(program.branches):
        return program
    sums = tuple(f"{AHEAD}.{number}" for number in range(1, ahead + 1))
    full, reuse = program.segments
    return program.model_copy(
        update={
            "steps": tuple(
                step if step.reads else step.model_copy(update={"writes": dict.fromkeys(sums, 0)}) for step in steps
            ),
            "segments": (
                full.model_copy(update={"writes": sums, "ahead": ahead}),
                reuse.model_copy(update={"reads": (AHEAD,)}),
            ),
        }
    )


def assign_slots(program: Program) -> Program:
    """Give each cached value a slot from its step to its last reader; a branch keeps its slot where it can.

    A slot that a step reads is not free for that step's writes: an engine's outputs never alias its inputs.
    """
    last_read: dict[tuple[int, str], int] = {}
    made: dict[str, int] = {}
    for step in program.steps:
        for branch in step.reads:
            last_read[made[branch], branch] = step.index
        for branch in step.writes:
            made[branch] = step.index
    busy_until: list[int] = []
    slot_of: dict[str, int] = {}
    steps = []
    for step in program.steps:
        reads = {branch: slot_of[branch] for branch in step.reads}
        writes = {}
        for branch in step.writes:
            slot = _free_slot(busy_until, step.index, slot_of.get(branch))
            busy_until[slot] = last_read.get((step.index, branch), step.index)
            writes[branch] = slot_of[branch] = slot
        steps.append(step.model_copy(update={"reads": reads, "writes": writes}))
    return program.model_copy(update={"steps": tuple(steps), "slots": len(busy_until)})


PASSES: tuple[Pass, ...] = (
    hoist_condition,  # first: afterwards two steps with equal rows are equal calls
    drop_unread_caches,  # before merging, so that a schedule without reuse has a segment without cache outputs
    merge_equal_segments,
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
    decode: bool = False,
    caches: Caches = "branches",
) -> Program:
    """The compiled program of a schedule. With "sums" every branch of the model has to add to the residual stream."""
    program = naive_program(schedule, timesteps, branches)
    for transform in (*PASSES, *FOLDING[caches]):
        program = transform(program)
    program = program.model_copy(update={"epilogue": (DECODE,) if decode else ()})
    program.check()
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


def _segment_name(mask: tuple[bool, ...]) -> str:
    if all(mask):
        return FULL
    return f"row-{digest_of(mask)[:8]}" if any(mask) else REUSE


def _free_slot(busy_until: list[int], step: int, preferred: int | None) -> int:
    """A slot whose value nobody reads at or after `step`; a new one where all are taken."""
    if preferred is not None and busy_until[preferred] < step:
        return preferred
    for slot, until in enumerate(busy_until):
        if until < step:
            return slot
    busy_until.append(-1)
    return len(busy_until) - 1
