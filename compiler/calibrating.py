"""Scales from what linear layers read at the calibration points: by running FP at them, or on the way, in the pool."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from ditc.bundle import Bundle
from ditc.calib_data.selection import SELECTORS
from ditc.calibset import CalibSet
from ditc.compiler.observing import (
    ObservedPool,
    Observer,
    ObservingBackend,
    PeakObserver,
    histogram_bytes,
    show_activations,
)
from ditc.compiler.options import CompileOptions
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.point_conditions import PointConditions
from ditc.errors import BundleError, InputError
from ditc.files import sha256_of
from ditc.precision import INT8, levels_of
from ditc.program import CONDITION, FULL
from ditc.quantize.midpoints import Range, lower_bounds
from ditc.quantize.ranges import RANGES, Histogram
from ditc.quantize.scale_binding import BINDINGS, Groups
from ditc.quantize.scale_table import ScaleTable
from ditc.quantize.scales import (
    Origin,
    RunProbe,
    activation_probe,
    histograms_of,
    ranges_of,
    scale_table,
    uncalibrated_scale_table,
)
from ditc.runtime.conditioning import condition_tables, of_step

__all__ = [
    "OBSERVED",
    "Probe",
    "activation_scales",
    "calibration_feeds",
    "check_selector_sees",
    "chosen_points",
    "observation",
    "open_probe",
    "parts_of_groups",
    "points_together",
    "probe_path",
    "scales_of",
    "spread_points",
]

OBSERVED = "observed.npz"  # beside the calibration set
OBSERVED_BYTES = 1 << 28  # of a pool's histograms


def observation(plan: Plan, segments: Segments) -> tuple[ObservingBackend, Observer | PeakObserver] | None:
    """Return what watches the pool's own runs, for histograms to calibrate on or for the selector: backend, observer.

    None where nothing is calibrated on them, or their histograms would not fit. Every recorded step has to run the
    `full` segment; smoothing and rotation change what its layers read, and gradients come later. Raises InputError
    where the selector has to see what can't be shown.
    """
    from ditc.exporter.onnx_files import load_graph, save_sharing_data

    options = plan.options
    needed = SELECTORS[options.select].needs_peaks
    reads_alone = _reads_what_the_pool_has(options) and not RANGES[options.ranges].needs_gradients
    calibrates = options.bits is not None and BINDINGS[options.scales].time_groups is not None and reads_alone
    if not computes_all(plan) or not (calibrates or needed):
        return None
    model = load_graph(segments["full"])
    bounds, shown = lower_bounds(model, options.midpoint), show_activations(model)
    if not shown and needed:
        raise InputError(
            f"--select {options.select} can't tell apart what the images of a batch give linear layers in "
            f"{plan.spec.name}; choose another --select"
        )
    points = options.pool_size(len(plan.recorded_steps)) * len(plan.recorded_steps)
    fits = calibrates and histogram_bytes(points, len(shown)) <= OBSERVED_BYTES
    if not shown or not (fits or needed):
        return None
    probe = probe_path(segments["full"], "observed")
    save_sharing_data(model, probe)
    observer = Observer(shown, bounds, plan.halves) if fits else PeakObserver(shown, plan.halves)
    return ObservingBackend(plan.backend, segments["full"], probe, shown, observer.watch), observer


def _reads_what_the_pool_has(options: CompileOptions) -> bool:
    """Do linear layers that are quantized read what those of the exported segments read?"""
    return options.smooth == "none" and options.rotate is None


def computes_all(plan: Plan) -> bool:
    """Does every step whose points enter the pool run the segment that computes everything?"""
    return all(plan.recorded_program.steps[step].segment == FULL for step in plan.recorded_steps)


def check_selector_sees(plan: Plan) -> None:
    """Raise InputError where the selector looks at what linear layers read, and some points have nothing to show."""
    options = plan.options
    if options.bits is not None and SELECTORS[options.select].needs_peaks and not computes_all(plan):
        raise InputError(
            f"--select {options.select} looks at what linear layers read, so every point has to be of a step that "
            "computes everything: leave --pool-steps out, choose another --policy, or another --select"
        )


def calibration_feeds(
    condition: Any, calib: CalibSet, images: PointConditions, points_at_once: int
) -> Iterator[dict[str, Any]]:
    """Yield inputs of `full` at every calibration point, points of one step together, in the order of steps.

    `condition` is the ONNX Runtime session of that segment, `images` are those of the points. With guidance every point
    has two rows.
    """
    for points in points_together(calib, points_at_once):
        tables = condition_tables(condition, points.t[:1], images.rows(points))
        yield {"x": images.guidance.rows(points.x), **of_step(tables, 0), **images.step_rows(points)}


def points_together(calib: CalibSet, at_once: int) -> Iterator[CalibSet]:
    """Yield up to so many points of one step together, in the order of steps."""
    for step in np.unique(calib.step):
        at_step = np.flatnonzero(calib.step == step)
        for start in range(0, len(at_step), at_once):
            yield calib.take(at_step[start : start + at_once])


def parts_of_groups(calib: CalibSet, groups: Groups) -> list[CalibSet]:
    """Return the points of each group of steps; `groups` is (steps,)."""
    return [calib.take(np.flatnonzero(groups[calib.step] == group)) for group in range(groups.max() + 1)]


def watched(plan: Plan, feeds: Iterable[dict[str, Any]], done: int, points: int) -> Iterator[dict[str, Any]]:
    """Yield the same feeds, each reported as progress of `quantize`."""
    for feed in feeds:
        plan.progress("quantize", done, points)
        done += len(feed["x"]) // plan.halves
        yield feed


@dataclass(frozen=True)
class Probe:
    """The FP `full` segment with what its linear layers read as outputs: `readers` names them, and who reads each.

    `bounds` are what is known of an output without running it; `run` takes feeds of `points_at_once` points at most.
    """

    readers: Mapping[str, tuple[str, ...]]
    bounds: Mapping[str, float]
    run: RunProbe
    points_at_once: int


def open_probe(plan: Plan, segments: Segments) -> Probe:
    """Open the probe of a compile, as one session of ONNX Runtime."""
    from ditc.exporter.onnx_files import load_graph

    model = load_graph(segments["full"])
    bounds, readers = lower_bounds(model, plan.options.midpoint), activation_probe(model)
    return Probe(
        readers=readers,
        bounds=bounds,
        run=probe_runner(plan, segments, model),
        points_at_once=plan.probed_at_once,
    )


def probe_path(segment: Path, kind: str) -> Path:
    """Return a name in the folder where a segment's weights lie, and where another process may be doing the same."""
    return segment.with_name(f"{segment.stem}.{kind}-{os.getpid()}.onnx")


