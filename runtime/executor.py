"""The executor: runs a program step by step on named buffers. It decides nothing.

One request: the conditioning once for all steps, then per step one segment call, guidance, the sampler's update and
the compensation. What a request computes on is its own: buffers, and their bindings to the engines. They are allocated
at its first step or come from an earlier request of the same size; cache slots carry nothing over, because a program
writes every slot before it reads it. So requests may run in any number of threads, half-way, nested or abandoned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import index
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.engines.backend import Binding, Buffer, Engine
from ditc.errors import DitcError, InputError
from ditc.guidance import Guidance
from ditc.program import AHEAD, CONDITION, DECODE, UPDATE, Program, Step
from ditc.runtime.conditioning import Conditioning, steps_ahead
from ditc.runtime.samplers import Row, needs_noise, update
from ditc.spec import ModelSpec

__all__ = [
    "Compensation",
    "Executor",
    "NoiseSource",
    "Observation",
    "Samples",
    "StepEvent",
    "check_request",
    "check_stream",
    "closed_while_running",
    "seeded_noise",
    "streamed_noise",
    "whole_numbers",
    "written_ports",
]

Samples = NDArray[np.float32]
NoiseSource = Callable[[int], Samples]  # step -> fresh noise, (batch, channels, height, width)
Compensation = Callable[[int, Samples], Samples]  # (step, sample) -> sample
Observation = tuple["int | None", str, Mapping[str, Buffer]]  # (step, segment, outputs by port)
NO_INPUTS: Mapping[str, Samples] = {}

REQUEST_BYTES = 256 << 20  # about what the buffers of one request may take
MOST_AT_ONCE = 64  # images; more of the smallest models gain nothing
BLOCK_INSIDES = 16  # tensors of a branch's size that are alive inside a block, beside the cache slots
WORD = 32  # bits of a word of a random stream's seed
KEPT_BUFFERS = 4  # sets of buffers that wait for their next request, whatever their sizes


@dataclass(frozen=True)
class StepEvent:
    """What one step did. `before` and `x` are the samples before and after it, (batch, channels, height, width).

    A caller may change `x` in place before it asks for the next step, which starts from it.

    `engine_seconds` is the time inside the segment's engine, `seconds` the whole step. The last event of
    `Pipeline.generate` carries the finished `images`.
    """

    index: int
    steps: int
    t: float
    segment: str
    before: Samples
    x: Samples
    seconds: float
    engine_seconds: float
    images: Samples | None = None


@dataclass(frozen=True, eq=False)
class _Buffers:
    """Everything one engine call needs, for one number of images; `rows` of the network are images times halves.

    `bindings` are those of the segments that these buffers have been bound to, by name.
    """

    images: int
    x: Samples
    out: Samples
    conditioning: Conditioning
    slots: tuple[Buffer, ...]  # each (rows, *branch_shape)
    bindings: dict[str, Binding]


Part = tuple[slice, _Buffers]  # the images of a request that go through the engines together


class Executor:
    """Runs one program over opened engines, for any number of threads; a request's buffers and bindings are its own.

    `engines` maps segment names to engines, `table` is the sampler's (column -> (steps,)), `guidance` the weight of
    classifier-free guidance; at 1 the unconditional half is not computed at all. `step_inputs` are tables that a
    segment may take a row of at each step, name of its input -> (steps, ...). `together` is how many images a call of
    an engine may hold at most, None for any number: scales measured as a tensor comes are those of all its images.
    """

    def __init__(
        self,
        spec: ModelSpec,
        program: Program,
        table: Mapping[str, NDArray[np.float64]],
        engines: Mapping[str, Engine],
        guidance: float,
        compensation: Compensation | None = None,
        *,
        step_inputs: Mapping[str, Samples] = NO_INPUTS,
        together: int | None = None,
    ) -> None:
        self.spec = spec
        self.program = program
        self.guidance = Guidance.of(spec, guidance)
        self.compensation = compensation
        self._engines = engines
        self._step_inputs = step_inputs
        self.together = together
        self._rows: list[Row] = [
            {name: float(column[i]) for name, column in table.items()} for i in range(len(program.steps))
        ]
        self._free: deque[_Buffers] = deque(maxlen=KEPT_BUFFERS)
        self._closed = False

    @property
    def at_once(self) -> int:
        """How many images one request should hold: as many as REQUEST_BYTES has buffers for, 1 where none go together.

        An image has its rows of every buffer, one label's tables of all steps, and what is alive inside a block.
        """
        if self.together is not None:
            return self.together
        branch, latent = prod(self.spec.branch_shape), prod(self.spec.latent_shape)
        values = self.guidance.halves * ((self.program.slots + BLOCK_INSIDES) * branch + 3 * latent)
        one = np.dtype(np.float32).itemsize * (values + self._table_values())
        return int(np.clip(REQUEST_BYTES // one, 1, MOST_AT_ONCE))

    @property
    def decoder(self) -> Engine | None:
        """The engine from latents to images; None where nothing is decoded."""
        return self._engines.get(DECODE)

    def close(self) -> None:
        """Let the buffers go. Requests under way end at their next step with an error of ours."""
        self._closed = True
        self._free.clear()

    def run(self, labels: Sequence[int], noise: Samples, fresh_noise: NoiseSource) -> Iterator[StepEvent]:
        """One request: a StepEvent per step; the last one's `x` is the finished latent.

        `noise` is x_T, (batch, channels, height, width). Samples of earlier events stay valid.
        """
        check_request(self.spec, labels, noise)
        size = self.together or len(labels)
        places = [slice(first, min(first + size, len(labels))) for first in range(0, len(labels), size)]
        parts = [(place, self._lent(place.stop - place.start)) for place in places]
        try:
            for place, buffers in parts:
                self._run_condition(labels[place], buffers)
            x = np.ascontiguousarray(noise, dtype=np.float32)
            for step in self.program.steps:
                if self._closed:
                    raise closed_while_running()
                event = self._run_step(step, x, parts, fresh_noise)
                x = event.x
                yield event
        finally:
            for _, buffers in parts:
                self._free.append(buffers)

    def last(self, labels: Sequence[int], noise: Samples, fresh_noise: NoiseSource) -> Samples:
        """The finished latents of one request, (n, channels, height, width)."""
        *_, event = self.run(labels, noise, fresh_noise)
        return event.x

    def outputs_at(self, label: int, samples: Mapping[int, Samples]) -> Iterator[Observation]:
        """What each segment returns for one image that stands at `samples`, (1, channels, height, width), before steps.

        (index of the step, segment, its outputs by port): the conditioning of these steps first, then the steps in
        order, each followed by UPDATE, the sample after it without fresh noise. A step takes what an earlier one of
        `samples` left; so all that it reads has to be written there. Arrays are valid until the next one.
        """
        buffers = self._lent(1)
        try:
            self._run_condition([label], buffers)
            yield None, CONDITION, buffers.conditioning.tables_at(sorted(samples))
            for step in (step for step in self.program.steps if step.index in samples):
                x = np.ascontiguousarray(samples[step.index], np.float32)
                self._run_engine(step, x, buffers)
                yield (
                    step.index,
                    step.segment,
                    {"out": buffers.out, **{port: buffers.slots[slot] for port, slot in written_ports(step)}},
                )
                yield step.index, UPDATE, {"next": self._updated(step, x, buffers.out, np.zeros_like(x))}
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

    def _run_condition(self, labels: Sequence[int], buffers: _Buffers) -> None:
        """All steps and both guidance halves in one call, each label once."""
        buffers.conditioning.compute(self.guidance.labels(labels))

    def _run_step(self, step: Step, x: Samples, parts: Sequence[Part], fresh_noise: NoiseSource) -> StepEvent:
        start = perf_counter()
        z = fresh_noise(step.index) if needs_noise(self._rows[step.index]) else None
        after, engine_seconds = [], 0.0
        for place, buffers in parts:
            engine_seconds += self._run_engine(step, x[place], buffers)
            after.append(self._updated(step, x[place], buffers.out, None if z is None else z[place]))
        return StepEvent(
            index=step.index,
            steps=len(self.program.steps),
            t=step.t,
            segment=step.segment,
            before=x,
            x=after[0] if len(after) == 1 else np.concatenate(after),
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

    def _updated(self, step: Step, x: Samples, out: Samples, z: Samples | None) -> Samples:
        """The samples after guidance, the sampler's update and the compensation."""
        prediction, raw_variance = self.guidance.combine(out, len(x))
        after = update(self._rows[step.index], x, prediction, raw_variance, z)
        return after if self.compensation is None else self.compensation(step.index, after)

    def _bound(self, step: Step, buffers: _Buffers) -> Binding:
        engine = self._engines[step.segment]
        binding = buffers.bindings.get(step.segment)
        if binding is None:
            binding = buffers.bindings[step.segment] = engine.binding()
        binding.bind("x", buffers.x)
        binding.bind("out", buffers.out)
        for name, rows in buffers.conditioning.inputs(step.index, engine.inputs).items():
            binding.bind(name, rows)
        for name in self._step_inputs.keys() & engine.inputs.keys():
            binding.bind(name, self._step_inputs[name][step.index])
        for port, slot in step.cache_ports:
            binding.bind(port, buffers.slots[slot])
        return binding

    def _allocate(self, images: int) -> _Buffers:
        rows = images * self.guidance.halves
        t = np.array([row["t"] for row in self._rows], dtype=np.float32)
        slot_shape, slot_type = (rows, *self.spec.branch_shape), self._slot_type()
        return _Buffers(
            images=images,
            x=np.empty((rows, *self.spec.latent_shape), np.float32),
            out=np.empty((rows, self.spec.out_channels, self.spec.height, self.spec.width), np.float32),
            conditioning=Conditioning(self._engines[CONDITION], t, rows, self._most_ahead()),
            slots=tuple(np.empty(slot_shape, slot_type) for _ in range(self.program.slots)),
            bindings={},
        )

    def _table_values(self) -> int:
        """Numbers in the tables of all steps for one label."""
        sizes = {"batch": 1, "steps": len(self._rows)}
        ports = self._engines[CONDITION].outputs.values()
        return sum(prod(sizes[size] if isinstance(size, str) else size for size in port.shape) for port in ports)

    def _most_ahead(self) -> int:
        """How many rows of the tables past its own a step may be given."""
        ports = (port for engine in self._engines.values() for port in engine.inputs.values())
        return max((steps_ahead(port) for port in ports if port.name.startswith(f"{AHEAD}.")), default=0)

    def _slot_type(self) -> str:
        """The type in which segments hand over cached outputs: that of the first one written."""
        for step in self.program.steps:
            for value in step.writes:
                return self._engines[step.segment].outputs[f"cache.{value}"].dtype
        return "float32"


