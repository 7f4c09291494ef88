"""The conditions of calibration points: those of the images of the pool that the points were taken from.

With them goes what depends on a point's timestep alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import Bundle
from ditc.calibset import CalibSet
from ditc.compiler.plan import Plan
from ditc.compiler.trajectories import POOL_NOISE
from ditc.guidance import Guidance
from ditc.requests import Examples
from ditc.runtime.conditioning import at_step
from ditc.runtime.executor import streamed_request
from ditc.tables import Tables, tables_of_steps

__all__ = ["PointConditions"]


@dataclass(frozen=True)
class PointConditions:
    """The images of a pool: their examples, the seed of their noise, and how many steps they took.

    `step_tables` are what segments take a row of that depends on the timestep alone, by input, (steps, ...).
    """

    examples: Examples
    guidance: Guidance
    seed: int
    steps: int
    step_tables: Tables

    @staticmethod
    def of_plan(plan: Plan) -> PointConditions:
        steps = len(plan.program.steps)
        return PointConditions(plan.examples, plan.guidance, plan.options.seed, steps, plan.step_tables)

    @staticmethod
    def of_bundle(bundle: Bundle) -> PointConditions:
        """Those of the pool that a bundle was calibrated from."""
        manifest = bundle.manifest
        guidance = Guidance.of(manifest.model, manifest.guidance)
        steps, tables = len(manifest.program.steps), tables_of_steps(bundle.tables())
        return PointConditions(bundle.examples(), guidance, manifest.asked.seed or 0, steps, tables)

    def rows(self, points: CalibSet) -> dict[str, NDArray[Any]]:
        """Return what `condition` takes at points of one step, for all rows of the network: (rows, *shape) each."""
        assert len(np.unique(points.step)) == 1, "points of one step"
        spec = self.examples.spec
        request = self.examples.of(points.sample, points.label.tolist())
        images = [(self.seed + POOL_NOISE, int(sample)) for sample in points.sample]
        request, _, _ = streamed_request(spec, request, images, self.steps)
        return at_step(spec, self.guidance.row_conditions(request), int(points.step[0]))

    def step_rows(self, points: CalibSet) -> dict[str, NDArray[Any]]:
        """Return what segments take at points of one step that depends on the timestep alone, (...) each."""
        return {name: table[points.step[0]] for name, table in self.step_tables.items()}
