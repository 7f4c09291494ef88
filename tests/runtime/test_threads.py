"""A pipeline may be shared: by threads, by requests walked in turn, by images merged into one request."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from ditc.bundle import Bundle, open_bundle
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.engines.backend import Engine
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import DitcError, InputError
from ditc.exporter.dit import DiT
from ditc.exporter.models import with_vae
from ditc.runtime.executor import streamed_noise
from ditc.runtime.host_executor import KEPT_BUFFERS, HostExecutor
from ditc.runtime.pipeline import Pipeline, load

Images = NDArray[Any]
SHARED = ("cached", "per-step", "float-ends", "fp32-taylor", "fp32-none")
REQUESTS = [([n % 5 for n in range(first, first + 1 + first % 3)], first) for first in range(16)]  # of 1 to 3 images


@pytest.fixture(scope="module")
def noisy(
    tmp_path_factory: pytest.TempPathFactory, make_small_model: Callable[..., DiT], quick_options: CompileOptions
) -> Path:
    """A bundle whose sampler draws fresh noise at every step."""
    folder = tmp_path_factory.mktemp("noisy") / "noisy"
    changes = {"sampler": "ddpm", "variance": "fixed-small", "policy": "fora:2", "precision": "fp32", "vc": "none"}
    return compile_model(make_small_model(), folder, quick_options.model_copy(update=changes)).path


@pytest.fixture(scope="module")
def dynamic(
    compiled_once: Callable[..., Bundle], make_small_model: Callable[..., DiT], quick_options: CompileOptions
) -> Path:
    """A bundle whose activation scales are measured as the tensors come."""
    changes = {"scales": "dynamic", "policy": "fora:2", "vc": "none"}
    return compiled_once(make_small_model(), quick_options.model_copy(update=changes)).path


@pytest.fixture(scope="module")
def vae(
    tmp_path_factory: pytest.TempPathFactory,
    compiled_once: Callable[..., Bundle],
    make_small_model: Callable[..., DiT],
    quick_options: CompileOptions,
) -> Path:
    """A bundle with a decoder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8, sample_size=8).save_pretrained(folder)
    options = quick_options.model_copy(update={"policy": "fora:2", "precision": "fp32", "vc": "none"})
    return compiled_once(with_vae(make_small_model(in_channels=4), folder), options).path


def in_turn(pipe: Pipeline) -> list[Images]:
    return [pipe.images(labels, seed=seed) for labels, seed in REQUESTS]


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("name", SHARED)
def test_threads_get_the_images_of_the_same_requests_in_turn(
    name: str, threads: int, pipes: dict[str, Pipeline]
) -> None:
    pipe = pipes[name]
    expected = in_turn(pipe)
    with ThreadPoolExecutor(threads) as pool:
        images = list(pool.map(lambda request: pipe.images(request[0], seed=request[1]), REQUESTS))
    assert [np.array_equal(a, b) for a, b in zip(images, expected, strict=True)] == [True] * len(REQUESTS)


@pytest.mark.parametrize("engine_threads", [1, 2])
def test_threads_on_two_pipelines_of_one_process_get_their_images(
    engine_threads: int, bundles: dict[str, Bundle]
) -> None:
    with (
        load(bundles["cached"].path, threads=engine_threads) as cached,
        load(bundles["fp32-cached"].path, threads=engine_threads) as exact,
    ):
        expected = [*in_turn(cached), *in_turn(exact)]
        jobs = [(pipe, *request) for pipe in (cached, exact) for request in REQUESTS]
        order = random.Random(0).sample(range(len(jobs)), len(jobs))
        with ThreadPoolExecutor(8) as pool:
            images = dict(
                zip(order, pool.map(lambda n: jobs[n][0].images(jobs[n][1], seed=jobs[n][2]), order), strict=True)
            )
    assert all(np.array_equal(images[n], image) for n, image in enumerate(expected))


