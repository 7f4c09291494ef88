"""`ditc bench` as a function: a bundle's latency per request, step and segment, and traces of its layers."""

from __future__ import annotations

import json
import resource
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from ditc.compiler.machine import machine
from ditc.compiler.running import HERE, Place
from ditc.compiler.tracing import trace_bundle
from ditc.errors import CheckError, InputError
from ditc.files import atomic_write
from ditc.runtime.latency import latency_of
from ditc.runtime.pipeline import Pipeline

__all__ = ["bench_bundle"]

Watch = Callable[[str, int, int], None]


def bench_bundle(
    bundle: Path,
    *,
    requests: int,
    warmup: int,
    place: Place = HERE,
    trace: Path | None = None,
    most_seconds: float | None = None,
    progress: Watch,
) -> dict[str, Any]:
    """Measure `requests` full batches after `warmup` others. `trace` is a folder for layers_*.json, profile_*.json.

    Raises CheckError where the median request takes longer than `most_seconds`.
    """
    if requests < 1 or warmup < 0:
        raise InputError(f"--requests must be at least 1 and --warmup at least 0, found {requests} and {warmup}")
    with place.load(bundle) as pipe:
        found = _measured(pipe, requests, warmup, progress)
    if trace is not None:
        found["trace"] = trace_bundle(bundle, trace, place)
        atomic_write(trace / "bench.json", json.dumps(found, indent=1).encode() + b"\n")
    median = found["request"]["median"]
    if most_seconds is not None and median > most_seconds:
        raise CheckError(f"the median request takes {median:.4f} s, allowed are {most_seconds:g} s (--max-seconds)")
    return found


def _measured(pipe: Pipeline, requests: int, warmup: int, progress: Watch) -> dict[str, Any]:
    manifest = pipe.bundle.manifest
    labels = [number % manifest.model.num_classes for number in range(manifest.batch)]
    for number in range(warmup):
        pipe.latents(labels, seed=number)
    seconds = []
    for number in range(requests):
        progress("requests", number, requests)
        start = perf_counter()
        pipe.latents(labels, seed=number)
        seconds.append(perf_counter() - start)
    progress("requests", requests, requests)
    request = latency_of(seconds)
    return {
        "machine": machine(),
        "bundle": {"model": manifest.model.name, "precision": manifest.precision, "steps": len(manifest.program.steps)},
        "batch": manifest.batch,
        "warmup": warmup,
        "request": request.model_dump() | {"spread": request.spread},
        "seconds_per_image": request.median / manifest.batch,
        **_step_times(pipe, labels, requests),
        "host_peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _step_times(pipe: Pipeline, labels: list[int], requests: int) -> dict[str, Any]:
    """Observed requests: every step by itself, and the share of them that is not inside an engine."""
    engine: dict[str, list[float]] = defaultdict(list)
    outside: list[float] = []
    for number in range(requests):
        for event in pipe.generate(labels, seed=number):
            engine[event.segment].append(event.engine_seconds)
            outside.append(event.seconds - event.engine_seconds)
    total = sum(sum(times) for times in engine.values()) + sum(outside)
    return {
        "segments": {
            name: latency_of(times).model_dump() | {"share": sum(times) / total} for name, times in engine.items()
        },
        "outside_engines": latency_of(outside).model_dump() | {"share": sum(outside) / total},
    }