def written_ports(step: Step) -> Iterator[tuple[str, int]]:
    """(port, slot) of every cache that a step leaves for later ones."""
    return ((f"cache.{value}", slot) for value, slot in step.writes.items())


def check_request(spec: ModelSpec, labels: Sequence[int], noise: Samples) -> None:
    """Raise InputError unless every label is a class and `noise` has one sample per label."""
    spec.check_labels(tuple(labels))
    expected = (len(labels), *spec.latent_shape)
    if noise.shape != expected:
        raise InputError(f"noise must have shape {expected} for {len(labels)} labels, found {noise.shape}")


def whole_numbers(name: str, values: Iterable[Any], example: str) -> list[int]:
    """Python's integers of any kind of them. Raises InputError for fractions, texts and nested rows."""
    try:
        return [index(value) for value in values]
    except TypeError as e:
        found = " ".join(repr(values).split())
        raise InputError(f"{name} must be whole numbers, for example {example}; found {found:.60}") from e


def closed_while_running() -> DitcError:
    """The error of a request whose pipeline was closed before its last step."""
    return DitcError("the pipeline was closed while this request ran; keep it open until the last image is there")


def seeded_noise(seed: int, first: int, count: int, shape: tuple[int, ...]) -> tuple[Samples, NoiseSource]:
    """(x_T, source of fresh noise) for images `first` to `first + count` of a seed.

    Every image has a random stream of its own, so neither the batch size nor the neighbours change it.
    """
    return streamed_noise([(seed, first + i) for i in range(count)], shape)


def streamed_noise(images: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> tuple[Samples, NoiseSource]:
    """As `seeded_noise`, for images named one by one: (seed, number of the image).

    Raises InputError for numbers below 0.
    """
    streams = [_stream(seed, number) for seed, number in images]

    def draw(_: Any = None) -> Samples:
        return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])

    return draw(), draw


def check_stream(seed: int, number: int) -> None:
    """Raise InputError for a seed, or a number of an image, below 0."""
    named = (("seed", "--seed 0 or more", seed), ("number of the first image", "first=0 or more", number))
    for name, advice, value in named:
        if value < 0:
            raise InputError(f"the {name} must not be negative, found {value}; set {advice}")


def _stream(seed: int, number: int) -> np.random.Generator:
    """The random stream of one image.

    NumPy takes a list of numbers as the 32-bit words that they have, one after the other: a seed of two words would be
    the stream of another seed's later image. So the words are told apart by how many a large seed has.
    """
    check_stream(seed, number)
    words = [-(-value.bit_length() // WORD) or 1 for value in (seed, number)]
    return np.random.default_rng((seed, number) if words == [1, 1] else (seed, number, *words))
