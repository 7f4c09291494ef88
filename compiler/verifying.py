"""The stage that verifies: the compiled program on fresh noise, held to the FP one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ditc.compiler.plan import Plan, Segments
from ditc.compiler.trajectories import VERIFY_NOISE, exact_trajectory, executor, start_requests
from ditc.compiler.work import write_json
from ditc.runtime.closeness import trajectory_comparison
from ditc.runtime.executor import Samples
from ditc.tables import Tables

__all__ = ["verify"]


def verify(plan: Plan, segments: Segments, compiled: Segments, tables: Tables, folder: Path) -> None:
    """Measure the compiled program against the FP one on fresh noise: verify.json."""
    count = plan.options.verify_images
    exact = exact_trajectory(plan, segments, count, VERIFY_NOISE, "verify")
    steps: list[list[Samples]] = [[] for _ in exact]
    with executor(plan, plan.program, compiled, tables) as runner:
        for _, request in start_requests(plan, runner, count, VERIFY_NOISE, plan.served_at_once):
            for event in request:
                steps[event.index].append(event.x)
    verification = trajectory_comparison([np.concatenate(parts) for parts in steps], exact)
    write_json(folder / "verify.json", verification.model_dump(mode="json"))
