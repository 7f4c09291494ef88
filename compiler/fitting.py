"""The stages that fit against the FP program, mostly in a closed loop: numbers of a reuse, and the compensation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.approximators import APPROXIMATORS
from ditc.bundle import write_tables
from ditc.checks import Approximation, ValueRange
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.trajectories import (
    FIT_NOISE,
    REUSE_NOISE,
    exact_trajectory,
    executor,
    purposed_request,
    start_requests,
)
from ditc.compiler.work import write_json
from ditc.engines.recording import RecordedRun, RecordingBackend
from ditc.program import AHEAD, CONDITION, FULL, REUSE_ROWS, Step, distance_of
from ditc.runtime.approximation import Moments, Rows, fitted_rows, makers_of
from ditc.runtime.compensation import ClosedLoopFit
from ditc.runtime.conditioning import at_step, condition_tables, is_of_request, of_step
from ditc.runtime.executor import Samples, StepEvent
from ditc.runtime.host_executor import HostExecutor
from ditc.tables import Tables

__all__ = ["ReuseWalk", "approximate", "fit", "reuse_walk", "rows_summary", "write_rows"]


def fit(plan: Plan, segments: Segments, compiled: Segments, tables: Tables, folder: Path) -> None:
    """Fit the compensation table in a closed loop against the FP program: compensation.safetensors."""
    count = plan.options.vc_images
    correction = ClosedLoopFit(exact_trajectory(plan, segments, count, FIT_NOISE, "fit"), plan.options.vc)
    with executor(plan, plan.program, compiled, tables, correction=correction) as runner:
        runner.last(*purposed_request(plan, range(count), FIT_NOISE))
    fitted = correction.table
    write_tables(folder / "compensation.safetensors", {"compensation.k": fitted.k, "compensation.mu": fitted.mu})


def approximate(plan: Plan, segments: Segments, compiled: Segments, tables: Tables, folder: Path) -> None:
    """Write approximate.safetensors with the rows of every step, and approximation.json with their range."""
    if APPROXIMATORS[plan.options.reuse].open_loop:
        rows = _rows_of_fp(plan, segments)
    else:
        rows = _rows_of_own_run(plan, segments, compiled, tables)
    write_rows(folder, rows, rows_summary(plan, rows, plan.options.vc_images))


def _rows_of_own_run(plan: Plan, segments: Segments, compiled: Segments, tables: Tables) -> Rows:
    """Fit in a closed loop: the compiled requests are walked in lockstep.

    In front of a step that reuses, its numbers are fitted over all of them: from the sums that it will combine to the
    one that FP adds at that step of its own, uncached trajectory.
    """
    with reuse_walk(plan, segments, compiled, tables, (REUSE_NOISE,)) as walk:
        for step in plan.program.steps:
            if plan.program.segment(step.segment).rows:
                moments = walk.moments(step, REUSE_NOISE)
                walk.rows[step.index] = fitted_rows(plan.options.reuse, moments, plan.options.vc_images)
            walk.advance()
        return walk.rows


def _rows_of_fp(plan: Plan, segments: Segments) -> Rows:
    """Fit in an open loop: from the sums that FP's own trajectory would have left for a step to the one that it adds.

    Nothing of the compiled program is looked at, so errors of earlier steps are not corrected.
    """
    count, rows, target = plan.options.vc_images, plan.reuse_tables[REUSE_ROWS], _Target.of(plan, segments)
    exact = exact_trajectory(plan, segments, count, REUSE_NOISE, "approximate")
    for step in plan.program.steps:
        if not plan.program.segment(step.segment).rows:
            continue
        makers = makers_of(step)
        moments = Moments.empty(len(makers) + 1, rows.shape[-1])
        for part in plan.batches(count):
            _, noise, _ = purposed_request(plan, part, REUSE_NOISE)
            before = [noise, *(x[part.start : part.stop] for x in exact)]  # the samples in front of every step
            asked = (*makers, step.index)
            moments = moments.add(*(target.sums(step.index, before[at], part, REUSE_NOISE, at) for at in asked))
        rows[step.index] = fitted_rows(plan.options.reuse, moments, count)
    return rows


def write_rows(folder: Path, rows: Rows, summary: Approximation) -> None:
    """Write a table of numbers, and what the manifest says of it."""
    write_tables(folder / "approximate.safetensors", {REUSE_ROWS: rows})
    write_json(folder / "approximation.json", summary.model_dump(mode="json", exclude_unset=True))


@dataclass(frozen=True)
class ReuseWalk:
    """The requests of some purposes in lockstep, beside FP's trajectories on the same noise.

    `rows` (steps, n, channels) are the numbers with which steps combine what they reuse; a row is read when its step
    begins, and may be filled in before. `computed` has the runs of the last steps that computed, the latest first, each
    with a run for every request.
    """

    target: _Target
    rows: Rows
    requests: Sequence[tuple[int, range, Iterator[StepEvent]]]  # purpose, images, events
    exact: Mapping[int, Sequence[Samples]]  # by purpose, the samples after every step
    runs: Sequence[list[RecordedRun]]
    computed: deque[list[RecordedRun]]

    def moments(self, step: Step, purpose: int) -> Moments:
        """Return the moments of the sums that the next step reads, and of FP's own, over the images of a purpose."""
        sums = sorted(step.reads, key=distance_of)
        moments = Moments.empty(len(sums) + 1, self.rows.shape[-1])
        for (own, part, _), *runs_of in zip(self.requests, *self.computed, strict=True):
            if own == purpose:
                x = self.exact[own][step.index - 1][part.start : part.stop]
                seen = [run.outputs[f"cache.{value}"] for run, value in zip(runs_of, sums, strict=True)]
                moments = moments.add(*seen, self.target.sums(step.index, x, part, purpose))
        return moments

    def advance(self) -> None:
        """Run the next step of all requests."""
        for *_, request in self.requests:
            next(request)
        if latest := [run for recorded in self.runs for run in recorded]:
            self.computed.appendleft(latest)
        for recorded in self.runs:
            recorded.clear()


