"""Observers of what linear layers read while the pool is recorded: histograms of every point, or largest magnitudes.

A large model spends as long on a calibration point as on recording it. Where the pool's histograms fit, its own runs
are looked at, and the points that the selector picks need no run of their own.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditc.engines.backend import Backend, Buffer, Engine, Port
from ditc.engines.wrapping_engine import WrappingBinding, WrappingEngine
from ditc.errors import BundleError
from ditc.quantize.linears import linears_of
from ditc.quantize.ranges import BINS, Histogram

__all__ = ["ObservedPool", "Observer", "ObservingBackend", "PeakObserver", "histogram_bytes", "show_activations"]

ShowOutputs = Callable[[Mapping[str, Buffer]], None]
Counts = NDArray[np.uint32]
Numbers = NDArray[np.float64]


def show_activations(model: ir.Model) -> tuple[str, ...]:
    """Make what linear layers read further outputs of a segment, in place; returns their names.

    None of them, and no names, where one is not (batch, ...) with everything but the batch known: its rows can't be
    told apart before it is run.
    """
    batch = _batch_of(model)
    activations = dict.fromkeys(linear.activation for linear in linears_of(model))
    shown = [value for value in activations if not value.is_graph_output()]
    if not all(value.shape is not None and _is_by_row(value.shape, batch) for value in shown):
        return ()
    model.graph.outputs.extend(shown)
    return tuple(str(value.name) for value in shown)


def _batch_of(model: ir.Model) -> object:
    shape = next(value.shape for value in model.graph.inputs if value.name == "x")
    return None if shape is None else shape[0]


def _is_by_row(shape: ir.Shape, batch: object) -> bool:
    return len(shape) > 0 and shape[0] == batch and all(isinstance(size, int) for size in shape[1:])


def histogram_bytes(points: int, tensors: int) -> int:
    """Return the bytes that the histograms of a pool take."""
    return points * tensors * BINS * np.dtype(np.uint32).itemsize


@dataclass
class ObservingBinding(WrappingBinding):
    """A binding that hands `watch` the outputs `shown` after every run."""

    shown: Mapping[str, Port]
    watch: ShowOutputs
    rows: int = 0

    def bind(self, name: str, buffer: Buffer) -> None:
        self.inside.bind(name, buffer)
        if name == "x" and len(buffer) != self.rows:
            self._allocate(len(buffer))

    def _allocate(self, rows: int) -> None:
        self.rows = rows
        for name, port in self.shown.items():
            shape = tuple(rows if isinstance(size, str) else size for size in port.shape)
            self.buffers[name] = np.empty(shape, port.dtype)
            self.inside.bind(name, self.buffers[name])

    def run(self) -> None:
        self.inside.run()
        self.watch(self.buffers)


@dataclass
class ObservingEngine(WrappingEngine):
    """An engine whose runs show `watch` the outputs named `shown`."""

    shown: tuple[str, ...]
    watch: ShowOutputs

    @property
    def outputs(self) -> Mapping[str, Port]:
        """Those that a caller has to bind."""
        return {name: port for name, port in self.inside.outputs.items() if name not in self.shown}

    def binding(self) -> ObservingBinding:
        return ObservingBinding(
            self.inside.binding(), {name: self.inside.outputs[name] for name in self.shown}, self.watch
        )


@dataclass(frozen=True)
class ObservingBackend:
    """Opens segments as `inside` does, but `watched` from the file `probe`, which has the further outputs `shown`."""

    inside: Backend
    watched: Path
    probe: Path
    shown: tuple[str, ...]
    watch: ShowOutputs

    @property
    def name(self) -> str:
        return self.inside.name

    def open(self, segment: Path) -> Engine:
        if segment != self.watched:
            return self.inside.open(segment)
        return ObservingEngine(self.inside.open(self.probe), self.shown, self.watch)


@dataclass(frozen=True)
class Seen:
    """One point of a pool, image `sample` at `step`: the histogram of every tensor, (tensors, BINS) and (tensors,)."""

    sample: int
    step: int
    counts: Counts
    limits: Numbers
    largest: Numbers

    @staticmethod
    def of(sample: int, step: int, histograms: Sequence[Histogram]) -> Seen:
        return Seen(
            sample=sample,
            step=step,
            counts=np.stack([histogram.counts for histogram in histograms]).astype(np.uint32),
            limits=np.array([histogram.limit for histogram in histograms]),
            largest=np.array([histogram.amax for histogram in histograms]),
        )


@dataclass
class Observer:
    """Counts what is shown to it, point by point: x, or x - bound where `bounds` has a lower bound of the tensor.

    `halves` is the number of network rows of an image.
    """

    names: tuple[str, ...]
    bounds: Mapping[str, float]
    halves: int
    points: list[Seen] = field(default_factory=list)
    _last: list[list[Histogram]] = field(default_factory=list)

    def watch(self, tensors: Mapping[str, Buffer]) -> None:
        """Count one run: rows (images x halves, ...), all images of a half together."""
        count = len(tensors[self.names[0]]) // self.halves
        self._last = [
            [self._counted(name, tensors[name][image::count]) for name in self.names] for image in range(count)
        ]

    def _counted(self, name: str, values: Buffer) -> Histogram:
        return Histogram.empty().add(values - np.float32(self.bounds[name]) if name in self.bounds else values)

    def keep(self, step: int, first: int) -> None:
        """Keep the run that was counted last: it was `step` of images `first` and on."""
        self.points += [Seen.of(first + image, step, histograms) for image, histograms in enumerate(self._last)]

    @property
    def peaks(self) -> dict[tuple[int, int], Numbers]:
        """The largest of each tensor at each point, as it was counted, (sample, step) -> (tensors,)."""
        return {(seen.sample, seen.step): seen.largest for seen in self.points}


@dataclass
class PeakObserver:
    """Keeps the largest magnitudes of what is shown to it, and no more; otherwise as Observer."""

    names: tuple[str, ...]
    halves: int
    peaks: dict[tuple[int, int], Numbers] = field(default_factory=dict)
    _last: Numbers = field(default_factory=lambda: np.empty((0, 0)))

    def watch(self, tensors: Mapping[str, Buffer]) -> None:
        """Look at one run: rows (images x halves, ...), all images of a half together."""
        by_row = np.stack([np.abs(tensors[name]).reshape(len(tensors[name]), -1).max(axis=1) for name in self.names])
        self._last = by_row.reshape(len(self.names), self.halves, -1).max(axis=1).T  # (images, tensors)

    def keep(self, step: int, first: int) -> None:
        """Keep the run that was looked at last: it was `step` of images `first` and on."""
        self.peaks |= {(first + image, step): largest for image, largest in enumerate(self._last)}


@dataclass(frozen=True)
class ObservedPool:
    """Histograms of every point of a pool; `bounds` are the lower bounds they were counted from."""

    names: tuple[str, ...]
    bounds: Mapping[str, float]
    points: Mapping[tuple[int, int], Seen]  # (sample, step) ->

    @staticmethod
    def of(observer: Observer) -> ObservedPool:
        return ObservedPool(
            observer.names, observer.bounds, {(seen.sample, seen.step): seen for seen in observer.points}
        )

    def histograms(self, points: Iterable[tuple[int, int]]) -> dict[str, Histogram]:
        """Merge those of some points, (sample, step). Raises BundleError for a point that was not observed."""
        merged = [Histogram.empty() for _ in self.names]
        for pair in points:
            if pair not in self.points:
                raise BundleError(f"image {pair[0]} at step {pair[1]} was not observed; compile again")
            seen = self.points[pair]
            merged = [
                histogram.merged(Histogram(seen.counts[i].astype(np.int64), seen.limits[i], seen.largest[i]))
                for i, histogram in enumerate(merged)
            ]
        return dict(zip(self.names, merged, strict=True))

    def save(self, path: Path) -> None:
        """Write it as one .npz file without pickle."""
        bounded, seen = [name for name in self.names if name in self.bounds], list(self.points.values())
        arrays: dict[str, Any] = {
            "names": np.array(self.names),
            "bounded": np.array(bounded, dtype=str),
            "bounds": np.array([self.bounds[name] for name in bounded]),
        }
        np.savez(
            path, **arrays | {each.name: np.stack([getattr(row, each.name) for row in seen]) for each in fields(Seen)}
        )

    @staticmethod
    def load(path: Path) -> ObservedPool:
        """Load a pool that was saved. Raises BundleError for a file that is none."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                bounds = dict(zip(arrays["bounded"].tolist(), arrays["bounds"].tolist(), strict=True))
                columns = {each.name: arrays[each.name] for each in fields(Seen)}
                names = tuple(arrays["names"].tolist())
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as e:
            raise BundleError(f"{path} holds no observed pool ({e}); compile again") from e
        rows = [
            Seen(**{name: column[place] for name, column in columns.items()}) for place in range(len(columns["step"]))
        ]
        return ObservedPool(names, bounds, {(int(seen.sample), int(seen.step)): seen for seen in rows})
