"""Laws of every executor: on a processor, and on a device whose memory is the host's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from ditc.bundle import Bundle, open_bundle
from ditc.engines.backend import Backend, DeviceBackend
from ditc.engines.device import CudaDevice
from ditc.engines.fake import FakeDevice
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.engines.onnxrt_device import OnnxRuntimeDeviceBackend, Provider
from ditc.errors import DitcError, InputError
from ditc.exporter.dit import DiT
from ditc.exporter.models import with_vae
from ditc.program import CONDITION, UPDATE
from ditc.requests import Request
from ditc.runtime.closeness import relative_error
from ditc.runtime.compensation import ClosedLoopFit
from ditc.runtime.device_executor import DeviceExecutor
from ditc.runtime.executor import NoiseSource, Samples, seeded_request
from ditc.runtime.host_executor import HostExecutor
from ditc.runtime.pipeline import Pipeline

Asked = tuple[Request, Samples, NoiseSource]
LABELS = [3, 0, 4]
STEPS = 6
IN_HOST_MEMORY = Provider("CPUExecutionProvider", memory="cpu", takes_stream=False)


@dataclass(frozen=True)
class PlayedDevice(OnnxRuntimeDeviceBackend):
    """Sessions of the processor, bound as those of a GPU are."""

    @contextmanager
    def device(self) -> Iterator[CudaDevice]:
        yield cast(CudaDevice, FakeDevice())


BACKENDS: dict[str, Callable[[], Backend | DeviceBackend]] = {
    "processor": OnnxRuntimeBackend,
    "device": lambda: PlayedDevice(IN_HOST_MEMORY),
}


@pytest.fixture(scope="module")
def decoded(
    tmp_path_factory: pytest.TempPathFactory,
    compiled_once: Callable[..., Bundle],
    make_small_model: Callable[..., DiT],
    quick_options: Any,
) -> Path:
    """A compensated bundle whose sampler adds noise, and that ends in a decoder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8, sample_size=8).save_pretrained(folder)
    options = quick_options.model_copy(update={"policy": "fora:2", "precision": "fp32", "eta": 0.5})
    return compiled_once(with_vae(make_small_model(in_channels=4), folder), options).path


@pytest.fixture(params=BACKENDS)
def pipe(request: pytest.FixtureRequest, decoded: Path) -> Iterator[Pipeline]:
    with Pipeline(open_bundle(decoded), backend=BACKENDS[request.param]()) as opened:
        assert type(opened.executor) is {"processor": HostExecutor, "device": DeviceExecutor}[request.param]
        yield opened


@pytest.fixture(scope="module")
def on_a_processor(decoded: Path) -> Iterator[Pipeline]:
    with Pipeline(open_bundle(decoded), backend=OnnxRuntimeBackend()) as opened:
        yield opened


def request_for(pipe: Pipeline, seed: int = 5) -> Asked:
    """Labels, x_T and fresh noise, which can be drawn once."""
    spec = pipe.bundle.manifest.model
    return seeded_request(spec, Request.of(spec, LABELS), seed, 0, STEPS)


def test_a_request_gives_the_same_watched_whole_and_decoded(pipe: Pipeline) -> None:
    executor = pipe.executor
    events = list(executor.run(*request_for(pipe)))
    latents = executor.last(*request_for(pipe))
    assert [(event.index, event.steps) for event in events] == [(step, STEPS) for step in range(STEPS)]
    assert np.array_equal(events[-1].x, latents)
    images = executor.images(*request_for(pipe))
    assert executor.decodes
    assert np.array_equal(images, executor.decode(latents))
    assert images.shape == (len(LABELS), 3, 8, 8)
    assert np.abs(images).max() <= 1
    assert np.array_equal(pipe.images(LABELS, seed=5), images)


def test_every_executor_gives_what_the_processor_gives(pipe: Pipeline, on_a_processor: Pipeline) -> None:
    events, expected = (list(each.executor.run(*request_for(each))) for each in (pipe, on_a_processor))
    for event, other in zip(events, expected, strict=True):
        assert relative_error(event.x, other.x) < 1e-5
    images = [each.executor.images(*request_for(each)) for each in (pipe, on_a_processor)]
    assert relative_error(*images) < 1e-4


