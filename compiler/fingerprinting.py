"""The last stage of a compile: what its segments give, for other machines to be held to (`runtime.fingerprint`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from ditc.compiler.plan import Plan, Segments
from ditc.compiler.trajectories import executor, purposed_request
from ditc.engines.backend import lowered_path
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.precision import quantized
from ditc.program import DECODE
from ditc.requests import Request
from ditc.runtime.executor import Executor, Samples, seeded_noise
from ditc.runtime.fingerprint import PORTABLE, TYPED, Fingerprint, Observer, expected, observer, steps_to_keep
from ditc.tables import Tables

__all__ = ["fingerprint"]

ON_PROCESSORS, ON_DEVICES = ("f32", "bf16"), ("f16",)  # types around the integers
NOISE = 4_000_003  # the first image of those that fit a reuse: what is compared here is not fitted to it


def fingerprint(plan: Plan, segments: Segments, tables: Tables, folder: Path) -> None:
    """Let one image walk the compiled program, and write what the segments give on its way: FINGERPRINT.

    ONNX Runtime's own form of them is kept apart where it gives something else than the portable one: scales that are
    measured at run time are those of its own operator. A form for GPUs is run too where there is one, in its types.
    """
    integers = quantized(plan.options.precision)
    apart = replace(plan.backend, name=PORTABLE)  # there is no form of that name, so it takes the portable one
    typed = {name: lowered_path(path, "trt") for name, path in segments.items()}
    typed = {name: path for name, path in typed.items() if path.is_file()}
    image = next((place for place, label in enumerate(plan.labels(2)) if label != plan.spec.null_label), 0)
    request, _, _ = purposed_request(plan, range(image, image + 1), NOISE)
    rests = ON_PROCESSORS if typed else ON_PROCESSORS + ON_DEVICES
    with _observing(plan, segments, request, tables) as (runner, observe):
        samples = _on_its_way(plan, runner, request)
        own = expected(observe, samples, rests, integers=integers)
    forms = {PORTABLE: own}
    if any(lowered_path(path, plan.backend.name).is_file() for path in segments.values()):
        with _observing(plan, segments, request, tables, apart) as (_, observe):
            if not own.holds(observe(samples)):
                forms = {plan.backend.name: own, PORTABLE: expected(observe, samples, rests, integers=integers)}
    if typed:
        with _observing(plan, typed, request, tables) as (_, observe):
            forms[TYPED] = expected(observe, samples, ON_DEVICES, integers=integers)
    Fingerprint(request, samples, forms).save(folder)


@contextmanager
def _observing(
    plan: Plan,
    segments: Segments,
    request: Request,
    tables: Tables,
    backend: OnnxRuntimeBackend | None = None,
) -> Iterator[tuple[Executor, Observer]]:
    """Yield an executor over one form of the segments, and what observes them."""
    with executor(plan, plan.program, segments, tables, backend) as runner:
        yield runner, observer(runner, request, _decoder(plan, segments))


def _on_its_way(plan: Plan, runner: Executor, request: Request) -> dict[int, Samples]:
    """Return the image's samples in front of steps that are kept, and the finished one under the number of steps."""
    noise, fresh = seeded_noise(plan.options.seed + NOISE, 0, 1, plan.spec.latent_shape)
    steps, samples = set(steps_to_keep(plan.program)), dict[int, Samples]()
    for event in runner.run(request, noise, fresh):
        plan.progress("fingerprint", event.index, event.steps)
        if event.index in steps:
            samples[event.index] = event.before
    return samples | {event.steps: event.x}


def _decoder(plan: Plan, segments: Segments) -> Callable[[Samples], Samples] | None:
    """Return a function from a latent to its image in [-1, 1]; None where nothing is decoded."""
    if DECODE not in segments:
        return None
    session = plan.backend.session(segments[DECODE])
    return lambda latent: np.asarray(np.clip(session.run(["image"], {"latent": latent})[0], -1, 1))