@pytest.mark.parametrize("name", ["cached", "fp32-taylor"])
def test_threads_may_watch_abandon_and_nest_requests(name: str, pipes: dict[str, Pipeline]) -> None:
    pipe = pipes[name]
    expected = in_turn(pipe)

    def watched(number: int) -> Images:
        labels, seed = REQUESTS[number]
        for event in pipe.generate(labels, seed=seed):
            if event.index == 1:
                half_way = pipe.generate([number % 5], seed=number + 100)
                next(half_way)
                next(half_way)  # and no more of it
            if event.index == 3:
                other = (number + 1) % len(REQUESTS)
                assert np.array_equal(pipe.images(REQUESTS[other][0], seed=REQUESTS[other][1]), expected[other])
        assert event.images is not None
        return event.images

    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(watched, range(len(REQUESTS))))
    assert all(np.array_equal(a, b) for a, b in zip(images, expected, strict=True))


@pytest.mark.parametrize("name", SHARED)
def test_merged_requests_give_what_each_gives_alone(name: str, pipes: dict[str, Pipeline]) -> None:
    labels, seeds = [3, 1, 4, 1, 0], [7, 5, 5, 2**40, 0]
    merged = pipes[name].images(labels, seeds=seeds)
    alone = [pipes[name].images([label], seed=seed)[0] for label, seed in zip(labels, seeds, strict=True)]
    assert [np.array_equal(a, b) for a, b in zip(merged, alone, strict=True)] == [True] * 5


def test_merged_requests_keep_their_fresh_noise(noisy: Path) -> None:
    with load(noisy) as pipe:
        merged = pipe.images([3, 1, 4, 1], seeds=[7, 5, 9, 2])
        alone = [pipe.images([label], seed=seed)[0] for label, seed in ((3, 7), (1, 5), (4, 9), (1, 2))]
        assert not np.allclose(alone[1], alone[3])
    assert np.array_equal(merged, np.stack(alone))


def test_scales_measured_at_run_time_are_of_one_image(dynamic: Path) -> None:
    """A scale serves all images of an engine call, so each image has a call of its own."""
    labels, seeds = [3, 1, 4, 1], [7, 5, 9, 2]
    with load(dynamic) as pipe:
        assert pipe.at_once == 1
        alone = np.stack([pipe.images([label], seed=seed)[0] for label, seed in zip(labels, seeds, strict=True)])
        *_, event = pipe.generate(labels, seeds=seeds)
        assert np.array_equal(pipe.images(labels, seeds=seeds), alone)
        assert event.images is not None
        assert np.array_equal(event.images, alone)


