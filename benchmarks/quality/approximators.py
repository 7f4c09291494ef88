"""The worth of each approximator of reused features on the reference model, W8A8, with and without compensation.

Every cell is one compile (its seed is that of calibration and fits) and `--images` images on the same noise for all
cells. Three measures against the FP, uncached program:

    psnr_db     of the finished images, with an interval over images, and paired: less that of `hold`
    trajectory  relative error of the samples, mean over the steps
    eps         relative error of the noise prediction at the steps that reuse, FP's on the very same samples

    PYTHONPATH=... python benchmarks/quality/approximators.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ditc
from ditc.approximators import APPROXIMATORS
from ditc.bundle import Bundle
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.engines.recording import RecordingBackend
from ditc.exporter.onnx_files import load_graph, save_graph
from ditc.machine import machine
from ditc.program import FULL
from ditc.quality.bootstrap import LEVEL, bootstrapped, estimates
from ditc.quantize.segment_outputs import keep_outputs
from ditc.runtime.closeness import psnr_db, relative_error
from ditc.runtime.executor import Samples
from ditc.runtime.pipeline import Pipeline

HERE = Path(__file__).parent
OPTIONS = CompileOptions(points=200, smooth="none", vc="std", vc_images=64, verify_images=1, batch=64)
NOISE_SEED = 77
EPS_IMAGES = 32
ROUNDS = 1000
EVERY_RUN = range(1 << 30)


def walked(pipe: Pipeline, images: int) -> list[Samples]:
    """Return the samples after every step, each (images, channels, height, width)."""
    steps: list[list[Samples]] = [[] for _ in pipe.program.steps]
    for first in range(0, images, OPTIONS.batch):
        labels = pipe.bundle.manifest.model.labels_in_turn(first, min(OPTIONS.batch, images - first))
        for event in pipe.generate(labels, seed=NOISE_SEED, first=first):
            steps[event.index].append(event.x)
    return [np.concatenate(parts) for parts in steps]


def eps_error(bundle: Bundle) -> float:
    """Return the mean over the steps that reuse of the prediction's error, without compensation."""
    recorder = RecordingBackend(OnnxRuntimeBackend(), dict.fromkeys(("reuse", "extrapolate"), EVERY_RUN))
    with TemporaryDirectory() as folder:
        model = load_graph(bundle.reference_path(FULL))
        keep_outputs(model, [value for value in model.graph.outputs if value.name == "out"])
        save_graph(model, Path(folder) / "full.onnx")
        exact = OnnxRuntimeBackend().session(Path(folder) / "full.onnx")
    with Pipeline(bundle, backend=recorder, compensation=False) as pipe:
        for _ in pipe.generate(bundle.manifest.model.labels_in_turn(0, EPS_IMAGES), seed=NOISE_SEED):
            pass
    errors = []
    for run in (run for runs in recorder.runs.values() for run in runs):
        feeds = {port.name: run.inputs[port.name] for port in exact.get_inputs()}
        errors.append(relative_error(run.outputs["out"], exact.run(["out"], feeds)[0]))
    return float(np.mean(errors))


def estimate_of(values: NDArray[np.float64]) -> dict[str, float]:
    """Return the mean over images with its bootstrap interval."""
    n = len(values)
    means = bootstrapped(lambda counts: counts @ values[:, None] / n, n, ROUNDS, 0)
    (row,) = estimates(np.array([values.mean()]), means)
    return {"mean": row.value, "low": row.low, "high": row.high}


def cells_of(interval: int, seed: int, images: int, exact: Sequence[Samples] | None) -> tuple[Any, list[Any]]:
    """Return the FP samples, made where they are None, and the cells of one interval and seed."""
    rows: list[dict[str, Any]] = []
    held: dict[str, NDArray[np.float64]] = {}
    for reuse in APPROXIMATORS:
        with TemporaryDirectory() as folder:
            settings = {"policy": f"fora:{interval}", "reuse": reuse, "seed": seed}
            bundle = compile_model("digits", Path(folder) / "b", OPTIONS.model_copy(update=settings))
            if exact is None:
                with ditc.load(bundle.path, reference=True) as pipe:
                    exact = walked(pipe, images)
            eps = eps_error(bundle)
            for vc in ("none", "std"):
                with ditc.load(bundle.path, compensation=vc != "none") as pipe:
                    samples = walked(pipe, images)
                psnr = psnr_db(samples[-1].clip(-1, 1), exact[-1].clip(-1, 1))
                gain = psnr - held.setdefault(vc, psnr)
                errors = [relative_error(a, b) for a, b in zip(samples, exact, strict=True)]
                row = {"interval": interval, "reuse": reuse, "vc": vc, "seed": seed, "n": images}
                row |= {"psnr_db": estimate_of(psnr), "gain_db": estimate_of(gain)}
                row |= {"trajectory": float(np.mean(errors)), "eps": eps, "worse_than_hold": float((gain < 0).mean())}
                row |= {"std_ratio": float(samples[-1].std() / exact[-1].std())}
                rows.append(row)
                print(json.dumps(row), flush=True)
    return exact, rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--intervals", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--out", type=Path, default=HERE / "approximators.json")
    arguments = parser.parse_args()
    start, rows, exact = perf_counter(), [], None
    for seed in arguments.seeds:
        for interval in arguments.intervals:
            exact, cells = cells_of(interval, seed, arguments.images, exact)
            rows += cells
    report = {
        "machine": machine().model_dump(),
        "settings": OPTIONS.model_dump(),
        "evaluation": {"noise_seed": NOISE_SEED, "eps_images": EPS_IMAGES, "rounds": ROUNDS, "level": LEVEL},
        "seconds": perf_counter() - start,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
