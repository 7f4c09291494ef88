"""FP segments that were changed and should compute the same, held to what they were at calibration points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.calibset import CalibSet
from ditc.compiler.calibrating import calibration_feeds
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.point_conditions import PointConditions
from ditc.errors import CheckError
from ditc.host_memory import return_free_memory
from ditc.program import AHEAD, CONDITION, REUSE_ROWS
from ditc.runtime.closeness import relative_error

__all__ = ["Side", "parity_of"]

Side = tuple[Plan, Segments]  # segments, and the plan that has the tables of timesteps for them
Shape = tuple[int, ...]  # of a cached value, without the batch axis

PARITY_POINTS = 8
PARITY_TOLERANCE = 1e-4  # that of an exported segment against torch


def parity_of(exact: Side, changed: Side, calib: CalibSet, told: tuple[str, str]) -> dict[str, float]:
    """Return the largest relative error of any output of each segment, with the tables of its own side.

    `told` names what changed them, and the settings without it. Raises CheckError where that changes the function.
    """
    every = np.linspace(0, len(calib) - 1, min(PARITY_POINTS, len(calib))).round().astype(np.int64)
    points = calib.take(every[np.argsort(calib.step[every], kind="stable")])
    worst = {}
    for part in exact[0].cached_program.segments:
        before, after = (_outputs(*side, part.name, points) for side in (exact, changed))
        worst[part.name] = max(_change(after[name], before[name]) for name in before)
        if not worst[part.name] < PARITY_TOLERANCE:
            raise CheckError(
                f"segment {part.name}: {told[0]} changes its outputs by {worst[part.name]:.2g}, expected below "
                f"{PARITY_TOLERANCE:g}; compile with {told[1]}, and report this"
            )
    return worst


def _change(after: NDArray[np.float32], before: NDArray[np.float32]) -> float:
    """Return the relative error, or the norm itself where there was nothing before."""
    return relative_error(after, before) if before.any() else float(np.linalg.norm(after))


def _input(port: Any, feed: Mapping[str, NDArray[Any]], cached: Mapping[Shape, NDArray[np.float32]]) -> NDArray[Any]:
    """Return an input's own feed, for the next steps' tables those of this step, else what is cached of its shape."""
    if port.name == REUSE_ROWS:
        return np.ones(port.shape, np.float32)
    if port.name.startswith(f"{AHEAD}."):
        return np.stack([feed[port.name.removeprefix(f"{AHEAD}.")]] * port.shape[0])
    return feed[port.name] if port.name in feed else cached[tuple(port.shape[1:])]


def _outputs(plan: Plan, segments: Segments, name: str, points: CalibSet) -> dict[str, Any]:
    """Run a segment at some points, one after the other, and return all outputs; its cache holds seeded noise."""
    condition, session = (plan.backend.session(segments[each]) for each in (CONDITION, name))
    names = [port.name for port in session.get_outputs()]
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys([plan.spec.branch_shape, *plan.spec.wiring.shapes.values()])
    runs = []
    for feed in calibration_feeds(condition, points, PointConditions.of_plan(plan), 1):
        noise = {shape: rng.standard_normal((len(feed["x"]), *shape), np.float32) for shape in shapes}
        inputs = {port.name: _input(port, feed, noise) for port in session.get_inputs()}
        runs.append(session.run(names, inputs))
    return_free_memory()
    return {each: np.concatenate(parts) for each, parts in zip(names, zip(*runs, strict=True), strict=True)}
