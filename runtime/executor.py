"""The executor: runs a program step by step on named buffers. It decides nothing.

One request: the conditioning once for all steps, then per step one segment call, guidance, the sampler's update and
the compensation. Buffers are allocated once per batch size and used again by the next request. Cache slots carry
nothing from one request to the next, because a program writes every slot before it reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ditc.engines.backend import Buffer, Engine
from ditc.errors import InputError
from ditc.program import AHEAD, CONDITION, Program, Step
from ditc.runtime.conditioning import Conditioning, steps_ahead
from ditc.runtime.samplers import Row, needs_noise, update
from ditc.spec import ModelSpec

__all__ = [
    "Compensation",
    "Executor",
    "NoiseSource",
    "Samples",
    "StepEvent",
    "check_request",
    "seeded_noise",
]

Samples = NDArray[np.float32]
NoiseSource = Callable[[int], Samples]  # step -> fresh noise, (batch, channels, height, width)
Compensation = Callable[[int, Samples], Samples]  # (step, sample) -> sample
NO_INPUTS: Mapping[str, Samples] = {}


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


@dataclass(frozen=True)
class _Buffers:
    """Everything one request needs, for one batch size; `rows` of the network are images times guidance halves."""

    x: Samples
    labels: NDArray[np.int64]
    out: Samples
    conditioning: Conditioning
    slots: tuple[Buffer, ...]  # each (rows, *branch_shape)


class Executor:
    """Runs one program over opened engines.

    `engines` maps segment names to engines, `table` is the sampler's (column -> (steps,)), `guidance` the weight of
    classifier-free guidance; at 1 the unconditional half is not computed at all. `step_inputs` are tables that a
    segment may take a row of at each step, name of its input -> (steps, ...).
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
    ) -> None:
        if guidance != 1 and spec.null_label is None:
            raise InputError(f"{spec.name} has no unconditional class, so guidance must be 1, found {guidance:g}")
        self.spec = spec
        self.program = program
        self.guidance = guidance
        self.compensation = compensation
        self._engines = engines
        self._step_inputs = step_inputs
        self._rows: list[Row] = [
            {name: float(column[i]) for name, column in table.items()} for i in range(len(program.steps))
        ]
        self._free: dict[int, list[_Buffers]] = {}

    @property
    def halves(self) -> int:
        """Network rows per image: 2 with guidance (conditional, unconditional), else 1."""
        return 1 if self.guidance == 1 else 2

    def run(self, labels: Sequence[int], noise: Samples, fresh_noise: NoiseSource) -> Iterator[StepEvent]:
        """One request: a StepEvent per step; the last one's `x` is the finished latent.

        `noise` is x_T, (batch, channels, height, width). Samples of earlier events stay valid.
        """
        check_request(self.spec, labels, noise)
        free = self._free.setdefault(len(labels), [])
        buffers = free.pop() if free else self._allocate(len(labels))
        try:
            self._run_condition(labels, buffers)
            x = np.ascontiguousarray(noise, dtype=np.float32)
            for step in self.program.steps:
                event = self._run_step(step, x, buffers, fresh_noise)
                x = event.x
                yield event
        finally:
            free.append(buffers)

    def last(self, labels: Sequence[int], noise: Samples, fresh_noise: NoiseSource) -> Samples:
        """The finished latents of one request, (n, channels, height, width)."""
        *_, event = self.run(labels, noise, fresh_noise)
        return event.x

    def _run_condition(self, labels: Sequence[int], buffers: _Buffers) -> None:
        """All steps and both guidance halves in one call, each label once."""
        count = len(labels)
        buffers.labels[:count] = labels
        if self.halves == 2:
            buffers.labels[count:] = cast(int, self.spec.null_label)  # the constructor refused guidance without one
        buffers.conditioning.compute(buffers.labels)

    def _run_step(self, step: Step, x: Samples, buffers: _Buffers, fresh_noise: NoiseSource) -> StepEvent:
        start = perf_counter()
        row = self._rows[step.index]
        for half in range(self.halves):
            buffers.x[half * len(x) : (half + 1) * len(x)] = x
        engine = self._bound_engine(step, buffers)
        engine_start = perf_counter()
        engine.run()
        engine_seconds = perf_counter() - engine_start
        out, raw_variance = self._guided(buffers.out, len(x))
        z = fresh_noise(step.index) if needs_noise(row) else None
        after = update(row, x, out, raw_variance, z)
        if self.compensation is not None:
            after = self.compensation(step.index, after)
        return StepEvent(
            index=step.index,
            steps=len(self.program.steps),
            t=step.t,
            segment=step.segment,
            before=x,
            x=after,
            seconds=perf_counter() - start,
            engine_seconds=engine_seconds,
        )

    def _bound_engine(self, step: Step, buffers: _Buffers) -> Engine:
        engine = self._engines[step.segment]
        engine.bind("x", buffers.x)
        engine.bind("out", buffers.out)
        for name, rows in buffers.conditioning.inputs(step.index, engine.inputs).items():
            engine.bind(name, rows)
        for name in self._step_inputs.keys() & engine.inputs.keys():
            engine.bind(name, self._step_inputs[name][step.index])
        for port, slot in step.cache_ports:
            engine.bind(port, buffers.slots[slot])
        return engine

    def _guided(self, out: Samples, count: int) -> tuple[Samples, Samples | None]:
        """(prediction after guidance, raw variance or None): eps_u + w (eps_c - eps_u) on the guided channels."""
        channels, guided = self.spec.in_channels, self.spec.cfg_channels
        raw_variance = out[:count, channels:] if self.spec.diffusion.learned_sigma else None
        prediction = out[:count, :channels].copy()
        if self.halves == 2:
            conditional, unconditional = out[:count, :guided], out[count:, :guided]
            prediction[:, :guided] = unconditional + np.float32(self.guidance) * (conditional - unconditional)
        return prediction, raw_variance

    def _allocate(self, count: int) -> _Buffers:
        rows = count * self.halves
        t = np.array([row["t"] for row in self._rows], dtype=np.float32)
        slot_shape, slot_type = (rows, *self.spec.branch_shape), self._slot_type()
        return _Buffers(
            x=np.empty((rows, *self.spec.latent_shape), np.float32),
            labels=np.empty(rows, np.int64),
            out=np.empty((rows, self.spec.out_channels, self.spec.height, self.spec.width), np.float32),
            conditioning=Conditioning(self._engines[CONDITION], t, rows, self._most_ahead()),
            slots=tuple(np.empty(slot_shape, slot_type) for _ in range(self.program.slots)),
        )

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


def check_request(spec: ModelSpec, labels: Sequence[int], noise: Samples) -> None:
    """Raise InputError unless every label is a class and `noise` has one sample per label."""
    spec.check_labels(tuple(labels))
    expected = (len(labels), *spec.latent_shape)
    if noise.shape != expected:
        raise InputError(f"noise must have shape {expected} for {len(labels)} labels, found {noise.shape}")


def seeded_noise(seed: int, first: int, count: int, shape: tuple[int, ...]) -> tuple[Samples, NoiseSource]:
    """(x_T, source of fresh noise) for images `first` to `first + count` of a seed.

    Every image has a random stream of its own, so neither the batch size nor the neighbours change it.
    """
    if seed < 0:
        raise InputError(f"the seed must not be negative, found {seed}; set --seed 0 or more")
    streams = [np.random.default_rng([seed, first + i]) for i in range(count)]

    def draw(_: Any = None) -> Samples:
        return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])

    return draw(), draw