def probe_runner(plan: Plan, segments: Segments, probe: Any) -> RunProbe:
    """Return a function that runs the `full` segment cut down to `probe`, an onnx_ir model, on the inputs of a step."""
    from ditc.exporter.onnx_files import save_sharing_data

    path = probe_path(segments["full"], "probe")
    save_sharing_data(probe, path)
    try:
        session = plan.backend.session(path)
    finally:
        path.unlink()
    names = [port.name for port in session.get_outputs()]
    inputs = {port.name for port in session.get_inputs()}  # tables for the head alone are not among them

    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: array for name, array in feeds.items() if name in inputs}
        return dict(zip(names, session.run(names, own), strict=True))

    return run


def activation_scales(
    plan: Plan, segments: Segments, calib_file: Path, taught: Sequence[Mapping[str, Range]] | None = None
) -> ScaleTable:
    """Turn what the linear layers of the FP `full` segment read at the calibration points into scales.

    The segment is run at them, unless the pool was observed while it was recorded, or the ranges of each group of steps
    were `taught`.
    """
    from ditc.exporter.onnx_files import load_graph

    calib, bits = CalibSet.load(calib_file), plan.options.bits or INT8
    origin = Origin(plan.options.ranges, sha256_of(segments["full"]), calib.digest, plan.options.scales, bits)
    groups, model = plan.scale_groups(calib), load_graph(segments["full"])
    bounds, readers = lower_bounds(model, plan.options.midpoint), activation_probe(model)
    if groups is None:
        return uncalibrated_scale_table(readers, origin)
    if taught is not None:
        return scale_table(taught, readers, groups, origin)
    assert not RANGES[plan.options.ranges].needs_gradients, "the stage `teach` comes first"
    parts, pool = parts_of_groups(calib, groups), observed_pool(plan, calib_file, bounds)
    histograms = run_histograms(plan, segments, parts) if pool is None else observed_histograms(pool, parts)
    ranges = [ranges_of(part, plan.options.ranges, bounds, levels_of(bits.activations)) for part in histograms]
    return scale_table(ranges, readers, groups, origin)


