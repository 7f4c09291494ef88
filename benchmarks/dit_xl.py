"""DiT-XL/2 at 256 pixels, random weights: what its compile costs, and its bundle against torch in the same run.

    python benchmarks/dit_xl.py --work out/xl

The compile runs in a child process, whose wall time and peak resident memory are taken. Then torch float32 eager and
the bundle take a guided step in turn (batch 1, so 2 rows). Random weights say nothing about images.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import ditc
from ditc.compiler.eager import eager_images
from ditc.compiler.machine import machine
from ditc.exporter.models import random_model
from ditc.runtime.executor import seeded_noise
from ditc.runtime.samplers import sampler_table

HERE = Path(__file__).parent
SIZE = "dit-xl-2-256"
SETTINGS = "--policy fora:3 --points 16 --pool 1 --vc std --vc-images 2 --verify-images 1".split()


def compile_cost(out: Path) -> dict[str, float]:
    """Wall seconds and peak resident bytes of the compile."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "ditc.compiler", "compile", "--random", SIZE, "-o", str(out), "--force", *SETTINGS]
    subprocess.run(command, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - start, "peak_resident_bytes": peak}


def step_times(bundle: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of one guided step: torch eager, and the bundle's full and reuse steps, in turn."""
    model = random_model(SIZE)
    x = torch.randn(2, *model.spec.latent_shape)
    t, y = torch.full((2,), 500.0), torch.tensor([207, 1000])
    times: dict[str, list[float]] = {"torch": [], "full": [], "reuse": []}
    with ditc.load(bundle) as pipe, torch.inference_mode():
        model(x, t, y)
        events = pipe.generate([207], seed=0)
        for _ in range(3):
            next(events)
        for _ in range(rounds):
            start = time.perf_counter()
            model(x, t, y)
            times["torch"].append(time.perf_counter() - start)
            for _ in range(3):  # full, reuse, reuse
                event = next(events)
                times[event.segment].append(event.seconds)
    return times


def whole_runs(bundle: Path) -> dict[str, list[float]]:
    """Seconds of 50 guided steps, conditioning and all: torch eager once, the bundle before and after it."""
    model = random_model(SIZE)
    table = sampler_table(model.diffusion, model.sampler, 50)
    times: dict[str, list[float]] = {"torch": [], "bundle": []}
    with ditc.load(bundle) as pipe:
        guidance = pipe.bundle.manifest.guidance
        pipe.latents([207])

        def timed(name: str, run: Callable[[], object]) -> None:
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)

        noise, fresh = seeded_noise(0, 0, 1, model.spec.latent_shape)
        for _ in range(2):
            timed("bundle", lambda: pipe.latents([207]))
        timed("torch", lambda: eager_images(model, table, [207], noise, fresh, guidance))
        for _ in range(2):
            timed("bundle", lambda: pipe.latents([207]))
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("out/xl"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--measure-only", action="store_true", help="take the bundle that is there, keep its cost")
    options = parser.parse_args()
    before = json.loads((HERE / "dit_xl.json").read_text()) if options.measure_only else {}
    cost = before["compile"] if options.measure_only else compile_cost(options.work)
    times = step_times(options.work, options.rounds)
    manifest = ditc.load(options.work).bundle.manifest
    steps = {
        name: {"n": len(s), "median_seconds": statistics.median(s), "spread_seconds": float(np.std(s))}
        for name, s in times.items()
    }
    full, plain = (steps[name]["median_seconds"] for name in ("full", "torch"))
    whole = whole_runs(options.work)
    computed = sum(step.segment == "full" for step in manifest.program.steps)
    count = len(manifest.program.steps)
    found = {
        "machine": machine(),
        "size": SIZE,
        "settings": manifest.settings,
        "compile": cost,
        "deployed_bytes": manifest.size_bytes(reference=False),
        "reference_bytes": manifest.size_bytes(reference=True),
        "step": steps,
        "ratio_full_step": plain / full,
        "steps_computed": [computed, count],
        "whole_run_seconds": whole,
        "ratio_whole_run": whole["torch"][0] / statistics.median(whole["bundle"]),
    }
    (HERE / "dit_xl.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: found[key] for key in ("compile", "step", "ratio_full_step", "ratio_whole_run")}))


if __name__ == "__main__":
    main()
