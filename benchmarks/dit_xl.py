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
from pathlib import Path

import numpy as np
import torch
from machine import machine

import ditc
from ditc.exporter.models import random_model

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("out/xl"))
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    cost = compile_cost(options.work)
    times = step_times(options.work, options.rounds)
    manifest = ditc.load(options.work).bundle.manifest
    steps = {
        name: {"n": len(s), "median_seconds": statistics.median(s), "spread_seconds": float(np.std(s))}
        for name, s in times.items()
    }
    full, reuse, plain = (steps[name]["median_seconds"] for name in ("full", "reuse", "torch"))
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
        "ratio_trajectory_from_steps": count * plain / (computed * full + (count - computed) * reuse),
    }
    (HERE / "dit_xl.json").write_text(json.dumps(found, indent=1) + "\n")
    print(
        json.dumps({key: found[key] for key in ("compile", "step", "ratio_full_step", "ratio_trajectory_from_steps")})
    )


if __name__ == "__main__":
    main()
