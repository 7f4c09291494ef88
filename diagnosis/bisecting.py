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
from ditc.compiler.point_conditions import PointConditions
from ditc.diagnosis.bisection import Bisection, GroupError, StepError
from ditc.diagnosis.options import BisectOptions
from ditc.engines.backend import Engine, runnable_path
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import CheckError, InputError, unknown_name
from ditc.exporter.onnx_files import data_path, load_graph, save_derived, save_graph
from ditc.files import digest_of, writing
from ditc.lowering.backend_forms import lower
from ditc.precision import quantized
from ditc.program import CONDITION
from ditc.progress import Progress, silent
from ditc.quantize.layer_groups import LayerGroup, groups_of
from ditc.quantize.qdq import insert_qdq
from ditc.quantize.rotated_graphs import rotate
from ditc.quantize.scale_table import ScaleTable
from ditc.quantize.segment_outputs import keep_outputs
from ditc.runtime.closeness import relative_error
from ditc.runtime.executor import Samples
from ditc.tables import step_inputs

__all__ = [
    "MODES",
    "Target",
    "bisect_bundle",
    "open_target",
]

Layers = frozenset[str]


@dataclass(frozen=True)
class Mode:
    """A way to look at a group: `quantized` of (all layers, the group's), and the square that it then accounts for.

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


@dataclass(frozen=True)
class Target:
    """The place where variants run: the backend's name, whose lowerings they take, and what opens an ONNX file of it.

    Every run has one point, so 2 rows with guidance and 1 without. The file may be gone after the engine is closed.
    """

    name: str
    open_engine: Callable[[Path], Engine]


@contextmanager
def open_target(name: str, bundle: Path) -> Iterator[Target]:
    """Open the target of a name: `cpu` is ONNX Runtime, `tensorrt` builds an engine of every variant right here."""
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
class _VariantParts:
    """The common parts of variants: the FP segment in a folder that may be written, scales, inputs of each point.

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
    with _variant_parts(bundle, options.points, target) as parts:
        groups = groups_of(load_graph(parts.segment), options.by)
        every = frozenset(name for group in groups for name in group.names)
        chosen = [MODES[options.mode].quantized(every, frozenset(group.names)) for group in groups]
        variants = [frozenset(), every, *chosen]
        predictions = []
        for done, layers in enumerate(variants):
            progress("bisect", done, len(variants))
            predictions.append(predict(parts, layers))
        progress("bisect", len(variants), len(variants))
    exact, *of_quantized = predictions
    return _ranked(bundle, options, parts, groups, [_errors(parts, part, exact) for part in of_quantized])


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
def _variant_parts(bundle: Bundle, points: int, target: Target) -> Iterator[_VariantParts]:
    """Copy the FP segment to a folder that lives as long as the block, and read the inputs of the chosen points."""
    spec = bundle.manifest.model
    table, calib = scales_of(bundle), chosen_points(bundle, points)
    condition = OnnxRuntimeBackend().session(runnable_path(bundle.segment_path(CONDITION), "onnxrt"))
    feeds = list(calibration_feeds(condition, calib, PointConditions.of_bundle(bundle), points_at_once=1))
    for name, rows in step_inputs(bundle.tables()).items():
        feeds = [feed | {name: rows[step]} for feed, step in zip(feeds, calib.step, strict=True)]
    with TemporaryDirectory(prefix="ditc-bisect-") as folder:
        segment = Path(folder).resolve() / "full.onnx"  # resolved: ONNX Runtime takes no weights through a link
        source = bundle.reference_path("full")
        with writing(segment):
            for file in filter(Path.is_file, (source, data_path(source))):
                shutil.copyfile(file, segment.with_name(file.name))
        if table.rotation is not None:
            model = load_graph(source)
            rotate(model, table.rotation)
            save_graph(model, segment)
        yield _VariantParts(target, segment, table, feeds, calib, spec.in_channels)


def predict(parts: _VariantParts, layers: Layers) -> list[Samples]:
    """Return the prediction at each point with `layers` quantized, each (rows, channels, *space)."""
    path = write_variant(parts, layers)
    try:
        with parts.target.open_engine(path) as engine:
            return [_prediction(engine, feed, parts.channels) for feed in parts.feeds]
    finally:
        for file in (path, data_path(path)):
            file.unlink(missing_ok=True)


def write_variant(parts: _VariantParts, layers: Layers) -> Path:
    """Write the segment with `layers` quantized and only the prediction as output, as the backend takes it."""
    model = load_graph(parts.segment)
    insert_qdq(model, parts.table, layers)
    keep_outputs(model, [value for value in model.graph.outputs if value.name == "out"])
    lower(model, parts.target.name)
    path = parts.segment.with_name(f"variant-{digest_of(sorted(layers))}.onnx")
    save_derived(model, path)
    return path


def _prediction(engine: Engine, feed: dict[str, NDArray[Any]], channels: int) -> Samples:
    predicted = engine.outputs["out"]
    shape = (len(feed["x"]), *(size for size in predicted.shape[1:] if isinstance(size, int)))
    out: NDArray[Any] = np.empty(shape, predicted.dtype)
    binding = engine.binding()
    for name, port in engine.inputs.items():
        binding.bind(name, np.ascontiguousarray(feed[name], port.dtype))
    binding.bind("out", out)
    binding.run()
    return np.asarray(out[:, :channels], np.float32)


def _errors(
    parts: _VariantParts, predictions: Sequence[Samples], exact: Sequence[Samples]
) -> tuple[float, tuple[StepError, ...]]:
    """Return the relative error over all points, and at each step."""
    if not all(np.isfinite(part).all() for part in (*predictions, *exact)):
        raise CheckError(f"a prediction on {parts.target.name} is NaN or infinite; `ditc verify` shows the step")
    steps = []
    for step, group in groupby(range(len(predictions)), key=lambda place: int(parts.calib.step[place])):
        places = list(group)
        error = relative_error(np.stack([predictions[i] for i in places]), np.stack([exact[i] for i in places]))
        steps.append(StepError(step=step, t=float(parts.calib.t[places[0]]), error=error))
    return relative_error(np.stack(predictions), np.stack(exact)), tuple(steps)


def _ranked(
    bundle: Bundle,
    options: BisectOptions,
    parts: _VariantParts,
    groups: Sequence[LayerGroup],
    errors: Sequence[tuple[float, tuple[StepError, ...]]],
) -> Bisection:
    """Return the report; `errors` are those of everything quantized, then of each group."""
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
        backend=parts.target.name,
        by=options.by,
        mode=options.mode,
        points=len(parts.calib),
        together=together,
        together_steps=together_steps,
        squares_ratio=total / together**2 if together > 0 else 0.0,
        groups=tuple(row(place) for place in np.argsort([-square for square in squares], kind="stable")),
    )
