"""The effect of smoothing on the error of INT8: the reference model, plain and under stress.

    python benchmarks/quality/smoothing.py

For every seed a calibration set of its own, selected as a compile selects it; for every method of smoothing and of
ranges the INT8 segment that a compile makes of it. Its noise prediction is held against the FP segment's at points of
FP trajectories whose noise no calibration used, both guidance halves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ditc.calibset import CalibSet
from ditc.compiler.calibrating import calibration_feeds
from ditc.compiler.exporting import export
from ditc.compiler.options import CompileOptions
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.planning import make_plan
from ditc.compiler.point_conditions import PointConditions
from ditc.compiler.pooling import record_pool, select
from ditc.compiler.quantizing import quantize
from ditc.compiler.smoothing import smooth
from ditc.engines.backend import runnable_path
from ditc.exporter.dit import DiT
from ditc.exporter.models import builtin_digits
from ditc.exporter.stress import Stress, stressed
from ditc.machine import machine
from ditc.program import CONDITION
from ditc.runtime.closeness import relative_error

HERE = Path(__file__).parent
MODELS: dict[str, Callable[[], DiT]] = {"plain": builtin_digits, "stressed": lambda: stressed(builtin_digits())}
SMOOTHINGS, RANGES = ("none", "smooth", "balance"), ("max", "mse", "percentile")
OPTIONS = CompileOptions(policy="none", smooth="none", points=256, pool_images=16)
EVALUATION_SEED = 1_000  # its noise is no calibration's
EVALUATION_POINTS = 200


def evaluation_points(plan: Plan, segments: Segments) -> CalibSet:
    """Return points of FP trajectories, drawn evenly from all steps."""
    held_out = replace(plan, options=plan.options.model_copy(update={"seed": EVALUATION_SEED}))
    points = record_pool(held_out, segments).calibration_set()
    chosen = np.random.default_rng(0).permutation(len(points))[:EVALUATION_POINTS]
    return points.take(np.sort(chosen))


def predictions(plan: Plan, segments: Segments, points: CalibSet) -> list[np.ndarray]:
    """Return the noise prediction at the points of each step, in the order of steps."""
    condition = plan.backend.session(segments[CONDITION])
    full = plan.backend.session(runnable_path(segments["full"], plan.backend.name))
    outputs = []
    for step in np.unique(points.step):
        at_step = points.take(np.flatnonzero(points.step == step))
        feeds = calibration_feeds(condition, at_step, PointConditions.of_plan(plan), len(at_step))
        outputs += [full.run(["out"], feed)[0][:, : plan.spec.in_channels] for feed in feeds]
    return outputs


def errors(outputs: list[np.ndarray], exact: list[np.ndarray]) -> dict[str, float]:
    """Return the error over all points, mostly of the last steps, since there INT8 errs most; and the median step's."""
    steps = [relative_error(f, e) for f, e in zip(outputs, exact, strict=True)]
    together = relative_error(np.concatenate(outputs), np.concatenate(exact))
    return {"relative_error": together, "median_step": float(np.median(steps))}


def compiled(plan: Plan, segments: Segments, calib: Path, folder: Path) -> Segments:
    """Return the segments as a compile quantizes them under the plan's settings."""
    for name, stage in (("smooth", smooth), ("quantize", quantize)):
        if name == "smooth" and plan.options.smooth == "none":
            continue
        place = folder / name
        place.mkdir()
        stage(plan, segments, calib, place)
        segments = {key: new if (new := place / path.name).is_file() else path for key, path in segments.items()}
    return segments


def measured(name: str, seeds: list[int]) -> list[dict[str, Any]]:
    """Return rows of the result: one per seed, smoothing and ranges."""
    rows = []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = MODELS[name]()
        plan = make_plan(model, OPTIONS)
        export(plan, model, folder)
        segments = {call: folder / f"{call}.onnx" for call in plan.program.calls}
        points = evaluation_points(plan, segments)
        exact = predictions(plan, segments, points)
        for seed in seeds:
            place = folder / f"seed-{seed}"
            place.mkdir()
            seeded = replace(plan, options=OPTIONS.model_copy(update={"seed": seed}))
            select(seeded, segments, place)
            for method, ranges in ((m, r) for m in SMOOTHINGS for r in RANGES):
                options = seeded.options.model_copy(update={"smooth": method, "ranges": ranges})
                with TemporaryDirectory(dir=place) as variant:
                    variant_segments = compiled(
                        replace(plan, options=options), segments, place / "calib.npz", Path(variant)
                    )
                    errors_of = errors(predictions(plan, variant_segments, points), exact)
                rows.append({"model": name, "seed": seed, "smooth": method, "ranges": ranges, **errors_of})
                print(rows[-1], flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and spread over the seeds."""
    means = []
    for model, method, ranges in ((m, s, r) for m in MODELS for s in SMOOTHINGS for r in RANGES):
        key = {"model": model, "smooth": method, "ranges": ranges}
        of_seeds = [row for row in rows if key.items() <= row.items()]
        if of_seeds:
            together = [row["relative_error"] for row in of_seeds]
            spread = {"mean": float(np.mean(together)), "least": min(together), "largest": max(together)}
            median_step = float(np.mean([row["median_step"] for row in of_seeds]))
            means.append(key | spread | {"median_step": median_step})
    return means


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path, default=HERE / "smoothing.json")
    arguments = parser.parse_args()
    rows = [row for name in arguments.models for row in measured(name, arguments.seeds)]
    report = {
        "machine": machine().model_dump(),
        "settings": OPTIONS.model_dump(),
        "stress": asdict(Stress()),
        "evaluation": {"seed": EVALUATION_SEED, "points": EVALUATION_POINTS},
        "summary": summary(rows),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
