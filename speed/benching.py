"""`ditc bench` as a function: a bundle's latency per request, step and segment, beside its peers and its limits."""

from __future__ import annotations

import json
import resource
from collections import defaultdict
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np

from ditc.engines.integer_form import arithmetic_of
from ditc.errors import CheckError, InputError
from ditc.files import atomic_write
from ditc.machine import machine
from ditc.program import CONDITION, DECODE
from ditc.progress import Progress
from ditc.requests import Request
from ditc.runtime.options import HERE, Place
from ditc.runtime.pipeline import Pipeline
from ditc.speed.bench_result import Bench, BenchedBundle, CallLatency, OutsideLatency, StepTime
from ditc.speed.latency import latency_of, with_spread
from ditc.speed.options import BenchOptions
from ditc.speed.peer_task import bench_request
from ditc.speed.roofline import Roofline
from ditc.speed.side_by_side import against_peers
from ditc.speed.tracing import trace_bundle

__all__ = ["bench_bundle"]


def bench_bundle(bundle: Path, options: BenchOptions, *, place: Place = HERE, progress: Progress) -> Bench:
    """Measure a bundle. `side_by_side.check_not_slower` holds the result's `against` to `options.fail_if_slower`.

    Raises CheckError where the median request takes longer than `options.max_seconds`.
    """
    pipe = place.load(bundle)
    if place.threads is not None and (options.roofline or options.against):
        raise InputError("peers and ceilings are measured on all cores; leave --threads out")
    if pipe.on_device and (options.roofline or options.against):
        raise InputError("peers and ceilings are measured on the processor; measure there too: --target cpu")
    with pipe:
        bench = _measured(pipe, options, progress)
    if options.roofline:
        bench = bench.model_copy(update={"roofline": _roofline(pipe, bench)})
    if options.against:
        bench = bench.model_copy(update={"against": against_peers(pipe, options, progress)})
    if options.trace is not None:
        bench = bench.model_copy(update={"trace": tuple(trace_bundle(bundle, options.trace, place))})
        written = json.dumps(bench.model_dump(mode="json"), indent=1)
        atomic_write(options.trace / "bench.json", written.encode() + b"\n")
    median, most = bench.request.median, options.max_seconds
    if most is not None and median > most:
        raise CheckError(f"the median request takes {median:.4f} s, allowed are {most:g} s (--max-seconds)")
    return bench


def _measured(pipe: Pipeline, options: BenchOptions, progress: Progress) -> Bench:
    manifest, asked = pipe.bundle.manifest, bench_request(pipe.bundle)
    for number in range(options.warmup):
        pipe.latents(asked, seed=number)
    seconds = []
    for number in range(options.requests):
        progress("requests", number, options.requests)
        start = perf_counter()
        pipe.latents(asked, seed=number)
        seconds.append(perf_counter() - start)
    progress("requests", options.requests, options.requests)
    request, calls = latency_of(seconds), _call_times(pipe, asked, options.requests)
    return Bench(
        machine=machine(),
        bundle=BenchedBundle(
            model=manifest.model.name, precision=manifest.precision, steps=len(manifest.program.steps)
        ),
        arithmetic=arithmetic_of(pipe.backend, manifest.precision),
        batch=manifest.batch,
        warmup=options.warmup,
        request=with_spread(request),
        seconds_per_image=request.median / manifest.batch,
        segments=calls.segments,
        outside_engines=calls.outside_engines,
        steps=calls.steps,
        host_peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


class _CallTimes(NamedTuple):
    """The part of a `Bench` that comes from observed requests."""

    segments: dict[str, CallLatency]
    outside_engines: OutsideLatency
    steps: tuple[StepTime, ...]


def _call_times(pipe: Pipeline, request: Request, requests: int) -> _CallTimes:
    """Observe requests: every call by itself, and the part of them that is not inside an engine.

    The conditioning is what comes before the first step, decoding what comes after the last, NumPy around them and all.
    """
    engine: dict[str, list[float]] = defaultdict(list)
    outside: list[float] = []
    steps: dict[tuple[int, float, str], list[tuple[float, float]]] = defaultdict(list)
    for number in range(requests):
        asked = perf_counter()
        for event in pipe.generate(request, seed=number):
            around = perf_counter() - asked - event.seconds
            if event.index == 0:
                engine[CONDITION].append(around)
            elif event.index == event.steps - 1 and DECODE in pipe.program.epilogue:
                engine[DECODE].append(around)
            engine[event.segment].append(event.engine_seconds)
            outside.append(event.seconds - event.engine_seconds)
            steps[event.index, event.t, event.segment].append((event.seconds, event.engine_seconds))
            asked = perf_counter()
    total = sum(sum(times) for times in engine.values()) + sum(outside)
    return _CallTimes(
        segments={name: _share(times, total) for name, times in engine.items()},
        outside_engines=OutsideLatency(**dict(_share(outside, total)), seconds_per_step=sum(outside) / len(outside)),
        steps=tuple(
            StepTime(index=index, t=t, segment=segment, seconds=whole, engine_seconds=inside)
            for (index, t, segment), times in steps.items()
            for whole, inside in [np.median(times, axis=0).tolist()]
        ),
    )


def _share(seconds: list[float], total: float) -> CallLatency:
    return CallLatency(**dict(with_spread(latency_of(seconds))), share=sum(seconds) / total)


def _roofline(pipe: Pipeline, bench: Bench) -> Roofline:
    from ditc.speed.ceilings import measured_rates
    from ditc.speed.roofline import roofline

    medians = {name: times.median for name, times in bench.segments.items()}
    return roofline(pipe.bundle, medians, measured_rates())