def observed_pool(plan: Plan, calib_file: Path, bounds: Mapping[str, float]) -> ObservedPool | None:
    """Load what was observed of these segments, counted from these lower bounds; None where that is not there."""
    path = calib_file.with_name(OBSERVED)
    if not _reads_what_the_pool_has(plan.options) or not path.is_file():
        return None
    pool = ObservedPool.load(path)
    return pool if pool.bounds == bounds else None


def observed_histograms(pool: ObservedPool, parts: Sequence[CalibSet]) -> Iterator[dict[str, Histogram]]:
    """Yield what the layers read at each of some sets of points, from the pool's own runs."""
    for part in parts:
        yield pool.histograms(zip(part.sample.tolist(), part.step.tolist(), strict=True))


def run_histograms(plan: Plan, segments: Segments, parts: Sequence[CalibSet]) -> Iterator[dict[str, Histogram]]:
    """Yield the same, by running the segment at them."""
    probe, condition = open_probe(plan, segments), plan.backend.session(segments[CONDITION])
    done, points = 0, sum(len(part) for part in parts)
    for part in parts:
        feeds = calibration_feeds(condition, part, PointConditions.of_plan(plan), probe.points_at_once)
        yield histograms_of(probe.run, watched(plan, feeds, done, points), probe.bounds)
        done += len(part)


def spread_points(steps: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return places of `count` points, or of all, spread evenly over the distinct steps and sorted by step.

    `steps` is (n,), the step of each point. Within a step the first points are taken.
    """
    distinct = np.unique(steps)
    if count < len(distinct):
        distinct = distinct[np.linspace(0, len(distinct) - 1, count).round().astype(np.int64)]
    queues = [np.flatnonzero(steps == step) for step in distinct]
    places: list[int] = []
    for turn in range(max(map(len, queues), default=0)):
        places += [int(queue[turn]) for queue in queues if turn < len(queue)]
    chosen = np.array(places[:count], np.int64)
    return chosen[np.argsort(steps[chosen], kind="stable")]


def chosen_points(bundle: Bundle, count: int) -> CalibSet:
    """Load `count` points of the bundle's calibration set, spread over the steps that quantize and sorted by step."""
    program = bundle.manifest.program
    quantizing = [step.index for step in program.steps if program.segment(step.segment).quantizes]
    calib = CalibSet.load(bundle.path / "calib" / "calib.npz")
    calib = calib.take(np.flatnonzero(np.isin(calib.step, quantizing)))
    if len(calib) == 0:
        raise BundleError(f"{bundle.path} has no calibration point at a step that quantizes; compile it again")
    return calib.take(spread_points(calib.step, count))


def scales_of(bundle: Bundle) -> ScaleTable:
    """Load the activation scales a bundle was quantized with. Raises BundleError where they can't be read."""
    path = bundle.path / "calib" / "scales.json"
    try:
        return ScaleTable.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as e:
        raise BundleError(f"{path} is not a table of scales; compile the bundle again") from e
