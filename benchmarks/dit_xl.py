"""DiT-XL/2 at 256 pixels, random weights: what its compile and serving cost, and its bundle against its peers.

    python benchmarks/dit_xl.py --work out/xl [--measure-only] [--no-openvino]

The compile runs in a child process, whose wall time and peak resident memory are taken. Then, in one run and in turn: a
guided step (batch 1, so 2 rows) and whole runs of 50 steps of torch float32 eager, torch bfloat16 eager, OpenVINO with
NNCF's INT8 (where both are installed; steps only, its run is 50 of them) and the bundle at several cache intervals.
Random weights say something about time and memory and nothing about images.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ditc
from ditc.bundle import Bundle, open_bundle, seal_bundle
from ditc.calib_data.calibset import CalibSet
from ditc.compiler.eager import eager_images
from ditc.compiler.machine import machine
from ditc.compiler.stages import calibration_feeds
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.exporter.models import random_model
from ditc.program import program_from_schedule
from ditc.runtime.executor import seeded_noise
from ditc.runtime.samplers import sampler_table
from ditc.schedule import schedule_for

HERE = Path(__file__).parent
SIZE = "dit-xl-2-256"
SETTINGS = "--policy fora:4 --points 64 --pool 5 --vc none --verify-images 1".split()
INTERVALS = (3, 4, 5)
SERVE = """
import json, sys, time
start = time.perf_counter()
import ditc
from ditc.bundle import open_bundle
imported = time.perf_counter()
open_bundle(__import__("pathlib").Path(sys.argv[1]))
hashed = time.perf_counter()
with ditc.load(sys.argv[1]) as pipe:
    opened = time.perf_counter()
    pipe.latents([207])
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith(("VmRSS", "VmHWM")))
print(json.dumps({
    "hashing_seconds": hashed - imported,
    "opening_seconds": opened - hashed - (hashed - imported),
    "resident_bytes": int(status["VmRSS"].split()[0]) * 1024,
    "peak_resident_bytes": int(status["VmHWM"].split()[0]) * 1024,
}))
"""


def compile_cost(out: Path) -> dict[str, float]:
    """Wall seconds and peak resident bytes of the compile."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "ditc.compiler", "compile", "--random", SIZE, "-o", str(out), "--force", *SETTINGS]
    subprocess.run(command, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - start, "peak_resident_bytes": peak}


