"""The stage that teaches: the torch model once more, one branch at a time, for methods that need gradients.

Fisher's information of a prediction is E[(J^T v)^2] over unit normal v, if its errors are Gaussian: the square of a
value's gradient under such a v says how much an error of this value weighs. Each point has a seeded v of its own at the
prediction that guidance makes, since that is what reaches the sample.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ditc.calibset import CalibSet
from ditc.compiler.calibrating import parts_of_groups, points_together
from ditc.compiler.exporting import model_digest
from ditc.compiler.options import CompileOptions
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.point_conditions import PointConditions
from ditc.compiler.smoothing import FACTORS
from ditc.compiler.work import write_json
from ditc.errors import CheckpointError
from ditc.host_memory import release_weights
from ditc.precision import INT8, levels_of
from ditc.program import FULL
from ditc.quantize.linears import Linear, linears_of
from ditc.quantize.midpoints import Range, lower_bounds
from ditc.quantize.ranges import RANGES, Histogram
from ditc.quantize.scales import ranges_of
from ditc.tables import read_tables

if TYPE_CHECKING:
    from ditc.exporter.gradient_walk import Reading, Walk

__all__ = ["TAUGHT", "Teacher", "check_teachable", "needs_teacher", "taught_ranges", "teach"]

TAUGHT = "ranges.json"  # of the stage's folder
TEACH_NOISE = 6_000_011  # apart from the seeds of images
WEIGHT_TOLERANCE = 1e-5  # of the exported weights against torch's, which are rounded once or twice


@dataclass(frozen=True)
class Teacher:
    """The way to the torch model after its export, and the digest of what was exported.

    `is_ours` is whether `open` loads it anew, so that it is to be released.
    """

    open: Callable[[], Any]
    digest: str
    is_ours: bool

    def model(self) -> Any:
        """Open the model. Raises CheckpointError where it isn't the one that was exported."""
        model = self.open()
        if model_digest(model) != self.digest:
            raise CheckpointError(
                f"the weights of {model.spec.name} are others than those that were exported; leave them alone during a "
                "compile, and seed what is random"
            )
        if self.is_ours and model.decoder is not None:
            release_weights(model.decoder)
        return model


def needs_teacher(options: CompileOptions) -> bool:
    """Does a setting need gradients?"""
    return options.bits is not None and RANGES[options.ranges].needs_gradients


def check_teachable(model: Any, full: Path) -> None:
    """Raise CheckpointError where a layer of the segment can't be shown with its gradients, before anything is lost."""
    import torch

    from ditc.exporter.onnx_files import load_graph
    from ditc.exporter.protocol import example_inputs

    linears = list(linears_of(load_graph(full)))
    walk = _walk(model, linears)
    _check_weights(walk, linears, {})
    x, t, *conditions = example_inputs(model.spec, 2)
    out_gradient = torch.ones(2, *model.spec.prediction_shape)
    for _ in walk.readings(x, t[:1], conditions, out_gradient):
        pass


def teach(plan: Plan, teacher: Teacher, segments: Segments, calib_file: Path, folder: Path) -> None:
    """Choose the ranges of what linear layers read by gradients: ranges.json has those of every group of steps.

    `segments` are those that will be quantized. Raises CheckpointError where the torch model can't show a layer.
    """
    from ditc.exporter.onnx_files import load_graph

    full, factors_file = load_graph(segments[FULL]), segments[FULL].with_name(FACTORS)
    linears = list(linears_of(full))
    factors = read_tables(factors_file) if factors_file.is_file() else {}
    calib, bounds = CalibSet.load(calib_file), lower_bounds(full, plan.options.midpoint)
    groups, levels = plan.scale_groups(calib), levels_of((plan.options.bits or INT8).activations)
    assert groups is not None, "settings with nothing to calibrate are refused"
    model = teacher.model()
    try:
        walk = _walk(model, linears)
        _check_weights(walk, linears, factors)
        weighing, ranges, done = Weighing.of(linears, factors, bounds), [], 0
        for part in parts_of_groups(calib, groups):
            histograms = weighing.histograms(_readings_at(plan, walk, part, done, len(calib)))
            ranges.append(ranges_of(histograms, plan.options.ranges, bounds, levels))
            done += len(part)
    finally:
        if teacher.is_ours:
            release_weights(model)
    write_json(folder / TAUGHT, ranges)


def taught_ranges(file: Path) -> list[dict[str, Range]]:
    """Load the ranges of every group of steps, by activation, that the stage left."""
    return [{name: Range(*ends) for name, ends in group.items()} for group in json.loads(file.read_bytes())]


