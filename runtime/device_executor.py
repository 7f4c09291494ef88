"""The executor on a GPU: the same program, with every buffer on the device and no host round trip between steps.

Per step two engines run on one stream: the segment, then `update` (guidance, sampler, compensation), which writes the
next sample once per guidance half. Two sample buffers take turns, so step i always reads and writes the same
addresses; that makes every step, and the whole trajectory, one CUDA graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import Manifest
from ditc.engines.backend import DeviceEngine
from ditc.engines.device import ALIGNMENT, Device, DeviceGraph, DeviceTensor
from ditc.errors import CheckError, InputError
from ditc.guidance import Guidance
from ditc.program import AHEAD, CONDITION, DECODE, LABELS, TIMESTEPS, UPDATE, Step
from ditc.runtime.compensation import TableCompensation
from ditc.runtime.conditioning import steps_ahead
from ditc.runtime.executor import (
    NoiseSource,
    Observation,
    Samples,
    StepEvent,
    check_request,
    closed_while_running,
    in_range,
    written_ports,
)
from ditc.tables import Tables, sampler_columns, step_inputs
from ditc.update_form import COLUMNS

__all__ = ["GRAPHS", "DeviceExecutor", "update_rows"]

GRAPHS = ("trajectory", "step", "none")  # how much one CUDA graph holds
REPLAY_TOLERANCE = 1e-3  # of a replay against the same calls made one by one, relative to the largest value


def update_rows(tables: Tables, channels: int) -> NDArray[np.float32]:
    """The `row` input of `update` for every step, (steps, width): COLUMNS, then K and mu per channel.

    `tables` are a bundle's: the sampler's columns, and the compensation where there is one.
    """
    given = sampler_columns(tables)
    steps = len(given["t"])
    columns = {name: given.get(name, np.zeros(steps)) for name in COLUMNS}
    columns["noise"] = (columns["sigma"] > 0).astype(np.float64)
    k, mu = np.ones((steps, channels)), np.zeros((steps, channels))
    compensation = TableCompensation.from_tables(tables)
    if compensation is not None:
        k = compensation.k
        mu = np.where(k == 1, 0.0, compensation.mu)
    rows = np.concatenate([np.stack([columns[name] for name in COLUMNS], axis=1), k, mu], axis=1)
    return rows.astype(np.float32)


@dataclass(eq=False)
class _Watched:
    """A request that is walked step by step, and what it left on the device when another took its place."""

    left: Sequence[NDArray[Any]] = ()
    ended: bool = False


class DeviceExecutor:
    """Runs one program over device engines, at the one batch size they were made for.

    A request of fewer images is filled up and cut back. `tables` are the bundle's. `graphs` says how much one CUDA
    graph holds: the second request captures it and checks that a replay follows its inputs, so that a single request
    does not pay for that.

    There is one set of buffers, so threads take turns: with a request that is queued whole, or with one step of a
    watched one. A watched request that has lost its place between two steps puts what it left there back.
    """

    def __init__(
        self,
        manifest: Manifest,
        tables: Tables,
        engines: Mapping[str, DeviceEngine],
        device: Device,
        *,
        graphs: str = "none",
    ) -> None:
        self.spec = manifest.model
        self.program = manifest.program
        self.batch = manifest.batch
        self._guidance = Guidance.of(manifest.model, manifest.guidance)
        self.graphs = graphs
        self._engines = engines
        self._device = device
        self._adds_noise = "z" in engines[UPDATE].inputs
        self._allocate(sampler_columns(tables)["t"], update_rows(tables, self.spec.in_channels))
        self._step_inputs = {
            name: [self._uploaded(row) for row in table] for name, table in step_inputs(tables).items()
        }
        self._trajectory: DeviceGraph | None = None
        self._step_graphs: dict[int, DeviceGraph] = {}
        self._requests = 0
        self._turn = threading.Lock()
        self._owner: _Watched | None = None  # whose values the buffers hold, if it has steps left
        self._closed = False

    @property
    def at_once(self) -> int:
        """The number of images that one request should hold: what its engines are made for."""
        return self.batch

    @property
    def decodes(self) -> bool:
        return DECODE in self._engines

    def close(self) -> None:
        """As `Executor.close`, once whose turn it is has had it."""
        with self._turn:
            self._closed = True

    def run(self, labels: Sequence[int], noise: Samples, fresh_noise: NoiseSource) -> Iterator[StepEvent]:
        """As `Executor.run`, with every step's sample copied to the host. `last` does without."""
        request = _Watched()
        try:
            with self._turn_of(request):
                count = self._start(labels, noise, fresh_noise)
                self._queue_condition()
                self._device.synchronize()
            before = np.ascontiguousarray(noise, dtype=np.float32)
            for step in self.program.steps:
                with self._turn_of(request):
                    event = self._run_step(step, before, count)
                before = event.x
                yield event
        finally:
            request.ended = True

    def _run_step(self, step: Step, before: Samples, count: int) -> StepEvent:
        start = perf_counter()
        self._launch_step(step)
        self._device.synchronize()
        engine_seconds = perf_counter() - start
        return StepEvent(
            index=step.index,
            steps=len(self.program.steps),
            t=step.t,
            segment=step.segment,
            before=before,
            x=self._device.download(self._x[(step.index + 1) % 2])[:count],
            seconds=perf_counter() - start,
            engine_seconds=engine_seconds,
        )

    @contextmanager
    def _own_turn(self) -> Iterator[None]:
        """The device for this thread."""
        with self._turn:
            if self._closed:
                raise closed_while_running()
            self._device.activate()
            yield

    @contextmanager
    def _turn_of(self, request: _Watched | None) -> Iterator[None]:
        """The device and its buffers for a request; None is one that is done when the block ends."""
        with self._own_turn():
            owner = self._owner
            if owner is not request:
                if owner is not None and not owner.ended:
                    owner.left = [self._device.download(tensor) for tensor in self._carried]
                self._owner = None  # until all of it is there: an error half-way leaves the buffers nobody's
                if request is not None and request.left:
                    for tensor, array in zip(self._carried, request.left, strict=True):
                        self._device.upload(array, tensor)
                self._owner = request
            yield

    def last(self, labels: Sequence[int], noise: Samples, fresh_noise: NoiseSource) -> Samples:
        """As `Executor.last`: queued whole, waited for once."""
        with self._turn_of(None):
            count = self._start(labels, noise, fresh_noise)
            self._launch_trajectory()
            return self._device.download(self._final)[:count]

    def outputs_at(self, label: int, samples: Mapping[int, Samples]) -> list[Observation]:
        """As `Executor.outputs_at`: call by call and without a graph."""
        first, observations = samples[min(samples)], list[Observation]()
        rows = [0, self.batch][: len(set(self._guidance.labels([label]).tolist()))]
        with self._turn_of(None):
            self._start([label], first, lambda _: np.zeros_like(first))
            self._queue_condition()
            tables = {name: self._device.download(table) for name, table in self._tables.items()}
            observations.append(
                (None, CONDITION, {name: table[sorted(samples)][:, rows] for name, table in tables.items()})
            )
            for step in (step for step in self.program.steps if step.index in samples):
                x = self._guidance.rows(_filled(samples[step.index], self.batch))
                self._device.upload(np.ascontiguousarray(x, np.float32), self._x[step.index % 2])
                self._queue_step(step)
                written = {"out": self._out, **{port: self._slots[slot] for port, slot in written_ports(step)}}
                outputs = {port: self._device.download(tensor)[:: self.batch] for port, tensor in written.items()}
                after = self._device.download(self._x[(step.index + 1) % 2])
                observations += [(step.index, step.segment, outputs), (step.index, UPDATE, {"next": after[:1]})]
        return observations

    def images(self, labels: Sequence[int], noise: Samples, fresh_noise: NoiseSource) -> Samples:
        """As `Executor.images`; latents that are decoded never leave the device."""
        if not self.decodes:
            return in_range(self.last(labels, noise, fresh_noise))
        with self._turn_of(None):
            count = self._start(labels, noise, fresh_noise)
            self._launch_trajectory()
            self._device.copy(self._final, self._latent)
            return in_range(self._decoded(count))

    def decode(self, latents: Samples) -> Samples:
        """As `Executor.decode`."""
        if not self.decodes:
            return in_range(latents)
        images = []
        for first in range(0, len(latents), self.batch):
            part = latents[first : first + self.batch]
            with self._own_turn():
                self._device.upload(_filled(part, self.batch), self._latent)
                images.append(self._decoded(len(part)))
        return in_range(np.concatenate(images))

    def _decoded(self, count: int) -> Samples:
        engine = self._engines[DECODE]
        engine.bind("latent", self._latent)
        engine.bind("image", self._image)
        engine.enqueue()
        return self._device.download(self._image)[:count]

    def _start(self, labels: Sequence[int], noise: Samples, fresh_noise: NoiseSource) -> int:
        """Check a request and upload all it needs: labels, x_T, and every step's noise."""
        count = len(labels)
        check_request(self.spec, labels, noise)
        if count > self.batch:
            raise InputError(
                f"these engines run {self.batch} images at a time, found {count} labels; "
                "take images() or latents(), which split them, or compile the bundle with a larger --batch"
            )
        own = _filled(np.asarray(labels, np.int64), self.batch)
        self._device.upload(self._guidance.labels(own), self._labels)
        self._device.upload(self._guidance.rows(_filled(noise, self.batch)), self._start_x)
        if self._adds_noise:
            fresh = [_filled(fresh_noise(step.index), self.batch) for step in self.program.steps]
            for z, tensor in zip(fresh, self._z, strict=True):
                self._device.upload(z, tensor)
        self._requests += 1
        return count

    def _queue_condition(self) -> None:
        """All steps' tables in one call, and x_T in its place."""
        engine = self._engines[CONDITION]
        engine.bind(TIMESTEPS, self._t)
        engine.bind(LABELS, self._labels)
        for name, table in self._tables.items():
            engine.bind(name, table.rows(0, len(self.program.steps)))
        engine.enqueue()
        for part, own in self._copied_parts:
            self._device.copy(part, own)
        self._device.copy(self._start_x, self._x[0])

    def _queue_step(self, step: Step) -> None:
        """The segment, then the update; every address depends on the step alone."""
        engine = self._engines[step.segment]
        x, after = self._x[step.index % 2], self._x[(step.index + 1) % 2]
        engine.bind("x", x)
        engine.bind("out", self._out)
        for name, part in self._table_parts[step.index].items():
            engine.bind(name, part)
        for name in self._step_inputs.keys() & engine.inputs.keys():
            engine.bind(name, self._step_inputs[name][step.index])
        for port_name, slot in step.cache_ports:
            engine.bind(port_name, self._slots[slot])
        engine.enqueue()
        update = self._engines[UPDATE]
        update.bind("x", x)
        update.bind("out", self._out)
        update.bind("row", self._update_rows[step.index])
        if self._adds_noise:
            update.bind("z", self._z[step.index])
        update.bind("next", after)
        update.enqueue()

    def _queue_trajectory(self) -> None:
        self._queue_condition()
        for step in self.program.steps:
            self._queue_step(step)

    def _launch_step(self, step: Step) -> None:
        """One step: on its own graph where graphs hold steps, captured by the second request."""
        if self.graphs != "step" or self._requests < 2:
            self._queue_step(step)
        elif step.index in self._step_graphs:
            self._step_graphs[step.index].launch()
        else:
            self._step_graphs[step.index] = self._captured(
                lambda: self._queue_step(step), self._x[step.index % 2], self._x[(step.index + 1) % 2]
            )

    def _launch_trajectory(self) -> None:
        if self.graphs == "trajectory" and self._requests > 1:
            if self._trajectory is None:
                self._trajectory = self._captured(self._queue_trajectory, self._start_x, self._final)
            else:
                self._trajectory.launch()
            return
        self._queue_condition()
        for step in self.program.steps:
            self._launch_step(step)

    def _captured(self, queue_work: Callable[[], None], source: DeviceTensor, result: DeviceTensor) -> DeviceGraph:
        """Do the work once call by call, capture it, and hold the graph against that: same input, and another one.

        A graph that was captured under the wrong device or stream replays old results and raises no error.
        """
        queue_work()  # also settles what an engine sets up at its first run
        expected = self._device.download(result)
        if not np.isfinite(expected).all():
            raise CheckError("the samples are NaN or infinite on this target; `ditc verify --target` shows the step")
        graph = self._device.capture(queue_work)
        given = self._device.download(source)
        self._device.upload(given[..., ::-1] + 1, source)
        graph.launch()
        changed = self._device.download(result)
        self._device.upload(given, source)
        graph.launch()
        replayed = self._device.download(result)
        gap, scale = float(np.abs(replayed - expected).max()), float(np.abs(expected).max()) or 1.0
        if gap > REPLAY_TOLERANCE * scale or np.array_equal(changed, replayed):
            raise CheckError(
                "a CUDA graph does not follow its inputs (it replays an old result); "
                "run with --graphs none, and report this with what `ditc doctor` prints"
            )
        return graph

    def _allocate(self, t: NDArray[np.float64], rows: NDArray[np.float32]) -> None:
        device, spec, steps = self._device, self.spec, len(self.program.steps)
        count = self.batch * self._guidance.halves
        sample = (count, *spec.latent_shape)
        self._x = (device.empty(sample, "float32"), device.empty(sample, "float32"))
        self._start_x = device.empty(sample, "float32")
        self._final = self._x[steps % 2].rows(0, self.batch)
        self._out = device.empty((count, spec.out_channels, spec.height, spec.width), "float32")
        self._labels = device.empty((count,), "int64")
        self._t = device.empty((steps,), "float32")
        device.upload(t.astype(np.float32), self._t)
        self._update_rows = [self._uploaded(row) for row in rows]
        self._z = (
            [device.empty((self.batch, *spec.latent_shape), "float32") for _ in range(steps)]
            if self._adds_noise
            else []
        )
        self._copied_parts: list[tuple[DeviceTensor, DeviceTensor]] = []
        self._allocate_tables()
        shape, dtype = self._slot_form(count)
        self._slots = [device.empty(shape, dtype) for _ in range(self.program.slots)]
        # what a step finds and a later one needs
        own = (copy for _, copy in self._copied_parts)
        self._carried = (*self._x, *self._tables.values(), *own, *self._z, *self._slots)
        if self.decodes:
            self._latent = device.empty((self.batch, *spec.latent_shape), "float32")
            port = self._engines[DECODE].outputs["image"]
            self._image = device.empty(port.fixed_shape, port.dtype)

    def _uploaded(self, array: NDArray[Any]) -> DeviceTensor:
        tensor = self._device.empty(array.shape, str(array.dtype))
        self._device.upload(array, tensor)
        return tensor

    def _allocate_tables(self) -> None:
        """Allocate what `condition` returns, with zeros for steps past the last, and the parts that each step binds."""
        later = {
            name: {port.name: steps_ahead(port) for port in engine.inputs.values() if port.name.startswith(f"{AHEAD}.")}
            for name, engine in self._engines.items()
        }
        past = max((count for ports in later.values() for count in ports.values()), default=0)
        self._tables = {}
        for port in self._engines[CONDITION].outputs.values():
            steps, *shape = port.fixed_shape
            self._tables[port.name] = self._uploaded(np.zeros((steps + past, *shape), port.dtype))
        self._table_parts = []
        for step in self.program.steps:
            inputs = self._engines[step.segment].inputs
            tables = {name: table for name, table in self._tables.items() if name in inputs}
            parts = {name: self._placed(table.row(step.index)) for name, table in tables.items()}
            for port_name, count in later[step.segment].items():
                table = self._tables[port_name.removeprefix(f"{AHEAD}.")]
                parts[port_name] = self._placed(table.rows(step.index + 1, count))
            self._table_parts.append(parts)

    def _placed(self, part: DeviceTensor) -> DeviceTensor:
        """A part of a table; where its address would be odd, a tensor of its own that it is copied to."""
        if part.pointer % ALIGNMENT == 0:
            return part
        own = self._device.empty(part.shape, part.dtype)
        self._copied_parts.append((part, own))
        return own

    def _slot_form(self, count: int) -> tuple[tuple[int, ...], str]:
        """Shape and type in which segments hand over cached outputs: those of the first one written."""
        for step in self.program.steps:
            for value in step.writes:
                return (count, *self.spec.branch_shape), self._engines[step.segment].outputs[f"cache.{value}"].dtype
        return (count, *self.spec.branch_shape), "float32"


def _filled(array: NDArray[Any], count: int) -> NDArray[Any]:
    """The array with its first axis filled up to `count` by repeating."""
    return array if len(array) == count else np.resize(array, (count, *array.shape[1:]))
