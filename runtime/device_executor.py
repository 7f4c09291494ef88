"""The executor on a GPU: the same program, with every buffer on the device and no host round trip between steps.

Per step two engines run on one stream: the segment, then `update` (guidance, sampler, compensation), which writes the
next sample once per guidance half. Step i always reads and writes the same addresses (`device_buffers`); that makes
every step, and the whole trajectory, one CUDA graph.
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
from ditc.engines.device import Device, DeviceGraph, DeviceTensor
from ditc.errors import CheckError, InputError
from ditc.guidance import Guidance
from ditc.program import CONDITION, DECODE, TIMESTEPS, UPDATE, Step
from ditc.requests import Request
from ditc.runtime.conditioning import is_of_request
from ditc.runtime.device_buffers import DeviceBuffers
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
from ditc.tables import Tables, history_columns
from ditc.update_form import PREDICTED

__all__ = ["GRAPHS", "DeviceExecutor"]

GRAPHS = ("trajectory", "step", "none")  # how much one CUDA graph holds
REPLAY_TOLERANCE = 1e-3  # of a replay against the same calls made one by one, relative to the largest value


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
        self._buffers = DeviceBuffers(manifest, tables, engines, device)
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

    def run(self, request: Request, noise: Samples, fresh_noise: NoiseSource, start: int = 0) -> Iterator[StepEvent]:
        """As `Executor.run`, with every step's sample copied to the host. `last` does without."""
        watched = _Watched()
        try:
            with self._turn_of(watched):
                count = self._start(request, noise, fresh_noise, start)
                self._queue_condition(start)
                self._device.synchronize()
            before = np.array(noise, np.float32, order="C")  # as on a processor
            for step in self.program.steps[start:]:
                with self._turn_of(watched):
                    event = self._run_step(step, before, count, start)
                before = event.x
                yield event
        finally:
            watched.ended = True

    def _run_step(self, step: Step, before: Samples, count: int, first: int) -> StepEvent:
        start = perf_counter()
        self._launch_step(step, first)
        self._device.synchronize()
        engine_seconds = perf_counter() - start
        return StepEvent(
            index=step.index,
            steps=len(self.program.steps),
            t=step.t,
            segment=step.segment,
            before=before,
            x=self._device.download(self._buffers.x_at(step.index + 1))[:count],
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
                    owner.left = self._buffers.contents()
                self._owner = None  # until all of it is there: an error half-way leaves the buffers nobody's
                if request is not None and request.left:
                    self._buffers.restore(request.left)
                self._owner = request
            yield

    def last(self, request: Request, noise: Samples, fresh_noise: NoiseSource, start: int = 0) -> Samples:
        """As `Executor.last`: queued whole, waited for once."""
        with self._turn_of(None):
            count = self._start(request, noise, fresh_noise, start)
            self._launch_trajectory(start)
            return self._device.download(self._buffers.final)[:count]

    def outputs_at(self, request: Request, samples: Mapping[int, Samples]) -> list[Observation]:
        """As `Executor.outputs_at`: call by call and without a graph."""
        first, observations = samples[min(samples)], list[Observation]()
        rows = [half * self.batch for half in range(self._distinct_halves(request))]
        with self._turn_of(None):
            self._start(request, first, lambda _: np.zeros_like(first))
            self._queue_condition()
            tables = {name: self._device.download(table) for name, table in self._buffers.tables.items()}
            observations.append(
                (
                    None,
                    CONDITION,
                    {name: _of_rows(name, table, sorted(samples), rows) for name, table in tables.items()},
                )
            )
            for step in (step for step in self.program.steps if step.index in samples):
                x = self._guidance.rows(_filled(samples[step.index], self.batch))
                self._device.upload(np.ascontiguousarray(x, np.float32), self._buffers.x_at(step.index))
                self._queue_step(step, first=step.index)
                caches = {port: self._buffers.slots[slot] for port, slot in written_ports(step)}
                written = {"out": self._buffers.out, **caches}
                outputs = {port: self._device.download(tensor)[:: self.batch] for port, tensor in written.items()}
                after = self._device.download(self._buffers.x_at(step.index + 1))
                observations += [(step.index, step.segment, outputs), (step.index, UPDATE, {"next": after[:1]})]
        return observations

    def images(self, request: Request, noise: Samples, fresh_noise: NoiseSource, start: int = 0) -> Samples:
        """As `Executor.images`; latents that are decoded never leave the device."""
        if not self.decodes:
            return in_range(self.last(request, noise, fresh_noise, start))
        with self._turn_of(None):
            count = self._start(request, noise, fresh_noise, start)
            self._launch_trajectory(start)
            self._device.copy(self._buffers.final, self._buffers.latent)
            return in_range(self._decoded(count))

    def decode(self, latents: Samples) -> Samples:
        """As `Executor.decode`."""
        if not self.decodes:
            return in_range(latents)
        images = []
        for first in range(0, len(latents), self.batch):
            part = latents[first : first + self.batch]
            with self._own_turn():
                self._device.upload(_filled(part, self.batch), self._buffers.latent)
                images.append(self._decoded(len(part)))
        return in_range(np.concatenate(images))

    def _decoded(self, count: int) -> Samples:
        engine = self._engines[DECODE]
        engine.bind("latent", self._buffers.latent)
        engine.bind("image", self._buffers.image)
        engine.enqueue()
        return self._device.download(self._buffers.image)[:count]

    def _distinct_halves(self, request: Request) -> int:
        """Return 1 where both guidance halves of one image are given the same, else the number of halves."""
        rows = self._guidance.row_conditions(request).values()
        return self._guidance.halves if any(not np.array_equal(array[:1], array[-1:]) for array in rows) else 1

    def _start(self, request: Request, noise: Samples, fresh_noise: NoiseSource, first: int = 0) -> int:
        """Check a request and upload all it needs: conditions, what it begins with, and the noise of every step."""
        count = len(request)
        check_request(self.spec, request, noise)
        if count > self.batch:
            raise InputError(
                f"these engines run {self.batch} images at a time, found {count} images; "
                "take images() or latents(), which split them, or compile the bundle with a larger --batch"
            )
        filled = self._guidance.row_conditions(request.filled(self.spec, self.batch))
        for name, rows in filled.items():
            self._device.upload(np.ascontiguousarray(rows), self._buffers.conditions[name])
        self._device.upload(self._guidance.rows(_filled(noise, self.batch)), self._buffers.start_x)
        for step, tensor in self._buffers.z.items():
            if step >= first:
                self._device.upload(_filled(fresh_noise(step), self.batch), tensor)
        self._requests += 1
        return count

    def _queue_condition(self, first: int = 0) -> None:
        """All steps' tables in one call, and the samples in front of the first step in their place."""
        engine, buffers = self._engines[CONDITION], self._buffers
        if TIMESTEPS in engine.inputs:
            engine.bind(TIMESTEPS, buffers.t)
        for name, tensor in buffers.conditions.items():
            engine.bind(name, tensor)
        for name, table in buffers.tables.items():
            engine.bind(name, table if is_of_request(name) else table.rows(0, len(self.program.steps)))
        engine.enqueue()
        for part, own in buffers.copied_parts:
            self._device.copy(part, own)
        self._device.copy(buffers.start_x, buffers.x_at(first))

    def _queue_step(self, step: Step, *, first: int = 0) -> None:
        """The segment, then the update; every address depends on the step alone.

        Where it looks back to before the request's first step, the update finds zeros.
        """
        engine, buffers = self._engines[step.segment], self._buffers
        x = buffers.x_at(step.index)
        engine.bind("x", x)
        engine.bind("out", buffers.out)
        for name, part in buffers.table_parts[step.index].items():
            engine.bind(name, part)
        for name, row in buffers.step_rows[step.index].items():
            engine.bind(name, row)
        for port_name, slot in self.program.cache_ports(step):
            engine.bind(port_name, buffers.slots[slot])
        engine.enqueue()
        update = self._engines[UPDATE]
        update.bind("x", x)
        update.bind("out", buffers.out)
        update.bind("row", buffers.update_rows[step.index])
        if buffers.z:
            update.bind("z", buffers.noise_at(step.index))
        for back, (of_x, of_out) in enumerate(history_columns(buffers.memory), 1):
            sample, prediction = buffers.pair_at(step.index - back if step.index - back >= first else -1)
            update.bind(of_x, sample)
            update.bind(of_out, prediction)
        if buffers.memory:
            update.bind(PREDICTED, buffers.prediction_at(step.index))
        update.bind("next", buffers.x_at(step.index + 1))
        update.enqueue()

    def _queue_trajectory(self) -> None:
        self._queue_condition()
        for step in self.program.steps:
            self._queue_step(step)

    def _launch_step(self, step: Step, first: int = 0) -> None:
        """One step: on its own graph where graphs hold steps, captured by the second request that runs all of them."""
        if self.graphs != "step" or self._requests < 2 or first:
            self._queue_step(step, first=first)
        elif step.index in self._step_graphs:
            self._step_graphs[step.index].launch()
        else:
            self._step_graphs[step.index] = self._captured(
                lambda: self._queue_step(step), self._buffers.x_at(step.index), self._buffers.x_at(step.index + 1)
            )

    def _launch_trajectory(self, first: int = 0) -> None:
        if self.graphs == "trajectory" and self._requests > 1 and not first:
            if self._trajectory is None:
                self._trajectory = self._captured(self._queue_trajectory, self._buffers.start_x, self._buffers.final)
            else:
                self._trajectory.launch()
            return
        self._queue_condition(first)
        for step in self.program.steps[first:]:
            self._launch_step(step, first)

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


def _filled(array: NDArray[Any], count: int) -> NDArray[Any]:
    """The array with its first axis filled up to `count` by repeating."""
    return array if len(array) == count else np.resize(array, (count, *array.shape[1:]))


def _of_rows(name: str, table: NDArray[Any], steps: Sequence[int], rows: Sequence[int]) -> NDArray[Any]:
    """The rows of one image in a table at some steps; a table of the request has no steps."""
    return table[rows] if is_of_request(name) else table[steps][:, rows]