def _readings_at(plan: Plan, walk: Walk, calib: CalibSet, done: int, total: int) -> Iterator[Iterator[Reading]]:
    """Yield the readings at all calibration points, as many points at once as fit, each as progress of `teach`."""
    import torch

    images, inputs = PointConditions.of_plan(plan), plan.spec.inputs
    for points in points_together(calib, plan.probed_at_once):
        plan.progress("teach", done, total)
        done += len(points)
        rows = images.rows(points)
        conditions = [rows[each.name][0] if each.fresh else rows[each.name] for each in inputs]
        arrays = (
            images.guidance.rows(points.x),
            points.t[:1].astype(np.float32),
            images.guidance.pulled_back(_directions(plan, points)),
            *conditions,
        )
        x, t, out_gradient, *tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
        yield walk.readings(x, t, tensors, out_gradient)


def _directions(plan: Plan, points: CalibSet) -> NDArray[np.float32]:
    """Unit normal v of each point, (points, channels, *space), whoever else is in its batch."""
    pairs = zip(points.sample.tolist(), points.step.tolist(), strict=True)
    streams = (np.random.default_rng([plan.options.seed, TEACH_NOISE, *pair]) for pair in pairs)
    return np.stack([stream.standard_normal(plan.spec.latent_shape, np.float32) for stream in streams])


@dataclass(frozen=True)
class Weighing:
    """Makes the histograms of activations from readings: each value by the square of its gradient.

    `activations` names the one that the layer at (branch, path) reads, `readers` counts who reads it. An activation
    that was divided by `factors` has gradients so much larger; x - bound is counted where it has one of `bounds`.
    """

    activations: Mapping[tuple[str, str], str]
    readers: Mapping[str, int]
    factors: Mapping[str, NDArray[np.float64]]
    bounds: Mapping[str, float]

    @staticmethod
    def of(
        linears: Sequence[Linear], factors: Mapping[str, NDArray[np.float64]], bounds: Mapping[str, float]
    ) -> Weighing:
        activations = {(linear.branch, linear.path): str(linear.activation.name) for linear in linears}
        return Weighing(activations, Counter(activations.values()), factors, bounds)

    def histograms(self, passes: Iterable[Iterable[Reading]]) -> dict[str, Histogram]:
        """Return the histogram of every activation over some passes through the network.

        Its gradient is the sum of its readers', who share its scale, and so its errors.
        """
        histograms: dict[str, Histogram] = {}
        for readings in passes:
            sums: dict[str, Any] = {}  # of activations that have readers further in front
            left = dict(self.readers)
            for reading in readings:
                name = self.activations[reading.branch, reading.path]
                before, left[name] = sums.pop(name, None), left[name] - 1
                gradient = reading.gradient if before is None else before + reading.gradient
                if left[name]:
                    sums[name] = gradient
                    continue
                histogram = histograms.get(name, Histogram.empty())
                histograms[name] = self._added(histogram, name, reading.x.numpy(), gradient.numpy())
            assert not any(left.values()), "every layer is read in every pass"
        return histograms

    def _added(
        self, histogram: Histogram, name: str, x: NDArray[np.float32], gradient: NDArray[np.float32]
    ) -> Histogram:
        factors = self.factors.get(name, np.ones(1))
        values = np.float32(x / factors) - np.float32(self.bounds.get(name, 0.0))
        return histogram.add(values, np.square(gradient * factors))


def _walk(model: Any, linears: Sequence[Linear]) -> Walk:
    from ditc.exporter.gradient_walk import Walk, layers_at

    paths: dict[str, list[str]] = {}
    for linear in linears:
        paths.setdefault(linear.branch, []).append(linear.path)
    return Walk(model, layers_at(model, paths))


def _check_weights(walk: Walk, linears: Sequence[Linear], factors: Mapping[str, NDArray[np.float64]]) -> None:
    """Raise CheckpointError where a layer of the graph isn't the one at its path, with its rows times the factors.

    Columns may have a factor each: that of a layer behind attention that divides its input.
    """
    for linear in linears:
        inner = linear.weight_array().astype(np.float64)
        own = walk.layers[linear.branch][linear.path].weight.detach().numpy().T.astype(np.float64)
        same = own.shape == inner.shape
        if same:
            own *= factors.get(str(linear.activation.name), np.ones(1))[:, None]
            sizes = np.square(own).sum(axis=0)
            columns = (own * inner).sum(axis=0) / np.where(sizes > 0, sizes, 1)
            same = bool(np.linalg.norm(inner - columns * own) <= WEIGHT_TOLERANCE * np.linalg.norm(inner))
        if not same:
            raise CheckpointError(
                f"the weight at {linear.path} of {walk.model.spec.name} is not the one that branch {linear.branch} "
                "was exported with, so its gradients are of something else; choose --ranges without gradients"
            )