def test_images_walk_together_as_many_as_the_buffer_holds(
    pipes: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, sizes = pipes["cached"], []
    last = HostExecutor.last

    def noted(self: HostExecutor, labels: list[int], *rest: Any) -> Images:
        sizes.append(len(labels))
        return last(self, labels, *rest)

    monkeypatch.setattr(HostExecutor, "last", noted)
    labels = [n % 5 for n in range(70)]
    everything = pipe.images(labels, seed=1)
    assert (pipe.at_once, sizes) == (64, [64, 6])
    monkeypatch.setattr("ditc.runtime.host_executor.REQUEST_BYTES", 1 << 18)
    assert 4 <= pipe.at_once < 16  # no fewer than the bundle was compiled for
    assert np.array_equal(pipe.images(labels, seed=1), everything)


def test_the_batch_can_be_said_when_a_bundle_is_opened(bundles: dict[str, Bundle]) -> None:
    with load(bundles["cached"].path, batch=3) as pipe, load(bundles["cached"].path) as default:
        assert pipe.at_once == 3
        assert np.array_equal(pipe.images([0, 1, 2, 3, 4]), default.images([0, 1, 2, 3, 4]))


def test_buffers_that_wait_for_their_next_request_are_few(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each set of buffers has a binding of its own to an engine, which nothing else refers to."""
    bindings: list[weakref.ref[Any]] = []
    with load(bundles["cached"].path) as pipe:
        full = cast(Engine, pipe.engines["full"])
        bind = type(full).binding

        def noted(engine: Engine) -> Any:
            binding = bind(engine)
            bindings.extend([weakref.ref(binding)] if engine is full else [])
            return binding

        monkeypatch.setattr(type(full), "binding", noted)
        for count in range(1, 10):
            pipe.images([1] * count)
        gc.collect()
        assert len(bindings) == 9
        assert sum(binding() is not None for binding in bindings) == KEPT_BUFFERS


def walked(pipe: Pipeline, seed: int = 0) -> Iterator[object]:
    """A request that has done two steps."""
    events = pipe.generate([1], seed=seed)
    next(events)
    next(events)
    return events


def test_a_request_goes_no_further_once_the_pipeline_is_closed(bundles: dict[str, Bundle]) -> None:
    with load(bundles["cached"].path) as pipe:
        events = walked(pipe)
    with pytest.raises(DitcError, match="closed while this request ran; keep it open until the last image"):
        next(events)
    with pytest.raises(DitcError, match=r"not open; .*with ditc\.load"):
        pipe.images([1])
    with pytest.raises(DitcError, match="not open"):
        next(pipe.generate([1]))


def test_closing_beside_requests_ends_them_with_our_error_or_their_images(bundles: dict[str, Bundle]) -> None:
    with load(bundles["cached"].path) as pipe:
        expected = in_turn(pipe)
    for pause in range(5):
        begun = threading.Barrier(5)
        pipe = load(bundles["cached"].path).__enter__()
        outcomes: list[object] = []

        def ask(number: int, pipe: Pipeline = pipe, begun: threading.Barrier = begun) -> None:
            begun.wait()
            try:
                for labels, seed in REQUESTS:
                    outcomes.append(np.array_equal(pipe.images(labels, seed=seed), expected[seed]))  # noqa: B023
            except DitcError as e:
                outcomes.append(str(e))  # noqa: B023

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        begun.wait()
        threading.Event().wait(pause * 0.01)
        pipe.__exit__(None, None, None)
        for thread in threads:
            thread.join()
        assert False not in outcomes
        texts = [text for text in outcomes if isinstance(text, str)]
        assert all("pipeline" in text for text in texts)


class ClosedMeanwhile(Pipeline):
    """Closed, as by another thread, right after what it has open is looked at for the `closes_at`th time."""

    closes_at = -1

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in ("_executor", "engines") and self.closes_at > 0:
            self.closes_at -= 1
            if self.closes_at == 0:
                self.__exit__(None, None, None)
        return value


ASKS: dict[str, Callable[[Pipeline], Any]] = {
    "images": lambda pipe: pipe.images([1, 3], seed=2),
    "latents": lambda pipe: pipe.latents([1, 3], seed=2),
    "generate": lambda pipe: list(pipe.generate([1, 3], seed=2))[-1].images,
    "decode": lambda pipe: pipe.decode(np.ones((2, *pipe.bundle.manifest.model.latent_shape), np.float32)),
    "differences": lambda pipe: np.array([each.error for each in pipe.differences()]),
    "at_once": lambda pipe: np.array([pipe.at_once]),
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_closing_between_any_two_looks_gives_the_same_or_our_error(ask: Callable[[Pipeline], Any], vae: Path) -> None:
    bundle, backend = open_bundle(vae), OnnxRuntimeBackend(1)
    with Pipeline(bundle, backend=backend) as pipe:
        expected = ask(pipe)
    for look in range(1, 20):
        with ClosedMeanwhile(bundle, backend=backend) as pipe:
            pipe.closes_at = look
            with suppress(DitcError):
                assert np.array_equal(ask(pipe), expected)
            if pipe.closes_at > 0:  # it does not look that often
                return
    raise AssertionError("never done")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"seeds": [1]}, "seeds must be one for each image: 2 images, found 1"),
        ({"seeds": [1, 2], "seed": 3}, "seed and first, or seeds"),
        ({"seeds": [1, 2], "first": 3}, "seed and first, or seeds"),
        ({"seeds": [1, -2]}, "must not be negative, found -2"),
        ({"seed": -1}, "must not be negative, found -1"),
        ({"first": -1}, "number of the first image must not be negative, found -1"),
        ({"seed": 1.5}, r"seed and first must be whole numbers, .*found \[1\.5, 0\]"),
        ({"first": 0.5}, "seed and first must be whole numbers"),
        ({"seeds": [1.9, 2]}, r"seeds must be whole numbers, .*found \[1\.9, 2\]"),
        ({"seeds": "12"}, "seeds must be whole numbers"),
        ({"seeds": 12}, "seeds must be whole numbers"),
        ({"noise": [[0.0]]}, r"noise must be a NumPy array of float32, found list; take np\.asarray"),
        ({"noise": np.array(["a", "b"])}, "noise must be a NumPy array of float32, found <U1"),
        ({"noise": np.float32([1])}, "one sample per image: 2 images, found 1"),
        ({"noise": np.zeros((), np.float32)}, "one sample per image: 2 images, found 1"),
        ({"noise": np.zeros((2, 5), np.float32)}, r"noise must have shape \(2, 3, 8, 8\)"),
    ],
)
def test_seeds_and_noise_that_do_not_fit_are_one_line(
    asked: dict[str, Any], message: str, pipes: dict[str, Pipeline]
) -> None:
    for ask in asking(pipes["cached"]):
        with pytest.raises(InputError, match=message):
            ask([1, 2], **asked)


@pytest.mark.parametrize(
    "labels", [[3.7], [float("nan")], "31", ["3"], np.eye(2, dtype=int), np.array([3.0]), 3, [None]]
)
def test_labels_that_are_no_whole_numbers_are_one_line(labels: Any, pipes: dict[str, Pipeline]) -> None:
    for ask in asking(pipes["cached"]):
        with pytest.raises(InputError, match=r"^labels must be whole numbers, for example \[3, 1, 4\]; found .*$"):
            ask(labels)


def test_integers_of_any_kind_are_taken(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["cached"]
    expected = pipe.images([3, 1], seeds=[7, 5])
    assert np.array_equal(pipe.images(np.array([3, 1], np.uint8), seeds=np.array([7, 5])), expected)
    assert np.array_equal(pipe.images((np.int64(3),), seed=np.int32(7)), expected[:1])
    assert np.array_equal(pipe.images([3], seed=np.uint64(2**63)), pipe.images([3], seed=2**63))


def test_every_image_of_every_seed_has_a_stream_of_its_own() -> None:
    """Where NumPy would read a large seed as a small one and the number of its image."""
    few = [*range(3), *(2**bits + near for bits in (31, 32, 33, 64, 96, 128) for near in (-1, 0, 1))]
    streams = [(seed, number) for seed in few for number in few]
    noise, fresh = streamed_noise(streams, (2, 3))
    assert len({sample.tobytes() for sample in [*noise, *fresh(0)]}) == 2 * len(streams)


def test_images_of_seeds_below_two_to_the_32nd_stay_what_they_were() -> None:
    streams = [(seed, number) for seed in (0, 7, 2**32 - 1) for number in (0, 1, 2**32 - 1)]
    noise, _ = streamed_noise(streams, (2, 3))
    before = [np.random.default_rng(stream).standard_normal((2, 3), dtype=np.float32) for stream in streams]
    assert np.array_equal(noise, before)


def asking(pipe: Pipeline) -> tuple[Callable[..., Any], ...]:
    """The ways to ask for images."""
    return pipe.images, pipe.latents, lambda *given, **named: list(pipe.generate(*given, **named))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "--threads must be 1 to 4096, found 0"),
        ({"threads": 999_999_999_999}, "--threads must be 1 to 4096, found 999999999999"),
        ({"batch": 0}, "--batch must be at least 1, found 0"),
        ({"threads": 2, "target": "cuda"}, "--threads is for processors; cuda runs on a GPU"),
    ],
)
def test_settings_of_a_processor_that_make_no_sense_are_one_line(
    options: dict[str, Any], message: str, bundles: dict[str, Bundle]
) -> None:
    with pytest.raises(InputError, match=message):
        load(bundles["cached"].path, **options)
