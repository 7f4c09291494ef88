"""The conditions of calibration points: those of the images of the pool that the points were taken from."""

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

__all__ = ["PointConditions"]


@dataclass(frozen=True)
class PointConditions:
    """The images of a pool: their examples, the seed of their noise, and how many steps they took."""

    examples: Examples
    guidance: Guidance
    seed: int
    steps: int

    @staticmethod
    def of_plan(plan: Plan) -> PointConditions:
        return PointConditions(plan.examples, plan.guidance, plan.options.seed, len(plan.program.steps))

    @staticmethod
    def of_bundle(bundle: Bundle) -> PointConditions:
        """Those of the pool that a bundle was calibrated from."""
        manifest = bundle.manifest
        guidance = Guidance.of(manifest.model, manifest.guidance)
        return PointConditions(bundle.examples(), guidance, manifest.asked.seed or 0, len(manifest.program.steps))

    def rows(self, points: CalibSet) -> dict[str, NDArray[Any]]:
        """Return what `condition` takes at points of one step, for all rows of the network: (rows, *shape) each."""
        assert len(np.unique(points.step)) == 1, "points of one step"
        spec = self.examples.spec
        request = self.examples.of(points.sample, points.label.tolist())
        images = [(self.seed + POOL_NOISE, int(sample)) for sample in points.sample]
        request, _, _ = streamed_request(spec, request, images, self.steps)
        return at_step(spec, self.guidance.row_conditions(request), int(points.step[0]))
