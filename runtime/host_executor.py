"""The executor on a processor: runs a program step by step on named buffers. It decides nothing.

One request: the conditioning once for all steps, then per step one segment call, guidance, the sampler's update and
the correction. What a request computes on is its own: buffers, their bindings to the engines, and the pairs that a
sampler with memory looks back at. Buffers are allocated at its first step or come from an earlier request of the same
size; cache slots carry nothing over, because a program writes every slot before it reads it. So requests may run in any
number of threads, half-way, nested or abandoned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.engines.backend import Binding, Buffer, Engine
from ditc.guidance import Guidance
from ditc.program import CONDITION, DECODE, UPDATE, Program, Step
from ditc.requests import Request
from ditc.runtime.compensation import TableCompensation
from ditc.runtime.conditioning import Conditioning, most_ahead, rows_at, with_later_rows
from ditc.runtime.executor import (
    Correction,
    NoiseSource,
    Observation,
    Samples,
    StepEvent,
    check_request,
    closed_while_running,
    in_range,
    slot_shapes,
    slot_type,
    written_ports,
)
from ditc.runtime.samplers import Pairs, Row, needs_noise, no_pairs, update
from ditc.spec import ModelSpec
from ditc.tables import Tables, memory_of, sampler_columns, step_inputs

__all__ = ["HostExecutor"]

REQUEST_BYTES = 256 << 20  # about what the buffers of one request may take
MOST_AT_ONCE = 64  # images; more of the smallest models gain nothing
BLOCK_INSIDES = 16  # tensors of the streams' size that are alive inside a block, beside the cache slots
KEPT_BUFFERS = 4  # sets of buffers that wait for their next request, whatever their sizes


@dataclass(frozen=True, eq=False)
class _Buffers:
    """Everything one engine call needs, for one number of images; `rows` of the network are images times halves.

    `bindings` are those of the segments that these buffers have been bound to, by name.
    """

    images: int
    x: Samples
    out: Samples
    conditioning: Conditioning
    slots: tuple[Buffer, ...]  # each (rows, *shape of what it holds)
    bindings: dict[str, Binding]


Part = tuple[slice, _Buffers, Pairs]  # the images of a request that go through the engines together, and their past


class HostExecutor:
    """Runs one program over opened engines, for any number of threads; a request's buffers and bindings are its own.

    `engines` maps segment names to engines; `guidance` is the weight of classifier-free guidance, at 1 the
    unconditional half is not computed at all. `tables` are a bundle's: the sampler's columns, the compensation where
    there is one, and what segments take a row of at each step. `step_inputs` holds the latter, name of the input ->
    (steps, ...), some with zeros for steps past the last; each row is read when its step begins. A `correction` stands
    in for the tables' compensation; it is called with the samples of a whole request.

    `batch` is how many images the bundle was compiled for: a request should hold no fewer, and a decoder takes no more.
    `together` is how many images a call of an engine may hold at most, None for any number: scales measured as a tensor
    comes are those of all its images.
    """

    def __init__(
        self,
        spec: ModelSpec,
        program: Program,
        tables: Tables,
        engines: Mapping[str, Engine],
        guidance: float,
        *,
        correction: Correction | None = None,
        batch: int = 1,
        together: int | None = None,
    ) -> None:
        self.spec = spec
        self.program = program
        self.guidance = Guidance.of(spec, guidance)
        self.step_inputs = with_later_rows(step_inputs(tables), most_ahead(engines))
        self._correction = TableCompensation.from_tables(tables) if correction is None else correction
        self._batch = batch
        self._together = together
        self._engines = engines
        columns = sampler_columns(tables)
        self._memory = memory_of(columns)
        self._rows: list[Row] = [
            {name: float(column[i]) for name, column in columns.items()} for i in range(len(program.steps))
        ]
        self._free: deque[_Buffers] = deque(maxlen=KEPT_BUFFERS)
        self._closed = False

    @property
    def at_once(self) -> int:
        """The number of images that one request should hold: as fit REQUEST_BYTES, or a call of an engine.

        An image has its rows of every buffer, one row's tables of all steps, and what is alive inside a block.
        """
        if self._together is not None:
            return self._together
        latent, slots = prod(self.spec.latent_shape), sum(map(prod, slot_shapes(self.program, self.spec)))
        values = self.guidance.halves * (slots + BLOCK_INSIDES * self.spec.stream_numbers + 3 * latent)
        values += 2 * self._memory * latent
        image_bytes = np.dtype(np.float32).itemsize * (values + self._table_values())
        return max(self._batch, min(REQUEST_BYTES // image_bytes, MOST_AT_ONCE))

    @property
    def decodes(self) -> bool:
        return DECODE in self._engines

    def close(self) -> None:
        """As `Executor.close`."""
        self._closed = True
        self._free.clear()

    def run(self, request: Request, noise: Samples, fresh_noise: NoiseSource, start: int = 0) -> Iterator[StepEvent]:
        """As `Executor.run`."""
        check_request(self.spec, request, noise)
        size = self._together or len(request)
        places = [slice(first, min(first + size, len(request))) for first in range(0, len(request), size)]
        parts = [(place, self._lent(place.stop - place.start), no_pairs(self._rows[0])) for place in places]
        try:
            for place, buffers, _ in parts:
                self._run_condition(request.take(self.spec, place), buffers)
            x = np.array(noise, np.float32, order="C")  # a record of it stays what it is, whatever the caller does
            for step in self.program.steps[start:]:
                if self._closed:
                    raise closed_while_running()
                event = self._run_step(step, x, parts, fresh_noise)
                x = event.x
                yield event
        finally:
            for _, buffers, _ in parts:
                self._free.append(buffers)

    def last(self, request: Request, noise: Samples, fresh_noise: NoiseSource, start: int = 0) -> Samples:
        """As `Executor.last`."""
        x = noise
        for event in self.run(request, noise, fresh_noise, start):
            x = event.x
        return np.array(x)

    def images(self, request: Request, noise: Samples, fresh_noise: NoiseSource, start: int = 0) -> Samples:
        """As `Executor.images`."""
        return self.decode(self.last(request, noise, fresh_noise, start))

    def decode(self, latents: Samples) -> Samples:
        """As `Executor.decode`: as many at a time as the bundle was compiled for, a decoder's insides are large."""
        if not self.decodes:
            return in_range(latents)
        decoder = self._engines[DECODE]
        port, binding = decoder.outputs["image"], decoder.binding()
        shape = (len(latents), *(length for length in port.shape[1:] if isinstance(length, int)))
        images: NDArray[Any] = np.empty(shape, port.dtype)
        for first in range(0, len(latents), self._batch):
            part = slice(first, first + self._batch)
            binding.bind("latent", np.ascontiguousarray(latents[part], np.float32))
            binding.bind("image", images[part])
            binding.run()
        return in_range(images)

    def outputs_at(self, request: Request, samples: Mapping[int, Samples]) -> Iterator[Observation]:
        """As `Executor.outputs_at`."""
        buffers = self._lent(1)
        try:
            self._run_condition(request, buffers)
            yield None, CONDITION, buffers.conditioning.tables_at(sorted(samples))
            for step in (step for step in self.program.steps if step.index in samples):
                x = np.ascontiguousarray(samples[step.index], np.float32)
                self._run_engine(step, x, buffers)
                yield (
                    step.index,
                    step.segment,
                    {"out": buffers.out, **{port: buffers.slots[slot] for port, slot in written_ports(step)}},
                )
                after = self._updated(step, x, buffers.out, np.zeros_like(x), no_pairs(self._rows[0]))
                yield step.index, UPDATE, {"next": self._corrected(step, after)}
        finally:
            self._free.append(buffers)

    def _lent(self, images: int) -> _Buffers:
        """Buffers for so many images: some that an earlier request has given back, else new ones."""
        for _ in range(len(self._free)):  # no lock: each call on the deque is whole, and a miss costs an allocation
            try:
                buffers = self._free.popleft()
            except IndexError:
                break
            if buffers.images == images:
                return buffers
            self._free.append(buffers)
        return self._allocate(images)

    def _run_condition(self, request: Request, buffers: _Buffers) -> None:
        """All steps and both guidance halves in one call, equal rows once."""
        buffers.conditioning.compute(self.guidance.row_conditions(request))

    def _run_step(self, step: Step, x: Samples, parts: Sequence[Part], fresh_noise: NoiseSource) -> StepEvent:
        start = perf_counter()
        z = fresh_noise(step.index) if needs_noise(self._rows[step.index]) else None
        after, engine_seconds = list[Samples](), 0.0
        for place, buffers, pairs in parts:
            engine_seconds += self._run_engine(step, x[place], buffers)
            after.append(self._updated(step, x[place], buffers.out, None if z is None else z[place], pairs))
        return StepEvent(
            index=step.index,
            steps=len(self.program.steps),
            t=step.t,
            segment=step.segment,
            before=x,
            x=self._corrected(step, after[0] if len(after) == 1 else np.concatenate(after)),
            seconds=perf_counter() - start,
            engine_seconds=engine_seconds,
        )

    def _run_engine(self, step: Step, x: Samples, buffers: _Buffers) -> float:
        """The network's output for samples, left in the buffers; returns the seconds inside the engine."""
        for half in range(self.guidance.halves):
            buffers.x[half * len(x) : (half + 1) * len(x)] = x
        binding = self._bound(step, buffers)
        start = perf_counter()
        binding.run()
        return perf_counter() - start

    def _updated(self, step: Step, x: Samples, out: Samples, z: Samples | None, pairs: Pairs) -> Samples:
        """The samples after guidance and the sampler's update, which looks back at `pairs` and adds this step's."""
        prediction, raw_variance = self.guidance.combine(out, len(x))
        after = update(self._rows[step.index], x, prediction, raw_variance, z, pairs)
        if self._memory:
            pairs.appendleft((x, prediction))  # a copy of its own, as `combine` gives it
        return after

    def _corrected(self, step: Step, x: Samples) -> Samples:
        """The samples that the next step starts from."""
        return x if self._correction is None else self._correction(step.index, x)

    def _bound(self, step: Step, buffers: _Buffers) -> Binding:
        engine = self._engines[step.segment]
        binding = buffers.bindings.get(step.segment)
        if binding is None:
            binding = buffers.bindings[step.segment] = engine.binding()
        binding.bind("x", buffers.x)
        binding.bind("out", buffers.out)
        for name, rows in buffers.conditioning.inputs(step.index, engine.inputs).items():
            binding.bind(name, rows)
        for name, row in rows_at(self.step_inputs, step.index, engine.inputs).items():
            binding.bind(name, row)
        for port, slot in self.program.cache_ports(step):
            binding.bind(port, buffers.slots[slot])
        return binding

    def _allocate(self, images: int) -> _Buffers:
        rows = images * self.guidance.halves
        t = np.array([row["t"] for row in self._rows], dtype=np.float32)
        fresh = frozenset(condition.name for condition in self.spec.conditions if condition.fresh)
        dtype = slot_type(self.program, self._engines)
        return _Buffers(
            images=images,
            x=np.empty((rows, *self.spec.latent_shape), np.float32),
            out=np.empty((rows, *self.spec.prediction_shape), np.float32),
            conditioning=Conditioning(self._engines[CONDITION], t, rows, most_ahead(self._engines), fresh),
            slots=tuple(np.empty((rows, *shape), dtype) for shape in slot_shapes(self.program, self.spec)),
            bindings={},
        )

    def _table_values(self) -> int:
        """Numbers in the tables of all steps for one row."""
        sizes = {"batch": 1, "steps": len(self._rows)}
        ports = self._engines[CONDITION].outputs.values()
        return sum(prod(sizes[size] if isinstance(size, str) else size for size in port.shape) for port in ports)
