"""Requests on the way of a compile: the program in one of its forms, run on noise of a purpose's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from ditc.compiler.plan import LARGEST_BATCH, Plan, Segments
from ditc.engines.backend import Backend
from ditc.program import DECODE, Program
from ditc.requests import Request
from ditc.runtime.executor import Correction, NoiseSource, Samples, StepEvent, seeded_request
from ditc.runtime.host_executor import HostExecutor
from ditc.runtime.pipeline import open_engines
from ditc.tables import Tables

__all__ = [
    "FIT_NOISE",
    "HELD_NOISE",
    "POOL_NOISE",
    "REUSE_NOISE",
    "VERIFY_NOISE",
    "WATCH_NOISE",
    "exact_trajectory",
    "executor",
    "purposed_request",
    "start_requests",
]

NO_TABLES: Tables = {}

# purposes with noise of their own, so that no image is used twice: calibration, compensation, verification, reuse;
# what fits the compensation has not been fitted by the reuse already, nor has it decided the schedule
POOL_NOISE, FIT_NOISE, VERIFY_NOISE, REUSE_NOISE = 1_000_003, 2_000_003, 3_000_003, 4_000_003
WATCH_NOISE = 5_000_003
HELD_NOISE = 6_000_003  # held out from what a reuse learns on, to choose how far it is to be believed


@contextmanager
def executor(
    plan: Plan,
    program: Program,
    segments: Segments,
    tables: Tables = NO_TABLES,
    backend: Backend | None = None,
    correction: Correction | None = None,
) -> Iterator[HostExecutor]:
    """Yield an executor over segment files, and close its engines. `tables` are a bundle's beside the plan's own.

    With a `correction` of its own it is for one request of any size, whose images go through the engines in batches.
    """
    names = [name for name in program.calls if name != DECODE]
    together = None if correction is None else plan.batch_size(plan.served_at_once)
    with ExitStack() as stack:
        engines = open_engines(stack, backend or plan.backend, {name: segments[name] for name in names})
        every: Tables = {**plan.tables, **tables}
        yield HostExecutor(
            plan.spec, program, every, engines, plan.options.cfg, correction=correction, together=together
        )


def start_requests(
    plan: Plan, runner: HostExecutor, count: int, purpose: int, at_most: int = LARGEST_BATCH
) -> list[tuple[range, Iterator[StepEvent]]]:
    """Return requests over `count` images with a purpose's own noise, not yet run, and the images of each."""
    return [(part, runner.run(*purposed_request(plan, part, purpose))) for part in plan.batches(count, at_most)]


def purposed_request(plan: Plan, part: range, purpose: int) -> tuple[Request, Samples, NoiseSource]:
    """Return the request of some images with a purpose's own noise: what an executor takes."""
    seed, steps = plan.options.seed + purpose, len(plan.program.steps)
    return seeded_request(plan.spec, plan.request(part), seed, part.start, steps)


def exact_trajectory(plan: Plan, segments: Segments, count: int, purpose: int, stage: str) -> list[Samples]:
    """Run FP uncached, and return the samples after every step, each (count, channels, *space)."""
    steps: list[list[Samples]] = [[] for _ in plan.reference_program.steps]
    with executor(plan, plan.reference_program, segments) as runner:
        for part, request in start_requests(plan, runner, count, purpose):
            for event in request:
                plan.progress(stage, part.start * event.steps + event.index * len(part), count * event.steps)
                steps[event.index].append(event.x)
    return [np.concatenate(parts) for parts in steps]
