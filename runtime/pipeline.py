"""The public face of a bundle at run time: open it, ask for images, watch the steps.

with ditc.load("bundle") as pipe:
    images = pipe.images([3, 1, 4], seed=0)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import Bundle, open_bundle
from ditc.engines.backend import Backend, DeviceBackend, DeviceEngine, Engine, runnable_path
from ditc.engines.integer_form import SaysType
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.engines.targets import backend_for
from ditc.errors import BundleError, CheckError, DitcError, InputError, unknown_name
from ditc.program import CONDITION, DECODE, UPDATE, Program
from ditc.requests import Request
from ditc.runtime.device_executor import GRAPHS, DeviceExecutor
from ditc.runtime.executor import Executor, NoiseSource, Samples, StepEvent, streamed_noise
from ditc.runtime.fingerprint import PORTABLE, TYPED, Difference, Fingerprint, observer, types_of_calls
from ditc.runtime.host_executor import HostExecutor
from ditc.runtime.prompts import PromptEncoders, prompted_request
from ditc.runtime.request_inputs import check_noise, image_streams
from ditc.runtime.starting import Starting
from ditc.spec import ModelSpec
from ditc.tables import DYNAMIC, sampler_columns

__all__ = ["Pipeline", "load", "open_engines"]


CHECKED: set[tuple[str, str, bool]] = set()  # (bundle, backend, compensated?) that this process has compared


def load(
    path: str | PathLike[str],
    *,
    target: str | None = None,
    engines: str | PathLike[str] | None = None,
    graphs: str = "trajectory",
    backend: Backend | DeviceBackend | None = None,
    reference: bool = False,
    compensation: bool = True,
    threads: int | None = None,
    batch: int | None = None,
    check: bool = False,
) -> Pipeline:
    """Open a bundle. `reference=True` runs its FP, uncached program instead of the compiled one, on the CPU.

    `compensation=False` leaves out the variance compensation it was compiled with, to see what that does. `target` is
    where it runs, None for the one it was compiled for; `engines` the folder of its engines where that is not the
    bundle's own; `graphs` how much one CUDA graph holds ("trajectory", "step", "none"); `backend` stands in
    for the target's. `threads` are those of one engine call on a processor, None for every core that the process may
    use; `batch` is how many images `images` and `latents` walk together there, None for as many as fit a small buffer.
    With `check` every segment is first held to what it gave where the bundle was compiled, once per process and target,
    on a GPU at every opening: CheckError names the one that gives something else. Raises BundleError, naming the file,
    where anything in the bundle differs from its manifest.
    """
    if graphs not in GRAPHS:
        raise unknown_name("CUDA graph scope", graphs, GRAPHS)
    bundle = open_bundle(Path(path))
    if backend is None:
        chosen = "cpu" if reference else target or bundle.manifest.target
        store = None if engines is None or reference else Path(engines)
        backend = backend_for(chosen, store, threads)
    return Pipeline(
        bundle,
        backend=backend,
        reference=reference,
        compensation=compensation,
        graphs=graphs,
        batch=batch,
        check=check,
    )


def open_engines(stack: ExitStack, backend: Backend, segments: Mapping[str, Path]) -> dict[str, Engine]:
    """The engine of each segment, in the backend's own form where there is one; closed with the stack."""
    return {
        name: stack.enter_context(backend.open(runnable_path(path, backend.name))) for name, path in segments.items()
    }