@contextmanager
def reuse_walk(
    plan: Plan, segments: Segments, compiled: Segments, tables: Tables, purposes: Sequence[int]
) -> Iterator[ReuseWalk]:
    """Yield the compiled requests of some purposes, not yet begun, with numbers as they are known beforehand."""
    count = plan.options.vc_images
    exact = {purpose: exact_trajectory(plan, segments, count, purpose, "approximate") for purpose in purposes}
    calls = count * len(purposes) * len(plan.program.steps)
    with _recorded(plan, compiled, {**tables, **plan.reuse_tables}, calls) as (runner, runs):
        requests = [
            (purpose, *request)
            for purpose in purposes
            for request in start_requests(plan, runner, count, purpose, plan.served_at_once)
        ]
        computed: deque[list[RecordedRun]] = deque(maxlen=APPROXIMATORS[plan.options.reuse].looks_back)
        target = _Target.of(plan, segments)
        yield ReuseWalk(target, runner.step_inputs[REUSE_ROWS], requests, exact, runs, computed)


@contextmanager
def _recorded(
    plan: Plan, compiled: Segments, tables: Tables, calls: int
) -> Iterator[tuple[HostExecutor, list[list[RecordedRun]]]]:
    """Yield the compiled program, and the runs that compute as they come, up to so many of a segment."""
    computing = [part.name for part in plan.program.segments if part.computes]
    recorder = RecordingBackend(plan.backend, dict.fromkeys(computing, range(calls)))
    with executor(plan, plan.program, compiled, tables, recorder) as runner:
        yield runner, [recorder.runs[name] for name in computing]


@dataclass(frozen=True)
class _Target:
    """The FP network: what all its branches together add at a step, with that step's own gates."""

    plan: Plan
    condition: Any
    full: Any

    @staticmethod
    def of(plan: Plan, segments: Segments) -> _Target:
        return _Target(plan, *(plan.backend.session(segments[name]) for name in (CONDITION, FULL)))

    def sums(self, step: int, x: Samples, part: range, purpose: int, maker: int | None = None) -> NDArray[np.float32]:
        """Return (rows, *branch_shape) for samples (images, ...) that are images `part` of a purpose.

        With a `maker` it is what that step leaves for this one: its own outputs, for its own samples.
        """
        own = self._tables(step if maker is None else maker, part, purpose)
        feeds = {"x": self.plan.guidance.rows(x), **of_step(own, 0)}
        for name, table in (own if maker is None else self._tables(step, part, purpose)).items():
            if not is_of_request(name):  # the next step's gates are this step's
                feeds[f"{AHEAD}.{name}"] = np.repeat(table, self.plan.program.segment(FULL).ahead, axis=0)
        inputs = {port.name: feeds[port.name] for port in self.full.get_inputs()}
        return np.asarray(self.full.run([f"cache.{AHEAD}.1"], inputs)[0])

    def _tables(self, step: int, part: range, purpose: int) -> dict[str, NDArray[np.float32]]:
        """Return what the model makes of the conditions and of one timestep, each (1, ...) or of the request."""
        guidance, t = self.plan.guidance, self.plan.columns["t"][step : step + 1]
        request, _, _ = purposed_request(self.plan, part, purpose)
        tables = condition_tables(self.condition, t, at_step(self.plan.spec, guidance.row_conditions(request), step))
        return {**tables, **{name: table[step : step + 1] for name, table in self.plan.step_tables.items()}}


def rows_summary(plan: Plan, rows: Rows, images: int, **learned: Any) -> Approximation:
    """Return the range and the mean of weights and of shifts over the steps that reuse, for the manifest."""
    used = rows[[step.index for step in plan.program.steps if step.reads]]
    weights, shifts = np.split(used, [APPROXIMATORS[plan.options.reuse].looks_back], axis=1)
    return Approximation(
        method=plan.options.reuse,
        images=images,
        scale=_range_of(weights),
        shift=_range_of(shifts) if shifts.size else None,
        **learned,
    )


def _range_of(numbers: Rows) -> ValueRange:
    return ValueRange(least=float(numbers.min()), mean=float(numbers.mean()), largest=float(numbers.max()))
