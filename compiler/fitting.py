"""The stages that fit in a closed loop against the FP program: numbers of a reuse, and the compensation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
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
from ditc.program import AHEAD, CONDITION, FULL, REUSE_ROWS, distance_of
from ditc.runtime.approximation import Moments, Rows, fitted_rows
from ditc.runtime.compensation import ClosedLoopFit
from ditc.runtime.conditioning import at_step, condition_tables, is_of_request, of_step
from ditc.runtime.executor import Samples
from ditc.runtime.host_executor import HostExecutor
from ditc.tables import Tables

__all__ = ["approximate", "fit"]


def fit(plan: Plan, segments: Segments, compiled: Segments, tables: Tables, folder: Path) -> None:
    """Fit the compensation table in a closed loop against the FP program: compensation.safetensors."""
    count = plan.options.vc_images
    correction = ClosedLoopFit(exact_trajectory(plan, segments, count, FIT_NOISE, "fit"), plan.options.vc)
    with executor(plan, plan.program, compiled, tables, correction=correction) as runner:
        runner.last(*purposed_request(plan, range(count), FIT_NOISE))
    fitted = correction.table
    write_tables(folder / "compensation.safetensors", {"compensation.k": fitted.k, "compensation.mu": fitted.mu})


def approximate(plan: Plan, segments: Segments, compiled: Segments, tables: Tables, folder: Path) -> None:
    """Write approximate.safetensors with the rows of every step, and approximation.json with their range.

    The compiled requests are walked in lockstep. In front of a step that reuses, its numbers are fitted over all of
    them: from the sums that it will combine to the one that FP adds at that step of its own, uncached trajectory.
    """
    count, steps = plan.options.vc_images, plan.program.steps
    exact = exact_trajectory(plan, segments, count, REUSE_NOISE, "approximate")
    target = _Target.of(plan, segments)
    with _recorded(plan, compiled, {**tables, **plan.reuse_tables}) as (runner, runs):
        rows = runner.step_inputs[REUSE_ROWS]  # read when a step begins, and filled in before
        requests = start_requests(plan, runner, count, REUSE_NOISE, plan.served_at_once)
        # of each request, the last ones that made sums, the latest first
        computed: deque[list[RecordedRun]] = deque(maxlen=APPROXIMATORS[plan.options.reuse].looks_back)
        for step in steps:
            if plan.program.segment(step.segment).rows:
                sums = sorted(step.reads, key=distance_of)
                moments = Moments.empty(len(sums) + 1, rows.shape[-1])
                for (part, _), *runs_of in zip(requests, *computed, strict=True):
                    x = exact[step.index - 1][part.start : part.stop]
                    seen = [run.outputs[f"cache.{value}"] for run, value in zip(runs_of, sums, strict=True)]
                    moments = moments.add(*seen, target.sums(step.index, x, part))
                rows[step.index] = fitted_rows(plan.options.reuse, moments, count)
            for _, request in requests:
                next(request)
            if latest := [run for recorded in runs for run in recorded]:
                computed.appendleft(latest)
            for recorded in runs:
                recorded.clear()
    write_tables(folder / "approximate.safetensors", {REUSE_ROWS: rows})
    summary = _summary(plan, rows).model_dump(mode="json")
    write_json(folder / "approximation.json", summary)


@contextmanager
def _recorded(plan: Plan, compiled: Segments, tables: Tables) -> Iterator[tuple[HostExecutor, list[list[RecordedRun]]]]:
    """Yield the compiled program, and the runs that compute as they come."""
    computing = [part.name for part in plan.program.segments if part.computes]
    recorder = RecordingBackend(
        plan.backend, dict.fromkeys(computing, range(plan.options.vc_images * len(plan.program.steps)))
    )
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

    def sums(self, step: int, x: Samples, part: range) -> NDArray[np.float32]:
        """Return (rows, *branch_shape) for samples (images, ...) that are images `part` of the plan's."""
        guidance, t = self.plan.guidance, self.plan.columns["t"][step : step + 1]
        request, _, _ = purposed_request(self.plan, part, REUSE_NOISE)
        tables = condition_tables(self.condition, t, at_step(self.plan.spec, guidance.row_conditions(request), step))
        own = {name: table[step : step + 1] for name, table in self.plan.step_tables.items()}
        feeds = {"x": guidance.rows(x), **of_step({**tables, **own}, 0)}
        for name, table in {**tables, **own}.items():
            if not is_of_request(name):  # the next step's gates are this step's
                feeds[f"{AHEAD}.{name}"] = np.repeat(table, self.plan.program.segment(FULL).ahead, axis=0)
        inputs = {port.name: feeds[port.name] for port in self.full.get_inputs()}
        return np.asarray(self.full.run([f"cache.{AHEAD}.1"], inputs)[0])


def _summary(plan: Plan, rows: Rows) -> Approximation:
    """Return the range and the mean of weights and of shifts over the steps that reuse, for the manifest."""
    used = rows[[step.index for step in plan.program.steps if step.reads]]
    weights, shifts = np.split(used, [APPROXIMATORS[plan.options.reuse].looks_back], axis=1)
    return Approximation(
        method=plan.options.reuse,
        images=plan.options.vc_images,
        scale=_range_of(weights),
        shift=_range_of(shifts) if shifts.size else None,
    )


def _range_of(numbers: Rows) -> ValueRange:
    return ValueRange(least=float(numbers.min()), mean=float(numbers.mean()), largest=float(numbers.max()))