class Pipeline:
    """A bundle ready to generate. Use it in a `with` block; it owns the engines.

    Threads may share it: every request gives the images that it gives by itself. On a processor requests run side by
    side, and their engine calls wait for free cores; on a GPU one request, or one step of a watched one, has the device
    at a time. `engines` are those of the open pipeline by segment, for who measures them; `encoders` read prompts, and
    are opened by the first one.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: Backend | DeviceBackend,
        reference: bool = False,
        compensation: bool = True,
        graphs: str = "none",
        batch: int | None = None,
        check: bool = False,
    ) -> None:
        if reference and check:
            raise InputError(
                "the fingerprint is of the compiled program, not of the reference; leave out one of the two"
            )
        if reference and not bundle.has_reference:
            raise BundleError(f"{bundle.path} was compiled or copied without its FP reference; compile it again")
        self.bundle = bundle
        self.backend = backend
        self.reference = reference
        self._compensated = compensation and not reference
        self._stack = ExitStack()
        self._graphs = graphs
        self._check = check
        self._batch = self._checked_batch(batch)
        self._executor: Executor | None = None
        self.engines: Mapping[str, Engine | DeviceEngine] = {}
        self.encoders = PromptEncoders(
            bundle, backend if isinstance(backend, OnnxRuntimeBackend) else OnnxRuntimeBackend()
        )

    def _checked_batch(self, batch: int | None) -> int | None:
        made_for = self.bundle.manifest.batch
        if batch is not None and batch < 1:
            raise InputError(f"--batch must be at least 1, found {batch}; leave it out for what fits a small buffer")
        if self.on_device and batch not in (None, made_for):
            raise InputError(f"these engines run {made_for} images at a time, found --batch {batch}; leave it out")
        return batch

    @property
    def program(self) -> Program:
        """The program that this pipeline runs."""
        reference = self.bundle.manifest.reference_program
        return reference if self.reference and reference is not None else self.bundle.manifest.program

    @property
    def on_device(self) -> bool:
        """Do the segments run on a GPU, with all buffers in its memory?"""
        return isinstance(self.backend, DeviceBackend)

    def __enter__(self) -> Pipeline:
        names = self.program.calls
        try:
            if isinstance(self.backend, DeviceBackend):
                self._executor = self._on_device(self.backend, [*names, UPDATE])
            else:
                self._executor = self._on_host(self.backend, names)
            self._check_types()
            if self._check:
                self._check_once()
        except BaseException:
            self._close()
            raise
        return self

    def _on_host(self, backend: Backend, names: Sequence[str]) -> HostExecutor:
        place = self.bundle.reference_path if self.reference else self.bundle.segment_path
        self.engines = engines = open_engines(self._stack, backend, {name: place(name) for name in names})
        manifest = self.bundle.manifest
        measures = manifest.scales == DYNAMIC and not self.reference
        return HostExecutor(
            manifest.model,
            self.program,
            self._tables(),
            engines,
            manifest.guidance,
            batch=manifest.batch,
            together=1 if measures else None,
        )

    def _tables(self) -> dict[str, NDArray[Any]]:
        tables = self.bundle.tables()
        return {n: t for n, t in tables.items() if self._compensated or not n.startswith("compensation.")}

    def _check_types(self) -> None:
        """Raise BundleError where conditions are of other types than their segment takes, whose file says shapes."""
        ports = self.engines[CONDITION].inputs
        for each in self._spec.network_inputs:
            if each.name in ports and ports[each.name].dtype != each.dtype:
                raise BundleError(
                    f"{self.bundle.path} contradicts itself: its model is given {each.name!r} as {each.dtype}, and the "
                    f"segment {CONDITION} takes {ports[each.name].dtype}; compile it again"
                )

    def _on_device(self, backend: DeviceBackend, names: Sequence[str]) -> DeviceExecutor:
        device = self._stack.enter_context(backend.device())
        self.engines = engines = self._stack.enter_context(backend.engines(self.bundle, names, device))
        graphs = self._graphs if backend.captures else "none"
        return DeviceExecutor(self.bundle.manifest, self._tables(), engines, device, graphs=graphs)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        executor = self._executor
        if executor is not None:
            executor.close()
        self.encoders.close()
        self._stack.close()  # before anything is let go: a device may still work on it
        self._executor = None
        self.engines = {}

    @property
    def at_once(self) -> int:
        """The number of images that `images` and `latents` walk together.

        On a processor as many as a buffer of REQUEST_BYTES holds, and no fewer than the bundle was compiled for; one
        where activation scales are measured as they come, since a scale is then that of all images of a call.
        """
        return self._at_once(self.executor)

    def _at_once(self, executor: Executor) -> int:
        return self._batch or executor.at_once

    def generate(
        self,
        labels: Sequence[int] | Request | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        conditions: Mapping[str, Any] | None = None,
        count: int | None = None,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        noise: Samples | None = None,
        first: int = 0,
        latents: Samples | None = None,
        start: int = 0,
    ) -> Iterator[StepEvent]:
        """All images as one batch: a StepEvent per step, the last one carrying `images`; their arrays are read-only.

        `labels` are classes, one for each image, of a model that has them, or a whole Request; `prompt` is a text for
        all images or a list with one for each, where the bundle has text encoders, and `negative_prompt` what guidance
        leads away from, the empty text unless given; `conditions` are arrays of every other condition by name, (n,
        ...), embeddings too in place of prompts; `count` says how many images where none of these does. `noise` is x_T,
        (n, channels, *space); without it each image draws from the stream of (seed, first + its place), seed 0 where
        none is given. `seeds` are one for each image instead, each giving what it gives by itself: requests merged into
        one keep their noise. `latents` are samples in front of step `start` instead, taken as they are: what `noised`
        makes of finished ones, or the `before` of that step's event. The steps before it are not run, and those from it
        on have the fresh noise that they have in a whole run. Raises InputError for a condition or a shape that the
        model doesn't have, and for a step that can't be the first.
        """
        executor, count = self.executor, _count_of(count, prompt, seeds, noise, latents)
        request = self.request(labels, conditions, count, prompt=prompt, negative_prompt=negative_prompt)
        streams = image_streams(len(request), seed, seeds, first)
        begin = self._starting.samples(noise, latents, start, len(request))
        request, drawn, fresh = self._starting.streamed(request, streams, start)
        for event in executor.run(request, drawn if begin is None else begin, fresh, start):
            last = event.index == event.steps - 1
            yield replace(event, images=executor.decode(event.x)) if last and self.makes_images else event

    def latents(
        self,
        labels: Sequence[int] | Request | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        conditions: Mapping[str, Any] | None = None,
        count: int | None = None,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        noise: Samples | None = None,
        first: int = 0,
        latents: Samples | None = None,
        start: int = 0,
    ) -> Samples:
        """Finished samples before decoding, (n, channels, *space), `at_once` of them at a time; as `generate`."""
        executor, count = self.executor, _count_of(count, prompt, seeds, noise, latents)
        request = self.request(labels, conditions, count, prompt=prompt, negative_prompt=negative_prompt)
        streams = image_streams(len(request), seed, seeds, first)
        begin = self._starting.samples(noise, latents, start, len(request))
        requests = self._requests(executor, request, streams, begin, start)
        return np.concatenate([executor.last(*part) for part in requests])

    def images(
        self,
        labels: Sequence[int] | Request | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        conditions: Mapping[str, Any] | None = None,
        count: int | None = None,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        noise: Samples | None = None,
        first: int = 0,
        latents: Samples | None = None,
        start: int = 0,
    ) -> Samples:
        """Images in [-1, 1], float32 (n, channels, height, width), `at_once` of them at a time; as `generate`.

        The first one is image `first` of the seed; with `seeds` each is the first one of its own. `latents` and `start`
        are those of `generate`: image to image is

            begin = pipe.noised(finished, start=20, seed=0)
            images = pipe.images(labels, latents=begin, start=20, seed=0)
        """
        self.check_makes_images()
        executor, count = self.executor, _count_of(count, prompt, seeds, noise, latents)
        request = self.request(labels, conditions, count, prompt=prompt, negative_prompt=negative_prompt)
        streams = image_streams(len(request), seed, seeds, first)
        begin = self._starting.samples(noise, latents, start, len(request))
        requests = self._requests(executor, request, streams, begin, start)
        return np.concatenate([executor.images(*part) for part in requests])

    def request(
        self,
        labels: Sequence[int] | Request | None = None,
        conditions: Mapping[str, Any] | None = None,
        count: int | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
    ) -> Request:
        """Return the request of some images, held to the model. Raises InputError as `generate`."""
        texts = prompt is not None or negative_prompt is not None
        if isinstance(labels, Request):
            if conditions is not None or count is not None or texts:
                raise InputError("a whole request says its conditions and its count itself; leave them out")
            own = Request.of(self._spec, None, labels.arrays, len(labels))
            return replace(own, prompts=labels.prompts, negatives=labels.negatives)
        if texts:
            return prompted_request(self.encoders, labels, conditions, count, prompt, negative_prompt)
        if self.bundle.has_text and labels is None and not conditions:
            raise InputError(f"{self._spec.name} was asked for no prompt; give prompt=, or embeddings as conditions=")
        return Request.of(self._spec, labels, conditions, count)

    @property
    def _spec(self) -> ModelSpec:
        return self.bundle.manifest.model

    def noised(
        self,
        latents: Samples,
        *,
        start: int,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        first: int = 0,
    ) -> Samples:
        """Finished samples, (n, channels, *space), with as much noise as there is in front of step `start`.

        The noise is the x_T of each image: that of seed and number, as `generate` has them. Where diffusers has a
        `strength`, of N steps the last int(N * strength) are run: start = N - int(N * strength).
        """
        check_noise(latents, None, "latents")
        streams = image_streams(len(latents), seed, seeds, first)
        noise, _ = streamed_noise(streams, self._spec.latent_shape)
        return self._starting.noised(latents, noise, start)

    def start_for(self, strength: float) -> int:
        """Return the step to begin with at diffusers' `strength`, above 0 to 1: the nearest of `starts`.

        Raises InputError where that is step 0 and a later one was meant.
        """
        return self._starting.nearest(strength)

    @property
    def starts(self) -> tuple[int, ...]:
        """The steps that a request may begin with; where steps reuse or the sampler looks back, they are few."""
        return self._starting.steps

    @cached_property
    def _starting(self) -> Starting:
        return Starting(self._spec, self.program, sampler_columns(self.bundle.tables()))

    def decode(self, latents: Samples) -> Samples:
        """Latents to images in [-1, 1]. A model of 1 or 3 channels without a decoder works on pixels already.

        Raises InputError where the latents are of another kind and the bundle has no decoder.
        """
        self.check_makes_images()
        return self.executor.decode(latents)

    @property
    def makes_images(self) -> bool:
        """Does this bundle end in pixels: through a decoder, or because the model works on them?"""
        return DECODE in self.program.epilogue or self._spec.is_picture

    def check_makes_images(self) -> None:
        """Raise InputError unless `makes_images`."""
        if not self.makes_images:
            channels, *space = self._spec.latent_shape
            if len(space) != 2:
                raise InputError(
                    f"{self.bundle.path} makes samples of shape {(channels, *space)}, no images; take pipe.latents()"
                )
            raise InputError(
                f"{self.bundle.path} makes latents of {channels} channels and has no decoder; "
                "compile it with --vae FOLDER, or take pipe.latents()"
            )

    def differences(self) -> list[Difference]:
        """Return the distance of every output of every segment from what it was at the compile, in their order.

        The form that runs here is compared, with what rounding makes of the type that this target computes in; behind
        the program's segments stand text encoders, on one prompt. Raises BundleError for a bundle without a
        fingerprint.
        """
        if self.reference:
            raise InputError("the fingerprint is of the compiled program; open the bundle without reference=True")
        fingerprint = Fingerprint.of(self.bundle.path)
        fingerprint.check_fits(self.program, self._spec)
        engines, executor = self.engines, self.executor  # in this order: engines that are gone have none
        observe = observer(executor, fingerprint.request, executor.decode if executor.decodes else None)
        outputs = observe(fingerprint.samples)
        if not self._compensated:  # then the next sample is another one
            outputs = {(call, port): values for (call, port), values in outputs.items() if not call.startswith(UPDATE)}
        types = types_of_calls(self.program, {name: self._type_of(engine) for name, engine in engines.items()})
        own = fingerprint.forms[self._form(fingerprint)].differences(outputs, types)
        return [*own, *self.encoders.differences()]

    def _form(self, fingerprint: Fingerprint) -> str:
        """Return the form in a fingerprint that runs here."""
        own = TYPED if self.on_device else self.backend.name
        return own if own in fingerprint.forms else PORTABLE

    def _type_of(self, engine: Engine | DeviceEngine) -> str:
        """Return the type that an engine that has run computes in around the integers."""
        if self.on_device:
            return "f16"
        return engine.rest if isinstance(engine, SaysType) else "f32"

    def _check_once(self) -> None:
        """Raise CheckError where a segment gives something else here than where the bundle was compiled.

        On a GPU every time: its engines are no part of the bundle, and may have been built again meanwhile.
        """
        key = (self.bundle.digest, repr(self.backend), self._compensated)
        if key in CHECKED and not self.on_device:
            return
        for difference in self.differences():
            if not difference.is_rounding:
                raise CheckError(
                    f"segment {difference.segment} of {self.bundle.path} gives something else here than where it was "
                    f"compiled: {difference.told}; `ditc doctor {self.bundle.path}` shows all segments"
                )
        CHECKED.add(key)

    def _requests(
        self,
        executor: Executor,
        request: Request,
        streams: Sequence[tuple[int, int]],
        begin: Samples | None,
        start: int,
    ) -> Iterator[tuple[Request, Samples, NoiseSource, int]]:
        """Yield requests of `at_once` images, each with its first samples, its fresh noise, and its first step."""
        size = self._at_once(executor)
        for first in range(0, len(request), size):
            part = slice(first, min(first + size, len(request)))
            own, drawn, fresh = self._starting.streamed(request.take(self._spec, part), streams[part], start)
            yield own, drawn if begin is None else begin[part], fresh, start

    @property
    def executor(self) -> Executor:
        """The executor of the open pipeline, for who measures or checks it."""
        executor = self._executor  # one look: another thread may close the pipeline right after it
        if executor is None:
            raise DitcError("the pipeline is not open; use it in a block: with ditc.load(path) as pipe: ...")
        return executor


def _count_of(count: int | None, prompt: Any, *others: Any) -> int | None:
    """Return the number of images of one prompt: as given, or as many as there are seeds or samples; None if unsaid."""
    if count is not None or not isinstance(prompt, str):
        return count
    return next((len(each) for each in others if hasattr(each, "__len__")), None)
