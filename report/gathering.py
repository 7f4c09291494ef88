"""`ditc report` as a function: everything a person wants to see of a bundle, gathered into one value and two files."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

import ditc
from ditc.bundle import Bundle, open_bundle
from ditc.engines.integer_form import arithmetic_of
from ditc.engines.targets import backend_for
from ditc.errors import DitcError, InputError, one_line
from ditc.files import atomic_write
from ditc.machine import machine
from ditc.progress import Progress, silent
from ditc.quality.evaluating import check_not_worse, evaluate_bundle
from ditc.report.calibration import activations_of, calibration_of
from ditc.report.facts import Report, ReportSettings, SegmentTime, Skipped, Speed
from ditc.report.options import ReportOptions
from ditc.report.page import page_from_report
from ditc.report.samples import sample_parts
from ditc.runtime.options import HERE, Place
from ditc.speed.benching import bench_bundle
from ditc.speed.latency import Latency
from ditc.speed.side_by_side import check_not_slower

__all__ = ["check_page_path", "check_report", "default_page", "report_bundle", "write_report"]

DEFAULT_TARGET = "cpu"
USUAL_PEER = "onnxruntime-f32"


def report_bundle(path: Path, options: ReportOptions, *, place: Place = HERE, progress: Progress = silent) -> Report:
    """Gather everything about a bundle. A part that can't be had here says why; the bundle stays as it is.

    Where its own target can't run on this machine, and no other was asked for, samples come from the CPU and nothing
    is timed. Raises CheckError where the bundle makes NaN.
    """
    bundle = open_bundle(path)
    place, elsewhere = _runnable_place(bundle, place)
    if elsewhere and options.fail_if_slower is not None:
        raise InputError(f"--fail-if-slower needs latencies, and {elsewhere}")
    speed = Skipped(skipped=elsewhere) if elsewhere else _speed(bundle, options, place, progress)
    samples = sample_parts(path, options.images, options.seed, place, progress)
    activations = activations_of(bundle, progress)
    evaluated = options.evaluation
    evaluation = None if evaluated is None else evaluate_bundle(path, evaluated, place=place, progress=progress)
    k = bundle.tables().get("compensation.k")
    return Report(
        bundle=_shown(path.resolve().name),
        made_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        ditc_version=ditc.__version__,
        machine=machine(),
        settings=ReportSettings(images=options.images, seed=options.seed, requests=options.requests),
        place=_place_text(bundle, place),
        arithmetic=arithmetic_of(backend_for(_target(bundle, place), place.engines), bundle.manifest.precision),
        manifest=bundle.manifest,
        pictures=samples.pictures,
        fidelity=samples.fidelity,
        drift=samples.drift,
        compensation=None if k is None else tuple(tuple(row) for row in k.tolist()),
        speed=speed,
        activations=activations,
        calibration=calibration_of(bundle),
        evaluation=evaluation,
    )


def _shown(name: str) -> str:
    """Return a name out of a path as text for a page: that is UTF-8, and a path any bytes."""
    return one_line(os.fsencode(name).decode(errors="backslashreplace"))


def default_page(bundle: Path) -> Path:
    """Return the path of a report unless told: beside the bundle, which is sealed."""
    whole = bundle.resolve()
    return whole.with_name(f"{whole.name}-report.html")


def check_page_path(page: Path, bundle: Path) -> None:
    """Raise InputError for a page inside its bundle, or one that its JSON would replace."""
    if page.suffix != ".html":
        raise InputError(f"--out must end in .html, found {page}; its numbers go to the same name with .json")
    if page.resolve().is_relative_to(bundle.resolve()):
        raise InputError(f"{page} lies inside the bundle, which is sealed; name a file elsewhere with --out")


def write_report(report: Report, page: Path) -> Path:
    """Write the page, and its numbers beside it with the ending .json, whose path is returned."""
    numbers = page.with_suffix(".json")
    atomic_write(numbers, report.model_dump_json(indent=1).encode() + b"\n")
    atomic_write(page, page_from_report(report, _shown(numbers.name)).encode())
    return numbers


def check_report(report: Report, options: ReportOptions) -> None:
    """Raise CheckError where the bundle is worse or slower than the options allow, as `evaluate` and `bench` do."""
    if options.fail_if_worse is not None and report.evaluation is not None:
        check_not_worse(report.evaluation, options.fail_if_worse)
    if options.fail_if_slower is not None and isinstance(report.speed, Speed):
        check_not_slower(report.speed.against, options.fail_if_slower)


def _runnable_place(bundle: Bundle, place: Place) -> tuple[Place, str]:
    """Return (where samples come from, why nothing is timed there). A target that was asked for has to run."""
    target = bundle.manifest.target
    if place.target is not None or target == DEFAULT_TARGET:
        return place, ""
    try:
        with place.load(bundle.path):
            return place, ""
    except DitcError as e:
        reason = f"the bundle is for {target}, which does not run here ({e})"
        return place.model_copy(update={"target": DEFAULT_TARGET, "engines": None}), reason


def _target(bundle: Bundle, place: Place) -> str:
    """Return the target that ran."""
    return place.target or bundle.manifest.target


def _place_text(bundle: Bundle, place: Place) -> str:
    """Return the target that ran, beside the bundle's own where that is another one."""
    own, ran = bundle.manifest.target, _target(bundle, place)
    return ran if ran == own else f"{ran}, compiled for {own}"


def _speed(bundle: Bundle, options: ReportOptions, place: Place, progress: Progress) -> Speed:
    """Measure the bundle's latencies, in turn with the usual peer where no other was asked for and it can be had."""
    against = _usual_peer(bundle, place) if options.against is None else options.against
    asked = options.bench.model_copy(update={"against": against})
    bench = bench_bundle(bundle.path, asked, place=place, progress=progress)
    return Speed(
        target=_target(bundle, place),
        batch=bench.batch,
        request=_plain(bench.request),
        seconds_per_image=bench.seconds_per_image,
        steps=bench.steps,
        segments={
            name: SegmentTime(calls=times.n // options.requests, latency=_plain(times), share=times.share)
            for name, times in bench.segments.items()
        },
        outside_share=bench.outside_engines.share,
        against=bench.against,
    )


def _usual_peer(bundle: Bundle, place: Place) -> tuple[str, ...]:
    """Return the FP program in ONNX Runtime, where a CPU runs the bundle and the compiler is installed."""
    on_cpu = _target(bundle, place) == DEFAULT_TARGET
    return (USUAL_PEER,) if on_cpu and bundle.has_reference and find_spec("onnx_ir") is not None else ()


def _plain(latency: Latency) -> Latency:
    """Return a latency without what `ditc bench` tells beside it."""
    return Latency.model_validate({name: getattr(latency, name) for name in Latency.model_fields})
