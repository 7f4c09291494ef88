"""Executors, which walk requests through one program, on a processor or on a device, and decide nothing.

Beside the protocol lies what a request is made of: the records of its steps, its checks and its noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ditc.engines.backend import Buffer, DeviceEngine, Engine
from ditc.errors import DitcError, InputError
from ditc.guidance import Samples
from ditc.program import Program, Step
from ditc.requests import Arrays, Request
from ditc.spec import ModelSpec

__all__ = [
    "Correction",
    "Executor",
    "NoiseSource",
    "Observation",
    "Samples",
    "StepEvent",
    "check_request",
    "check_stream",
    "closed_while_running",
    "in_range",
    "seeded_noise",
    "seeded_request",
    "slot_shapes",
    "slot_type",
    "streamed_noise",
    "streamed_request",
    "written_ports",
]

NoiseSource = Callable[[int], Samples]  # step -> fresh noise, (batch, channels, *space)
Observation = tuple["int | None", str, Mapping[str, Buffer]]  # (step, segment, outputs by port)
# (step, samples of a whole request after it) -> the samples that the next step starts from
Correction = Callable[[int, Samples], Samples]

WORD = 32  # bits of a word of a random stream's seed
NOISE_OF_CONDITIONS = 0x636F6E64  # the purpose of a stream, no number of words of a seed


@dataclass(frozen=True)
class StepEvent:
    """A record of one step. `before` and `x` are the samples before and after it, (batch, channels, *space).

    Its arrays are views that can't be written to, and stay what they are while the request goes on: a record changes
    nothing. What is to change samples on their way is a `Correction`, which an executor is made with.

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

    def __post_init__(self) -> None:
        for name in ("before", "x", "images"):
            if (array := getattr(self, name)) is not None:
                object.__setattr__(self, name, _read_only(array))


class Executor(Protocol):
    """Runs one program over open engines, for any number of threads, and corrects the samples after each step."""

    @property
    def at_once(self) -> int:
        """The number of images that one request should hold."""
        ...

    @property
    def decodes(self) -> bool:
        """Is there a decoder among the engines? Without one, images are the latents themselves."""
        ...

    def run(self, request: Request, noise: Samples, fresh_noise: NoiseSource, start: int = 0) -> Iterator[StepEvent]:
        """Walk one request: a StepEvent per step; the last one's `x` is the finished latent.

        `noise` is x_T, (batch, channels, *space), or the samples in front of step `start`, which is the first to run
        and has to be one that may be (`runtime.starting`). Raises InputError for a shape that the model doesn't have,
        DitcError at the step before which the executor was closed.
        """
        ...

    def last(self, request: Request, noise: Samples, fresh_noise: NoiseSource, start: int = 0) -> Samples:
        """Return the finished latents of one request, (n, channels, *space), the caller's own."""
        ...

    def images(self, request: Request, noise: Samples, fresh_noise: NoiseSource, start: int = 0) -> Samples:
        """Return the finished images of one request in [-1, 1], (n, channels, height, width), the caller's own."""
        ...

    def decode(self, latents: Samples) -> Samples:
        """Return images in [-1, 1] of any number of latents, (n, channels, *space)."""
        ...

    def outputs_at(self, request: Request, samples: Mapping[int, Samples]) -> Iterable[Observation]:
        """Return what segments give for one image that stands at `samples`, (1, channels, *space), before steps.

        (index of the step, segment, its outputs by port): the conditioning of these steps first, then the steps in
        order, each followed by UPDATE, the sample after it without fresh noise. A step takes what an earlier one of
        `samples` left; so all that it reads has to be written there. Arrays are valid until the next one.
        """
        ...

    def close(self) -> None:
        """Let go of what requests need. Those under way end at their next step with an error of ours."""
        ...


def _read_only(array: Samples) -> Samples:
    view: Samples = array.view()
    view.flags.writeable = False
    return view


def in_range(images: Samples) -> Samples:
    """Return images cut to [-1, 1]."""
    return np.asarray(np.clip(images, -1, 1))


def written_ports(step: Step) -> Iterator[tuple[str, int]]:
    """(port, slot) of every cache that a step leaves for later ones."""
    return ((f"cache.{value}", slot) for value, slot in step.writes.items())


def slot_shapes(program: Program, spec: ModelSpec) -> list[tuple[int, ...]]:
    """Return the shape of each slot without the batch axis: that of all values that it holds in turn."""
    shapes = [spec.branch_shape] * program.slots
    own = spec.wiring.shapes
    for step in program.steps:
        for value, slot in step.writes.items():
            shapes[slot] = own.get(value, spec.branch_shape)
    return shapes


def slot_type(program: Program, engines: Mapping[str, Engine | DeviceEngine]) -> str:
    """Return the type in which segments hand over cached outputs: that of the first one written."""
    for step in program.steps:
        for value in step.writes:
            return engines[step.segment].outputs[f"cache.{value}"].dtype
    return "float32"


def check_request(spec: ModelSpec, request: Request, noise: Samples) -> None:
    """Raise InputError unless `noise` has one sample per image, and classes are the model's."""
    if spec.num_classes is not None:
        spec.check_labels(tuple(request.labels))
    expected = (len(request), *spec.latent_shape)
    if noise.shape != expected:
        raise InputError(f"noise must have shape {expected} for {len(request)} images, found {noise.shape}")


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


def seeded_request(
    spec: ModelSpec, request: Request, seed: int, first: int, steps: int
) -> tuple[Request, Samples, NoiseSource]:
    """(request, x_T, source of fresh noise) for images `first` and on of a seed, as executors take them."""
    return streamed_request(spec, request, [(seed, first + place) for place in range(len(request))], steps)


def streamed_request(
    spec: ModelSpec, request: Request, images: Sequence[tuple[int, int]], steps: int
) -> tuple[Request, Samples, NoiseSource]:
    """As `seeded_request`, for images named one by one: (seed, number of the image).

    Conditions that are fresh noise have random streams of their own: those of the samples stay what they are without.
    """
    fresh = [condition for condition in spec.conditions if condition.fresh]
    arrays: Arrays = {
        condition.name: np.stack(
            [
                _stream(*image, NOISE_OF_CONDITIONS, number).standard_normal((steps, *condition.shape), np.float32)
                for image in images
            ],
            axis=1,
        )
        for number, condition in enumerate(fresh)
    }
    return request.with_fresh(arrays), *streamed_noise(images, spec.latent_shape)


def check_stream(seed: int, number: int) -> None:
    """Raise InputError for a seed, or a number of an image, below 0."""
    named = (("seed", "--seed 0 or more", seed), ("number of the first image", "first=0 or more", number))
    for name, advice, value in named:
        if value < 0:
            raise InputError(f"the {name} must not be negative, found {value}; set {advice}")


def _stream(seed: int, number: int, *purpose: int) -> np.random.Generator:
    """The random stream of one image, or one of its further ones by their `purpose`.

    NumPy takes a list of numbers as the 32-bit words that they have, one after the other: a seed of two words would be
    the stream of another seed's later image. So the words are told apart by how many a large seed has.
    """
    check_stream(seed, number)
    words = [-(-value.bit_length() // WORD) or 1 for value in (seed, number)]
    return np.random.default_rng((seed, number, *([] if words == [1, 1] else words), *purpose))