def test_a_device_combines_several_sums_as_the_processor_does(bundles: dict[str, Bundle]) -> None:
    """Early steps bind one buffer to two ports, and no request finds sums of another."""
    with ExitStack() as stack:
        host, device = (
            stack.enter_context(Pipeline(bundles["fp32-taylor-3"], backend=backend())) for backend in BACKENDS.values()
        )
        assert type(device.executor) is DeviceExecutor
        for seed in (5, 6):
            for event, other in zip(*(each.generate(LABELS, seed=seed) for each in (device, host)), strict=True):
                assert relative_error(event.x, other.x) < 1e-5
            assert np.array_equal(device.latents(LABELS, seed=seed), event.x)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("streams-fp32-cached", 1e-5), ("streams-fp32-branches", 1e-5), ("streams-rows", 3e-2)]
)
def test_a_device_gives_what_the_processor_gives_of_two_streams(
    name: str, tolerance: float, bundles: dict[str, Bundle]
) -> None:
    """In INT8 the two forms round at other places; a cache that is lost or mixed up makes a difference of nearly 1."""
    with ExitStack() as stack:
        device, host = (stack.enter_context(Pipeline(bundles[name], backend=make())) for make in BACKENDS.values())
        for event, other in zip(*(each.executor.run(*request_for(each)) for each in (device, host)), strict=True):
            assert relative_error(event.x, other.x) < tolerance


def test_a_model_of_pixels_needs_no_decoder(bundles: dict[str, Bundle]) -> None:
    for backend in BACKENDS.values():
        with Pipeline(bundles["fp32-cached"], backend=backend()) as pipe:
            executor = pipe.executor
            assert not executor.decodes
            latents = executor.last(*request_for(pipe))
            assert np.abs(latents).max() > 1
            assert np.array_equal(executor.images(*request_for(pipe)), np.clip(latents, -1, 1))
            assert np.array_equal(executor.decode(latents), np.clip(latents, -1, 1))


def test_a_request_holds_at_least_what_the_bundle_was_compiled_for(pipe: Pipeline) -> None:
    batch = pipe.bundle.manifest.batch
    assert pipe.executor.at_once >= batch
    assert pipe.executor.at_once == pipe.at_once
    assert pipe.at_once == batch if pipe.on_device else pipe.at_once == 64


def test_outputs_are_those_of_the_conditioning_and_of_each_step(pipe: Pipeline) -> None:
    executor = pipe.executor
    events = list(executor.run(*request_for(pipe)))
    samples = {event.index: event.before[:1] for event in events[:2]}
    calls = [(step, segment) for step, segment, _ in executor.outputs_at(pipe.request(LABELS[:1]), samples)]
    assert calls == [(None, CONDITION), (0, "full"), (0, UPDATE), (1, "reuse"), (1, UPDATE)]


def test_a_request_ends_at_its_next_step_once_the_executor_is_closed(pipe: Pipeline) -> None:
    events = pipe.executor.run(*request_for(pipe))
    next(events)
    pipe.executor.close()
    with pytest.raises(DitcError, match="closed while this request ran"):
        next(events)


@pytest.mark.parametrize("walk", ["run", "last", "images"])
def test_a_request_that_the_model_cannot_have_is_refused(walk: str, pipe: Pipeline) -> None:
    asked, noise, fresh = request_for(pipe)
    with pytest.raises(InputError, match="not a class"):
        list(getattr(pipe.executor, walk)(Request(3, {"y": np.array([3, 0, 9])}), noise, fresh))
    with pytest.raises(InputError, match="noise must have shape"):
        list(getattr(pipe.executor, walk)(asked, noise[:2], fresh))


@pytest.mark.parametrize("name", ["before", "x"])
def test_an_event_cannot_be_written_to_and_changes_no_step(name: str, pipe: Pipeline) -> None:
    expected = pipe.executor.last(*request_for(pipe))
    asked, noise, fresh = request_for(pipe)
    for event in pipe.executor.run(asked, noise, fresh):
        with pytest.raises(ValueError, match="read-only"):
            getattr(event, name)[...] = 0
        with pytest.raises(AttributeError):
            setattr(event, name, 0)
    assert np.array_equal(event.x, expected)
    assert noise.flags.writeable  # the caller's own stays as it was


