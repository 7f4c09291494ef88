"""The effect of scales and midpoints on the error of quantization, on the reference model.

    python benchmarks/activation_scales.py

Without cache and compensation, so that nothing but quantization differs from FP; all settings share the calibration
points. Measured on noise that calibrated nothing: the squared error of what each kind of linear layer reads, over its
square, rounded with the setting's scales along FP trajectories; and the PSNR of finished images against FP.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ditc.bundle import Bundle, read_tables
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.planning import make_plan
from ditc.compiler.quantizing import quantize
from ditc.compiler.trajectories import executor
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.engines.recording import RecordingBackend
from ditc.exporter.models import builtin_digits
from ditc.exporter.onnx_files import load_graph, save_sharing_data
from ditc.machine import machine
from ditc.quantize.scale_table import ScaleTable
from ditc.quantize.scales import activation_probe
from ditc.requests import Request
from ditc.runtime.closeness import psnr_db
from ditc.runtime.executor import seeded_noise
from ditc.runtime.pipeline import load

HERE = Path(__file__).parent
SETTINGS = [*product(("static", "per-step"), ("zero", "bounded")), ("dynamic", "zero")]
LABELS = list(range(10))
SEED = 12345


def rounded(x: np.ndarray, table: ScaleTable, path: str, step: int) -> np.ndarray:
    """Return an activation in a setting's integers, as numbers again."""
    if table.binding == "dynamic":  # DynamicQuantizeLinear: uint8 from the least to the largest value
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        scale = (high - low) / 255
        zero = np.clip(np.round(-low / scale), 0, 255)
        return (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale
    scale = table.steps[path][step] if table.steps else table.scales[path]
    middles = table.midpoints.get(path, (0,))
    middle = middles[step] if len(middles) > 1 else middles[0]
    return (np.clip(np.round(x / scale) - middle, -128, 127) + middle) * scale


Probed = tuple[int, str, np.ndarray]  # step, layer, what it reads


def probed(bundle: Bundle) -> Iterator[Probed]:
    """Yield the activations that linear layers read along FP trajectories."""
    recorder = RecordingBackend(OnnxRuntimeBackend(), {"full": range(len(bundle.manifest.program.steps))})
    with load(bundle.path, backend=recorder, reference=True) as pipe:
        pipe.latents(LABELS, seed=SEED)
    reference = bundle.reference_path("full")
    model = load_graph(reference)
    readers = activation_probe(model)
    probe = reference.with_name("probe.onnx")
    save_sharing_data(model, probe)
    session = OnnxRuntimeBackend().session(probe)
    probe.unlink()
    for run in recorder.runs["full"]:
        for paths, x in zip(readers.values(), session.run(list(readers), dict(run.inputs)), strict=True):
            yield run.call, paths[0], x


def input_errors(values: Iterator[Probed], tables: list[ScaleTable]) -> list[dict[str, float]]:
    """Return squared error over square for each kind of layer, under every table."""
    errors: list[dict[str, float]] = [defaultdict(float) for _ in tables]
    squares: dict[str, float] = defaultdict(float)
    for step, path, x in values:
        kind = path.rpartition(".")[2]
        squares[kind] += float((x.astype(np.float64) ** 2).sum())
        for of_table, table in zip(errors, tables, strict=True):
            of_table[kind] += float(((rounded(x, table, path, step) - x).astype(np.float64) ** 2).sum())
    return [{kind: error / squares[kind] for kind, error in of_table.items()} for of_table in errors]


def images(plan: Plan, segments: Segments, tables: dict[str, Any], batches: int) -> np.ndarray:
    """Return finished images, (10 * batches, 1, 8, 8)."""
    with executor(plan, plan.program, segments, tables) as runner:
        starts = [seeded_noise(SEED + n, 0, len(LABELS), plan.spec.latent_shape) for n in range(batches)]
        return np.concatenate([runner.last(Request.of(plan.spec, LABELS), noise, fresh) for noise, fresh in starts])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, default=400)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batches", type=int, default=10, help="of ten images that are compared")
    parser.add_argument("--ranges", default="mse")
    parser.add_argument("--out", type=Path, default=HERE / "activation_scales.json")
    options = parser.parse_args()
    base = CompileOptions(policy="none", smooth="none", vc="none", verify_images=1, batch=10, steps=options.steps)
    base = base.model_copy(update={"points": options.points, "ranges": options.ranges})
    with TemporaryDirectory() as folder:
        bundle = compile_model("digits", Path(folder) / "b", base)
        segments = {name: bundle.reference_path(name) for name in bundle.manifest.program.calls}
        calib, model = bundle.path / "calib" / "calib.npz", builtin_digits()
        exact = images(make_plan(model, base), segments, {}, options.batches)
        rows, tables = [], []
        for scales, midpoint in SETTINGS:
            plan = make_plan(model, base.model_copy(update={"scales": scales, "midpoint": midpoint}))
            place = Path(folder) / f"{scales}-{midpoint}"
            place.mkdir()
            quantize(plan, segments, calib, place)
            step_tables = read_tables(place / "scales.safetensors")
            quantized_images = images(plan, {**segments, "full": place / "full.onnx"}, step_tables, options.batches)
            psnr = psnr_db(quantized_images, exact)
            rows.append({"scales": scales, "midpoint": midpoint, "psnr_db": {"mean": psnr.mean(), "std": psnr.std()}})
            tables.append(ScaleTable.model_validate_json((place / "scales.json").read_bytes()))
        errors = input_errors(probed(bundle), tables)
    for row, error in zip(rows, errors, strict=True):
        row["input_error"] = error
        print(json.dumps(row))
    given = {name: value for name, value in vars(options).items() if name != "out"}
    settings = {"model": "digits", "guidance": base.cfg, "images": len(exact), "seed": SEED, **given}
    results = {"machine": machine().model_dump(), **settings, "rows": rows}
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