def serving_cost(bundle: Path) -> dict[str, float]:
    """Opening time and memory of a process that serves one image."""
    done = subprocess.run([sys.executable, "-c", SERVE, str(bundle)], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def at_interval(bundle: Bundle, interval: int) -> Path:
    """The bundle with another cache interval beside it: the same segments, hard-linked, under another program.

    Scales stay those of the first schedule, which decides nothing about speed.
    """
    out = bundle.path.with_name(f"{bundle.path.name}-fora{interval}")
    manifest = bundle.manifest
    steps = [step.t for step in manifest.program.steps]
    schedule = schedule_for(f"fora:{interval}", manifest.model, len(steps))
    program = program_from_schedule(schedule, steps, manifest.model.branches)
    for name in manifest.files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if not (out / name).exists():
            os.link(bundle.path / name, out / name)
    seal_bundle(out, manifest.model_copy(update={"program": program}))
    return out


def openvino_step(bundle: Bundle) -> Callable[[], object] | str:
    """A guided step of the FP segment quantized by NNCF, or why there is none."""
    try:
        import nncf
        import openvino
    except ImportError as e:
        return f"skipped: {e}"
    condition = OnnxRuntimeBackend().session(bundle.segment_path("condition"))
    calib = CalibSet.load(bundle.path / "calib" / "calib.npz").take(np.arange(2))
    feeds = list(calibration_feeds(condition, calib, bundle.manifest.model.null_label, points_at_once=1))
    core = openvino.Core()
    model = core.read_model(str(bundle.reference_path("full")))
    for output in [o for o in model.outputs if o.any_name != "out"]:
        model.remove_result(next(r for r in model.get_results() if r.output(0).names == output.names))
    model.reshape({name: list(array.shape) for name, array in feeds[0].items()})
    quantized = nncf.quantize(
        model,
        nncf.Dataset(feeds),
        subset_size=len(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        fast_bias_correction=True,
    )
    request = core.compile_model(quantized, "CPU", {"PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
    return lambda: request.infer(feeds[0])


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def step_times(bundle: Path, peers: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one guided step of every peer and of the bundle's full and reuse steps, in turn."""
    times: dict[str, list[float]] = {name: [] for name in (*peers, "full", "reuse")}
    with ditc.load(bundle) as pipe, torch.inference_mode():

        def events() -> Iterator[Any]:
            while True:
                yield from pipe.generate([207], seed=0)

        walk = events()
        for run in peers.values():
            run()
        for _ in range(rounds):
            for name, run in peers.items():
                times[name].append(timed(run))
            for _ in range(4):  # one interval of the cache: full, reuse, reuse, reuse
                event = next(walk)
                times[event.segment].append(event.seconds)
    return times


def whole_runs(bundles: dict[str, Path], models: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of 50 guided steps, conditioning and all: each torch model once, the bundles before and after."""
    times: dict[str, list[float]] = {name: [] for name in (*models, *bundles)}

    def run_bundles() -> None:
        for name, path in bundles.items():
            with ditc.load(path) as pipe:
                pipe.latents([207])
                times[name] += [timed(lambda pipe=pipe: pipe.latents([207])) for _ in range(2)]

    run_bundles()
    for name, model in models.items():
        table = sampler_table(model.diffusion, model.sampler, 50)
        noise, fresh = seeded_noise(0, 0, 1, model.spec.latent_shape)
        times[name].append(timed(lambda m=model, t=table, n=noise, f=fresh: eager_images(m, t, [207], n, f, 1.5)))
    run_bundles()
    return times


def in_bfloat16(model: Any) -> Any:
    """The model with bfloat16 weights and products; what float32 arithmetic is left between them is cast back."""
    model = model.to(torch.bfloat16)
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(torch.bfloat16),))
    return model


def summary(seconds: list[float]) -> dict[str, float]:
    return {"n": len(seconds), "median_seconds": statistics.median(seconds), "spread_seconds": float(np.std(seconds))}


def steps_of(work: Path, rounds: int, openvino: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(times and ratios of single steps, the torch models)."""
    models = {"torch float32": random_model(SIZE), "torch bfloat16": in_bfloat16(random_model(SIZE))}
    spec = models["torch float32"].spec
    x, t, y = torch.randn(2, *spec.latent_shape), torch.full((2,), 500.0), torch.tensor([207, 1000])
    peers: dict[str, Callable[[], object]] = {
        "torch float32": lambda: models["torch float32"](x, t, y),
        "torch bfloat16": lambda: models["torch bfloat16"](x.to(torch.bfloat16), t, y),
    }
    vino = openvino_step(open_bundle(work)) if openvino else "skipped: --no-openvino"
    if not isinstance(vino, str):
        peers["openvino nncf int8"] = vino
    steps = {name: summary(times) for name, times in step_times(work, peers, rounds).items()}
    full = steps["full"]["median_seconds"]
    return {
        "steps": steps,
        "openvino": vino
        if isinstance(vino, str)
        else "NNCF INT8, its own choice of float type; a run is 50 such steps",
        "ratio_full_step": {name: steps[name]["median_seconds"] / full for name in peers},
        "reuse_share_of_full": steps["reuse"]["median_seconds"] / full,
    }, models


def measured(work: Path, rounds: int, openvino: bool) -> dict[str, Any]:
    bundle = open_bundle(work)
    found, models = steps_of(work, rounds, openvino)
    bundles = {f"fora:{n}": at_interval(bundle, n) for n in INTERVALS}
    whole = {name: summary(times) for name, times in whole_runs(bundles, models).items()}
    seconds = {name: times["median_seconds"] for name, times in whole.items()}
    if "openvino nncf int8" in found["steps"]:
        seconds["openvino nncf int8"] = 50 * found["steps"]["openvino nncf int8"]["median_seconds"]
    return found | {
        "whole_runs": whole,
        "ratio_whole_run": {
            name: {peer: seconds[peer] / seconds[name] for peer in seconds if peer not in bundles} for name in bundles
        },
        "serving": serving_cost(work),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("out/xl"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--measure-only", action="store_true", help="take the bundle that is there, keep its cost")
    parser.add_argument("--no-openvino", action="store_true")
    parser.add_argument("--steps-only", action="store_true", help="single steps of a bundle that is there, in minutes")
    options = parser.parse_args()
    if options.steps_only:
        found = {
            "machine": machine(),
            "size": SIZE,
            **steps_of(options.work, options.rounds, not options.no_openvino)[0],
        }
        (HERE / "dit_xl_steps.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({key: found[key] for key in ("steps", "ratio_full_step", "openvino")}, indent=1))
        return
    cost = None if options.measure_only else compile_cost(options.work)
    manifest = open_bundle(options.work).manifest
    before = json.loads((HERE / "dit_xl.json").read_text())
    if options.measure_only and before["settings"] == manifest.settings:
        cost = before["compile"]
    found = {
        "machine": machine(),
        "size": SIZE,
        "settings": manifest.settings,
        "compile": cost,
        "deployed_bytes": manifest.size_bytes(reference=False),
        "reference_bytes": manifest.size_bytes(reference=True),
        **measured(options.work, options.rounds, not options.no_openvino),
    }
    (HERE / "dit_xl.json").write_text(json.dumps(found, indent=1) + "\n")
    shown = ("compile", "steps", "ratio_full_step", "reuse_share_of_full", "ratio_whole_run", "serving")
    print(json.dumps({key: found[key] for key in shown}, indent=1))


if __name__ == "__main__":
    main()
