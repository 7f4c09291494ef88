"""The next step as two that computed foretell it: the error of holding, extrapolating, and of fitted weights.

    python benchmarks/quality/extrapolation.py [--out benchmarks/quality/extrapolation.json]

On trajectories of the FP program without a cache, at every step that would reuse: the sum that the branches add,
against S + w (S - S_before). w is 0 (hold), the one of `--reuse taylor`, half of that, or least squares over other
images: one number per step, or one per step and channel. So what is seen is extrapolation itself: no INT8, and no error
of earlier reuses.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from cells import BASE, SAMPLERS
from numpy.typing import NDArray

from ditc.compiler.exporting import export
from ditc.compiler.options import CompileOptions
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.planning import make_plan
from ditc.compiler.trajectories import exact_trajectory
from ditc.exporter.models import builtin_digits
from ditc.files import atomic_write
from ditc.machine import machine
from ditc.program import AHEAD, CONDITION, EXTRAPOLATE, FULL, distance_of
from ditc.runtime.conditioning import condition_tables
from ditc.runtime.executor import Samples

HERE = Path(__file__).parent
INTERVALS, SEEDS = (2, 3, 5, 8), (0, 1, 2)
IMAGES, FITTED = 96, 64  # of a seed: so many fit the weights, the others are what errors are taken of
PURPOSE = 5_000_011  # noise of its own
Sums = NDArray[np.float32]


@dataclass(frozen=True)
class Exact:
    """The FP network at the samples of its own, uncached trajectory."""

    plan: Plan
    samples: list[Samples]
    tables: dict[str, Sums]
    full: Any

    @staticmethod
    def of(plan: Plan, segments: Segments) -> Exact:
        samples = exact_trajectory(plan, segments, IMAGES, PURPOSE, "exact")
        condition, full = (plan.backend.session(segments[name]) for name in (CONDITION, FULL))
        conditions = plan.guidance.row_conditions(plan.request(IMAGES))
        return Exact(plan, samples, condition_tables(condition, plan.columns["t"], conditions), full)

    def sums(self, step: int, gates: int) -> Sums:
        """Return the sum of all branches at a step's sample, with the gates of step `gates`: (rows, *branch_shape)."""
        feeds = {"x": self.plan.guidance.rows(self.samples[step - 1])}
        for name, table in self.tables.items():
            feeds[name] = table[step]
            feeds[f"{AHEAD}.{name}"] = np.repeat(
                table[gates : gates + 1], self.plan.program.segment(FULL).ahead, axis=0
            )
        inputs = {port.name: feeds[port.name] for port in self.full.get_inputs()}
        return np.asarray(self.full.run([f"cache.{AHEAD}.1"], inputs)[0])


def errors(plan: Plan, exact: Exact) -> dict[str, float]:
    """Return relative errors by what w is, and the least squares weight; means over the steps that extrapolate."""
    errors_of = defaultdict(list)
    rows = np.arange(2 * IMAGES) % IMAGES  # of which image; both guidance halves
    fits, held_out = rows < FITTED, rows >= FITTED
    t = [step.t for step in plan.program.steps]
    for step in plan.program.steps:
        if step.segment != EXTRAPOLATE:
            continue
        near, before = (step.index - back for back in sorted(map(distance_of, step.reads)))
        if before == 0:  # the first sample is noise, not a trajectory's
            continue
        wanted, last, earlier = (exact.sums(each, step.index) for each in (step.index, near, before))
        change, missing = last - earlier, wanted - last
        products = (change[fits] * missing[fits], change[fits] ** 2)
        scalar, channel = ((a / b) for a, b in ((p.sum() for p in products), (p.sum((0, 1)) for p in products)))
        taylor = (t[near] - t[step.index]) / (t[before] - t[near])
        weights = {"hold": 0.0, "taylor": taylor, "half": taylor / 2, "fitted": scalar, "fitted per channel": channel}
        norm = np.linalg.norm(wanted[held_out])
        for name, weight in weights.items():
            errors_of[name].append(np.linalg.norm((missing - weight * change)[held_out]) / norm)
        errors_of["fitted weight / taylor's"].append(scalar / taylor)
    return {name: float(np.mean(values)) for name, values in errors_of.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=HERE / "extrapolation.json")
    options, rows = parser.parse_args(), []
    for interval, sampler in product(INTERVALS, SAMPLERS):
        with TemporaryDirectory(dir=HERE) as temporary:
            for seed in SEEDS:
                settings = CompileOptions(
                    cfg=BASE["cfg"],
                    sampler=sampler,
                    policy=f"fora:{interval}",
                    precision="fp32",
                    reuse="taylor",
                    seed=seed,
                )
                plan, folder = make_plan(builtin_digits(), settings), Path(temporary)
                if seed == SEEDS[0]:
                    export(plan, builtin_digits(), folder)
                exact = Exact.of(plan, {call: folder / f"{call}.onnx" for call in plan.program.calls})
                rows.append({"policy": f"fora:{interval}", "sampler": sampler, "seed": seed, **errors(plan, exact)})
                print(rows[-1], flush=True)
    results = {"machine": machine().model_dump(), "images": IMAGES, "fitted": FITTED, "rows": rows}
    atomic_write(options.out, json.dumps(results, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
