"""The stage that selects: the FP program's points are recorded, and calibration points picked from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ditc.calib_data.pool import Pool, Visit, pool_from_visits
from ditc.calib_data.selection import select_points
from ditc.compiler.calibrating import OBSERVED, observation
from ditc.compiler.observing import ObservedPool, Observer, PeakObserver
from ditc.compiler.plan import LARGEST_BATCH, Plan, Segments
from ditc.compiler.trajectories import POOL_NOISE, executor, start_requests
from ditc.compiler.work import write_json
from ditc.engines.backend import Backend
from ditc.runtime.host_executor import HostExecutor

__all__ = ["record_pool", "select"]


def record_pool(
    plan: Plan, segments: Segments, backend: Backend | None = None, observer: Observer | PeakObserver | None = None
) -> Pool:
    """Record the points that the FP program visits, cached as in deployment unless the options ask for the uncached.

    An `observer` keeps what the `backend` that it watches has shown it at each of them.
    """
    wanted = plan.recorded_steps
    at_most = LARGEST_BATCH if observer is None else plan.probed_at_once
    count = plan.options.pool_size(len(wanted))
    labels = np.array(plan.labels(count))  # zeros without classes

    def visits(runner: HostExecutor) -> Iterator[Visit]:
        for part, request in start_requests(plan, runner, count, POOL_NOISE, at_most):
            for event in request:
                plan.progress("pool", part.start * event.steps + event.index * len(part), count * event.steps)
                if event.index in wanted:
                    if observer is not None:
                        observer.keep(event.index, part.start)
                    yield Visit(event.index, event.t, part.start, labels[part.start : part.stop], event.before)

    with executor(plan, plan.recorded_program, segments, plan.reuse_tables, backend) as runner:
        return pool_from_visits(visits(runner))


def select(plan: Plan, segments: Segments, folder: Path) -> None:
    """Record the pool and pick the calibration set from it: calib.npz, and pool.json with its size.

    Where the histograms of all its points fit, they are taken on the way: observed.npz. A selector that needs it is
    told what linear layers read at each point.
    """
    watched = observation(plan, segments)
    if watched is None:
        pool = record_pool(plan, segments)
    else:
        backend, observer = watched
        try:
            pool = record_pool(plan, segments, backend, observer)
        finally:
            backend.probe.unlink()
        pool = pool.with_peaks(observer.peaks)
        if isinstance(observer, Observer):
            ObservedPool.of(observer).save(folder / OBSERVED)
    plan.progress("select", 0, 1)
    chosen = select_points(plan.options.select, pool, plan.options.selection())
    chosen.save(folder / "calib.npz")
    write_json(folder / "pool.json", {"points": len(pool), "images": int(pool.sample.max()) + 1})
