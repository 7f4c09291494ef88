"""The program: a denoising trajectory as straight-line code.

The schedule is known before the first step runs, so a trajectory has no branches: it is a list of calls. `passes` makes
it, `program_checks` has what holds of every whole one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

from ditc.choices import Reuse
from ditc.files import digest_of
from ditc.spec import PartialRecord, Record
from ditc.streams import BranchStreams, Wiring

__all__ = [
    "AHEAD",
    "BEFORE",
    "BRANCH_KEY",
    "CONDITION",
    "DECODE",
    "EXTRAPOLATE",
    "FLOAT",
    "FULL",
    "OF_STEP",
    "PATH_KEY",
    "REQUEST",
    "REUSE",
    "REUSE_ROWS",
    "TIMESTEPS",
    "UPDATE",
    "Program",
    "SegmentPlan",
    "Step",
    "distance_of",
    "is_sum",
    "segment_name",
    "sum_ports",
]

CONDITION, DECODE = "condition", "decode"
TIMESTEPS = "t"  # what CONDITION takes beside the conditions of each row: float32 (steps,)
# in front of a table's name: it depends on no timestep, so a request has it once and not for each step
REQUEST = "request."
# in front of one that depends on the timestep alone: the bundle has it, a row for each step and none for a batch
OF_STEP = "step."
UPDATE = "update"  # guidance, sampler and compensation of a step, for devices
FULL, REUSE, EXTRAPOLATE = "full", "reuse", "extrapolate"
FLOAT = "float"  # `full` as it was before its linear layers became INT8

# a segment with `ahead` takes the tables of the next steps as inputs AHEAD.NAME, and returns their sums as AHEAD.1, ...
AHEAD = "ahead"
# the port of a second sum, which the step that computed before the last one has made; those of earlier steps follow it
# as BEFORE.2, BEFORE.3, ...
BEFORE = "before"
# table of a bundle and input of a segment with `rows`: (rows, channels) of each step
REUSE_ROWS = "reuse.rows"

# what a step that computes leaves for the steps that don't: the output of each branch, or one sum for each such step

# metadata of every ONNX node of a segment: the branch it belongs to, and the torch module path it came from
BRANCH_KEY, PATH_KEY = "ditc.branch", "ditc.path"


class SegmentPlan(Record):
    """One pass through the network: which branches compute, and which cached outputs it takes and returns.

    With `ahead` it also adds up all branches with the gates of that many next steps, for those that compute nothing.
    With `rows` it takes so many numbers per channel: the weights of the sums that it reads, and perhaps a shift.
    With `in_float` its linear layers stay in floating point in a bundle whose others are INT8.
    """

    name: str
    compute: tuple[bool, ...]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    ahead: int = 0
    rows: int = 0
    in_float: bool = False

    @property
    def computes(self) -> bool:
        """Does it run any branch? What has none runs whole at every step."""
        return any(self.compute) or not self.compute

    @property
    def quantizes(self) -> bool:
        """Are there linear layers that become INT8 where the bundle is quantized?"""
        return any(self.compute) and not self.in_float


class Step(Record):
    """One denoising step. `reads` and `writes` name the slot of each cached value; `before` are calls of its own.

    A cached value is an output of a branch, as `Wiring` names it, or AHEAD.k, the sum that the k-th step after the
    writer adds.
    """

    index: int
    t: float
    segment: str
    before: tuple[str, ...] = ()
    reads: dict[str, int] = {}
    writes: dict[str, int] = {}


class Program(PartialRecord):
    """Calls before the loop, the steps, calls after it, and how many cache slots they need.

    `streams` are those of the model's spec. `float_ends` are how many of the first and of the last steps compute in
    floating point, where they compute.
    """

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"streams"})

    branches: tuple[str, ...]
    streams: dict[str, BranchStreams] | None = None
    prologue: tuple[str, ...] = ()
    steps: tuple[Step, ...]
    epilogue: tuple[str, ...] = ()
    segments: tuple[SegmentPlan, ...]
    slots: int = 0
    reuse: Reuse = "hold"
    float_ends: tuple[int, int] = (0, 0)

    @property
    def calls(self) -> list[str]:
        """Names of all segments that the program calls, in the order of their first call."""
        return [*self.prologue, *(plan.name for plan in self.segments), *self.epilogue]

    @property
    def unquantized(self) -> set[int]:
        """The steps at either end that compute in floating point, or would."""
        (first, last), steps = self.float_ends, len(self.steps)
        return {*range(min(first, steps)), *range(max(steps - last, 0), steps)}

    @property
    def wiring(self) -> Wiring:
        """The streams between the branches, and what a branch's output is called."""
        return Wiring(self.branches, self.streams or {})

    def segment(self, name: str) -> SegmentPlan:
        return next(plan for plan in self.segments if plan.name == name)

    def cache_ports(self, step: Step) -> Iterator[tuple[str, int]]:
        """(port of its segment, slot) of every cache that a step binds.

        A sum is read as AHEAD, whichever it is, and those that were made earlier beside it as BEFORE and what follows.
        A step that has several, and fewer than its segment takes, gives it the earliest again: its weight there is 0.
        """
        sums = sorted(filter(is_sum, step.reads), key=distance_of)
        ports = sum_ports(len(sums))
        named = dict(zip(sums, ports, strict=True))
        for value, slot in step.reads.items():
            yield f"cache.{named.get(value, value)}", slot
        if len(sums) > 1:
            for port in self.segment(step.segment).reads[len(sums) :]:
                yield f"cache.{port}", step.reads[sums[-1]]
        for value, slot in step.writes.items():
            yield f"cache.{value}", slot


SUM = re.compile(rf"{AHEAD}\.[1-9][0-9]{{0,5}}")


def is_sum(value: str) -> bool:
    """Is a cached value a sum made ahead, and not a branch's output?"""
    return SUM.fullmatch(value) is not None


def sum_ports(count: int) -> tuple[str, ...]:
    """Return the ports of so many sums, that of the latest first: AHEAD, BEFORE, BEFORE.2, BEFORE.3, ..."""
    return (AHEAD, BEFORE, *(f"{BEFORE}.{number}" for number in range(2, count)))[:count]


def distance_of(value: str) -> int:
    """Return the number of steps behind its writer at which a sum is read."""
    return int(value.removeprefix(f"{AHEAD}."))


def segment_name(mask: tuple[bool, ...]) -> str:
    """The name of the segment that computes these branches: FULL, REUSE, or one with a digest of the row."""
    if all(mask):
        return FULL
    return f"row-{digest_of(mask)[:8]}" if any(mask) else REUSE