def test_the_first_record_stays_what_it_is_whatever_becomes_of_the_noise(pipe: Pipeline) -> None:
    noise = np.ones((1, *pipe.bundle.manifest.model.latent_shape), np.float32)
    events = pipe.generate([1], noise=noise)
    first = next(events)
    noise[:] = 0
    assert (first.before == 1).all()
    events.close()


def test_the_images_of_an_event_cannot_be_written_to(pipe: Pipeline) -> None:
    *_, event = pipe.generate(LABELS, seed=5)
    assert event.images is not None
    with pytest.raises(ValueError, match="read-only"):
        event.images[0] = 0


def test_what_a_whole_request_gives_is_the_callers_own(pipe: Pipeline) -> None:
    """It may be written to, and what is written there is in no later request."""
    executor = pipe.executor
    given = (
        lambda: executor.last(*request_for(pipe)),
        lambda: executor.images(*request_for(pipe)),
        lambda: executor.decode(executor.last(*request_for(pipe))),
        lambda: pipe.images(LABELS, seed=5),
        lambda: pipe.latents(LABELS, seed=5),
    )
    for give in given:
        array = give()
        expected = array.copy()
        array[...] = 0
        assert np.abs(expected).max() > 0
        assert np.array_equal(give(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bundles_compensation_is_applied_after_each_step(backend: str, decoded: Path) -> None:
    """K and mu take the samples of a run without it to those of a run with it, at the first step that they change."""
    k, mu = (open_bundle(decoded).tables()[f"compensation.{name}"] for name in ("k", "mu"))
    step = int(np.flatnonzero((k != 1).any(axis=1))[0])
    x = {}
    for compensation in (True, False):
        with Pipeline(open_bundle(decoded), backend=BACKENDS[backend](), compensation=compensation) as pipe:
            x[compensation] = list(pipe.executor.run(*request_for(pipe)))[step].x
    gain, centre = k[step][:, None, None], mu[step][:, None, None]
    np.testing.assert_allclose(x[True], centre + gain * (x[False] - centre), atol=1e-5)
    assert not np.allclose(x[True], x[False], atol=1e-4)


def corrected(pipe: Pipeline, correction: Any, together: int | None) -> list[Samples]:
    """The samples after each step of a request with a correction of its own."""
    bundle = pipe.bundle
    executor = HostExecutor(
        bundle.manifest.model,
        bundle.manifest.program,
        bundle.tables(),
        cast(Any, pipe.engines),
        bundle.manifest.guidance,
        correction=correction,
        together=together,
    )
    return [event.x for event in executor.run(*request_for(pipe))]


@pytest.mark.parametrize("together", [None, 1, 2])
def test_a_correction_sees_all_images_of_a_step_and_decides_where_the_next_one_starts(
    together: int | None, on_a_processor: Pipeline
) -> None:
    seen: list[tuple[int, int]] = []

    def halve_the_first(step: int, x: Samples) -> Samples:
        seen.append((step, len(x)))
        return x / 2 if step == 0 else x

    halved = corrected(on_a_processor, halve_the_first, together)
    assert seen == [(step, len(LABELS)) for step in range(STEPS)]
    left = corrected(on_a_processor, lambda step, x: x, together)
    assert np.array_equal(halved[0], left[0] / 2)
    assert not any(np.allclose(x, unchanged, rtol=0.01) for x, unchanged in zip(halved, left, strict=True))


def test_a_fit_is_of_all_images_however_many_go_through_the_engines_together(on_a_processor: Pipeline) -> None:
    exact = [0.9 * x for x in corrected(on_a_processor, lambda step, x: x, None)]
    fits = {together: ClosedLoopFit(exact, "std") for together in (None, 1, 2)}
    walks = {together: corrected(on_a_processor, fit, together) for together, fit in fits.items()}
    assert fits[None].table.k.shape == (STEPS, 4)
    for together, fit in fits.items():
        np.testing.assert_allclose(fit.table.k, fits[None].table.k, rtol=1e-5)
        again = corrected(on_a_processor, fit.table, together)
        assert all(np.array_equal(x, fitted) for x, fitted in zip(again, walks[together], strict=True))
