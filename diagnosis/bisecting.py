"""`ditc bisect` as a function: which linear layers the error of quantization comes from.

The FP `full` segment is run with the Q/DQ of one group of layers switched on, or all but that group's, at points of
the calibration set, and its prediction is held against the FP one on the same backend. So a group's error is that of
its quantization alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import Bundle, open_bundle
from ditc.calibset import CalibSet
from ditc.compiler.calibrating import calibration_feeds, chosen_points, scales_of
from ditc.diagnosis.options import BisectOptions
from ditc.engines.backend import Engine, runnable_path
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import CheckError, InputError, unknown_name
from ditc.exporter.onnx_files import data_path, load_graph, save_derived
from ditc.files import digest_of, writing
from ditc.guidance import Guidance
from ditc.lowering.backend_forms import lower
from ditc.precision import quantized
from ditc.program import CONDITION
from ditc.progress import Progress, silent
from ditc.quantize.layer_groups import LayerGroup, groups_of
from ditc.quantize.qdq import insert_qdq
from ditc.quantize.scale_table import ScaleTable
from ditc.quantize.segment_outputs import keep_outputs
from ditc.runtime.closeness import relative_error
from ditc.runtime.executor import Samples
from ditc.spec import Record
from ditc.tables import step_inputs

__all__ = [
    "MODES",
    "Bisection",
    "GroupError",
    "StepError",
    "Target",
    "bisect_bundle",
    "open_target",
]

Layers = frozenset[str]


@dataclass(frozen=True)
class Mode:
    """What is quantized to look at a group, (all layers, the group's) -> layers, and the square it then accounts for.

    `accounts_for` takes the error that was measured and that of everything quantized.
    """

    quantized: Callable[[Layers, Layers], Layers]
    accounts_for: Callable[[float, float], float]


def only(every: Layers, group: Layers) -> Layers:
    return group


def without(every: Layers, group: Layers) -> Layers:
    return every - group


def caused(error: float, together: float) -> float:
    return error**2


def gone(error: float, together: float) -> float:
    return together**2 - error**2


MODES: dict[str, Mode] = {"only": Mode(only, caused), "without": Mode(without, gone)}


class StepError(Record):
    """Relative error of the predictions at one step of the trajectory; `t` is its timestep."""

    step: int
    t: float
    error: float


class GroupError(Record):
    """What was measured for one group of layers.

    `layers` are torch module paths. `error` is over all points: with mode "only" the error that the group causes,
    with "without" the error that is left when it is not quantized. `worst` is the step where it causes most. `share`
    is its part of the sum of squares that the groups account for; below 0 where leaving a group out makes it worse.
    """

    layers: tuple[str, ...]
    branches: tuple[str, ...]
    error: float
    share: float
    worst: StepError
    steps: tuple[StepError, ...]


class Bisection(Record):
    """Groups by the error they cause, worst first.

    `together` is the error with everything quantized, `together_steps` that of each step. `squares_ratio` is the sum
    of the squares that the groups account for over the square of `together`: 1 where errors are independent.
    """

    model: str
    backend: str
    by: str
    mode: str
    points: int
    together: float
    together_steps: tuple[StepError, ...]
    squares_ratio: float
    groups: tuple[GroupError, ...]


@dataclass(frozen=True)
class Target:
    """Where the variants run: the backend's name, whose lowerings they take, and what opens an ONNX file of it.

    Every run has one point, so 2 rows with guidance and 1 without. The file may be gone after the engine is closed.
    """

    name: str
    open_engine: Callable[[Path], Engine]


@contextmanager
def open_target(name: str, bundle: Path) -> Iterator[Target]:
    """The target of a name: `cpu` is ONNX Runtime, `tensorrt` builds an engine of every variant on this machine."""
    if name == "cpu":
        yield Target("onnxrt", OnnxRuntimeBackend().open)
        return
    if name != "tensorrt":
        raise unknown_name("target", name, ("cpu", "tensorrt"))
    from ditc.engines.host_engine import tensorrt_opener

    halves = open_bundle(bundle).manifest.halves  # rows of one point
    with tensorrt_opener({"batch": halves}) as open_engine:
        yield Target("trt", open_engine)


@dataclass(frozen=True)
class _Bench:
    """What all variants share: the FP segment in a folder that may be written, the scales, the inputs of each point.

    `channels` of the prediction are compared; those after them, a learned variance, are not.
    """

    target: Target
    segment: Path
    table: ScaleTable
    feeds: Sequence[dict[str, NDArray[Any]]]
    calib: CalibSet
    channels: int


def bisect_bundle(
    path: str | PathLike[str],
    options: BisectOptions | None = None,
    *,
    target: Target | None = None,
    progress: Progress = silent,
) -> Bisection:
    """Toggle each group of a w8a8 bundle and rank the groups by the error they cause. The bundle stays as it is.

    `target` is where the variants run, ONNX Runtime without it. The FP weights are copied once to a temporary folder
    (in TMPDIR), and a variant adds only what it changes. Raises InputError for a bundle that is not quantized or has
    no FP reference, and CheckError where a prediction is not finite.
    """
    options = options or BisectOptions()
    bundle = open_bundle(Path(path))
    check_can_be_bisected(bundle)
    target = target or Target("onnxrt", OnnxRuntimeBackend().open)
    with _bench(bundle, options.points, target) as bench:
        groups = groups_of(load_graph(bench.segment), options.by)
        every = frozenset(name for group in groups for name in group.names)
        chosen = [MODES[options.mode].quantized(every, frozenset(group.names)) for group in groups]
        variants = [frozenset(), every, *chosen]
        predictions = []
        for done, layers in enumerate(variants):
            progress("bisect", done, len(variants))
            predictions.append(predict(bench, layers))
        progress("bisect", len(variants), len(variants))
    exact, together, *found = predictions
    return _ranked(bundle, options, bench, groups, [_errors(bench, part, exact) for part in (together, *found)])


def check_can_be_bisected(bundle: Bundle) -> None:
    """Raise InputError unless the bundle is quantized and carries its FP reference."""
    if not quantized(bundle.manifest.precision):
        raise InputError(
            f"{bundle.path} is {bundle.manifest.precision}, bisect needs w8a8: nothing in it is quantized; "
            "compile it with --precision w8a8"
        )
    if not bundle.has_reference:
        raise InputError(
            f"{bundle.path} has no FP reference to compare with; "
            "compile it with --reference, or copy its reference/ folder too"
        )


@contextmanager
def _bench(bundle: Bundle, points: int, target: Target) -> Iterator[_Bench]:
    """The FP segment copied to a folder that lives as long as the block, and the inputs of the chosen points."""
    spec = bundle.manifest.model
    null_label = Guidance.of(spec, bundle.manifest.guidance).null_label
    table, calib = scales_of(bundle), chosen_points(bundle, points)
    condition = OnnxRuntimeBackend().session(runnable_path(bundle.segment_path(CONDITION), "onnxrt"))
    feeds = list(calibration_feeds(condition, calib, null_label, points_at_once=1))
    for name, rows in step_inputs(bundle.tables()).items():
        feeds = [feed | {name: rows[step]} for feed, step in zip(feeds, calib.step, strict=True)]
    with TemporaryDirectory(prefix="ditc-bisect-") as folder:
        segment = Path(folder).resolve() / "full.onnx"  # resolved: ONNX Runtime takes no weights through a link
        source = bundle.reference_path("full")
        with writing(segment):
            for file in filter(Path.is_file, (source, data_path(source))):
                shutil.copyfile(file, segment.with_name(file.name))
        yield _Bench(target, segment, table, feeds, calib, spec.in_channels)


def predict(bench: _Bench, layers: Layers) -> list[Samples]:
    """The prediction at each point with `layers` quantized, each (rows, channels, height, width)."""
    path = write_variant(bench, layers)
    try:
        with bench.target.open_engine(path) as engine:
            return [_prediction(engine, feed, bench.channels) for feed in bench.feeds]
    finally:
        for file in (path, data_path(path)):
            file.unlink(missing_ok=True)


def write_variant(bench: _Bench, layers: Layers) -> Path:
    """The segment with `layers` quantized and only the prediction as output, as the backend takes it."""
    model = load_graph(bench.segment)
    insert_qdq(model, bench.table, layers)
    keep_outputs(model, [value for value in model.graph.outputs if value.name == "out"])
    lower(model, bench.target.name)
    path = bench.segment.with_name(f"variant-{digest_of(sorted(layers))}.onnx")
    save_derived(model, path)
    return path


def _prediction(engine: Engine, feed: dict[str, NDArray[Any]], channels: int) -> Samples:
    port = engine.outputs["out"]
    shape = (len(feed["x"]), *(size for size in port.shape[1:] if isinstance(size, int)))
    out: NDArray[Any] = np.empty(shape, port.dtype)
    binding = engine.binding()
    for name, taken in engine.inputs.items():
        binding.bind(name, np.ascontiguousarray(feed[name], taken.dtype))
    binding.bind("out", out)
    binding.run()
    return np.asarray(out[:, :channels], np.float32)


def _errors(bench: _Bench, found: Sequence[Samples], exact: Sequence[Samples]) -> tuple[float, tuple[StepError, ...]]:
    """The relative error over all points, and at each step."""
    if not all(np.isfinite(part).all() for part in (*found, *exact)):
        raise CheckError(f"a prediction on {bench.target.name} is NaN or infinite; `ditc verify` shows the step")
    steps = []
    for step, group in groupby(range(len(found)), key=lambda place: int(bench.calib.step[place])):
        places = list(group)
        error = relative_error(np.stack([found[i] for i in places]), np.stack([exact[i] for i in places]))
        steps.append(StepError(step=step, t=float(bench.calib.t[places[0]]), error=error))
    return relative_error(np.stack(found), np.stack(exact)), tuple(steps)


def _ranked(
    bundle: Bundle,
    options: BisectOptions,
    bench: _Bench,
    groups: Sequence[LayerGroup],
    errors: Sequence[tuple[float, tuple[StepError, ...]]],
) -> Bisection:
    """The report; `errors` are those of everything quantized, then of each group."""
    (together, together_steps), *measured = errors
    accounts_for = MODES[options.mode].accounts_for
    squares = [accounts_for(error, together) for error, _ in measured]
    total = sum(squares)

    def row(place: int) -> GroupError:
        error, steps = measured[place]
        at_steps = [accounts_for(step.error, whole.error) for step, whole in zip(steps, together_steps, strict=True)]
        return GroupError(
            layers=groups[place].paths,
            branches=groups[place].branches,
            error=error,
            share=squares[place] / total if total > 0 else 0.0,
            worst=steps[int(np.argmax(at_steps))],
            steps=steps,
        )

    return Bisection(
        model=bundle.manifest.model.name,
        backend=bench.target.name,
        by=options.by,
        mode=options.mode,
        points=len(bench.calib),
        together=together,
        together_steps=together_steps,
        squares_ratio=total / together**2 if together > 0 else 0.0,
        groups=tuple(row(place) for place in np.argsort([-square for square in squares], kind="stable")),
    )
